"""What people bring along: headers, other systems' paths, twice the same image, weights alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from extraction_world import draw_image, encode_jpeg, environment, write_rows

import create_features
import run_retrieval
from benchmarks.icir import read_annotation
from external.export import once
from extraction.assets import read_captions, read_images
from utils import Parser, UserError
from utils_assets import load_mean, load_synthetic
from utils_datasets import Dataset, find_spellings, is_header, slashed
from utils_features import load_encoder

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([["image", "text", "object"], ["a.jpg", "x", "i"]], True),
        ([["Dateiname", "Text", "Ding"], ["b/a.png", "x", "i"]], True),
        ([["a.jpg", "x", "i"], ["b.jpg", "x", "i"]], False),
        ([["a", "x", "i"], ["b", "x", "i"]], False),  # no suffixes at all
        ([["folder/a", "x", "i"], ["b.jpg", "x", "i"]], False),
        ([["image", "text", "object"]], False),
        ([], False),
    ],
)
def test_a_header_is_known_by_its_shape(rows, found):
    assert is_header(rows) is found


def test_headers_and_windows_paths_of_annotations(tmp_path):
    path = tmp_path / "query_files.csv"
    write_rows(path, [("Bild", "Text", "Ding"), ("a.jpg", "x", "i")])
    with pytest.raises(UserError, match=r"row 1: 'Bild,Text,Ding' names no image.*header line"):
        read_annotation(tmp_path, "query", "folder")
    write_rows(path, [("images\\a.jpg", "x", "i")])
    assert read_annotation(tmp_path, "query", "folder").image_paths == ["images/a.jpg"]
    assert slashed("a\\b/c.jpg") == "a/b/c.jpg"


def test_headers_and_windows_paths_of_captions(tmp_path):
    write_rows(tmp_path / "c.csv", [("file", "what it shows"), ("b\\a.jpg", "a mug")])
    assert read_captions(tmp_path / "c.csv") == [(2, "b/a.jpg", "a mug")]


def test_files_of_macs_are_passed_over(tmp_path, capsys):
    for name in ("a.jpg", "._a.jpg", "b/._b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encode_jpeg(draw_image(1)))
    assert read_images(tmp_path, "viewed").files == ["a.jpg"]
    assert "2 files ._* of macOS" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.pt", "a/b/epoch_9.bin"])
def test_weights_alone_are_no_model(name):
    with pytest.raises(UserError, match=r"beside open_clip_config.json.*local-dir:FOLDER"):
        load_encoder(name, torch.device("cpu"))


def test_assets_name_the_command_that_helps_for_that_backbone(tmp_path):
    with pytest.raises(UserError, match=r"fetch it with python3 data/download.py laion_mean, or"):
        load_mean(tmp_path, "clip")
    for load in (load_mean, load_synthetic):
        with pytest.raises(UserError) as error:
            load(tmp_path, "ViT-B-32/openai")
        assert "download.py" not in str(error.value)
        assert "--backbone ViT-B-32/openai --images" in str(error.value)


@pytest.mark.parametrize(
    ("command", "flags", "said"),
    [
        (run_retrieval, ["--method", "bsic"], "did you mean basic?"),
        (run_retrieval, ["--use_presett"], "did you mean --use_preset?"),
        (create_features, ["--dataset", "x", "--bakbone=clip"], "did you mean --backbone?"),
        (create_features, ["--dataset", "x", "--pixels", "view"], "did you mean viewed?"),
    ],
)
def test_did_you_mean(command, flags, said):
    with pytest.raises(UserError) as error:
        command.main(flags)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_is_guessed_where_nothing_is_near():
    with pytest.raises(UserError) as error:
        Parser().parse_args(["--zzz"])
    assert "did you mean" not in str(error.value)


def test_a_gpu_beside_from_pkl():
    flags = ["--dataset", "icir", "--from_pkl", "there", "--gpu", "-1"]
    assert create_features.read_arguments(flags).gpu == -1


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        create_features.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip()


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """A folder of photographs far from the toolkit: two spellings of one image, odd names."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "mine").mkdir()
    for seed, name in enumerate("qab"):
        (folder / f"mine/{name}.jpg").write_bytes(encode_jpeg(draw_image(seed)))
    write_rows(folder / "mine/query_files.csv", [("./q.jpg", "猫 at night", "i")])
    rows = [("a.jpg", "猫 at night", "i"), ("./a.jpg", "猫 at night", "i"), ("b.jpg", "", "i")]
    rows += [("mine/b.jpg", "", "i"), ("mine/a.jpg", "in snow", "i")]
    rows += [("mine/q.jpg", "", "i")]
    write_rows(folder / "mine/database_files.csv", rows)
    return folder


def run(folder: Path, command: str, *flags: str) -> subprocess.CompletedProcess[str]:
    always = ["--dataset", "mine", "--backbone", "tiny", "--gpu", "-1"]
    return subprocess.run(
        [sys.executable, ROOT / command, *always, *flags],
        cwd=folder,
        env=environment(PYTHONIOENCODING="ascii"),
        capture_output=True,
        text=True,
    )


def test_the_toolkits_own_data_from_another_folder_and_a_poor_console(elsewhere):
    """The tiny backbone and its corpus are found; what ASCII lacks is shown by its number."""
    done = run(elsewhere, "create_features.py", "--workers", "0")
    assert done.returncode == 0, done.stderr
    repeated = "warning: 3 gallery rows list an image that their instance has already"
    first = f"{repeated}, and count twice; the first, row 2: './a.jpg', that of row 1"
    assert first in done.stdout
    (path,) = elsewhere.glob("features/*/mine/manifest.json")
    assert json.loads(path.read_text())["repeated"]["count"] == 3
    own = "warning: 1 queries search a gallery that lists their own image, which is ranked as any"
    own += " other; the first, row 1: './q.jpg', gallery row 6; --exclude_query_image leaves it out"
    assert own in done.stdout
    done = run(elsewhere, "run_retrieval.py", "--method", "image", "--exclude_query_image")
    assert done.returncode == 0, done.stderr
    assert "their own image" not in done.stderr
    assert "the query's own image is left out of the rankings of 1 queries" in done.stderr
    done = run(elsewhere, "run_retrieval.py", "--method", "sum", "--export", "csv")
    assert own in done.stderr
    assert done.returncode == 0, done.stderr
    assert first in done.stderr
    (path,) = elsewhere.glob("results/mine/*/run.csv")
    listed = [line.split(",")[1] for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    assert sorted(listed) == ["a.jpg", "b.jpg", "mine/q.jpg"]
    assert "lists an image once in a ranking: 3 gallery rows list one again" in done.stderr


def test_exports_list_an_image_once():
    same = {1: "a.jpg", 4: "a.jpg"}
    assert once([4, 3, 1, 0], same) == [1, 3, 0]
    assert once([1, 3, 4, 0], same, {4}) == [4, 3, 0]
    assert once([4, 3], {}) == [4, 3]


def test_folders_that_differ_in_the_data_sets_name_alone_may_be_two(tmp_path):
    for name in ("b.jpg", "mine/b.jpg", "c.jpg"):
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).touch()
    paths = ["b.jpg", "mine/b.jpg", "c.jpg", "./c.jpg", "mine/c.jpg"]
    found = find_spellings(paths, Dataset("mine", tmp_path / "mine"))
    assert found == {"./c.jpg": "c.jpg", "mine/c.jpg": "c.jpg"}
