"""CompoDiff (TMLR 2024): a diffusion prior draws the query in CLIP ViT-L/14's image space.

Conditions are the image's CLIP feature (projected, not of unit length) and the last states of
CLIP bigG's text tower, of the text and of the negative text. Ten steps of DDIM, the mean of two
draws, a tenth of the image's own feature mixed in: the published usage. Gallery images are plain
CLIP features. A folder holds the prior (model.safetensors or pytorch_model.bin) and, where they are
not to come from open_clip's list, the towers as open_clip folders `image` and `text`.

The text tower masks padding. As in the published usage, the negative text is read with the mask of
the query's text. Which token pads is not published; it is the end token here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from composed.system import Composer, Options, System
from composed.tensors import count_layers, hash_tensors, load_tensors, shape_of
from utils import UserError
from utils_backbones import LOCAL_DIR
from utils_features import Encoder, load_encoder

FILES = ("model.safetensors", "pytorch_model.bin")
IMAGE_TOWER, TEXT_TOWER = "ViT-L-14-quickgelu/openai", "ViT-bigG-14/laion2b_s39b_b160k"
NEGATIVE_TEXT = "low quality"
STEPS, DRAWS, TIMES = 10, 2, 1000
IMAGE_SCALE, TEXT_SCALE, SOURCE_WEIGHT = 1.5, 7.5, 0.1
SQUASHED = 512  # pixels a side that a query image is squashed to before CLIP's preprocessing
MASK = 64 * 64
COSINE_SCALE, BUCKETS = 16, 16
NORM_EPS = 1e-5


# ---------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------


class Prior:
    """The denoiser, of the tensors of its file (names without "net."), and its schedule."""

    def __init__(self, weights: Mapping[str, Tensor]):
        self.w = weights
        self.layers = count_layers(weights, "transformer.layers.")
        self.dim = len(weights["to_text_embeds.0.weight"])
        self.text_dim = weights["to_text_embeds.0.weight"].shape[1]
        self.schedule = cosine_schedule()

    def to(self, device: torch.device) -> Prior:
        """The same on a device."""
        self.w = {name: tensor.to(device) for name, tensor in self.w.items()}
        self.schedule = {name: values.to(device) for name, values in self.schedule.items()}
        return self

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def _norm(self, x: Tensor, gain: str) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], self.w[gain], None, NORM_EPS)

    def _mlp(self, x: Tensor, name: str) -> Tensor:
        for layer in ("0.0", "1.0"):
            x = functional.silu(self._linear(x, f"{name}.net.{layer}"))
        return self._linear(x, f"{name}.net.2")

    def _self_attention(self, x: Tensor, name: str, bias: Tensor) -> Tensor:
        """Cosine attention: many heads of queries, one of keys and values, a null before these."""
        head = self.w[f"{name}.null_kv"].shape[1]
        x = self._norm(x, f"{name}.norm.g")
        q = self._linear(x, f"{name}.to_q").unflatten(-1, (-1, head)).transpose(1, 2)
        k, v = self._linear(x, f"{name}.to_kv").chunk(2, dim=-1)
        freqs = self.w["transformer.rotary_emb.freqs"]
        q, k = rotate(q, freqs), rotate(k, freqs)
        null_k, null_v = (null.expand(len(x), 1, -1) for null in self.w[f"{name}.null_kv"])
        k = functional.normalize(torch.cat([null_k, k], dim=1), dim=-1)
        v = torch.cat([null_v, v], dim=1)
        logits = COSINE_SCALE * functional.normalize(q, dim=-1) @ k[:, None].transpose(-1, -2)
        found = (logits + bias).softmax(-1) @ v[:, None]
        return self._out(found, name)

    def _cross_attention(self, x: Tensor, context: Tensor, name: str) -> Tensor:
        """Attention of the tokens to the conditions, a null before these."""
        head = self.w[f"{name}.null_kv"].shape[1]
        q = self._linear(self._norm(x, f"{name}.norm.g"), f"{name}.to_q")
        k, v = self._linear(context, f"{name}.to_kv").chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, head)).transpose(1, 2) for part in (q, k, v))
        nulls = self.w[f"{name}.null_kv"]
        k, v = (
            torch.cat([null.expand(*part.shape[:2], 1, -1), part], dim=2)
            for null, part in zip(nulls, (k, v), strict=True)
        )
        weights = (q @ k.transpose(-1, -2) / math.sqrt(head)).softmax(-1)
        return self._out(weights @ v, name)

    def _out(self, found: Tensor, name: str) -> Tensor:
        out = self._linear(found.transpose(1, 2).flatten(2), f"{name}.to_out.0")
        return self._norm(out, f"{name}.to_out.1.g")

    def _feed(self, x: Tensor, name: str) -> Tensor:
        a, gate = self._linear(self._norm(x, f"{name}.0.g"), f"{name}.1").chunk(2, dim=-1)
        return self._linear(a * functional.silu(gate), f"{name}.5")

    def _bias(self, count: int) -> Tensor:
        """What attention logits (heads, count, count + 1) are shifted by, the null counting."""
        table = self.w["transformer.rel_pos_bias.relative_attention_bias.weight"]
        places = torch.arange(count + 1, device=table.device)
        # Distances this small have a bucket each.
        far = (places[:count, None] - places[None]).clamp(0, BUCKETS - 1)
        return table[far].permute(2, 0, 1)

    def __call__(self, x: Tensor, image: Tensor, text: Tensor, time: Tensor) -> Tensor:
        """The vectors (B, 1, D) that noisy ones (B, 1, D) come from.

        image (B, 1, D), text (B, 77, T): conditions; time int64 (B,).
        """
        mask = torch.zeros(len(x), 1, MASK, device=x.device)
        clock = self._mlp(time_features(time, self.dim)[:, None], "to_time_embeds.0.1")
        context = [
            self._linear(text, "to_text_embeds.0"),
            image,
            self._mlp(mask, "to_mask_embeds.1"),
        ]
        context, x = torch.cat(context, dim=1), torch.cat([x, clock], dim=1)
        bias = self._bias(x.shape[1])
        for number in range(self.layers):
            layer = f"transformer.layers.{number}"
            x = x + self._self_attention(x, f"{layer}.0", bias)
            x = x + self._cross_attention(x, context, f"{layer}.1")
            x = x + self._feed(x, f"{layer}.2")
        x = self._norm(x / x.amax(-1, keepdim=True), "transformer.norm.g")
        return self._linear(x, "transformer.project_out")[:, :1]


def time_features(time: Tensor, dim: int) -> Tensor:
    """Sines, then cosines of times (B,) at falling frequencies: (B, dim)."""
    half = dim // 2
    steps = torch.arange(half, device=time.device, dtype=torch.float32)
    angles = time.float()[:, None] * torch.exp(steps * -(math.log(10000) / (half - 1)))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def rotate(x: Tensor, freqs: Tensor) -> Tensor:
    """Rotary positions on the first numbers of x (..., places, h), neighbours in pairs."""
    places = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
    angles = (places[:, None] * freqs).repeat_interleave(2, dim=-1)
    first, rest = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
    even, odd = first.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return torch.cat([first * angles.cos() + turned * angles.sin(), rest], dim=-1)


def cosine_schedule() -> dict[str, Tensor]:
    """Of the products a of alphas up to each time, float32 (TIMES,), computed in float64:

    "previous" those up to the time before, "reciprocal" 1 / sqrt(a), "noise" sqrt(1 / a - 1).
    """
    x = torch.linspace(0, TIMES, TIMES + 1, dtype=torch.float64)
    wave = torch.cos((x / TIMES + 0.008) / 1.008 * math.pi * 0.5) ** 2
    alphas = torch.cumprod(1 - (1 - wave[1:] / wave[:-1]).clip(0, 0.999), 0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    found = {
        "previous": previous,
        "reciprocal": (1 / alphas).sqrt(),
        "noise": (1 / alphas - 1).sqrt(),
    }
    return {name: values.float() for name, values in found.items()}


# ---------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------


def sample(prior: Prior, image: Tensor, text: Tensor, negative: Tensor, seed: int) -> Tensor:
    """The mean of the draws of each query, (Q, D), by DDIM with guidance.

    image (Q, 1, D), text and negative (Q, 77, T). Every query is drawn with the seed by itself, on
    the CPU, so that its draws depend on no other query and on no device.
    """
    device, count = image.device, len(image)
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        drawn = torch.randn((DRAWS, 1, prior.dim), generator=generator)
        return drawn.repeat(count, 1, 1).to(device)

    image, text, negative = (p.repeat_interleave(DRAWS, 0) for p in (image, text, negative))
    conditions = [
        torch.cat(parts)
        for parts in ((image, image, torch.zeros_like(image)), (text, negative, negative))
    ]
    times = torch.linspace(-1.0, TIMES, STEPS + 1)[:-1].int().tolist()[::-1]
    x = noise()
    for time, following in pairwise(times):
        at = torch.full((3 * len(x),), time, device=device)
        full, against, none = prior(x.repeat(3, 1, 1), *conditions, at).chunk(3)
        clean = none + TEXT_SCALE * (full - against) + IMAGE_SCALE * (against - none)
        if following < 0:
            x = clean
            continue
        schedule = prior.schedule
        wrong = (schedule["reciprocal"][time] * x - clean) / schedule["noise"][time]
        now, then = schedule["previous"][time], schedule["previous"][following]
        fresh = ((1 - now / then) * (1 - then) / (1 - now)).sqrt()
        kept = ((1 - then) - fresh.square()).sqrt()
        x = clean * then.sqrt() + fresh * noise() + kept * wrong
    return x.view(count, DRAWS, -1).mean(1)


# ---------------------------------------------------------------------------------------------
# The towers
# ---------------------------------------------------------------------------------------------


class TextStates(nn.Module):
    """The last states of a CLIP text tower, behind its last norm, padding masked."""

    def __init__(self, clip: nn.Module, end: int):
        super().__init__()
        self.clip, self.end = clip, end

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """States (B, L, T) of tokens (B, L), of which the first `lengths` (B,) are looked at."""
        clip = self.clip
        x = clip.token_embedding(tokens) + clip.positional_embedding
        seen = torch.arange(x.shape[1], device=x.device)[None] < lengths[:, None]
        mask = clip.attn_mask[None] + torch.where(seen, 0.0, -torch.inf)[:, None]
        heads = clip.transformer.resblocks[0].attn.num_heads
        x = clip.transformer(x, attn_mask=mask.repeat_interleave(heads, 0))
        return clip.ln_final(x)


@dataclass(frozen=True)
class SquashFirst:
    """CLIP's preprocessing of an image that is squashed to a square before."""

    preprocess: Callable
    side: int = SQUASHED

    def __call__(self, image: Image.Image) -> Tensor:
        return self.preprocess(image.convert("RGB").resize((self.side, self.side)))


class CompoDiff(Composer):
    """CompoDiff of a folder: its prior, and the encoders of both towers."""

    def __init__(self, prior: Prior, image: Encoder, text: Encoder, seeds: tuple[int, ...]):
        self.prior, self.seeds = prior, seeds
        self.image, self.tokenizer = image, text.tokenizer
        self.states = TextStates(text.model, text.model.vocab_size - 1)
        self.network = nn.ModuleList([image.model, self.states])
        self.preprocess = image.preprocess
        self.query_preprocess = SquashFirst(image.preprocess)
        self.dim = prior.dim
        self.identity = {
            "model": "compodiff",
            "weights_sha256": hash_tensors(prior.w),
            "image_tower": image.identity,
            "text_tower": text.identity,
            "seeds": list(seeds),
        }

    @property
    def query_columns(self) -> dict[str, int]:
        further = (f"query_composed_draw{n}" for n in range(2, len(self.seeds) + 1))
        return super().query_columns | dict.fromkeys(further, self.dim)

    def _features(self, images: Tensor) -> Tensor:
        """CLIP features of preprocessed images, projected, as they are."""
        encoder = replace(self.image, device=images.device)
        return encoder.encode_images(images).to(images.device)

    def queries(self, images: Tensor, texts: Sequence[str], numbers: Sequence[int]) -> Tensor:
        self.prior.to(images.device)
        image = self._features(images)[:, None]
        tokens, lengths = (part.to(images.device) for part in self._tokens(texts))
        negative, _ = self._tokens([NEGATIVE_TEXT] * len(texts))
        text = self.states(tokens, lengths)
        against = self.states(negative.to(images.device), lengths)
        rows = []
        for seed in self.seeds:
            drawn = sample(self.prior, image, text.float(), against.float(), seed)
            mixed = (1 - SOURCE_WEIGHT) * drawn + SOURCE_WEIGHT * image[:, 0]
            rows.append(functional.normalize(mixed, dim=-1))
        return torch.cat(rows, dim=1)

    def gallery(self, images: Tensor) -> Tensor:
        return functional.normalize(self._features(images), dim=-1)

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens (B, L), the end token behind their end, and how many there are, (B,)."""
        tokens = self.tokenizer(list(texts))
        lengths = tokens.argmax(1) + 1
        behind = torch.arange(tokens.shape[1])[None] >= lengths[:, None]
        return torch.where(behind, self.states.end, tokens), lengths

    def is_cut(self, text: str) -> bool:
        return len(self.tokenizer.encode(text)) + 2 > self.states.clip.context_length


# ---------------------------------------------------------------------------------------------
# The system
# ---------------------------------------------------------------------------------------------


def read_prior(path: Path) -> Prior:
    """The prior of a file. Raises UserError if it holds another network."""
    state = load_tensors(path)
    weights = {
        name.removeprefix("model.").removeprefix("net."): tensor.float()
        for name, tensor in state.items()
        if "noise_scheduler." not in name
    }
    freqs = [name for name in weights if name.endswith("rotary_emb.freqs")]
    if freqs:
        weights["transformer.rotary_emb.freqs"] = weights[freqs[0]]
    shape_of(weights, "to_text_embeds.0.weight", 2, path)
    for name in ("transformer.norm.g", "transformer.rotary_emb.freqs"):
        shape_of(weights, name, 1, path)
    return Prior(weights)


def _tower(folder: Path, name: str, usual: str) -> Encoder:
    """The CLIP of a subfolder or, where there is none, of open_clip's list."""
    own = folder / name
    spec = f"{LOCAL_DIR}{own}" if own.is_dir() else usual
    return load_encoder(spec, torch.device("cpu"))


def load(place: str, options: Options) -> CompoDiff:
    """Read the folder. Raises UserError if the prior is not there, or its towers do not fit."""
    folder = Path(place)
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder} holds none of {', '.join(FILES)}: CompoDiff's prior is expected")
    prior = read_prior(found[0])
    image, text = (
        _tower(folder, name, usual)
        for name, usual in (("image", IMAGE_TOWER), ("text", TEXT_TOWER))
    )
    if (image.dim, text.token_dim) != (prior.dim, prior.text_dim):
        raise UserError(
            f"{found[0]} is for image features of {prior.dim} and text states of {prior.text_dim} "
            f"numbers, but the towers give {image.dim} and {text.token_dim}"
        )
    return CompoDiff(prior, image, text, options.seeds or (0,))


SYSTEM = System(load=load, takes=("seeds",))
