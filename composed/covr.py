"""CoVR (AAAI 2024), BLIP-L: BERT reads the text and looks at the image; 256 numbers, unit length.

    query   = unit(text_proj(text encoder([ENC] text, all patches of the image)[0]))
    gallery = unit(vision_proj(vision tower(image)[0]))

The checkpoint is read as it is. Its vision tower is not trained, so that it encodes the gallery as
BLIP's own retrieval checkpoint does, which --gallery_weights compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from composed.blip import (
    HEAD,
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

MORE_WORDS = 2  # [DEC], [ENC]
UNUSED = ("text_encoder_m.", "visual_encoder_m.", "vision_proj_m.", "text_proj_m.", "itm_head.")
UNUSED = (*UNUSED, "image_queue", "text_queue", "idx_queue", "ptr_queue", "temp", "loss.")
HOW_TO_GET = "a checkpoint of CoVR is expected, see docs/systems.md"


class Network(nn.Module):
    """The vision tower, the text encoder and both projections."""

    def __init__(self, state: Mapping[str, Tensor], path: Path):
        super().__init__()
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        sizes = vision_sizes(state, path, HEAD)
        self.vision_model = BlipVisionModel(BlipVisionConfig(**sizes))
        text = bert_sizes(state, "text_encoder", path, sizes["hidden_size"])
        self.text_encoder = BlipTextModel(
            BlipTextConfig(**text, is_decoder=True), add_pooling_layer=False
        )
        dim, _ = shape_of(state, "text_proj.weight", 2, path)
        self.vision_proj = nn.Linear(sizes["hidden_size"], dim)
        self.text_proj = nn.Linear(text["hidden_size"], dim)
        vision = {f"vision_model.{k}": v for k, v in rename(state, VISION_NAMES).items()}
        others = {k: v for k, v in state.items() if not k.startswith("visual_encoder.")}
        load_into(self, vision | others, path)


class Covr(Composer):
    """CoVR of the tensors of its file."""

    def __init__(self, state: Mapping[str, Tensor], path: Path):
        self.network = Network(state, path)
        vision, text = self.network.vision_model.config, self.network.text_encoder.config
        self.tokens = Tokens(path.parent, text.vocab_size, MORE_WORDS)
        self.first = text.vocab_size - 1  # [ENC]
        self.preprocess = Squash(vision.image_size)
        self.dim = self.network.text_proj.out_features
        self.identity = {"model": "covr", "weights_sha256": hash_tensors(state)}

    def _patches(self, images: Tensor) -> Tensor:
        return self.network.vision_model(images).last_hidden_state

    def queries(self, images: Tensor, texts: Sequence[str], numbers: Sequence[int]) -> Tensor:
        ids, mask = (part.to(images.device) for part in self.tokens(texts))
        ids[:, 0] = self.first
        patches = self._patches(images)
        state = self.network.text_encoder(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], device=images.device).long(),
        ).last_hidden_state
        return functional.normalize(self.network.text_proj(state[:, 0]).float(), dim=-1)

    def gallery(self, images: Tensor) -> Tensor:
        found = self.network.vision_proj(self._patches(images)[:, 0])
        return functional.normalize(found.float(), dim=-1)

    def is_cut(self, text: str) -> bool:
        return self.tokens.is_cut(text)


def _check_gallery(state: Mapping[str, Tensor], path: Path, gallery: Path) -> None:
    """Raise UserError if another checkpoint would encode the gallery otherwise."""
    other = load_tensors(require_file(gallery, HOW_TO_GET), "model")
    for name, tensor in state.items():
        if name.startswith(("visual_encoder.", "vision_proj.")) and not (
            name in other and torch.equal(other[name].float(), tensor.float())
        ):
            raise UserError(
                f"--gallery_weights {gallery}: its {name!r} is another than that of {path}; they "
                "do not encode the gallery alike: name the checkpoint that it was fine-tuned from"
            )


def load(place: str, options: Options) -> Covr:
    """Read the checkpoint. Raises UserError if there is none, or it holds another network."""
    path = require_file(place, HOW_TO_GET)
    state = drop(load_tensors(path, "model"), UNUSED)
    if options.gallery_weights:
        _check_gallery(state, path, options.gallery_weights)
    return Covr(state, path)


SYSTEM = System(load=load, prompts=FORMS, clean=clean_text, takes=("gallery_weights",))
