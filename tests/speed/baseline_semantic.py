"""The baselines and BASIC on CIRCO or CIRR val written straight down: the yardstick.

Query by query it compares the query with every image of the gallery, sorts the whole gallery, takes
the names in that order and looks for the positives with Python's sets, for every method anew. It
shares no code with the toolkit, so that its figures are a check on the toolkit's as well.

    cd WORLD && python3 /path/to/tests/speed/baseline_semantic.py circo image text sum product basic
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

AA, COMPONENTS, HARRIS_LAMBDA = 0.2, 250, 0.1
EXPANSION_ROWS, EXPANSION_SLOPE = 25, 0.1
FEATURES = Path("features/clip_features")


def unit(rows: np.ndarray) -> torch.Tensor:
    """Rows as a float32 tensor, each of length 1."""
    return torch.nn.functional.normalize(torch.as_tensor(rows).float(), dim=1)


class Basic:
    """BASIC's preset: what no query changes, then scores of one query against the gallery."""

    def __init__(self, gallery: torch.Tensor) -> None:
        subjects, styles = (
            unit(np.load(FEATURES / "corpus" / f"{name}.npy"))
            for name in ("generic_subjects", "generic_styles")
        )
        mean = np.load("data/laion_mean/mean_clip.npz")["mean"]
        self.image_mean = torch.as_tensor(mean).float().reshape(-1)
        self.text_mean = subjects.mean(dim=0)
        self.rows = gallery - self.image_mean
        subjects, styles = subjects - self.text_mean, styles - self.text_mean
        wanted = subjects.T @ subjects / (len(subjects) - 1)
        unwanted = styles.T @ styles / (len(styles) - 1)
        values, vectors = torch.linalg.eigh((1 - AA) * wanted - AA * unwanted + 1e-5)
        order = torch.argsort(values, descending=True)
        kept = vectors[:, order[: min(COMPONENTS, int((values > 0).sum()))]]
        self.projection = kept @ kept.T
        synthetic = np.load("synthetic_data/synthetic_clip.npz")
        images = unit(synthetic["image_features"]) - self.image_mean
        texts = unit(synthetic["text_features"]) - self.text_mean
        self.lowest = (images @ images.T).min(), (texts @ images.T).min()

    def __call__(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        image, text = image - self.image_mean, text - self.text_mean
        nearest = torch.topk(self.rows @ (self.projection @ image), EXPANSION_ROWS)
        weights = torch.exp(EXPANSION_SLOPE * torch.cat([torch.ones(1), nearest.values]))
        neighbours = torch.cat([image[None], self.rows[nearest.indices]])
        expanded = self.projection @ (weights / weights.sum() @ neighbours)
        a, b = self.lowest
        s_i = ((self.rows @ expanded - a) / a.abs()).clamp(min=0)
        s_t = ((self.rows @ text - b) / a.abs()).clamp(min=0)
        return s_i * s_t - HARRIS_LAMBDA * (s_i + s_t) ** 2


def scorers(gallery: torch.Tensor) -> dict:
    """method -> function of one query's image and text (D,), scores (N,)."""
    return {
        "image": lambda image, text: gallery @ image,
        "text": lambda image, text: gallery @ text,
        "sum": lambda image, text: gallery @ image + gallery @ text,
        "product": lambda i, t: (gallery @ i).clamp(min=0) * (gallery @ t).clamp(min=0),
        "basic": Basic(gallery),
    }


# ---------------------------------------------------------------------------------------------
# Protocols
# ---------------------------------------------------------------------------------------------


def read_json(path: str):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_circo() -> tuple[list, list]:
    """Names of the gallery, and the queries: reference, positives, target, no group."""
    info = read_json("data/circo/COCO2017_unlabeled/annotations/image_info_unlabeled2017.json")
    queries = [
        (q["reference_img_id"], set(q["gt_img_ids"]), q["target_img_id"], None)
        for q in read_json("data/circo/annotations/val.json")
    ]
    return [image["id"] for image in info["images"]], queries


def read_cirr() -> tuple[list, list]:
    """Names of the gallery, and the queries: reference, positives, target, members."""
    names = list(read_json("data/cirr/cirr/image_splits/split.rc2.val.json"))
    queries = [
        (q["reference"], {q["target_hard"]}, q["target_hard"], set(q["img_set"]["members"]))
        for q in read_json("data/cirr/cirr/captions/cap.rc2.val.json")
    ]
    return names, queries


def average_precision(ranking: list, positives: set, k: int) -> float:
    """AP@k as CIRCO's evaluation has it."""
    hits, total = 0, 0.0
    for rank, name in enumerate(ranking[:k], 1):
        if name in positives:
            hits += 1
            total += hits / rank
    return total / min(len(positives), k)


def judge_circo(ranking: list, reference, positives: set, target, members) -> dict[str, float]:
    """mAP with the reference in and out, and recall of the target."""
    without = [name for name in ranking if name != reference]
    figures = {}
    for k in (5, 10, 25, 50):
        figures[f"mAP@{k}"] = average_precision(ranking, positives, k)
        figures[f"Recall@{k}"] = float(target in set(ranking[:k]))
        figures[f"mAP@{k} reference out"] = average_precision(without, positives, k)
    return figures


def judge_cirr(ranking: list, reference, positives: set, target, members: set) -> dict[str, float]:
    """Recall over the split and over the group, the reference left out."""
    ranking = [name for name in ranking if name != reference]
    group = [name for name in ranking if name in members]
    return {
        **{f"Recall@{k}": float(target in set(ranking[:k])) for k in (1, 5, 10, 50)},
        **{f"Recall_subset@{k}": float(target in set(group[:k])) for k in (1, 2, 3)},
    }


PROTOCOLS = {"circo": (read_circo, judge_circo), "cirr": (read_cirr, judge_cirr)}


def load_queries(
    folder: Path, gallery: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The image and the text feature of each query, (Q, D) unit rows. kind: of text features."""
    with open(folder / "query.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts = unit(np.load(folder / f"query_{kind}.npy"))
    images = torch.tensor([int(row["image_row"]) for row in rows])
    return gallery[images], texts[torch.tensor([int(row["text_row"]) for row in rows])]


@torch.inference_mode()
def evaluate(name: str, method: str, sample: int) -> dict[str, float]:
    """The means of one method, in percent, from the files on disk.

    sample: how many queries, 0 for all; seconds_left: what the others would take at that rate.
    """
    read, judge = PROTOCOLS[name]
    names, queries = read()
    folder = FEATURES / name
    gallery = unit(np.load(folder / "database_image.npy"))
    kind = "context_text" if method == "basic" else "text"  # as its preset has it
    images, texts = load_queries(folder, gallery, kind)
    score = scorers(gallery)[method]
    figures, started, sample = [], time.perf_counter(), sample or len(queries)
    for image, text, query in islice(zip(images, texts, queries, strict=True), sample):
        order = torch.argsort(score(image, text), descending=True, stable=True)
        ranking = [names[row] for row in order.tolist()]
        figures.append(judge(ranking, *query))
    means = {key: 100 * float(np.mean([own[key] for own in figures])) for key in figures[0]}
    left = (time.perf_counter() - started) * (len(queries) / len(figures) - 1)
    return means | {"seconds_left": round(left, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=PROTOCOLS)
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--sample", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    rows = [{"method": m} | evaluate(options.name, m, options.sample) for m in options.methods]
    seconds = f"{time.perf_counter() - started:.2f}"
    Path("results_baseline").mkdir(exist_ok=True)
    with open("results_baseline/table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], "seconds"])
        writer.writeheader()
        writer.writerows(row | {"seconds": seconds} for row in rows)


if __name__ == "__main__":
    main()
