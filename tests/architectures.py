"""Open_clip architectures small enough for tests, of every kind of text tower there is."""

from __future__ import annotations

from conftest import SMALL_CLIP

TEXT_CFG = SMALL_CLIP["text_cfg"]


def with_text(custom: bool = True, **changes) -> dict:
    config = {**SMALL_CLIP, "text_cfg": {**TEXT_CFG, **changes}}
    return {**config, "custom_text": True} if custom else config


SIGLIP_TEXT = {
    "no_causal_mask": True,
    "pool_type": "last",
    "proj_bias": True,
    "context_length": 64,
    "norm_kwargs": {"eps": 1e-6},
}
TIMM_VISION = {
    "image_size": 32,
    "timm_model_name": "test_vit",
    "timm_model_pretrained": False,
    "timm_pool": "avg",
    "timm_proj": "linear",
}
COCA_TEXT = {"context_length": 76, "embed_cls": True, "output_tokens": True}
COCA_VISION = {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}

# Open_clip architectures by name, and whether their text towers may be given fewer tokens.
ARCHITECTURES = {
    "clip": (SMALL_CLIP, True),
    "clip with a separate text tower": (with_text(), True),
    "pooled at the eos id": (with_text(pool_type="eos", eos_id=49407), True),
    "projection with a bias": (with_text(custom=False, proj_bias=True), True),
    "custom blocks": (with_text(qk_norm=True, scale_attn=True), True),
    "short context": (with_text(context_length=16), True),
    "siglip": ({**with_text(**SIGLIP_TEXT), "vision_cfg": TIMM_VISION}, False),
    "causal, pooled at the last token": (with_text(pool_type="last"), False),
    "no causal mask": (with_text(no_causal_mask=True), False),
    "coca": (
        {
            **with_text(**COCA_TEXT),
            "vision_cfg": {**SMALL_CLIP["vision_cfg"], **COCA_VISION},
            "multimodal_cfg": {"context_length": 76, "width": 32, "heads": 2, "layers": 1},
        },
        False,
    ),
}
