"""Arrays, pickles and archives that are not what they say: one line each."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from native import world_arguments, write_native_world
from test_caption_files import small_task

import run_retrieval
from utils import UserError, read_json, write_json
from utils_assets import load_mean, load_synthetic, mean_path, synthetic_path
from utils_evaluation import unit_features
from utils_pickles import load_pickle, read_array, read_labels, read_rows
from utils_protocol import refuse_clashes
from utils_records import read_manifest
from utils_runs import Setting
from utils_storage import MappedRows
from utils_task import Column
from utils_values import read_values


def make_npy(shape: str, data: bytes = b"", descr: str = "<f4") -> bytes:
    """A .npy file with whatever its header says."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
    header += " " * (64 - (len(header) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


CLAIMS = {
    "more than there is": make_npy("(10**18, 4)"),
    "a petabyte": make_npy("(250000000000000, 4)"),
    "no number that C knows": make_npy("(99999999999999999999999, 4)"),
    "negative": make_npy("(-1, -4)", bytes(16)),
    "a truth": make_npy("(True, 4)", bytes(16)),
    "no rows": make_npy("(0, 4)"),
    "no columns": make_npy("(4, 0)"),
    "many rows of nothing": make_npy("(1000000000000, 0)"),
    "a text": make_npy("('a', 4)"),
    "bytes behind": make_npy("(1, 4)", bytes(20)),
    "cut": make_npy("(1, 4)", bytes(12)),
    "objects": make_npy("(1, 4)", bytes(32), "|O"),
    "integers": make_npy("(1, 4)", bytes(16), "<i4"),
    "a nested header": b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 70_000,
    "an endless header": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b"(" * 70_000,
    "nothing": b"",
}


def one_line(caught: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.parametrize("claim", CLAIMS)
def test_arrays_that_are_not_what_they_say(tmp_path, claim):
    path = tmp_path / "rows.npy"
    path.write_bytes(CLAIMS[claim])
    readers = (read_array,) if claim == "no rows" else (read_array, MappedRows)
    for read in readers:
        with pytest.raises(UserError, match=r"rows\.npy") as caught:
            read(path)
        one_line(caught)


def write_npz(path: Path, arrays: dict[str, bytes], manifest: str = "{}") -> None:
    file = io.BytesIO()
    np.save(file, np.array(manifest))
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (arrays | {"manifest": file.getvalue()}).items():
            archive.writestr(f"{name}.npy", data)


@pytest.mark.parametrize("claim", CLAIMS)
def test_archives_of_arrays_that_are_not_what_they_say(tmp_path, claim):
    write_npz(mean_path(tmp_path, "clip"), {"mean": CLAIMS[claim]})
    good = make_npy("(1, 4)", np.ones(4, np.float32).tobytes())
    arrays = {"image_features": good, "text_features": CLAIMS[claim]}
    write_npz(synthetic_path(tmp_path, "clip"), arrays)
    for load, name in ((load_mean, "mean_clip"), (load_synthetic, "synthetic_clip")):
        with pytest.raises(UserError, match=rf"{name}\.npz") as caught:
            load(tmp_path, "clip")
        one_line(caught)


@pytest.mark.parametrize("manifest", ["[" * 100_000, "[]", "", '"x"', "{"])
def test_manifests_that_are_none(tmp_path, manifest):
    good = make_npy("(1, 4)", np.ones(4, np.float32).tobytes())
    write_npz(mean_path(tmp_path, "clip"), {"mean": good}, manifest)
    with pytest.raises(UserError, match=r"mean_clip\.npz") as caught:
        load_mean(tmp_path, "clip")
    one_line(caught)
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match=r"manifest\.json") as caught:
        read_json(tmp_path / "manifest.json")
    one_line(caught)


@pytest.mark.parametrize(
    "value",
    [[[1, 2], [3]], torch.ones(2, 3).to_sparse(), "text", {"a": 1}, [[10**400]], torch.ones(3)],
)
def test_pickled_features_that_are_none(tmp_path, value):
    path = tmp_path / "query.pkl"
    path.write_bytes(pickle.dumps({"image_feats": value}))
    with pytest.raises(UserError, match=r"query\.pkl") as caught:
        read_rows(load_pickle(path), "image_feats", path)
    one_line(caught)


def test_bfloat16_in_a_pickle_is_read(tmp_path):
    path = tmp_path / "query.pkl"
    values = torch.tensor([[1.0, 2.5, -3.0]], dtype=torch.bfloat16)
    path.write_bytes(pickle.dumps({"image_feats": values}))
    rows = read_rows(load_pickle(path), "image_feats", path)
    assert rows.dtype == np.float32
    assert rows.tolist() == [[1.0, 2.5, -3.0]]


@pytest.mark.parametrize(
    ("paths", "words"),
    [(["a\udcff"], "not UTF-8"), (5, "no paths"), ([["x"]], "no text"), (["a", "b"], "one length")],
)
def test_pickled_labels_that_are_none(tmp_path, paths, words):
    path = tmp_path / "query.pkl"
    path.write_bytes(pickle.dumps({"paths": paths, "texts": ["t"], "instances": ["i"]}))
    with pytest.raises(UserError, match=words) as caught:
        read_labels(load_pickle(path), path)
    one_line(caught)


@pytest.mark.parametrize("value", [0.0, 1e30, np.inf, np.nan])
def test_rows_whose_length_is_no_number(value):
    rows = np.ones((3, 4), np.float32)
    rows[1] = value
    with pytest.raises(UserError, match="the rows: row 2 is zero or not finite"):
        unit_features(rows, torch.device("cpu"), "the rows")


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    return write_native_world(tmp_path_factory.mktemp("native"))


def test_means_that_are_none(native):
    path = mean_path(native / "data", "clip")
    before = path.read_bytes()
    for mean in (np.full((1, 96), 1e30, np.float32), np.ones((2, 96), np.float32)):
        np.savez(path, mean=mean, manifest=json.dumps({}))
        with pytest.raises(UserError, match=r"mean_clip\.npz: .*make it again"):
            run_retrieval.main(
                [
                    *world_arguments(native),
                    "--method",
                    "basic",
                    "--standardize_features",
                    "--use_laion_mean",
                ]
            )
    path.write_bytes(before)


def test_top_k_ends_with_the_largest_gallery(native, capsys):
    flags = ("--method", "image", "--top_k", "1000000000")
    run_retrieval.main([*world_arguments(native), *flags])
    said = capsys.readouterr().err
    assert "--top_k 1000000000: the largest gallery has" in said
    largest = int(said.split("largest gallery has ")[1].split()[0])
    (table,) = (native / "results").rglob("top*.csv")
    assert table.name == f"top{largest}.csv"
    assert len(table.read_text().splitlines()[0].split(",")) < 10 + 3 * largest


def test_what_a_killed_run_left_is_removed(native):
    """By the next one into the same folder."""
    flags = [*world_arguments(native), "--method", "text"]
    run_retrieval.main(flags)
    (table,) = (native / "results").rglob("text*/mAP_table.csv")
    left = table.with_name(".mAP_table.csv.0123abcd.part")
    left.write_text("half")
    run_retrieval.main(flags)
    assert not left.exists()
    assert table.exists()


def words_of(folder: Path) -> dict:
    return json.loads((folder / "APs.json").read_text())


@pytest.mark.parametrize(
    ("place", "value"),
    [("labels", [[]]), ("labels", []), ("image", "x"), ("averages", [5]), ("tags", {"a": [None]})],
)
def test_values_that_do_not_describe_their_table(native, place, value):
    run_retrieval.main([*world_arguments(native), "--method", "text"])
    (table,) = (native / "results").rglob("text*/APs.csv")
    before = (table.parent / "APs.json").read_text()
    write_json(table.parent / "APs.json", words_of(table.parent) | {place: value})
    with pytest.raises(UserError, match=r"APs\.(json|csv)") as caught:
        read_values(table.parent)
    one_line(caught)
    (table.parent / "APs.json").write_text(before)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("counts", {"query": "5"}),
        ("skipped", 7),
        ("skipped", [[]]),
        ("skipped", [{"image_path": None}]),
        ("sources", []),
        ("precision", {}),
        ("arrays", {"query_x": 5}),
    ],
)
def test_manifests_of_other_types(tmp_path, key, value):
    write_json(tmp_path / "manifest.json", {"model": {"model": "x"}, key: value})
    with pytest.raises(UserError, match=rf"manifest\.json: {key}") as caught:
        read_manifest(tmp_path / "manifest.json")
    one_line(caught)


def test_a_column_called_like_a_parameter_is_refused():
    task = small_task()
    clash = replace(task, columns=(Column("aa", "AP-T"),))
    runs = [Setting({}, True, "x", "clip").run("basic")]
    refuse_clashes(task, runs)
    with pytest.raises(UserError, match="the column 'aa' is called like another"):
        refuse_clashes(clash, runs)
