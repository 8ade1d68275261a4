"""Backbones: which open_clip model a name stands for, loading it, encoding images and texts.

torch and open_clip are imported inside the functions that need them.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from utils import UserError
from utils_backbones import (
    BACKBONES,
    HF_HUB,
    LOCAL_DIR,
    PRECISIONS,
    Backbone,
    inference,
    own_data,
    split_backbone,
)
from utils_model_files import CONFIG_FILE, check_model_files, without_remote_code
from utils_pickles import one_line
from utils_task import unique_in_order
from utils_text_tower import (
    CausalTextTower,
    PlacedVectors,
    Replacement,
    find_causal_tower,
    find_mark,
    find_token_embedding,
    grow_trees,
    place_vectors,
    vectors_placed,
)

if TYPE_CHECKING:
    import torch

WEIGHT_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")  # as people name them
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth")

# Images whose pixels a CPU normalises together: a few MB.
NORMALISED_AT_ONCE = 4
# Distinct texts that are tokenised, and sorted to find their shared beginnings, together.
TEXTS_AT_ONCE = 16_384
SPECIAL_TOKENS = 4  # at most, that a tokenizer adds to a text
# Distinct texts whose contextual averages are summed up together (each brings 2 prompts a word).
CONTEXTS_AT_ONCE = 4_096


# ---------------------------------------------------------------------------------------------
# Backbones
# ---------------------------------------------------------------------------------------------


def list_backbones() -> list[str]:
    """The names that --backbone takes: the table's, then every MODEL/TAG of open_clip's.

    A tag trained with QuickGELU is listed under the architecture that has it, and only there.
    """
    import open_clip

    specs = open_clip.list_pretrained()
    return [*BACKBONES, *(f"{model}/{tag}" for model, tag in specs if _has_activation(model, tag))]


def find_backbone(backbone: str) -> Backbone:
    """The table's entry for a name, or a new one for an open_clip spec.

    Specs are MODEL/TAG, hf-hub:ORG/NAME and local-dir:PATH.
    Raises UserError if open_clip has no such model or weights, naming what it has.
    """
    if backbone in BACKBONES:
        entry = BACKBONES[backbone]
        if not entry.model.startswith(LOCAL_DIR):
            return entry
        folder = own_data(Path(entry.model.removeprefix(LOCAL_DIR)))
        return replace(entry, model=f"{LOCAL_DIR}{folder}")
    if backbone.startswith((HF_HUB, LOCAL_DIR)):
        return Backbone(backbone)
    model, tag = _split_spec(backbone)
    _check_tag(model, tag, backbone)
    return Backbone(model, tag)


def _split_spec(spec: str) -> tuple[str, str | None]:
    """ "ViT-B/32/openai" -> ("ViT-B-32", "openai"); without a tag -> (model, None)."""
    import open_clip

    models = open_clip.list_models()
    if spec.replace("/", "-") in models:
        return spec.replace("/", "-"), None
    if spec.endswith(WEIGHT_FILES):
        raise UserError(
            f"--backbone {spec}: weights alone do not say which model they are of; put them as "
            "open_clip_model.safetensors or open_clip_pytorch_model.bin into a folder of their "
            'own, beside open_clip_config.json ({"model_cfg": what open_clip.get_model_config('
            'NAME) gives, "preprocess_cfg": {}}), and give --backbone local-dir:FOLDER'
        )
    model, _, tag = spec.rpartition("/")
    model = model.replace("/", "-")
    if model in models:
        return model, tag
    names = {name.lower(): name for name in [*BACKBONES, *models]}
    close = difflib.get_close_matches((model or spec).lower(), names, n=5) or list(BACKBONES)
    closest = ", ".join(names[name] for name in close)
    raise UserError(
        f"--backbone {spec}: no such model; the closest names are {closest} "
        "(python3 create_features.py --list_backbones prints all)"
    )


def _check_tag(model: str, tag: str | None, spec: str) -> None:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag is None or tag.lower().replace("-", "_") not in tags:
        kin = (model, f"{model}-quickgelu")
        specs = [name for name in list_backbones() if name.rpartition("/")[0] in kin]
        offered = ", ".join(specs) or "none for it"
        problem = "names no weights" if tag is None else f"there are no weights {tag!r}"
        raise UserError(f"--backbone {spec}: {problem}; open_clip has {offered}")
    if not _has_activation(model, tag):
        raise UserError(
            f"--backbone {spec}: these weights were trained with QuickGELU and {model} is built "
            f"with GELU, which gives other features; use {model}-quickgelu/{tag}"
        )


def _has_activation(model: str, tag: str) -> bool:
    """Whether the architecture has the QuickGELU that the weights of a tag were trained with.

    An architecture with QuickGELU whose tag does not say so is as its authors trained it.
    """
    import open_clip

    weights = open_clip.get_pretrained_cfg(model, tag)
    architecture = open_clip.get_model_config(model) or {}
    return not weights.get("quick_gelu") or bool(architecture.get("quick_gelu"))


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocess:
    """A model's image preprocessing up to its uint8 pixels, or whole where that cannot be cut.

    Called with an RGB image, gives a tensor (3, H, W): uint8 if `mean` and `std` are set (the
    normalisation is left to the device, see Encoder.encode_images), else the model's own float32.
    """

    transform: Callable[[Image.Image], torch.Tensor]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.transform(image)


@dataclass(frozen=True)
class TargetPad:
    """Pads images with zeros to a ratio of their sides, where it is as large or larger.

    The longer side M stays; each end of the other is padded by int((M / ratio - side) / 2) pixels,
    in the image's own mode: black, or transparent (SEARLE's preprocessing; CIReVL, CVSI).
    """

    ratio: float = 1.25

    def __call__(self, image: Image.Image) -> Image.Image:
        longer = max(image.size)
        if longer / min(image.size) < self.ratio:
            return image
        across, down = (max(int((longer / self.ratio - side) / 2), 0) for side in image.size)
        return ImageOps.expand(image, (across, down, across, down), fill=0)


def make_preprocess(transform: Any, before: Sequence[Callable] = ()) -> Preprocess:
    """Cut an evaluation transform that ends in to-tensor and normalise; keep any other whole.

    before: what is done to an image first.
    """
    from torchvision import transforms

    steps = list(getattr(transform, "transforms", ()))
    kinds = (transforms.ToTensor, transforms.Normalize)
    if len(steps) < 2 or not all(map(isinstance, steps[-2:], kinds)):
        return Preprocess(transforms.Compose([*before, transform]) if before else transform)
    pixels = transforms.Compose([*before, *steps[:-2], transforms.PILToTensor()])
    return Preprocess(pixels, tuple(steps[-1].mean), tuple(steps[-1].std))


# ---------------------------------------------------------------------------------------------
# Encoder
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """A loaded model that turns images and texts into features (float32, not L2-normalised).

    dim: their dimension D; context_length: tokens a text may have; image_size: (H, W) in pixels;
    identity: what tells this model from another, for the manifest; preprocess: see Preprocess,
    picklable, for worker processes.
    """

    model: torch.nn.Module
    tokenizer: Callable[..., torch.Tensor]
    preprocess: Preprocess
    identity: dict[str, Any]
    device: torch.device
    precision: str
    dim: int
    context_length: int
    image_size: tuple[int, int]
    _buffers: dict[torch.Size, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def encode_images(self, batch: torch.Tensor, half_pixels: bool = False) -> torch.Tensor:
        """Features (B, D) float32 on the CPU of preprocessed images (B, 3, H, W) on the CPU.

        half_pixels: their normalised pixels are rounded to half precision before.
        """
        import torch

        with inference(self.device, self.precision):
            pixels = batch.to(self.device, non_blocking=True)
            if pixels.dtype == torch.uint8:
                pixels = self._normalise(pixels, self._reused_buffer(pixels.shape))
            if half_pixels:
                pixels = pixels.half().float()
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            return self.model.encode_image(pixels, normalize=False).float().cpu()

    def _reused_buffer(self, shape: torch.Size) -> torch.Tensor:
        """Float32 memory for images (B, 3, H, W), channels last, which the next batch writes over.

        On a CPU, memory that is new costs more than the arithmetic on it.
        """
        import torch

        buffer = self._buffers.get(shape[1:])
        if buffer is None or len(buffer) < shape[0]:
            options = {"device": self.device, "memory_format": torch.channels_last}
            buffer = self._buffers[shape[1:]] = torch.empty(shape, **options)
        return buffer[: shape[0]]

    def _normalise(self, pixels: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The rest of the model's preprocessing, bit for bit: uint8 -> float32, both (B, 3, H, W).

        On a CPU a few images at a time, which the caches hold. The constants are tensors on the
        device: CUDA divides by a number given from the CPU by multiplying with its reciprocal,
        which is another value in the last bit.
        """
        import torch

        mean, std, top = (
            torch.tensor(values, dtype=torch.float32, device=self.device).view(-1, 1, 1)
            for values in (self.preprocess.mean, self.preprocess.std, 255.0)
        )
        few = NORMALISED_AT_ONCE if self.device.type == "cpu" else len(pixels)
        for part, target in zip(pixels.split(few), out.split(few), strict=True):
            target.copy_(part.float().div_(top).sub_(mean).div_(std))
        return out

    def encode_texts(
        self,
        texts: Sequence[str],
        batch_size: int,
        progress: Callable[[int], None] | None = None,
        replace: Replacement | None = None,
    ) -> np.ndarray:
        """Features (n, D) float32, a row for each of n texts; a text that recurs is encoded once.

        progress is told after each batch how many of the n rows it has settled. replace: vectors
        that stand in the place of a mark; then what is encoded once is a text with its vector.
        Raises UserError for a text without the mark, and for vectors of another width.
        """
        keys = texts
        if replace is not None:
            self._check_vectors(replace)
            keys = list(zip(texts, replace.which.tolist(), strict=True))
        _, of = unique_in_order(keys)
        _, first, counts = np.unique(of, return_index=True, return_counts=True)
        replace = replace and replace.of(first)
        features = np.empty((len(first), self.dim), np.float32)
        distinct = [texts[row] for row in first]
        for batch, values in self._encode_distinct(distinct, batch_size, replace):
            features[batch] = values
            if progress:
                progress(int(counts[batch].sum()))
        return features[of]

    @property
    def token_dim(self) -> int:
        """The width W of the text tower's token embeddings."""
        return find_token_embedding(self.model).embedding_dim

    def _check_vectors(self, replace: Replacement) -> None:
        if replace.vectors.shape[1] != self.token_dim:
            raise UserError(
                f"the vectors for {replace.mark!r} have {replace.vectors.shape[1]} numbers, but "
                f"the token embeddings of this backbone {self.token_dim}"
            )

    def find_cut_texts(self, texts: Sequence[str]) -> list[int]:
        """The numbers of the texts of which the end is cut off, being longer than the context."""
        longer, cut = self.context_length + 1, []
        # A token takes a byte at least; the rest are those at the beginning and at the end.
        long = [i for i, text in enumerate(texts) if len(text.encode()) + SPECIAL_TOKENS >= longer]
        for start in range(0, len(long), TEXTS_AT_ONCE):
            some = [texts[i] for i in long[start : start + TEXTS_AT_ONCE]]
            tokens, more = self.tokenizer(some), self.tokenizer(some, context_length=longer)
            padding = self.tokenizer([""], context_length=longer)[0, -1]
            differ = (more[:, :-1] != tokens).any(1) | (more[:, -1] != padding)
            cut += [long[start + number] for number in differ.nonzero()[:, 0].tolist()]
        return cut

    def encode_contextual_texts(
        self,
        texts: Sequence[str],
        words: Sequence[str],
        batch_size: int,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Contextual features (n, D) float32, a row for each of n texts.

        The mean over the words of the unit-length features of "word text" and "text word". A text
        that recurs is averaged once, a prompt that recurs (within CONTEXTS_AT_ONCE texts) is
        encoded once. progress is told as in encode_texts.
        """
        distinct, of = unique_in_order(texts)
        counts = np.bincount(of, minlength=len(distinct))
        features = np.empty((len(distinct), self.dim), np.float32)
        for start in range(0, len(distinct), CONTEXTS_AT_ONCE):
            some = distinct[start : start + CONTEXTS_AT_ONCE]
            settled = int(counts[start : start + len(some)].sum())
            report = _scale_progress(progress, settled)
            features[start : start + len(some)] = self._average(some, words, batch_size, report)
        return features[of]

    def _average(
        self,
        texts: list[str],
        words: Sequence[str],
        batch_size: int,
        progress: Callable[[float], None],
    ) -> np.ndarray:
        """Contextual features (n, D) of distinct texts, summed prompt by prompt."""
        owners: dict[str, list[int]] = {}  # prompt -> the texts in whose averages it counts
        for row, text in enumerate(texts):
            for word in words:
                owners.setdefault(f"{word} {text}", []).append(row)
                owners.setdefault(f"{text} {word}", []).append(row)
        prompts = list(owners)
        sums = np.zeros((len(texts), self.dim), np.float64)
        done = 0
        for batch, values in self._encode_distinct(prompts, batch_size):
            units = values / np.linalg.norm(values, axis=1, keepdims=True)
            for position, unit in zip(batch, units, strict=True):
                for row in owners[prompts[position]]:
                    sums[row] += unit
            done += len(batch)
            progress(done / len(prompts))
        return sums / (2 * len(words))

    def _encode_distinct(
        self, texts: list[str], batch_size: int, replace: Replacement | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Encode texts batch by batch: positions in the list (B,) and features (B, D) of each.

        The batches follow from the list alone, so that a run done again gives the same bits.
        """
        tower = find_causal_tower(self.model)
        mark = None if replace is None else find_mark(self.tokenizer, replace.mark)
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            some = texts[start : start + TEXTS_AT_ONCE]
            tokens, placed = self.tokenizer(some), None
            if replace is not None:
                here = replace.of(range(start, start + len(some)))
                placed = place_vectors(some, tokens, mark, here)
            if tower is None:
                batches = self._encode_whole(tokens, batch_size, placed)
            else:
                batches = self._encode_trees(tower, tokens, batch_size, placed)
            for rows, features in batches:
                yield start + np.asarray(rows), features.float().cpu().numpy()

    def _encode_whole(
        self, tokens: torch.Tensor, batch_size: int, placed: PlacedVectors | None
    ) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
        """Encode tokens (n, L) at full length, by the model's own call."""
        embedding = find_token_embedding(self.model)
        for first in range(0, len(tokens), batch_size):
            batch = tokens[first : first + batch_size]
            here = placed and placed.among(first, first + len(batch))
            with inference(self.device, self.precision), vectors_placed(embedding, here):
                features = self.model.encode_text(batch.to(self.device), normalize=False)
            yield range(first, first + len(batch)), features

    def _encode_trees(
        self,
        tower: CausalTextTower,
        tokens: torch.Tensor,
        batch_size: int,
        placed: PlacedVectors | None,
    ) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
        """Encode tokens (n, L) as trees of shared beginnings."""
        vectors = placed and placed.vectors.to(self.device)
        for tree in grow_trees(tower.sequences(tokens, placed), batch_size):
            with inference(self.device, self.precision):
                features = tower.encode(tree, self.device, vectors)
            yield tree.rows, features


def _scale_progress(progress: Callable[[int], None] | None, total: int) -> Callable[[float], None]:
    """Turn a share done (0 to 1) into calls of progress whose numbers add up to total."""
    told = 0

    def report(share: float) -> None:
        nonlocal told
        now = int(share * total)
        if progress and now > told:
            progress(now - told)
        told = now

    return report


# ---------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------


def load_encoder(backbone: str, device: torch.device, precision: str = "fp32") -> Encoder:
    """Load a backbone with its weights, preprocessing and tokenizer.

    backbone: a name of BACKBONES or an open_clip spec (see find_backbone). precision: "fp32", or
    "bf16" and "fp16" for autocast; the features are float32 in all three.
    Raises UserError if there is no such model, or its files are neither here nor to be had.
    """
    import open_clip
    import torch

    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: choose among {', '.join(PRECISIONS)}")
    base, is_padded = split_backbone(backbone)
    spec = find_backbone(base)
    model, transform, tokenizer = _load_model(base, spec)
    config = open_clip.get_model_config(spec.model)
    identity = _identify(spec, model, config, tokenizer)  # hashes the weights, still on the CPU
    before = (TargetPad(),) if is_padded else ()
    if is_padded:
        identity |= {"preprocess": f"TargetPad {before[0].ratio}"}
    height, width = _as_pair(model.visual.image_size)
    return Encoder(
        model=model.eval().to(device=device, memory_format=torch.channels_last),
        tokenizer=tokenizer,
        preprocess=make_preprocess(transform, before),
        identity=identity,
        device=device,
        precision=precision,
        dim=config["embed_dim"],
        context_length=tokenizer.context_length,
        image_size=(height, width),
    )


def _load_model(backbone: str, spec: Backbone) -> tuple[torch.nn.Module, Any, Any]:
    """The model on the CPU, its evaluation transform and its tokenizer."""
    import open_clip

    if spec.model.startswith(LOCAL_DIR):
        _check_folder(backbone, Path(spec.model.removeprefix(LOCAL_DIR)))
    try:
        check_model_files(spec.model)
        with _silence(), without_remote_code():
            model, transform = open_clip.create_model_from_pretrained(spec.model, spec.pretrained)
            return model, transform, open_clip.get_tokenizer(spec.model)
    except UserError as error:
        raise UserError(f"--backbone {backbone}: {error}") from None
    except Exception as error:  # the hub, the file and the architecture each raise their own
        raise UserError(
            f"--backbone {backbone}: {_name_files(spec)} could not be loaded "
            f"({one_line(error)}); {_loading_advice(spec, error)}"
        ) from error


def _check_folder(backbone: str, folder: Path) -> None:
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"--backbone {backbone}: no {folder / CONFIG_FILE}, an open_clip model")
    if not any(path.suffix in WEIGHT_SUFFIXES for path in folder.iterdir()):
        wanted = f"open_clip_model{WEIGHT_SUFFIXES[0]}"
        raise UserError(f"--backbone {backbone}: no weights in {folder} ({wanted} is expected)")


def _name_files(spec: Backbone) -> str:
    import open_clip

    if spec.pretrained is None:
        return f"the model {spec.model}"
    weights = open_clip.get_pretrained_cfg(spec.model, spec.pretrained)
    source = f"{HF_HUB}{weights['hf_hub']}" if weights.get("hf_hub") else weights.get("url")
    return f"the weights {spec.pretrained} of {spec.model} ({source})"


def _loading_advice(spec: Backbone, error: Exception) -> str:
    if isinstance(error, ImportError):
        return "its tokenizer or tower needs that package: pip install transformers sentencepiece"
    if spec.model.startswith(LOCAL_DIR):
        return "the folder must hold an open_clip configuration and the weights that fit it"
    return (
        "run it once where the network reaches the Hugging Face Hub, or copy the Hub's cache from "
        "such a machine (HF_HOME says where it lies; HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE "
        "keep their meaning)"
    )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Hold back the log lines that open_clip and the hub write before they raise."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


# ---------------------------------------------------------------------------------------------
# Identity
# ---------------------------------------------------------------------------------------------


def _identify(spec: Backbone, model: torch.nn.Module, config: dict, tokenizer: Any) -> dict:
    """What decides whether two sets of features come from one model: the manifest's "model".

    A folder is known by the hash of its weights and configuration and not by its path, so that a
    copied or renamed one is the same model.
    """
    local = spec.model.startswith(LOCAL_DIR)
    builtin = spec.pretrained is not None
    pixels = model.visual.preprocess_cfg
    return {
        "model": LOCAL_DIR.rstrip(":") if local else spec.model,
        "pretrained": spec.pretrained,
        "activation": _find_activation(model),
        "embed_dim": config["embed_dim"],
        "context_length": tokenizer.context_length,
        "tokenizer": config["text_cfg"].get("hf_tokenizer_name") or type(tokenizer).__name__,
        "image_size": _square(model.visual.image_size),
        "mean": list(pixels["mean"]),
        "std": list(pixels["std"]),
        "interpolation": pixels["interpolation"],
        "resize_mode": pixels["resize_mode"],
        "config_sha256": None if builtin else _hash_config(config),
        "weights_sha256": None if builtin else _hash_weights(model),
    }


def _find_activation(model: torch.nn.Module) -> str:
    """The activation functions a model was built with: "QuickGELU", "GELU", "QuickGELU+ReLU"."""
    names = set()
    for module in model.modules():
        name = type(module).__name__
        if re.search("GELU|ReLU|SiLU", name):
            kind = getattr(module, "approximate", "none")
            names.add(name if kind == "none" else f"{name}({kind})")
    return "+".join(sorted(names))


def _as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _square(size: int | Sequence[int]) -> int | list[int]:
    """An image size as one number if both sides are equal."""
    height, width = _as_pair(size)
    return height if height == width else [height, width]


def _hash_config(config: dict) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _hash_weights(model: torch.nn.Module) -> str:
    """SHA-256 over the names, shapes and bytes of a model's tensors, whatever file they lay in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
