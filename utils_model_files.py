"""What a model's own files may say: a list of what is allowed, checked before open_clip sees them.

A configuration reaches the constructors of open_clip, timm and transformers, some of whose
arguments run code that lies beside it. Here every key is known, and every value is a number, a
flag, a word, or the name of a model.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from utils import UserError, read_json
from utils_backbones import HF_HUB, LOCAL_DIR

CONFIG_FILE = "open_clip_config.json"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_numbers(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return len(values) <= 16 and all(map(_is_number, values))


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\w{0,64}", value) is not None


def _is_mode(value: Any) -> bool:
    return value == "RGB"


def _is_timm_model(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\w+(\.\w+)?", value) is not None


def _is_hub_name(value: Any) -> bool:
    """ORG/NAME or NAME: no path, no scheme."""
    return isinstance(value, str) and re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*|", value) is not None


def _keys(allowed: Callable[[Any], bool], names: str) -> dict[str, Callable[[Any], bool]]:
    return dict.fromkeys(names.split(), allowed)


_BLOCKS = {
    **_keys(_is_numbers, "width heads head_width layers mlp_ratio ls_init_value"),
    **_keys(_is_flag, "qk_norm scaled_cosine_attn scale_heads scale_attn_inner scale_attn"),
    **_keys(_is_flag, "scale_fc final_ln_after_pool output_tokens"),
    **_keys(_is_word, "block_type pool_type"),
    "act_kwargs": _keys(_is_word, "approximate"),
    "norm_kwargs": _keys(_is_number, "eps"),
}

_VISION = {
    **_BLOCKS,
    **_keys(_is_numbers, "patch_size image_size patch_dropout attn_pooler_queries"),
    **_keys(_is_numbers, "attn_pooler_heads timm_drop timm_drop_path"),
    **_keys(_is_flag, "attentional_pool no_ln_pre timm_model_pretrained timm_proj_bias"),
    **_keys(_is_flag, "input_patchnorm global_average_pool"),
    **_keys(_is_word, "pos_embed_type timm_pool timm_proj"),
    "timm_model_name": _is_timm_model,
}

_TEXT = {
    **_BLOCKS,
    **_keys(_is_number, "context_length vocab_size pad_id eos_id"),
    **_keys(_is_flag, "embed_cls no_causal_mask proj_bias hf_model_pretrained"),
    **_keys(_is_word, "proj_type hf_proj_type hf_pooler_type tokenizer_mode"),
    **_keys(_is_hub_name, "hf_tokenizer_name hf_model_name"),
    "tokenizer_kwargs": {**_keys(_is_word, "clean language"), "strip_sep_token": _is_flag},
}

ALLOWED = {
    "model_cfg": {
        **_keys(_is_number, "embed_dim init_logit_scale init_logit_bias"),
        **_keys(_is_flag, "quick_gelu custom_text nonscalar_logit_scale"),
        "vision_cfg": _VISION,
        "text_cfg": _TEXT,
        "multimodal_cfg": {
            **_TEXT,
            **_keys(_is_number, "dim_head n_queries attn_pooler_heads"),
        },
    },
    "preprocess_cfg": {
        **_keys(_is_numbers, "size mean std fill_color"),
        **_keys(_is_word, "interpolation resize_mode"),
        "mode": _is_mode,
    },
}


def check_model_files(model: str) -> None:
    """Check the configuration that hf-hub:ORG/NAME or local-dir:PATH stands for.

    Models of open_clip's own list have none. Raises UserError, naming the key, unless all that it
    holds is allowed, and what the hub raises where there is none.
    """
    if model.startswith(LOCAL_DIR):
        check_config(Path(model.removeprefix(LOCAL_DIR)) / CONFIG_FILE)
    elif model.startswith(HF_HUB):
        from huggingface_hub import hf_hub_download

        check_config(Path(hf_hub_download(model.removeprefix(HF_HUB), CONFIG_FILE)))


def check_config(path: Path) -> None:
    """Raise UserError, naming the key, unless a configuration holds what is allowed and no more."""
    config = read_json(path)
    if not isinstance(config.get("model_cfg"), dict):
        raise UserError(f"{path} holds no model_cfg: it is no open_clip model")
    _check_section(config, ALLOWED, path, "")


def _check_section(section: dict, allowed: dict, path: Path, place: str) -> None:
    for key, value in section.items():
        name = f"{place}{key}"
        if key not in allowed:
            raise UserError(f"{path}: {name!r} is not among the keys that a model may set")
        if value is None:  # open_clip's own default
            continue
        rule = allowed[key]
        if isinstance(rule, dict) and isinstance(value, dict):
            _check_section(value, rule, path, f"{name}.")
        elif isinstance(rule, dict) or not rule(value):
            shown = ascii(value)[:80]
            raise UserError(f"{path}: {name!r} may not be {shown}")


@contextlib.contextmanager
def without_remote_code() -> Iterator[None]:
    """Let transformers refuse code that lies beside a tokenizer or tower, instead of asking."""
    try:
        from transformers import dynamic_module_utils
    except ImportError:  # then there is nothing that could ask
        yield
        return
    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before
