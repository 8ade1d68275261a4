"""BASIC on i-CIR written straight down, the way a first implementation would be: the yardstick.

Per instance it reads the corpora, the mean and the synthetic features again, computes the
projection and the minima again, picks the instance's rows by scanning every string, sorts all the
rows of the database, and looks for the positives pair by pair. Features are in the reference's
pickles and are held in memory. It shares no code with the toolkit, so that its figures are a check
on the toolkit's as well.

    cd WORLD && python3 /path/to/tests/speed/baseline.py --output results_baseline
"""

from __future__ import annotations

import argparse
import csv
import pickle
import time
from pathlib import Path

import numpy as np
import torch

AA, COMPONENTS, HARRIS_LAMBDA = 0.2, 250, 0.1
EXPANSION_ROWS, EXPANSION_SLOPE = 25, 0.1


def load_pickle(path: Path) -> dict:
    """Unpickle a file; only for worlds made on this machine, as pickles can run code."""
    with open(path, "rb") as file:
        return pickle.load(file)


def unit(rows: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Rows as a float32 tensor, each of length 1."""
    return torch.nn.functional.normalize(torch.as_tensor(rows).float(), dim=1)


def load_split(folder: Path, split: str) -> dict:
    """One split's unit-length features and its strings."""
    content = load_pickle(folder / f"{split}_icir_features.pkl")
    loaded = {name: content[name] for name in ("paths", "instances", "texts")}
    loaded["images"] = unit(content["image_feats"])
    if split == "query":
        loaded["text_feats"] = unit(content["context_text_feats"])
    return loaded


def read_corpus(features: Path, name: str) -> torch.Tensor:
    """A corpus's unit-length prompts (rows, dim)."""
    return unit(load_pickle(features / "corpus" / f"{name}.pkl")["feats"])


def score_instance(
    world: Path, backbone: str, images: torch.Tensor, texts: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """Scores (queries, rows) of the `basic` preset for one instance, assets read from disk."""
    features = world / "features" / f"{backbone}_features"
    subjects = read_corpus(features, "generic_subjects")
    styles = read_corpus(features, "generic_styles")
    mean_path = world / "data" / "laion_mean" / f"laion_1m_mean_{backbone}.pkl"
    image_mean = load_pickle(mean_path)["laion_1m_mean"].float().reshape(1, -1)
    text_mean = subjects.mean(dim=0, keepdim=True)

    # 1. centre
    images, rows = images - image_mean, rows - image_mean
    texts, subjects, styles = texts - text_mean, subjects - text_mean, styles - text_mean

    # 2. project the queries onto what subjects have and styles have not
    wanted = subjects.T @ subjects / (len(subjects) - 1)
    unwanted = styles.T @ styles / (len(styles) - 1)
    values, vectors = torch.linalg.eigh((1 - AA) * wanted - AA * unwanted + 1e-5)
    order = torch.argsort(values, descending=True)
    kept = vectors[:, order[: min(COMPONENTS, int((values > 0).sum()))]]
    projection = kept @ kept.T
    projected = images @ projection

    # 3. expand the queries by their nearest rows
    nearest = torch.topk(projected @ rows.T, min(EXPANSION_ROWS, len(rows)), dim=1)
    weights = torch.cat([torch.ones(len(images), 1), nearest.values], dim=1)
    weights = torch.exp(EXPANSION_SLOPE * weights)
    weights = weights / weights.sum(dim=1, keepdim=True)
    neighbours = torch.cat([images[:, None], rows[nearest.indices]], dim=1)
    projected = (weights[:, :, None] * neighbours).sum(dim=1) @ projection

    # 4. compare
    image_scores, text_scores = projected @ rows.T, texts @ rows.T

    # 5. bring both to one scale
    path = world / "synthetic_data" / f"dataset_1_sd_{backbone}.pkl.npy"
    synthetic = np.load(path, allow_pickle=True).item()
    synthetic_images = unit(synthetic["image_features"]) - image_mean
    synthetic_texts = unit(synthetic["text_features"]) - text_mean
    image_minimum = (synthetic_images @ synthetic_images.T).min()
    text_minimum = (synthetic_texts @ synthetic_images.T).min()
    image_scores = (image_scores - image_minimum) / image_minimum.abs()
    text_scores = (text_scores - text_minimum) / image_minimum.abs()

    # 6. fuse
    image_scores, text_scores = image_scores.clamp(min=0), text_scores.clamp(min=0)
    return image_scores * text_scores - HARRIS_LAMBDA * (image_scores + text_scores) ** 2


def average_precision(ranks: list[int]) -> float:
    """Trapezoidal AP of the sorted 0-based ranks of the positives; 0 without any."""
    total = 0.0
    for found, rank in enumerate(ranks):
        before = 1.0 if rank == 0 else found / rank
        total += (before + (found + 1) / (rank + 1)) / 2
    return total / (len(ranks) + 1e-5)


def evaluate(world: Path, backbone: str) -> list[tuple[str, str, str, float]]:
    """Every composed query's path, text, instance and AP, instance by instance."""
    folder = world / "features" / f"{backbone}_features" / "icir"
    query, database = load_split(folder, "query"), load_split(folder, "database")
    results = []
    for instance in sorted(set(query["instances"])):
        queries = [i for i, name in enumerate(query["instances"]) if name == instance]
        rows = [i for i, name in enumerate(database["instances"]) if name == instance]
        scores = score_instance(
            world,
            backbone,
            query["images"][queries],
            query["text_feats"][queries],
            database["images"][rows],
        )
        order = torch.argsort(scores, dim=1, descending=True, stable=True).tolist()
        for ranking, index in zip(order, queries, strict=True):
            text, ranks = query["texts"][index], []
            for rank, place in enumerate(ranking):
                row = rows[place]
                if database["instances"][row] == instance and database["texts"][row] == text:
                    ranks.append(rank)
            results.append((query["paths"][index], text, instance, average_precision(ranks)))
    return results


def means(results: list[tuple[str, str, str, float]]) -> tuple[float, float, float]:
    """mAP, mmAP and minmAP in percent."""
    instances: dict[str, list[float]] = {}
    for _, _, instance, value in results:
        instances.setdefault(instance, []).append(value)
    return (
        100 * float(np.mean([value for *_, value in results])),
        100 * float(np.mean([np.mean(values) for values in instances.values()])),
        100 * float(np.mean([min(values) for values in instances.values()])),
    )


def write_tables(folder: Path, results: list, seconds: float) -> None:
    """Write mAP_table.csv and APs.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "APs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Image Query", "Text Query", "Instance", "AP"])
        writer.writerows([path, text, instance, repr(ap)] for path, text, instance, ap in results)
    with open(folder / "mAP_table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["mAP", "mmAP", "minmAP", "queries", "seconds"])
        figures = [f"{value:.4f}" for value in means(results)]
        writer.writerow([*figures, len(results), f"{seconds:.3f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--world", type=Path, default=Path())
    parser.add_argument("--backbone", default="clip")
    parser.add_argument("--output", type=Path, default=Path("results_baseline"))
    options = parser.parse_args()
    started = time.perf_counter()
    results = evaluate(options.world, options.backbone)
    seconds = time.perf_counter() - started
    write_tables(options.output, results, seconds)
    print("mAP {:.2f}  mmAP {:.2f}  minmAP {:.2f}".format(*means(results)), f"in {seconds:.1f} s")


if __name__ == "__main__":
    main()
