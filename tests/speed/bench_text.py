"""Texts encoded per second, against a loop that encodes every text as it comes.

The plain loop is the definition written straight down: for every query, recurring or not, the
prompts of its text in one batch, padded to the model's full context. Model and texts are made here:
random weights (speed does not depend on them), phrases of corpora/generic_styles.csv as query
texts, each recurring as often as i-CIR's do, and 100 rows of
corpora/generic_subjects.csv as words. Both sides run in turns, and the medians are compared.

    python3 tests/speed/bench_text.py
    python3 tests/speed/bench_text.py --model ViT-L-14 --gpu 0 --queries 200
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils import run_command, select_device  # noqa: E402
from utils_features import Encoder, load_encoder  # noqa: E402

WORDS = 100
RECURRENCE = 1883 / 1010  # i-CIR: queries per distinct text
PLAIN_BATCH = 200


def make_model(folder: Path, architecture: str) -> str:
    """Save an architecture with seeded random weights and give its spec."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.create_model(architecture)
    config = {"model_cfg": open_clip.get_model_config(architecture), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), str(folder / "open_clip_model.safetensors"))
    return f"local-dir:{folder}"


def read_prompts(name: str, count: int) -> list[str]:
    """`count` prompts spread over a corpus of the repository."""
    with open(ROOT / "corpora" / f"{name}.csv", encoding="utf-8", newline="") as file:
        prompts = [row[0] for row in csv.reader(file)]
    return [prompts[index] for index in np.linspace(0, len(prompts) - 1, count).astype(int)]


def make_queries(count: int) -> list[str]:
    """Texts of `count` queries, each distinct one recurring as often as i-CIR's on average."""
    distinct = read_prompts("generic_styles", round(count / RECURRENCE))
    return [distinct[index % len(distinct)] for index in range(count)]


@torch.inference_mode()
def encode_plainly(encoder: Encoder, texts: list[str]) -> np.ndarray:
    """Features (n, D) of texts in the order they come, at full length."""
    batches = [texts[start : start + PLAIN_BATCH] for start in range(0, len(texts), PLAIN_BATCH)]
    tokens = (encoder.tokenizer(batch).to(encoder.device) for batch in batches)
    return np.concatenate([encoder.model.encode_text(batch).cpu().numpy() for batch in tokens])


def contextualise_plainly(encoder: Encoder, texts: list[str], words: list[str]) -> np.ndarray:
    """Contextual features (n, D), one query after the other."""
    rows = []
    for text in texts:
        prompts = [f"{word} {text}" for word in words] + [f"{text} {word}" for word in words]
        features = encode_plainly(encoder, prompts)
        rows.append((features / np.linalg.norm(features, axis=1, keepdims=True)).mean(axis=0))
    return np.stack(rows)


def compare(
    name: str, plain: Callable[[], np.ndarray], ours: Callable[[], np.ndarray], runs: int
) -> str:
    """Run both in turns and give a line of a table: queries/s of each, ratio, difference."""
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    results = {}
    for _ in range(runs):
        for side, function in (("plain", plain), ("ours", ours)):
            start = time.perf_counter()
            results[side] = function()
            seconds[side].append(time.perf_counter() - start)
    slow, fast = (statistics.median(seconds[side]) for side in ("plain", "ours"))
    count = len(results["ours"])
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["ours"], strict=True)]
    difference = np.abs(results["plain"] - results["ours"]).max()
    return (
        f"{name:12} {count:8} {count / slow:10.3g} {count / fast:10.3g} {slow / fast:8.1f} "
        f"{min(ratios):6.1f} to {max(ratios):.1f} {difference:10.1e}"
    )


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="ViT-B-32", help="an architecture of open_clip's")
    parser.add_argument("--gpu", type=int, default=-1)
    parser.add_argument("--queries", type=int, default=9, help="queries to contextualise")
    parser.add_argument("--texts", type=int, default=400, help="queries whose texts are encoded")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    logging.disable(logging.WARNING)
    device = select_device(arguments.gpu)
    with tempfile.TemporaryDirectory() as folder:
        encoder = load_encoder(make_model(Path(folder), arguments.model), device)
    words = read_prompts("generic_subjects", WORDS)
    queries, texts = make_queries(arguments.queries), make_queries(arguments.texts)
    batch, runs = arguments.batch, arguments.runs
    print(
        f"{arguments.model}, {device}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {platform.machine()}; medians of {runs} runs"
    )
    print(
        f"{'':12} {'queries':>8} {'plain /s':>10} {'ours /s':>10} {'ratio':>8}  range  difference"
    )
    lines = [
        (
            "contextual",
            lambda: contextualise_plainly(encoder, queries, words),
            lambda: encoder.encode_contextual_texts(queries, words, batch),
        ),
        (
            "text",
            lambda: encode_plainly(encoder, texts),
            lambda: encoder.encode_texts(texts, batch),
        ),
    ]
    for name, plain, ours in lines:
        ours()  # warm up
        print(compare(name, plain, ours, runs), flush=True)


if __name__ == "__main__":
    run_command(main)
