"""What CoVR and CoVR-2 share: BLIP's texts, images and vision towers, by transformers' classes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from composed.system import CLIP_MEAN, CLIP_STD
from composed.tensors import count_layers, shape_of
from utils import UserError

if TYPE_CHECKING:
    from tokenizers import BertWordPieceTokenizer

HEAD = 64  # numbers of an attention head, of BERT and of CoVR's vision tower
VISION_EPS = 1e-6  # of the layers' norms; transformers' default for BLIP is 1e-5
MAX_TOKENS = 64
MAX_WORDS = 30
VOCABULARY = "bert-base-uncased"


def clean_text(text: str) -> str:
    """Lower case, .!"()*#:;~ as blanks, no blanks in a row, at most 30 words."""
    text = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    return " ".join(re.sub(r"\s{2,}", " ", text).strip().split(" ")[:MAX_WORDS])


@dataclass(frozen=True)
class Squash:
    """An image resized to a square of `size` pixels, bicubic, normalised as CLIP's."""

    size: int

    def __call__(self, image: Image.Image) -> Tensor:
        from torchvision.transforms import functional

        image = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC)
        return functional.normalize(functional.to_tensor(image), CLIP_MEAN, CLIP_STD)


class Tokens:
    """BERT's tokens of texts, cut at 64. more: words of the network behind the vocabulary's."""

    def __init__(self, folder: Path, rows: int, more: int):
        self.tokenizer = _read_vocabulary(folder)
        known = self.tokenizer.get_vocab_size()
        if known + more != rows:
            raise UserError(
                f"the vocabulary has {known} words, but the network of {folder} has {rows - more}: "
                f"put the vocab.txt of {VOCABULARY} there"
            )

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, int64 (B, L), padded to the longest."""
        ids = [self.tokenizer.encode(text).ids for text in texts]
        longest = max(map(len, ids))
        padded = torch.tensor([own + [0] * (longest - len(own)) for own in ids])
        mask = torch.tensor([[1] * len(own) + [0] * (longest - len(own)) for own in ids])
        return padded, mask

    def is_cut(self, text: str) -> bool:
        """Whether a text is longer than is read."""
        return bool(self.tokenizer.encode(text).overflowing)


def _read_vocabulary(folder: Path) -> BertWordPieceTokenizer:
    """The vocabulary beside a checkpoint, else bert-base-uncased's of the Hub or its cache."""
    from tokenizers import BertWordPieceTokenizer

    path = folder / "vocab.txt"
    if not path.is_file():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(VOCABULARY, "vocab.txt"))
        except Exception as error:  # the hub and the network each raise their own
            raise UserError(
                f"{path} does not exist, and {VOCABULARY} cannot be had from the Hub "
                f"({type(error).__name__}): put its vocab.txt there"
            ) from None
    tokenizer = BertWordPieceTokenizer(str(path), lowercase=True)
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def drop(state: Mapping[str, Tensor], unused: Sequence[str]) -> dict[str, Tensor]:
    """Tensors without those whose names begin with, or hold, what is not used."""
    return {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith(tuple(unused)) and "position_ids" not in name
    }


def vision_sizes(state: Mapping[str, Tensor], path: Path, head: int) -> dict[str, int | float]:
    """A vision tower's configuration, of the shapes that its tensors have. head: a head's width."""
    width, _, patch, _ = shape_of(state, "visual_encoder.patch_embed.proj.weight", 4, path)
    _, places, _ = shape_of(state, "visual_encoder.pos_embed", 3, path)
    hidden, _ = shape_of(state, "visual_encoder.blocks.0.mlp.fc1.weight", 2, path)
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": count_layers(state, "visual_encoder.blocks."),
        "num_attention_heads": width // head,
        "image_size": patch * math.isqrt(places - 1),
        "patch_size": patch,
        "layer_norm_eps": VISION_EPS,
    }


def bert_sizes(state: Mapping[str, Tensor], bert: str, path: Path, vision: int) -> dict:
    """A text encoder's configuration, of the shapes that its tensors have.

    bert: what their names begin with; vision: the width of what it looks at. Its heads are 64 wide;
    transformers' default, 8 heads, gives other features silently.
    """
    vocabulary, width = shape_of(state, f"{bert}.embeddings.word_embeddings.weight", 2, path)
    places, _ = shape_of(state, f"{bert}.embeddings.position_embeddings.weight", 2, path)
    layers = f"{bert}.encoder.layer."
    hidden, _ = shape_of(state, f"{layers}0.intermediate.dense.weight", 2, path)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "encoder_hidden_size": vision,
        "intermediate_size": hidden,
        "num_hidden_layers": count_layers(state, layers),
        "num_attention_heads": width // HEAD,
        "max_position_embeddings": places,
        "layer_norm_eps": 1e-12,
    }


VISION_NAMES = (
    (r"^visual_encoder\.patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^visual_encoder\.cls_token$", "embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "embeddings.position_embedding"),
    (r"^(visual_encoder\.norm|ln_vision)\.", "post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.", r"encoder.layers.\1.self_attn."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


def rename(state: Mapping[str, Tensor], names: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """The tensors that one of the patterns matches, under the names that it gives them."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, target in names:
            if re.search(pattern, name):
                renamed[re.sub(pattern, target, name)] = tensor
                break
    return renamed
