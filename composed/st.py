"""Any multimodal embedding model that sentence-transformers loads: images, texts, and both at once.

    query   = model({image, text})      with --query_prompt as its instruction
    gallery = model(image)              with --gallery_prompt

PLACE is a folder or an id of the Hub. Code that lies beside a model is refused, wherever it is
named, unless --trust_remote_code is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.nn import functional

from benchmarks.annotations import load_json
from composed.system import Composer, Options, System
from composed.tensors import hash_tensors
from composed.texts import FORMS
from utils import UserError
from utils_model_files import without_remote_code
from utils_pickles import one_line

OWN = "sentence_transformers."  # what the names of the library's own modules begin with
ACTIVATIONS = "torch.nn."


def as_rgb(image: Image.Image) -> Image.Image:
    """The image, whose size is the model's affair."""
    return image.convert("RGB")


class SentenceTransformers(Composer):
    """A model of sentence-transformers with its instructions."""

    preprocess = staticmethod(as_rgb)

    def __init__(self, place: str, options: Options):
        from sentence_transformers import SentenceTransformer

        trusted = options.trust_remote_code
        with without_remote_code():
            self.network = SentenceTransformer(
                place,
                device="cpu",
                trust_remote_code=trusted,
                local_files_only=Path(place).is_dir(),
            )
        if not self.network.supports(("image", "text")):
            raise UserError(f"st:{place} does not read an image and a text at once")
        self.prompts = {"query": options.query_prompt, "document": options.gallery_prompt}
        self.unit = self.network.similarity_fn_name == "cosine"
        self.dim = self.network.get_embedding_dimension()
        self.identity = {
            "model": "sentence-transformers",
            "weights_sha256": hash_tensors(self.network.state_dict()),
            "prompts": {
                **self.network.prompts,
                "query_prompt": options.query_prompt,
                "gallery_prompt": options.gallery_prompt,
            },
            "remote_code": trusted,
        }

    def _encode(self, inputs: list, kind: str) -> Tensor:
        encode = {"query": self.network.encode_query, "document": self.network.encode_document}
        rows = encode[kind](
            inputs,
            prompt=self.prompts[kind],
            batch_size=len(inputs),
            show_progress_bar=False,
            convert_to_tensor=True,
        ).float()
        return functional.normalize(rows, dim=-1) if self.unit else rows

    def queries(self, images: list, texts: Sequence[str], numbers: Sequence[int]) -> Tensor:
        pairs = zip(images, texts, strict=True)
        return self._encode([{"image": image, "text": text} for image, text in pairs], "query")

    def gallery(self, images: list) -> Tensor:
        return self._encode(list(images), "document")


def refuse_remote_code(place: str) -> None:
    """Raise UserError if a model names code that is not sentence-transformers' or torch's own."""
    modules = _read(place, "modules.json") or []
    for module in modules:
        name = str(module.get("type"))
        settings = _read(place, "/".join(filter(None, (module.get("path"), "config.json")))) or {}
        activation = str(settings.get("activation_function") or ACTIVATIONS)
        named = [*(settings.get("auto_map") or {}).values()]
        named += [] if name.startswith(OWN) else [name]
        named += [] if activation.startswith(ACTIVATIONS) else [activation]
        if named:
            raise UserError(
                f"st:{place} needs code of its own ({named[0]}), which is not run; if you trust "
                "its authors, add --trust_remote_code"
            )


def _read(place: str, name: str) -> Any:
    """A JSON file of a model's, None where it has none."""
    if Path(place).is_dir():
        path = Path(place) / name
        return load_json(path) if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return load_json(Path(hf_hub_download(place, name)))
    except EntryNotFoundError:
        return None


def load(place: str, options: Options) -> SentenceTransformers:
    """Load the model. Raises UserError if it cannot be had, or needs code that is not trusted."""
    if "/" in place and not Path(place).is_dir() and place.startswith(("/", ".")):
        raise UserError(f"st:{place} is no folder")
    try:
        if not options.trust_remote_code:
            refuse_remote_code(place)
        return SentenceTransformers(place, options)
    except (ImportError, UserError):
        raise
    except Exception as error:  # the hub, the files and transformers each raise their own
        raise UserError(f"--backbone st:{place} could not be loaded ({one_line(error)})") from None


SYSTEM = System(
    load=load,
    prompts=FORMS,
    takes=("query_prompt", "gallery_prompt", "trust_remote_code"),
)
