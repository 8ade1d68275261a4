"""Helpers of the tests: the golden worlds for domain conversion (tests/golden_domains)."""

from __future__ import annotations

import csv
import json
import shutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.domains import BENCHMARK
from utils import write_csv, write_json
from utils_task import Task

if TYPE_CHECKING:
    from utils_features import Encoder

GOLDEN = Path(__file__).parent / "golden_domains"
DATA = GOLDEN / "data"
WORDS = "open_image_v7_class_names"
NAMES = ("imagenet_r", "nico", "minidn", "ltll")


@cache
def golden(name: str) -> dict:
    """What the published code computes on a data set: expected/NAME.json."""
    return json.loads((GOLDEN / "expected" / f"{name}.json").read_text(encoding="utf-8"))


@cache
def read_task(name: str) -> Task:
    return BENCHMARK.tasks[name](DATA / name)


def copy_lists(name: str, root: Path) -> Path:
    """A copy of a data set's annotation files alone, which a test may spoil."""
    root.mkdir(parents=True)
    for path in (*(DATA / name).glob("*.csv"), *(DATA / name).glob("*.txt")):
        shutil.copy(path, root)
    return root


def published_ranks(figures: dict) -> tuple[np.ndarray, np.ndarray]:
    """The ranks of a method's positives, int64 (P,), and whose they are, (P,)."""
    by_query = [[int(rank) for rank in ranks.split()] for ranks in figures["ranks"]]
    query = np.repeat(np.arange(len(by_query)), [len(ranks) for ranks in by_query])
    return np.array([rank for ranks in by_query for rank in ranks], np.int64), query


def read_prompts(path: Path = DATA / f"{WORDS}.csv") -> list[str]:
    """The first column of a CSV without a header: FREEDOM's words, or another corpus."""
    with open(path, encoding="utf-8", newline="") as file:
        return [row[0] for row in csv.reader(file)]


def stored_features(name: str, words: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The published features of a data set: gallery (N, D), and by name those of each query (Q, D).

    words: of the second backbone, whose texts differ.
    """
    task, suffix = read_task(name), "_words" if words else ""
    with np.load(GOLDEN / "expected" / f"{name}_features.npz") as arrays:
        gallery = torch.from_numpy(arrays["gallery"])
        images = torch.from_numpy(arrays["query"]) if "query" in arrays else gallery
        place = {text: row for row, text in enumerate(arrays["texts"].tolist())}
        text = [place[text] for text in task.queries.text]
        texts = {
            kind: torch.from_numpy(arrays[f"{kind}{suffix}"])[text]
            for kind in ("text", "context_text")
        }
    row = [int(key.partition("-")[0]) - 1 for key in task.queries.key]
    return gallery, {"image": images[row], **texts}


def save_words_clip(tiny: Path, folder: Path) -> Path:
    """The tiny backbone in which the domain words mean something: words.json gives them rows."""
    from open_clip.tokenizer import SimpleTokenizer
    from safetensors.torch import load_file, save_file

    ids, state = SimpleTokenizer().encoder, load_file(tiny / "open_clip_model.safetensors")
    table = state["token_embedding.weight"]
    known = json.loads((GOLDEN / "words.json").read_text(encoding="utf-8"))
    for word, model in known.items():
        for token in {word, f"{word}</w>"} & ids.keys():
            table[ids[token]] = table[ids[f"{model}</w>"]]
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(tiny / "open_clip_config.json", folder)
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def write_corpora(folder: Path, encoder: Encoder) -> None:
    """FREEDOM's words and BASIC's two corpora, encoded, in a backbone's folder."""
    corpora = {WORDS: DATA / f"{WORDS}.csv"}
    tiny = GOLDEN.parents[1] / "data" / "tiny" / "corpora"
    corpora |= {name: tiny / f"{name}.csv" for name in ("generic_subjects", "generic_styles")}
    target = folder / "corpus"
    target.mkdir(parents=True)
    for name, path in corpora.items():
        prompts = read_prompts(path)
        np.save(target / f"{name}.npy", encoder.encode_texts(prompts, 256))
        write_csv(target / f"{name}.csv", ["prompt"], [[prompt] for prompt in prompts])
        write_json(target / f"{name}.json", {"model": encoder.identity})
