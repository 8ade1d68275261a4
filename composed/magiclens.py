"""MagicLens (ICML 2024): CLIP's two features, composed by four layers of attention and a pooler.

    x = [image feature, text feature]        both projected, not of unit length: two tokens
    4 times: x += attention(norm(x)), x += feed-forward(norm(x))
    one learned query attends to both tokens, norm, unit length

Gallery images go through the same network with the empty text. The published pickle (an object of
bytes, in it msgpack with flax's arrays) is read by an own reader, which runs nothing.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from composed.system import CLIP_MEAN, CLIP_STD, Composer, Options, System
from composed.tensors import count_layers, hash_tensors, require_file
from composed.texts import FORMS
from utils import UserError, open_regular
from utils_pickles import one_line

LOGIT_CAP = 50.0
NORM_EPS = 1e-6
SOFTPLUS = 1.442695041  # 1 / softplus(0)
HOW_TO_GET = "magic_lens_clip_base.pkl or _large.pkl is expected, see docs/systems.md"


# ---------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------


class _BytesUnpickler(pickle.Unpickler):
    """Admits no global at all: plain objects alone."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def read_flax(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a pickled flax serialization, by their path, "a/b/c".

    Raises UserError for anything else; nothing in the file is run.
    """
    try:
        with open_regular(path) as file:
            content = _BytesUnpickler(file).load()
        if not isinstance(content, bytes):
            raise ValueError(f"it holds a {type(content).__name__}, not bytes")
        tree = _Msgpack(content).whole()
        if not isinstance(tree, dict):
            raise ValueError("it holds no map of arrays")
        return dict(_leaves(tree, ""))
    except Exception as error:  # a hostile or cut file may raise anything
        raise UserError(
            f"{path} is refused: no pickled flax arrays ({one_line(error)}); nothing in it was "
            "run. Fetch it again"
        ) from None


def _leaves(tree: Mapping, place: str):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{place}{name}/")
        elif isinstance(value, np.ndarray):
            yield f"{place}{name}", value
        else:
            raise ValueError(f"{place}{name} is a {type(value).__name__}, no array")


# The first byte of what follows in msgpack: a number in that struct format, or a constant.
NUMBERS = dict(enumerate((">f", ">d", ">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"), 0xCA))
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
# ... or something of that kind, its length before it in that struct format.
SIZED = {
    first + number: (kind, form)
    for first, kind, forms in (
        (0xC4, "bytes", (">B", ">H", ">I")),
        (0xC7, "array", (">B", ">H", ">I")),
        (0xD9, "text", (">B", ">H", ">I")),
        (0xDC, "list", (">H", ">I")),
        (0xDE, "map", (">H", ">I")),
    )
    for number, form in enumerate(forms)
}
DEEPEST = 32  # maps in maps


class _Msgpack:
    """Reads msgpack: maps, texts, integers, lists, bytes, and extension 1, flax's arrays."""

    def __init__(self, data: bytes, depth: int = 0):
        self.file, self.size, self.depth = io.BytesIO(data), len(data), depth

    def whole(self) -> Any:
        """The one object of the data. Raises ValueError for anything else."""
        value = self._read()
        if self.file.tell() != self.size:
            raise ValueError("it goes on behind its end")
        return value

    def _take(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise ValueError("it is cut short")
        return data

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _read(self) -> Any:
        first = self._take(1)[0]
        if first < 0x80 or first >= 0xE0:
            return first if first < 0x80 else first - 0x100
        if first in CONSTANTS:
            return CONSTANTS[first]
        if first in NUMBERS:
            return self._number(NUMBERS[first])
        if first in SIZED:
            kind, form = SIZED[first]
            return getattr(self, f"_{kind}")(self._number(form))
        if 0xD4 <= first <= 0xD8:
            return self._array(1 << (first - 0xD4))
        for base, end, read in ((0x80, 0x90, self._map), (0x90, 0xA0, self._list)):
            if base <= first < end:
                return read(first - base)
        if 0xA0 <= first < 0xC0:
            return self._text(first - 0xA0)
        raise ValueError(f"the byte {first:#x} begins nothing")

    def _bytes(self, count: int) -> bytes:
        return self._take(count)

    def _text(self, count: int) -> str:
        return self._take(count).decode()

    def _list(self, count: int) -> list:
        return self._deeper(lambda: [self._read() for _ in range(count)])

    def _map(self, count: int) -> dict:
        return self._deeper(lambda: {self._key(): self._read() for _ in range(count)})

    def _key(self) -> str:
        key = self._read()
        if not isinstance(key, str):
            raise ValueError(f"a map has the key {key!r}")
        return key

    def _deeper(self, read: Callable[[], Any]) -> Any:
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError("it is nested too deep")
        value = read()
        self.depth -= 1
        return value

    def _array(self, count: int) -> np.ndarray:
        """[shape, name of the dtype, bytes], itself msgpack."""
        if self._take(1)[0] != 1:
            raise ValueError("it holds an extension that is no array")
        shape, name, data = _Msgpack(self._take(count), self.depth).whole()
        dtype = np.dtype(name.decode() if isinstance(name, bytes) else name)
        if dtype.kind not in "fiub":
            raise ValueError(f"it holds an array of {dtype}")
        return np.frombuffer(data, dtype.newbyteorder("<")).reshape(shape)


# ---------------------------------------------------------------------------------------------
# CLIP's towers
# ---------------------------------------------------------------------------------------------


def clip_weights(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """open_clip's weights of the towers, of flax's arrays below clip/."""
    own = {
        name.removeprefix("clip/"): torch.tensor(array)
        for name, array in arrays.items()
        if name.startswith("clip/")
    }
    state = {"logit_scale": own["logit_scale"]}
    for side, before in (("visual", "visual."), ("text", "")):
        for number in range(count_layers(own, f"{side}/transformer/resblocks_")):
            block = f"{side}/transformer/resblocks_{number}"
            state |= _block_weights(own, block, f"{before}transformer.resblocks.{number}")
    for theirs, ours in (("visual/", "visual."), ("text/", "")):
        for norm in ("ln_pre", "ln_post", "ln_final"):
            if f"{theirs}{norm}/scale" in own:
                state |= _norm_weights(own, f"{theirs}{norm}", f"{ours}{norm}")
        state[f"{ours}positional_embedding"] = own[f"{theirs}positional_embedding"]
    state["visual.class_embedding"] = own["visual/class_embedding"]
    state["visual.conv1.weight"] = own["visual/conv1/kernel"].permute(3, 2, 0, 1)
    state["visual.proj"] = own["visual/proj/kernel"]
    state["text_projection"] = own["text/text_projection/kernel"]
    state["token_embedding.weight"] = own["text/token_embedding/embedding"]
    return state


def _norm_weights(own: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    return {f"{ours}.weight": own[f"{theirs}/scale"], f"{ours}.bias": own[f"{theirs}/bias"]}


def _block_weights(own: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    state = {}
    for norm in ("ln_1", "ln_2"):
        state |= _norm_weights(own, f"{theirs}/{norm}", f"{ours}.{norm}")
    parts = [f"{theirs}/attn/{part}" for part in ("query", "key", "value")]
    state[f"{ours}.attn.in_proj_weight"] = torch.cat(
        [own[f"{part}/kernel"].flatten(1).T for part in parts]
    )
    state[f"{ours}.attn.in_proj_bias"] = torch.cat(
        [own[f"{part}/bias"].flatten() for part in parts]
    )
    state[f"{ours}.attn.out_proj.weight"] = own[f"{theirs}/attn/out/kernel"].flatten(0, 1).T
    state[f"{ours}.attn.out_proj.bias"] = own[f"{theirs}/attn/out/bias"]
    for layer in ("c_fc", "c_proj"):
        state[f"{ours}.mlp.{layer}.weight"] = own[f"{theirs}/mlp/{layer}/kernel"].T
        state[f"{ours}.mlp.{layer}.bias"] = own[f"{theirs}/mlp/{layer}/bias"]
    return state


def build_clip(arrays: Mapping[str, np.ndarray]) -> nn.Module:
    """open_clip's CLIP with QuickGELU, of the sizes that the arrays have."""
    from open_clip.model import CLIP

    kernel = arrays["clip/visual/conv1/kernel"].shape
    positions = len(arrays["clip/visual/positional_embedding"])
    context, text_width = arrays["clip/text/positional_embedding"].shape
    key = arrays["clip/text/transformer/resblocks_0/attn/query/kernel"].shape
    model = CLIP(
        embed_dim=arrays["clip/visual/proj/kernel"].shape[1],
        quick_gelu=True,
        vision_cfg={
            "image_size": kernel[0] * math.isqrt(positions - 1),
            "patch_size": kernel[0],
            "width": kernel[3],
            "head_width": arrays["clip/visual/transformer/resblocks_0/attn/query/kernel"].shape[2],
            "layers": count_layers(arrays, "clip/visual/transformer/resblocks_"),
        },
        text_cfg={
            "context_length": context,
            "vocab_size": len(arrays["clip/text/token_embedding/embedding"]),
            "width": text_width,
            "heads": key[1],
            "layers": count_layers(arrays, "clip/text/transformer/resblocks_"),
        },
    )
    state = {name: tensor.contiguous() for name, tensor in clip_weights(arrays).items()}
    model.load_state_dict(state, strict=True)
    return model


# ---------------------------------------------------------------------------------------------
# The head
# ---------------------------------------------------------------------------------------------


class Norm(nn.Module):
    """Layer normalisation whose weight is 1 + scale."""

    def __init__(self, weights: Mapping[str, Tensor], name: str):
        super().__init__()
        self.scale = nn.Parameter(weights[f"{name}/scale"])
        self.bias = nn.Parameter(weights[f"{name}/bias"])

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], 1 + self.scale, self.bias, NORM_EPS)


class Attention(nn.Module):
    """Attention with logits capped by tanh. Weights (D, heads, h).

    Queries are scaled by 1 / sqrt(h) or, where there is a scale of each dimension, by
    1.442695 / sqrt(h) softplus(scale).
    """

    def __init__(self, weights: Mapping[str, Tensor], name: str):
        super().__init__()
        parts = ("query", "key", "value", "post")
        self.w = nn.ParameterDict({part: weights[f"{name}/{part}/w"] for part in parts})
        self.b = nn.ParameterDict({part: weights[f"{name}/{part}/b"] for part in parts})
        scale = weights.get(f"{name}/per_dim_scale/per_dim_scale")
        self.scale = None if scale is None else nn.Parameter(scale)

    def _project(self, part: str, x: Tensor) -> Tensor:
        return torch.einsum("btd,dnh->btnh", x, self.w[part]) + self.b[part]

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        """The queries (B, T, D) attend to x (B, S, D): (B, T, D)."""
        q, k, v = (self._project(p, t) for p, t in (("query", query), ("key", x), ("value", x)))
        factor = q.shape[-1] ** -0.5
        if self.scale is not None:
            factor = factor * SOFTPLUS * functional.softplus(self.scale)
        logits = torch.einsum("btnh,bsnh->bnts", q * factor, k)
        weights = (LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)).softmax(-1)
        found = torch.einsum("bnts,bsnh->btnh", weights, v)
        return torch.einsum("btnh,dnh->btd", found, self.w["post"]) + self.b["post"]


class Layer(nn.Module):
    """Attention and feed-forward, each of what is normalised before, added to what came in."""

    def __init__(self, weights: Mapping[str, Tensor], name: str):
        super().__init__()
        self.attention_norm = Norm(weights, f"{name}/layer_norm")
        self.attention = Attention(weights, f"{name}/self_attention")
        self.feed_norm = Norm(weights, f"{name}/ff_layer/layer_norm")
        layers = [f"{name}/ff_layer/ffn_layer{number}" for number in (1, 2)]
        self.w = nn.ParameterList([weights[f"{layer}/linear/w"] for layer in layers])
        self.b = nn.ParameterList([weights[f"{layer}/bias/b"] for layer in layers])

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        x = x + self.attention(normed, normed)
        hidden = functional.relu(self.feed_norm(x) @ self.w[0] + self.b[0])
        return x + hidden @ self.w[1] + self.b[1]


class Head(nn.Module):
    """The two features of CLIP, (B, D) each, to one of unit length, (B, D)."""

    def __init__(self, weights: Mapping[str, Tensor]):
        super().__init__()
        count = count_layers(weights, "multimodal_encoder/x_layers_")
        names = (f"multimodal_encoder/x_layers_{number}" for number in range(count))
        self.layers = nn.ModuleList([Layer(weights, name) for name in names])
        pooler = "contrastive_multimodal_pooler"
        self.query = nn.Parameter(weights[f"{pooler}/pooling_attn_query"])
        self.pool = Attention(weights, f"{pooler}/pool_attn")
        self.norm = Norm(weights, f"{pooler}/pool_attn_ln")

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        x = torch.stack([image, text], dim=1)
        for layer in self.layers:
            x = layer(x)
        found = self.norm(self.pool(self.query.expand(len(x), -1, -1), x))[:, 0]
        return found / (found.square().sum(-1, keepdim=True) + 1e-12).sqrt()


# ---------------------------------------------------------------------------------------------
# The system
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnMaximum:
    """Pixels divided by the image's own maximum, squashed to a square, bilinear on floats with
    antialiasing, then normalised as CLIP's. size: in pixels."""

    size: int

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image.convert("RGB"), np.float32)).permute(2, 0, 1)
        pixels = (pixels / (pixels.max() + 1e-12))[None]
        options = {"mode": "bilinear", "antialias": True, "align_corners": False}
        pixels = functional.interpolate(pixels, (self.size, self.size), **options)[0]
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        return (pixels - mean) / std


class MagicLens(Composer):
    """MagicLens of the arrays of its file."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        from open_clip import SimpleTokenizer

        weights = {name: torch.tensor(array) for name, array in arrays.items()}
        self.clip, self.head = build_clip(arrays), Head(weights)
        self.network = nn.ModuleList([self.clip, self.head])
        self.tokenizer = SimpleTokenizer(context_length=self.clip.context_length)
        self.preprocess = OwnMaximum(self.clip.visual.image_size[0])
        self.dim = self.head.query.shape[1]
        self.identity = {"model": "magiclens", "weights_sha256": hash_tensors(weights)}

    def queries(self, images: Tensor, texts: Sequence[str], numbers: Sequence[int]) -> Tensor:
        tokens = self.tokenizer(list(texts)).to(images.device)
        text = self.clip.encode_text(tokens)
        return self.head(self.clip.encode_image(images), text)

    def gallery(self, images: Tensor) -> Tensor:
        return self.queries(images, [""] * len(images), ())

    def is_cut(self, text: str) -> bool:
        return len(self.tokenizer.encode(text)) + 2 > self.clip.context_length


def load(place: str, options: Options) -> MagicLens:
    """Read the file. Raises UserError if there is none, or it holds another network."""
    path = require_file(place, HOW_TO_GET)
    arrays = {name.removeprefix("params/"): array for name, array in read_flax(path).items()}
    try:
        return MagicLens(arrays)
    except (KeyError, RuntimeError, ValueError, IndexError) as error:
        raise UserError(f"{path} holds another network ({one_line(error)}); {HOW_TO_GET}") from None


SYSTEM = System(
    load=load,
    prompts={
        **FORMS,
        "circo": "find {concept} but {caption}",
        "domains": "find this object in {caption}",
    },
)
