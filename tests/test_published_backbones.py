"""The three backbones of CVSI, whose real architectures get pseudo words of their real widths.

Random weights. Widths, heads, context and activation are those of open_clip's configurations; in
the suite the layers are cut. `python3 tests/test_published_backbones.py` takes whole text towers.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np
import open_clip
import pytest
import torch
from conftest import ROOT  # puts the product's modules on the path of a run by hand
from test_inversion import Phi
from test_text_tower import encode_plainly

from methods.captions import CVSI_WORDS
from methods.words import make_words
from utils import UserError
from utils_features import Encoder, _find_activation, find_backbone
from utils_text_tower import Replacement, find_causal_tower


class Published(NamedTuple):
    """A backbone as docs/zeroshot.md has it: --backbone, width of features and of words, GELU."""

    spec: str
    dim: int
    width: int
    activation: str


BACKBONES = (
    Published("ViT-B-32-quickgelu/openai", 512, 512, "QuickGELU"),
    Published("clip", 768, 768, "QuickGELU"),
    Published("ViT-bigG-14/laion2b_s39b_b160k", 1280, 1280, "GELU"),
)
TEXTS = [
    "a photo of $ that is red. And the photo should have a red dog.",
    "a photo of $ that is red. And the photo should have a cat and $ .",
    "a photo of $ that is at night. And the photo should have .",
    "a photo of $ that " + "word " * 90,
]
WHICH = np.array([0, 1, 0, 1])


def build_encoder(published: Published, vision_layers: int, text_layers: int | None) -> Encoder:
    """The architecture of a backbone with random weights; text_layers: None for all of them."""
    spec = find_backbone(published.spec)
    config = open_clip.get_model_config(spec.model)
    vision, text = dict(config.pop("vision_cfg")), dict(config.pop("text_cfg"))
    vision |= {"layers": vision_layers}
    text |= {"layers": text_layers or text["layers"]}
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = open_clip.CLIP(vision_cfg=vision, text_cfg=text, **config)
    return Encoder(
        model=model.eval(),
        tokenizer=open_clip.get_tokenizer(spec.model),
        preprocess=None,
        identity={},
        device=torch.device("cpu"),
        precision="fp32",
        dim=config["embed_dim"],
        context_length=77,
        image_size=(224, 224),
    )


def furthest(encoder: Encoder, published: Published, phi) -> float:
    """How far pseudo words in the tower's shared beginnings are from embeddings swapped by hand."""
    torch.manual_seed(12)
    torch.save({"Phi": Phi(published.dim, published.width, 4 * published.dim).state_dict()}, phi)
    assert _find_activation(encoder.model) == published.activation
    assert (encoder.dim, encoder.token_dim) == (published.dim, published.width)
    words = make_words(phi, CVSI_WORDS, encoder, half_pixels=True)
    features = encoder.encode_images(torch.randn(2, 3, 224, 224), half_pixels=True).numpy()
    vectors = words.make(features)
    assert vectors.shape == (2, published.width)
    replace = Replacement(words.mark, vectors, WHICH, words.everywhere)
    assert find_causal_tower(encoder.model) is not None
    found = encoder.encode_texts(TEXTS, 4, replace=replace)
    assert np.abs(found - encoder.encode_texts(TEXTS, 4)).max(1).min() > 1e-3
    scale = np.linalg.norm(found, axis=1).min()
    return float(np.abs(found - encode_plainly(encoder, TEXTS, replace)).max() / scale)


@pytest.mark.parametrize("published", BACKBONES, ids=lambda published: published.spec)
def test_pseudo_words_of_cvsi_in_the_architectures_it_is_published_for(published, tmp_path):
    encoder = build_encoder(published, vision_layers=1, text_layers=2)
    assert furthest(encoder, published, tmp_path / "phi.pt") < 1e-5
    for other in BACKBONES:
        if other is not published:
            torch.save({"Phi": Phi(other.dim, other.width).state_dict()}, tmp_path / "other.pt")
            with pytest.raises(UserError, match=f"{other.dim} .* backbone has {published.dim}"):
                make_words(tmp_path / "other.pt", CVSI_WORDS, encoder)


def run_whole(folder) -> None:
    """Whole text towers; OpenAI's image towers as well, of bigG two layers."""
    for published in BACKBONES:
        layers = open_clip.get_model_config(find_backbone(published.spec).model)
        vision = 2 if published.dim == 1280 else layers["vision_cfg"]["layers"]
        encoder = build_encoder(published, vision, None)
        count = sum(parameter.numel() for parameter in encoder.model.parameters())
        far = furthest(encoder, published, folder / "phi.pt")
        print(f"{published.spec}: {count / 1e6:.0f} M parameters, furthest off {far:.1e}")
        assert far < 1e-5
        del encoder


if __name__ == "__main__":
    import tempfile
    from pathlib import Path

    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as temporary:
        run_whole(Path(temporary))
