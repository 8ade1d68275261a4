"""Agreement with the reference's figures on the golden worlds (DESIGN, "Golden figures")."""

import csv
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import run_retrieval
import utils_blocks
import utils_search
from methods import basic
from utils_assets import load_assets
from utils_backbones import Places
from utils_evaluation import evaluate
from utils_storage import load_features

ROOT = Path(__file__).parents[1]
GOLDEN = {name: Path(__file__).parent / "golden" / name for name in ("clip", "siglip")}
FIGURES = {
    name: json.loads((folder / "golden.json").read_text()) for name, folder in GOLDEN.items()
}
CPU = torch.device("cpu")
CASES = [(world, flags) for world, figures in FIGURES.items() for flags in figures]
THROUGH_THE_CLI = ["image", "product", "basic", "basic_no_qe", "basic_corpora", "text_context"]


def arguments(world: str, flags: str, results: Path) -> list[str]:
    """The reference's own flags, with its folders where the golden world has them."""
    folder = GOLDEN[world]
    places = {"--features_dir": "features", "--data_dir": "data"}
    given = FIGURES[world][flags]["args"]
    given = [str(folder / "synthetic_data") if a == "./synthetic_data" else a for a in given]
    if "--use_preset" in given and "basic" in given:
        places["--path_to_synthetic_data"] = "synthetic_data"
    where = [part for flag, place in places.items() for part in (flag, str(folder / place))]
    return [*given, *where, "--backbone", world, "--results_dir", str(results), "--gpu", "-1"]


def check_agreement(figures: dict, means: dict, ap: dict) -> None:
    for name in ("mAP", "mmAP", "minmAP"):
        assert means[name] == pytest.approx(figures[name], abs=0.01)
    expected = {(path, text): value for path, text, value in figures["queries"]}
    assert ap.keys() == expected.keys()
    difference = np.array([abs(ap[query] - value) for query, value in expected.items()])
    assert difference.max() <= 0.01
    assert (difference <= 1e-6).mean() >= 0.99


def evaluate_all(world: str, device: torch.device) -> tuple:
    """Every flag set of a world through the library, as the command would plan it, in one pass."""
    parsed = {
        flags: run_retrieval.build_parser().parse_args(arguments(world, flags, Path("unused")))
        for flags in FIGURES[world]
    }
    runs = [run_retrieval.plan_of(args, "icir").runs[0] for args in parsed.values()]
    features = load_features(GOLDEN[world] / "features", world, "icir")
    evaluations = evaluate(features, runs, golden_assets(world, features, runs, device), device)
    return dict(zip(parsed, evaluations, strict=True))


def golden_assets(world: str, features, runs: list, device: torch.device = CPU):
    folders = (GOLDEN[world] / name for name in ("features", "data", "synthetic_data"))
    return load_assets(Places(*folders), features, runs, device)


@pytest.fixture(scope="module")
def evaluated():
    return {world: evaluate_all(world, torch.device("cpu")) for world in GOLDEN}


def by_query(evaluation) -> dict:
    labels = evaluation.task.queries.labels()
    names = zip(labels["Image Query"], labels["Text Query"], strict=True)
    return dict(zip(names, ap_of(evaluation), strict=True))


def ap_of(evaluation) -> np.ndarray:
    return evaluation.values["AP-T", "all"]


@pytest.mark.parametrize(("world", "flags"), CASES)
def test_every_flag_set_agrees_with_the_reference(evaluated, world, flags):
    evaluation = evaluated[world][flags]
    check_agreement(FIGURES[world][flags], evaluation.means(), by_query(evaluation))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("world", list(GOLDEN))
def test_cuda_agrees_with_the_reference(world):
    evaluations = evaluate_all(world, torch.device("cuda"))
    for flags, figures in FIGURES[world].items():
        check_agreement(figures, evaluations[flags].means(), by_query(evaluations[flags]))


@pytest.mark.parametrize("flags", THROUGH_THE_CLI)
@pytest.mark.parametrize("world", list(GOLDEN))
def test_the_command_agrees_with_the_reference(tmp_path, world, flags):
    command = [sys.executable, "run_retrieval.py", *arguments(world, flags, tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (folder,) = (tmp_path / "icir").iterdir()
    with open(folder / "mAP_table.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    with open(folder / "APs.csv", newline="") as file:
        ap = {(r["Image Query"], r["Text Query"]): float(r["AP"]) for r in csv.DictReader(file)}
    means = {name: float(row[name]) for name in ("mAP", "mmAP", "minmAP")}
    check_agreement(FIGURES[world][flags], means, ap)
    assert all(row[name] in done.stdout for name in means)


def test_the_command_never_imports_open_clip(tmp_path):
    watched = "import sys, run_retrieval; run_retrieval.main(sys.argv[1:]); print(*sys.modules)"
    command = [sys.executable, "-c", watched, *arguments("clip", "basic", tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "torch" in loaded
    assert not loaded & {"open_clip", "timm", "torchvision", "matplotlib", "webdataset"}


def test_help_answers_without_torch():
    watched = (
        "import sys, run_retrieval\n"
        "try: run_retrieval.main(['--help'])\n"
        "except SystemExit: print(*sys.modules)"
    )
    command = [sys.executable, "-c", watched]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1].split()
    assert not {"torch", "numpy", "pandas"} & set(loaded)


def test_one_pass_over_several_runs_gives_what_each_gives_alone(evaluated):
    """Runs that share a pass share intermediate results; none may leak into another."""
    world = "clip"
    together, device = evaluated[world], torch.device("cpu")
    features = load_features(GOLDEN[world] / "features", world, "icir")
    for flags in ("basic", "basic_std", "basic_l02", "product_context"):
        run = together[flags].run
        (alone,) = evaluate(features, [run], golden_assets(world, features, [run]), device)
        assert asdict(alone.run.parameters) == asdict(run.parameters)
        assert np.array_equal(alone.main.ranks, together[flags].main.ranks)


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_blocks_searched_at_once_give_the_same(evaluated, monkeypatch, four_threads, blocks):
    monkeypatch.setattr(utils_blocks, "BLOCKS_AT_ONCE", blocks)
    evaluations = evaluate_all("clip", torch.device("cpu"))
    assert torch.get_num_threads() == 4
    pairs = [(ap_of(evaluations[name]), ap_of(one)) for name, one in evaluated["clip"].items()]
    difference = np.concatenate([np.abs(one - other) for one, other in pairs])
    assert (difference <= 1e-6).mean() >= 0.99
    assert difference.max() <= 0.01


def test_pieces_of_any_size_give_the_same(evaluated, monkeypatch):
    """Whether a block's queries, and a sweep's runs, are searched together or one by one."""
    world, device = "clip", torch.device("cpu")
    runs = [evaluation.run for evaluation in evaluated[world].values()]
    features = load_features(GOLDEN[world] / "features", world, "icir")
    assets = golden_assets(world, features, runs)
    whole = evaluate(features, runs, assets, device, tops={"all": 5})
    monkeypatch.setattr(utils_search, "PAIRS_SCORED", {"cpu": 1})
    monkeypatch.setattr(utils_search, "IMAGES_COMPARED", 1)
    monkeypatch.setattr(utils_search, "PAIRS_COMPARED", 1)
    monkeypatch.setattr(utils_search, "SCORES_RANKED", 1)
    monkeypatch.setattr(basic, "IMAGE_VARIANTS_AT_ONCE", 1)
    pieces = evaluate(features, runs, assets, device, tops={"all": 5})
    pairs = list(zip(pieces, whole, strict=True))
    difference = np.concatenate([np.abs(ap_of(one) - ap_of(other)) for one, other in pairs])
    assert np.mean(difference <= 1e-6) >= 0.99
    assert difference.max() <= 0.01
    for one, other in pairs:
        assert np.array_equal(one.main.positives.row, other.main.positives.row)
        assert np.mean(one.main.top_rows == other.main.top_rows) >= 0.99
        assert np.allclose(one.main.top_scores, other.main.top_scores, atol=1e-5)
