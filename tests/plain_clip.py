"""Features straight from open_clip, one image and one text at a time: what the commands' are held
against."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image


@cache
def load(clip: Path) -> tuple:
    name = f"local-dir:{clip}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


def unit(rows: Iterable) -> np.ndarray:
    """Features (n, D) of unit length, float64."""
    rows = np.stack([np.asarray(row, np.float64) for row in rows])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@torch.no_grad()
def image_features(clip: Path, paths: Iterable[Path]) -> np.ndarray:
    """Unit features of image files, float64 (n, D)."""
    model, preprocess, _ = load(clip)
    images = (preprocess(Image.open(path).convert("RGB"))[None] for path in paths)
    return unit(model.encode_image(image)[0] for image in images)


@torch.no_grad()
def text_features(clip: Path, texts: Iterable[str]) -> np.ndarray:
    """Unit features of texts, float64 (n, D)."""
    model, _, tokenize = load(clip)
    return unit(model.encode_text(tokenize([text]))[0] for text in texts)
