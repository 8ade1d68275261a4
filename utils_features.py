"""Backbones: which open_clip model a name stands for, and where its assets lie."""

from __future__ import annotations

from dataclasses import dataclass
from utils import file_safe


@dataclass(frozen=True)
class Backbone:
    """One frozen vision-language model and the places of its assets.

    model, pretrained: what open_clip.create_model_and_transforms is asked for.
    corpora_dir: default of --corpora_dir; mean_dir: under --data_dir; synthetic_dir: default of
    --path_to_synthetic_data.
    """

    model: str
    pretrained: str | None = None
    corpora_dir: str = "corpora"
    mean_dir: str = "laion_mean"
    synthetic_dir: str = "synthetic_data"


BACKBONES = {
    "clip": Backbone("ViT-L-14-quickgelu", "openai"),
    "siglip": Backbone("hf-hub:timm/ViT-L-16-SigLIP-256"),
    "tiny": Backbone(
        "local-dir:data/tiny/clip",
        corpora_dir="data/tiny/corpora",
        mean_dir="tiny/mean",
        synthetic_dir="data/tiny/synthetic",
    ),
}


def backbone_folder(backbone: str) -> str:
    """The name of a backbone's feature folder, safe on every file system."""
    return f"{backbone if backbone in BACKBONES else file_safe(backbone)}_features"
