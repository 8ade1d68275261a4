"""CoVR-2 (TPAMI 2024), BLIP-2: the Q-Former composes; 32 tokens of 256 numbers a row.

    query   = unit(text_proj(q-former(query tokens, text, image)[:32]))     each token
    gallery = unit(vision_proj(q-former(query tokens, image)))              each token

Compared are the means over the tokens, as they are, not brought to unit length (CIRCO, FashionIQ);
with --tokens the best pair of tokens too (CIRR, `--method composed_tokens`). The Q-Former is
trained, and the published gallery is encoded with BLIP-2's own: --gallery_weights names that file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from composed.blip import (
    VISION_NAMES,
    Squash,
    Tokens,
    bert_sizes,
    clean_text,
    drop,
    rename,
    vision_sizes,
)
from composed.system import Composer, Options, System
from composed.tensors import (
    hash_tensors,
    load_into,
    load_tensors,
    require_file,
    shape_of,
)
from composed.texts import FORMS
from utils import UserError

VISION_HEAD = 88  # numbers of an attention head of the vision tower, 16 of 1408
LN_VISION_EPS = 1e-5  # of the norm behind the tower, which is not the layers' 1e-6
MORE_WORDS = 1  # [DEC]
UNUSED = ("Qformer.cls.", "itm_head.", "temp", "loss.")
HOW_TO_GET = "a checkpoint of CoVR-2 is expected, see docs/systems.md"
GALLERY = "BLIP-2's blip2_finetune_coco.pth is expected, see docs/systems.md"

NAMES = (
    *((pattern, f"vision_model.{target}") for pattern, target in VISION_NAMES),
    (r"^Qformer\.bert\.embeddings\.(word|position)_embeddings\.", r"embeddings.\1_embeddings."),
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (
        r"^Qformer\.bert\.encoder\.layer\.(\d+)\.(attention|crossattention)\.self\.",
        r"qformer.encoder.layer.\1.\2.attention.",
    ),
    (r"^Qformer\.bert\.encoder\.layer\.", "qformer.encoder.layer."),
    (r"^(vision_proj|text_proj)\.", r"\1."),
    (r"^query_tokens$", "query_tokens"),
)


def _join_biases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tower's biases of queries and values as one, in which keys have none."""
    joined = dict(state)
    for name in [name for name in state if name.endswith(".attn.q_bias")]:
        block = name.removesuffix("q_bias")
        query, value = joined.pop(name), joined.pop(f"{block}v_bias")
        joined[f"{block}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return joined


def former_sizes(state: Mapping[str, Tensor], path: Path, vision: int) -> dict:
    """The Q-Former's configuration, of the shapes that its tensors have."""
    sizes = bert_sizes(state, "Qformer.bert", path, vision)
    return {**sizes, "cross_attention_frequency": 2, "use_qformer_text_input": True}


class Network(nn.Module):
    """The vision tower, the Q-Former with its embeddings and query tokens, both projections."""

    def __init__(self, state: Mapping[str, Tensor], path: Path):
        super().__init__()
        from transformers import (
            Blip2QFormerConfig,
            Blip2QFormerModel,
            Blip2VisionConfig,
            Blip2VisionModel,
        )
        from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

        sizes = vision_sizes(state, path, VISION_HEAD)
        self.vision_model = Blip2VisionModel(Blip2VisionConfig(**sizes))
        self.vision_model.post_layernorm.eps = LN_VISION_EPS
        config = Blip2QFormerConfig(**former_sizes(state, path, sizes["hidden_size"]))
        self.embeddings, self.qformer = Blip2TextEmbeddings(config), Blip2QFormerModel(config)
        self.query_tokens = nn.Parameter(torch.empty(shape_of(state, "query_tokens", 3, path)))
        dim, _ = shape_of(state, "text_proj.weight", 2, path)
        self.vision_proj = nn.Linear(config.hidden_size, dim)
        self.text_proj = nn.Linear(config.hidden_size, dim)
        renamed = rename(_join_biases(state), NAMES)
        load_into(self, renamed, path)

    def patches(self, images: Tensor) -> Tensor:
        """The tower's states, (B, patches, W)."""
        return self.vision_model(images).last_hidden_state

    def compose(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """A query's tokens at unit length, (B, T, D)."""
        tokens = self.query_tokens.expand(len(images), -1, -1)
        count = tokens.shape[1]
        ones = torch.ones(tokens.shape[:2], dtype=mask.dtype, device=mask.device)
        states = self.qformer(
            query_embeds=self.embeddings(input_ids=ids, query_embeds=tokens),
            query_length=count,
            attention_mask=torch.cat([ones, mask], dim=1),
            encoder_hidden_states=self.patches(images),
        ).last_hidden_state[:, :count]
        return functional.normalize(self.text_proj(states).float(), dim=-1)

    def describe(self, images: Tensor) -> Tensor:
        """A gallery image's tokens at unit length, (B, T, D)."""
        states = self.qformer(
            query_embeds=self.query_tokens.expand(len(images), -1, -1),
            encoder_hidden_states=self.patches(images),
        ).last_hidden_state
        return functional.normalize(self.vision_proj(states).float(), dim=-1)


class Covr2(Composer):
    """CoVR-2 of the tensors of its file, and of the one that encodes the gallery."""

    unit = False

    def __init__(self, query: tuple[dict, Path], gallery: tuple[dict, Path], tokens: bool):
        of_queries, of_gallery = (Network(state, path) for state, path in (query, gallery))
        self.network = nn.ModuleList([of_queries, of_gallery])
        config = of_queries.vision_model.config
        if of_gallery.vision_model.config.image_size != config.image_size:
            raise UserError(f"{gallery[1]} is of another image size than {query[1]}")
        rows = len(of_queries.embeddings.word_embeddings.weight)
        self.tokens = Tokens(query[1].parent, rows, MORE_WORDS)
        self.preprocess = Squash(config.image_size)
        self.dim, count = of_queries.text_proj.out_features, of_queries.query_tokens.shape[1]
        self.kept = count * self.dim if tokens else 0
        self.identity = {
            "model": "covr2",
            "weights_sha256": hash_tensors(query[0]),
            "gallery_weights_sha256": hash_tensors(gallery[0]),
            "tokens": tokens,
        }

    @property
    def query_columns(self) -> dict[str, int]:
        return super().query_columns | ({"query_tokens": self.kept} if self.kept else {})

    @property
    def gallery_columns(self) -> dict[str, int]:
        return super().gallery_columns | ({"database_tokens": self.kept} if self.kept else {})

    def _row(self, tokens: Tensor) -> Tensor:
        """The mean of the tokens and, where they are kept, all of them."""
        mean = tokens.mean(1)
        return torch.cat([mean, tokens.flatten(1)], dim=1) if self.kept else mean

    def queries(self, images: Tensor, texts: Sequence[str], numbers: Sequence[int]) -> Tensor:
        ids, mask = (part.to(images.device) for part in self.tokens(texts))
        return self._row(self.network[0].compose(images, ids, mask))

    def gallery(self, images: Tensor) -> Tensor:
        return self._row(self.network[1].describe(images))

    def is_cut(self, text: str) -> bool:
        return self.tokens.is_cut(text)


def load(place: str, options: Options) -> Covr2:
    """Read both checkpoints. Raises UserError if one is not there, or holds another network."""
    path = require_file(place, HOW_TO_GET)
    if options.gallery_weights is None:
        raise UserError(
            "covr2 needs --gallery_weights FILE: its gallery is encoded with BLIP-2's own Q-Former "
            "(blip2_finetune_coco.pth)"
        )
    gallery = require_file(options.gallery_weights, GALLERY)
    query, other = (drop(load_tensors(file, "model"), UNUSED) for file in (path, gallery))
    return Covr2((query, path), (other, gallery), options.tokens)


SYSTEM = System(load=load, prompts=FORMS, clean=clean_text, takes=("gallery_weights", "tokens"))
