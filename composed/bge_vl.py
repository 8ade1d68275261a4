"""BGE-VL base and large (MMRet-CLIP, 2024): CLIP, fine-tuned so that features may be added.

    query   = unit(image feature + text feature)      both as the projections give them
    gallery = unit(image feature)

The folder is the model's of the Hub, read by transformers' CLIP; the code beside it is not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.nn import functional

from composed.system import Composer, Options, System
from composed.tensors import hash_tensors
from composed.texts import FORMS
from utils import UserError
from utils_model_files import without_remote_code
from utils_pickles import one_line


class BgeVl(Composer):
    """BGE-VL of a folder or of an id of the Hub."""

    def __init__(self, place: str):
        from open_clip import SimpleTokenizer, image_transform
        from transformers import CLIPModel

        with without_remote_code():
            self.network = CLIPModel.from_pretrained(place, trust_remote_code=False)
        config = self.network.config
        self.context = config.text_config.max_position_embeddings
        self.tokenizer = SimpleTokenizer(context_length=self.context)
        self.preprocess = image_transform(config.vision_config.image_size, is_train=False)
        self.dim = config.projection_dim
        weights = hash_tensors(self.network.state_dict())
        self.identity = {"model": "bge-vl", "weights_sha256": weights}

    def _image(self, images: Tensor) -> Tensor:
        network = self.network
        return network.visual_projection(network.vision_model(pixel_values=images).pooler_output)

    def queries(self, images: Tensor, texts: Sequence[str], numbers: Sequence[int]) -> Tensor:
        tokens = self.tokenizer(list(texts)).to(images.device)
        states = self.network.text_model(input_ids=tokens).last_hidden_state
        ends = states.gather(1, tokens.argmax(1)[:, None, None].expand(-1, 1, states.shape[2]))
        text = self.network.text_projection(ends[:, 0])
        return functional.normalize((self._image(images) + text).float(), dim=-1)

    def gallery(self, images: Tensor) -> Tensor:
        return functional.normalize(self._image(images).float(), dim=-1)

    def is_cut(self, text: str) -> bool:
        return len(self.tokenizer.encode(text)) + 2 > self.context


def load(place: str, options: Options) -> BgeVl:
    """Load the model. Raises UserError if it is neither here nor to be had from the Hub."""
    if Path(place).is_dir() and not (Path(place) / "config.json").is_file():
        raise UserError(f"{place} has no config.json: the folder of BGE-VL-base or -large is due")
    try:
        return BgeVl(place)
    except ImportError:
        raise
    except Exception as error:  # the hub, the files and transformers each raise their own
        raise UserError(
            f"--backbone bge-vl:{place} could not be loaded ({one_line(error)})"
        ) from None


SYSTEM = System(load=load, prompts=FORMS)
