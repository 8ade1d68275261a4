"""The tables of backbones and of precisions, and feature folders' names. Imports nothing large."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils import UserError, file_safe

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent  # of the toolkit
LOCAL_DIR = "local-dir:"
HF_HUB = "hf-hub:"
DEFAULT_BACKBONE = "clip"
PREPROCESSES = ("model", "targetpad")  # of --preprocess; another one is another backbone
CHECKPOINTS = (".pkl", ".ckpt", ".pt", ".pth", ".bin", ".safetensors")  # endings of files
PADDED = "+targetpad"  # what the name of a backbone ends in whose images are padded first

PIXELS = ("viewed", "plain")  # of --pixels: as a viewer shows an image, or as CLIP's pipelines do

# --precision -> the type that torch computes in, None for its own.
PRECISIONS = {"fp32": None, "bf16": "bfloat16", "fp16": "float16"}


@contextlib.contextmanager
def inference(device: torch.device, precision: str) -> Iterator[None]:
    """Inside, torch computes on the device in that precision, and keeps no gradients."""
    import torch

    name = PRECISIONS[precision]
    dtype = getattr(torch, name) if name else None
    with (
        torch.inference_mode(),
        torch.autocast(device.type, dtype=dtype, enabled=dtype is not None),
    ):
        yield


@dataclass(frozen=True)
class Backbone:
    """One frozen vision-language model and the places of its assets.

    model, pretrained: what open_clip.create_model_and_transforms is asked for.
    corpora_dir: default of --corpora_dir; mean_dir: under --data_dir; synthetic_dir: default of
    --path_to_synthetic_data. is_published: data/download.py fetches its assets.
    """

    model: str
    pretrained: str | None = None
    corpora_dir: str = "corpora"
    mean_dir: str = "laion_mean"
    synthetic_dir: str = "synthetic_data"
    is_published: bool = False


BACKBONES = {
    "clip": Backbone("ViT-L-14-quickgelu", "openai", is_published=True),
    "siglip": Backbone("hf-hub:timm/ViT-L-16-SigLIP-256", is_published=True),
    "tiny": Backbone(
        "local-dir:data/tiny/clip",
        corpora_dir="data/tiny/corpora",
        mean_dir="tiny/mean",
        synthetic_dir="data/tiny/synthetic",
    ),
}


def name_backbone(backbone: str, preprocess: str | None) -> str:
    """A backbone with the preprocessing asked for (None: as its name has it): "clip+targetpad".

    Raises UserError if the name asks for another one.
    """
    if split_composed(backbone):
        return backbone
    base, is_padded = split_backbone(backbone)
    if is_padded and preprocess == "model":
        raise UserError(
            f"--preprocess model contradicts --backbone {backbone}: leave it, or name {base}"
        )
    return f"{base}{PADDED}" if is_padded or preprocess == "targetpad" else base


def split_composed(backbone: str) -> tuple[str, str] | None:
    """Name and place of a system of composed/, "magiclens:FILE"; None for any other backbone."""
    if ":" not in backbone or backbone.startswith((LOCAL_DIR, HF_HUB)):
        return None
    name, _, place = backbone.partition(":")
    return name, place


def split_backbone(backbone: str) -> tuple[str, bool]:
    """A backbone without its preprocessing, and whether that is TargetPad."""
    return backbone.removesuffix(PADDED), backbone.endswith(PADDED)


def own_data(path: Path, is_there: Callable[[Path], bool] = Path.exists) -> Path:
    """A path to read, or where nothing is there, that of the toolkit's own data of this name."""
    return ROOT / path if not is_there(path) and is_there(ROOT / path) else path


def backbone_entry(backbone: str) -> Backbone:
    """The table's entry for a name, whatever its preprocessing; a new one for any other model."""
    base, _ = split_backbone(backbone)
    return BACKBONES.get(base, Backbone(base))


def backbone_folder(backbone: str) -> str:
    """The name of a backbone's feature folder, safe on every file system.

    Of a system it is made of its name and the last part of its place, without the file's ending.
    """
    if system := split_composed(backbone):
        place = Path(system[1])
        stem = place.stem if place.suffix in CHECKPOINTS else place.name
        return f"{system[0]}_{file_safe(stem)}_features"
    base, is_padded = split_backbone(backbone)
    name = base if base in BACKBONES else file_safe(base)
    return f"{name}_targetpad_features" if is_padded else f"{name}_features"


@dataclass(frozen=True)
class Places:
    """Where things are: features, data sets and image means, normalisation features (or None)."""

    features: Path
    data: Path
    synthetic: Path | None = None
