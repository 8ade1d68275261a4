"""TargetPad: which images are padded, by how much, with what; and the names of its backbones."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image

from utils import UserError
from utils_backbones import backbone_entry, backbone_folder, name_backbone
from utils_features import TargetPad


@pytest.mark.parametrize(
    ("size", "padded"),
    [
        ((96, 64), (96, 76)),  # 96 / 1.25 = 76.8: int(6.4) at either end
        ((64, 120), (96, 120)),
        ((80, 64), (80, 64)),  # the ratio exactly: nothing is left to add
        ((70, 64), (70, 64)),
        ((64, 81), (64, 81)),  # int(0.4)
        ((200, 150), (200, 160)),
        ((1, 1000), (799, 1000)),
    ],
)
def test_sides_after_padding(size, padded):
    assert TargetPad()(Image.new("RGB", size)).size == padded


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P"])
def test_an_image_keeps_its_mode_and_pixels_among_zeros(mode):
    random = np.random.default_rng(3).integers(1, 255, (64, 120, 3), dtype=np.uint8)
    image = Image.fromarray(random).convert(mode)
    padded = TargetPad()(image)
    assert padded.mode == mode
    inner = (0, 16, 120, 80)
    assert padded.crop(inner).convert("RGB").tobytes() == image.convert("RGB").tobytes()
    if mode != "P":
        assert not np.asarray(padded)[:16].any()
        assert not np.asarray(padded)[80:].any()


def test_it_goes_to_worker_processes():
    assert pickle.loads(pickle.dumps(TargetPad())) == TargetPad()


@pytest.mark.parametrize(
    ("backbone", "folder"),
    [
        ("clip", "clip_targetpad_features"),
        ("ViT-B-32/openai", "ViT-B-32-openai_targetpad_features"),
    ],
)
def test_it_is_a_backbone_of_its_own(backbone, folder):
    name = name_backbone(backbone, "targetpad")
    assert name == name_backbone(name, None) == f"{backbone}+targetpad"
    assert backbone_folder(name) == folder != backbone_folder(backbone)
    assert backbone_entry(name) == backbone_entry(backbone)
    assert name_backbone(backbone, "model") == name_backbone(backbone, None) == backbone
    with pytest.raises(UserError, match="--preprocess model contradicts"):
        name_backbone(name, "model")
