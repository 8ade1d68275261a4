"""FIFOs, devices, full and read-only disks: one line that names the file, never a hang."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from extraction_world import environment, make_world, output_folder, run
from hostile_files import attempt
from native import world_arguments, write_native_world
from test_workers import has_namespaces

from benchmarks.annotations import load_json
from captioning.describing import ENTRY
from captioning.journal import Journal
from external.arrays import read_embeddings
from external.ids import read_ids
from external.results import _read_matrix
from extraction.reference import write_reference_dataset
from extraction.warned import named_warnings
from utils import naming, read_csv, read_json, sha256_file, write_json
from utils_assets import load_mean, mean_path
from utils_captions import read_lines
from utils_datasets import Dataset, ImageStore, _read_places
from utils_pickles import load_pickle, read_array
from utils_records import read_utf8
from utils_storage import _read_table, read_csv_columns
from utils_tables import read_results
from utils_values import read_values

ROOT = Path(__file__).resolve().parent.parent
needs_namespaces = pytest.mark.skipif(not has_namespaces(), reason="no namespaces here")


def _read_image(path: Path) -> None:
    ImageStore(Dataset("x", path.parent), lambda root, name: root / name).read("query", path.name)


READERS = {
    "a CSV": lambda path: list(read_csv(path)),
    "a table of labels": partial(_read_table, columns=["image_path"]),
    "a table of rows": partial(read_csv_columns, columns=["key"]),
    "a table of results": read_results,
    "JSON": read_json,
    "annotations": load_json,
    "records": read_utf8,
    "captions": lambda path: list(read_lines(path)),
    "ids": read_ids,
    "an array": read_array,
    "a pickle": load_pickle,
    "embeddings": lambda path: read_embeddings([path.rename(path.with_suffix(".npy"))]),
    "scores": _read_matrix,
    "a hash": sha256_file,
    "an image": _read_image,
    "a shard": lambda path: list(_read_places(path)),
}


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_refused(tmp_path, reader, kind):
    path = tmp_path / "file"
    {
        "fifo": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "folder": os.mkdir,
    }[kind](path)
    assert "file" in attempt(partial(READERS[reader], path))


def test_values_and_means_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "APs.csv")
    os.mkfifo(tmp_path / "APs.json")
    assert attempt(partial(read_values, tmp_path))
    path = mean_path(tmp_path, "clip")
    path.parent.mkdir()
    os.mkfifo(path)
    assert "not a file" in attempt(partial(load_mean, tmp_path, "clip"))


# ---------------------------------------------------------------------------------------------
# Decoders
# ---------------------------------------------------------------------------------------------


def test_lines_of_c_libraries_name_the_image(capfd):
    with named_warnings("a\nb.tif"):
        os.write(2, b"LZWDecode: Not enough data\nLZWDecode: Not enough data\n")
    assert capfd.readouterr().err == "a\\nb.tif: LZWDecode: Not enough data\n"

    def fail() -> None:
        with named_warnings("c.tif"):
            os.write(2, b"told before it failed\n")
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        fail()
    os.write(2, b"not caught\n")
    assert capfd.readouterr().err == "c.tif: told before it failed\nnot caught\n"


# ---------------------------------------------------------------------------------------------
# Disks
# ---------------------------------------------------------------------------------------------


def test_errors_without_a_name_get_one():
    for error in (OSError("1000 requested and 0 written"), OSError(28, "No space left")):
        with pytest.raises(OSError, match=r"written|space") as caught, naming("x.npy"):
            raise error
        assert caught.value.filename == "x.npy"
        assert caught.value.strerror


def test_names_that_are_not_utf8_are_kept_in_json(tmp_path):
    write_json(tmp_path / "a.json", {"caf\udce9": "\ud800 é"})
    assert read_json(tmp_path / "a.json") == {"caf\udce9": "\ud800 é"}
    assert "é" in (tmp_path / "a.json").read_text(encoding="utf-8")


def in_namespace(mount: str, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command where a disk was mounted first."""
    script = f'{mount} && exec "$@"'
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, *command],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_clip) -> Path:
    """The data set `shop`, with finished features."""
    world = make_world(tmp_path_factory.mktemp("world"))
    done = run(world, small_clip, "--workers", "0")
    assert done.returncode == 0, done.stderr
    return world


def extraction(clip: Path, *flags: str) -> list[str]:
    from extraction_world import arguments

    return arguments(clip, "--workers", "0", *flags)


@needs_namespaces
def test_finished_features_on_a_read_only_disk(world, small_clip):
    folder = output_folder(world, small_clip, "features")
    read_only = "mount --bind features features && mount -o remount,bind,ro features"
    done = in_namespace(read_only, *extraction(small_clip), cwd=world)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder.relative_to(world)}: already finished\n"
    done = in_namespace(read_only, *extraction(small_clip, "--overwrite"), cwd=world)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("features may not be written; name another folder\n")
    assert (folder / "manifest.json").exists()


@needs_namespaces
def test_a_full_disk_names_a_file(world, small_clip):
    (world / "small").mkdir(exist_ok=True)
    flags = ("--features_dir", "small")
    disk = "mount -t tmpfs -o size=60k tmpfs small"
    done = in_namespace(disk, *extraction(small_clip, *flags), cwd=world)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: small/"), done.stderr
    assert "space" in done.stderr or "not written whole" in done.stderr


@needs_namespaces
def test_a_full_disk_of_results_names_a_file(tmp_path):
    folder = write_native_world(tmp_path)
    (folder / "results").mkdir()
    command = ["run_retrieval.py", *world_arguments(folder), "--method", "image", "--top_k", "50"]
    for size in ("8k", "40k"):
        disk = f"mount -t tmpfs -o size={size} tmpfs {folder / 'results'}"
        done = in_namespace(disk, *command, cwd=ROOT)
        assert done.returncode == 2, (size, done.stdout, done.stderr)
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(f"error: {folder / 'results'}/"), done.stderr
        assert "space" in done.stderr


# ---------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["query_text.npy", "database.csv"])
def test_damaged_features_are_not_turned_into_pickles(world, small_clip, tmp_path, name):
    folder = shutil.copytree(output_folder(world, small_clip, "features"), tmp_path / "shop")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-40] + b'"')
    line = attempt(partial(write_reference_dataset, folder, "shop", "shop"))
    assert line
    assert name in line


@pytest.mark.parametrize("line", ["5", '{"image": 5}', '{"image": "a", "box": "x"}', "[" * 10**5])
def test_a_damaged_journal_names_its_line(tmp_path, line):
    path = tmp_path / "images.progress.jsonl"
    path.write_text(f'{{"image": "a.jpg"}}\n{line}\n')
    assert "line 2 is damaged" in attempt(partial(Journal, path, ENTRY))
