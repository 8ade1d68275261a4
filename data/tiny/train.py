"""Train the tiny world's CLIP from nothing: `python3 data/tiny/train.py [--out DIR]`.

Renders the training images, trains with the contrastive loss, and writes an open_clip folder
(open_clip_config.json, open_clip_model.safetensors in fp16) and training_log.json. Seeded, with
torch's deterministic kernels: on one machine the weights repeat to the byte.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from captions import UNSAID, attributes, caption, full_caption
from render import SIZE, STYLES, Thing, draw_thing, render

HERE = Path(__file__).resolve().parent
TRAINING_SEED_SPACE, EVALUATION_SEED_SPACE = 1 << 40, 2 << 40  # far from every split's seeds
CHUNK = 500  # images per rendering task
CONTEXT_LENGTH = 24
FULL_VOCABULARY = 49408  # rows of open_clip's own tokenizer
MODEL = {
    "embed_dim": 128,
    "quick_gelu": False,
    "vision_cfg": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
    "text_cfg": {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": FULL_VOCABULARY,
        "width": 64,
        "heads": 2,
        "layers": 3,
    },
}
MEAN, STD = (0.5, 0.5, 0.5), (0.28, 0.28, 0.28)
PREPROCESS = {
    "size": SIZE,
    "mode": "RGB",
    "mean": list(MEAN),
    "std": list(STD),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------


def draw_sample(number: int, held_out: bool) -> tuple[Thing, str]:
    """The thing and the style of an image of the training world or of the held-out one."""
    space = EVALUATION_SEED_SPACE if held_out else TRAINING_SEED_SPACE
    rng = np.random.default_rng(space + number)
    thing = draw_thing(rng, held_out)
    return thing, str(rng.choice(list(STYLES)))


def _render_chunk(task: tuple[int, int, bool]) -> np.ndarray:
    start, stop, held_out = task
    space = EVALUATION_SEED_SPACE if held_out else TRAINING_SEED_SPACE
    images = np.empty((stop - start, SIZE, SIZE, 3), dtype=np.uint8)
    for number in range(start, stop):
        images[number - start] = render(*draw_sample(number, held_out), space + number)
    return images


def render_samples(count: int, held_out: bool, workers: int) -> np.ndarray:
    """The first `count` images of the training world or of the held-out one, uint8 (n, S, S, 3)."""
    starts = range(0, count, CHUNK)
    tasks = [(start, min(start + CHUNK, count), held_out) for start in starts]
    images = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for (start, stop, _), part in zip(tasks, pool.map(_render_chunk, tasks), strict=True):
            images[start:stop] = part
    return images


def draw_batches(
    families: np.ndarray, steps: int, size: int, rng: np.random.Generator, hard_from: float
):
    """Yield the image rows of each step; late on, every other batch shows only few families."""
    by_family = [np.flatnonzero(families == f) for f in range(families.max() + 1)]
    queue = np.empty(0, dtype=np.int64)
    for step in range(steps):
        if step >= hard_from * steps and step % 2:
            chosen = rng.choice(len(by_family), 4, replace=False)
            yield np.concatenate([rng.choice(by_family[f], size // 4) for f in chosen])
            continue
        if len(queue) < size:
            queue = np.concatenate([queue, rng.permutation(len(families))])
        yield queue[:size]
        queue = queue[size:]


# ---------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------


class CompactTokenizer:
    """open_clip's tokenizer with its ids renumbered, in order, to those this world uses."""

    def __init__(self, texts: list[str]):
        from open_clip.tokenizer import SimpleTokenizer

        self._full = SimpleTokenizer(context_length=CONTEXT_LENGTH)
        words = sorted({word for text in texts for word in text.split()})
        self.ids = np.unique(self._full(words).numpy())  # the end token stays the largest

    def __call__(self, texts: list[str]):
        import torch

        return torch.from_numpy(np.searchsorted(self.ids, self._full(texts).numpy()))


def build_model(vocabulary: int):
    from open_clip.model import CLIP

    text = MODEL["text_cfg"] | {"vocab_size": vocabulary}
    return CLIP(MODEL["embed_dim"], MODEL["vision_cfg"], text, quick_gelu=MODEL["quick_gelu"])


def contrastive_loss(image_features, text_features, scale, also_true):
    """Symmetric InfoNCE; pairs in `also_true` (n, n; text by image) are no negatives.

    A caption such as "on the beach" is true of several images of a batch; pushing it away from
    them would teach nothing.
    """
    import torch
    from torch.nn import functional

    logits = scale * text_features @ image_features.T
    logits = logits.masked_fill(also_true, float("-inf"))
    target = torch.arange(len(logits))
    by_text = functional.cross_entropy(logits, target)
    return (by_text + functional.cross_entropy(logits.T, target)) / 2


def find_also_true(mentions: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Where text i, by its (n, 6) mentions, is true of image j != i, by its (n, 6) attributes."""
    agrees = (mentions[:, None] == UNSAID) | (mentions[:, None] == shown[None])
    true = agrees.all(axis=2)
    np.fill_diagonal(true, False)
    return true


def _to_pixels(images: np.ndarray):
    import torch

    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


def measure_recall(model, tokenizer, images: np.ndarray, samples: list) -> dict[str, float]:
    """Share of images whose own full caption is among the 1 or 5 best of all, and the reverse."""
    import torch

    model.eval()
    with torch.no_grad():
        blocks = [_to_pixels(images[i : i + 250]) for i in range(0, len(images), 250)]
        image = torch.cat([model.encode_image(b, normalize=True) for b in blocks])
        texts = [full_caption(thing, style) for thing, style in samples]
        text = model.encode_text(tokenizer(texts), normalize=True)
    model.train()
    scores = image @ text.T
    found = {}
    for name, table in (("image_to_text", scores), ("text_to_image", scores.T)):
        rank = (table > table.diagonal()[:, None]).sum(dim=1)
        for k in (1, 5):
            found[f"{name}_R@{k}"] = round(float((rank < k).float().mean()), 4)
    return found


def save_folder(model, tokenizer: CompactTokenizer, folder: Path) -> None:
    """Write the open_clip folder; rows of tokens that were never trained are zero."""
    import torch
    from safetensors.torch import save_file

    state = model.state_dict()
    table = state["token_embedding.weight"]
    full = torch.zeros(FULL_VOCABULARY, table.shape[1])
    full[torch.from_numpy(tokenizer.ids).long()] = table
    state["token_embedding.weight"] = full
    state = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in state.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "open_clip_model.safetensors"
    save_file(state, weights)
    weights.chmod(0o644)
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    started = time.time()
    images = render_samples(args.images, held_out=False, workers=args.workers)
    held_images = render_samples(args.held_out, held_out=True, workers=args.workers)
    samples = [draw_sample(i, held_out=False) for i in range(args.images)]
    held = [draw_sample(i, held_out=True) for i in range(args.held_out)]
    shown = np.stack([attributes(*sample) for sample in samples])
    rendering_seconds = time.time() - started
    print(f"rendered {args.images} images in {rendering_seconds:.0f} s", flush=True)

    import open_clip
    import torch

    torch.set_num_threads(args.threads)
    torch.backends.cuda.enable_flash_sdp(False)  # its CPU form is slower on texts this short
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    rng = np.random.default_rng(args.seed)
    words = np.random.default_rng(1)
    tokenizer = CompactTokenizer(
        [
            caption(*samples[i % len(samples)], words)[0]
            for i in range(max(20_000, args.images // 2))
        ]
        + [full_caption(thing, style) for thing, style in samples[:20_000]]
    )
    model = build_model(len(tokenizer.ids)).to(memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.decay}, {"params": plain, "weight_decay": 0.0}],
        lr=args.rate,
        betas=(0.9, 0.98),
    )
    warmup = min(100, args.steps // 10 + 1)
    history, total = [], 0.0
    training_started, cpu_started = time.time(), time.process_time()
    for step, rows in enumerate(
        draw_batches(shown[:, 0], args.steps, args.batch, rng, args.hard_from)
    ):
        done = max(0, step - warmup) / max(1, args.steps - warmup)
        rate = args.rate * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        said = [caption(*samples[row], rng) for row in rows]
        also_true = find_also_true(np.stack([mention for _, mention in said]), shown[rows])
        tokens = tokenizer([text for text, _ in said])
        with torch.autocast("cpu", torch.bfloat16):
            image = model.encode_image(_to_pixels(images[rows]))
            text = model.encode_text(tokens)
        image = torch.nn.functional.normalize(image.float(), dim=1)
        text = torch.nn.functional.normalize(text.float(), dim=1)
        loss = contrastive_loss(image, text, model.logit_scale.exp(), torch.from_numpy(also_true))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        total += float(loss.detach())
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            count = args.every if (step + 1) % args.every == 0 else (step + 1) % args.every
            entry = {"step": step + 1, "loss": round(total / count, 4)}
            if (step + 1) % (4 * args.every) == 0 or step + 1 == args.steps:
                entry |= measure_recall(model, tokenizer, held_images, held)
            entry["seconds"] = round(time.time() - training_started, 1)
            history.append(entry)
            total = 0.0
            print(json.dumps(entry), flush=True)
    save_folder(model, tokenizer, args.out)
    log = {
        "command": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        | {"out": args.out.name},
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer.ids),
        "samples_seen": args.steps * args.batch,
        "held_out_renders": args.held_out,
        "rendering_seconds": round(rendering_seconds, 1),
        "training_seconds": round(time.time() - training_started, 1),
        "training_cpu_seconds": round(time.process_time() - cpu_started, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
            "numpy": np.__version__,
        },
        "history": history,
    }
    (args.out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "clip", help="folder to write")
    parser.add_argument("--images", type=int, default=80_000, help="training renders")
    parser.add_argument("--held_out", type=int, default=1_000, help="renders recall is taken on")
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay")
    parser.add_argument("--hard_from", type=float, default=0.5, help="share of steps before")
    parser.add_argument("--every", type=int, default=50, help="steps between log entries")
    parser.add_argument("--threads", type=int, default=1, help="of torch; part of the result")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="that render")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.workers < 1:
        parser.error("--workers: at least one renders")
    train(args)


if __name__ == "__main__":
    main()
