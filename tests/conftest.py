"""What several test files share: a small real CLIP on disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SEED = 7

# A CLIP of 1.6 M parameters, nearly all of them the token embeddings of CLIP's own vocabulary.
SMALL_CLIP = {
    "embed_dim": 48,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 8,
        "width": 64,
        "head_width": 32,
        "layers": 2,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 2,
    },
}


def save_clip(folder: Path, config: dict, preprocess: dict | None = None, seed: int = SEED) -> Path:
    """Write an open_clip folder with seeded random weights, to be loaded through `local-dir:`."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    content = {"model_cfg": config, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(content), encoding="utf-8")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.create_model(f"local-dir:{folder}")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, str(folder / "open_clip_model.safetensors"))
    return folder


@pytest.fixture(scope="session")
def make_clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that saves a CLIP of a given open_clip configuration and gives its folder."""
    base = tmp_path_factory.mktemp("clips")

    def make(name: str, config: dict, preprocess: dict | None = None, seed: int = SEED) -> Path:
        return save_clip(base / name, config, preprocess, seed)

    return make


@pytest.fixture(scope="session")
def small_clip(make_clip: Callable[..., Path]) -> Path:
    """The folder of a small QuickGELU CLIP (32-pixel images, 48-d features): `local-dir:{it}`."""
    return make_clip("small", SMALL_CLIP)


@pytest.fixture
def four_threads():
    """torch computes with four threads, whatever the machine has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(threads)
