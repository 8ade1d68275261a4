"""Feature files: native, the reference's, and files that must be refused."""

import os
import pickle
import shutil
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch
from native import GOLDEN, write_native_world

import utils_blocks
from benchmarks.icir import task_of_labels
from utils import UserError
from utils_assets import check_same_model, load_corpus, load_mean, load_synthetic, mean_path
from utils_blocks import Block, _copied_blocks, make_blocks, search_blocks
from utils_pickles import load_pickle
from utils_storage import ArrayRows, MappedRows, load_features


class Touch:
    """A pickle of this would create a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path, protocol):
    path, victim = tmp_path / "query_icir_features.pkl", tmp_path / "created"
    path.write_bytes(pickle.dumps({"image_feats": Touch(victim)}, protocol=protocol))
    with pytest.raises(UserError, match=r"query_icir_features\.pkl is refused.*system"):
        load_pickle(path)
    assert not victim.exists()


def test_a_pickle_cannot_change_what_reads_the_next_one(tmp_path):
    """A pickle may set attributes of what it names; here, of a function of torch's."""
    path = tmp_path / "query_icir_features.pkl"
    name = b"ctorch._utils\n_rebuild_tensor_v2\n"
    path.write_bytes(b"(" + name + b"(dS'changed'\nI1\nsb0d.")
    assert load_pickle(path) == {}
    assert not hasattr(torch._utils._rebuild_tensor_v2, "changed")


def test_a_tensor_in_a_pickle_cannot_smuggle_code(tmp_path):
    """A tensor's storage is a pickle of its own inside the pickle."""
    victim = tmp_path / "created"

    class Storage:
        def __reduce__(self):
            return (torch.storage._load_from_bytes, (pickle.dumps(Touch(victim)),))

    path = tmp_path / "mean.pkl"
    path.write_bytes(pickle.dumps({"laion_1m_mean": Storage()}))
    with pytest.raises(UserError, match="is refused"):
        load_pickle(path)
    assert not victim.exists()


def test_an_object_array_that_would_run_code_is_refused(tmp_path):
    path, victim = tmp_path / "dataset_1_sd_clip.pkl.npy", tmp_path / "created"
    np.save(path, np.array({"image_features": Touch(victim)}, dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="is refused"):
        load_pickle(path)
    assert not victim.exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1, 2])])
def test_broken_pickles_are_named(tmp_path, content):
    path = tmp_path / "broken.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.pkl"):
        load_pickle(path)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_and_tensors_come_back_whole(tmp_path, protocol):
    content = {
        "image_feats": np.arange(6, dtype=np.float32).reshape(2, 3),
        "laion_1m_mean": torch.arange(3.0)[None],
        "paths": ["a", "ü"],
        "count": 2,
        "scalar": np.float32(1.5),
        "text_feats": None,
    }
    path = tmp_path / "content.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    loaded = load_pickle(path)
    assert loaded.keys() == content.keys()
    assert np.array_equal(loaded["image_feats"], content["image_feats"])
    assert torch.equal(loaded["laion_1m_mean"], content["laion_1m_mean"])
    assert loaded["paths"] == content["paths"]
    assert loaded["scalar"] == content["scalar"]


def test_native_and_reference_files_hold_the_same(tmp_path):
    native = load_features(write_native_world(tmp_path) / "features", "clip", "icir")
    reference = load_features(GOLDEN / "clip" / "features", "clip", "icir")
    assert native.task.queries.labels() == reference.task.queries.labels()
    for column in ("path", "note"):
        of_native, of_reference = (getattr(f.task.gallery, column) for f in (native, reference))
        assert list(of_native) == list(of_reference)
    for name in ("image", "text", "context_text"):
        assert np.array_equal(native.query(name).values, reference.query(name).values)
    for rows in (slice(5, 30), np.array([0, 3, 4, 900])):
        pair = (f.database("image").read(rows) for f in (native, reference))
        assert np.array_equal(*pair)


def test_paths_in_any_alphabet(tmp_path):
    path = write_native_world(tmp_path) / "features/clip_features/icir/database.csv"
    plain = load_features(tmp_path / "features", "clip", "icir")
    paths = list(plain.task.gallery.path)
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table["image_path"] = "画像/ü " + table["image_path"]
    table.to_csv(path, index=False)
    named = load_features(tmp_path / "features", "clip", "icir")
    assert np.array_equal(named.task.sets.row, plain.task.sets.row)
    assert list(named.task.gallery.path) == ["画像/ü " + path for path in paths]


@pytest.mark.parametrize("labels", [("007", "7"), ("True", "1"), ("NA", "nan"), ("1e3", "1000")])
def test_labels_are_texts_whatever_they_look_like(tmp_path, labels):
    folder = write_native_world(tmp_path) / "features/clip_features/icir"
    for split in ("query", "database"):
        table = pd.read_csv(folder / f"{split}.csv", dtype=str, keep_default_na=False)
        known = sorted(set(table["instance"]))
        table["instance"] = [labels[known.index(name) % 2] for name in table["instance"]]
        table["text"] = [f"{len(text)}" for text in table["text"]]
        table.to_csv(folder / f"{split}.csv", index=False)
    task = load_features(tmp_path / "features", "clip", "icir").task
    assert set(task.queries.tags["instance"]) == set(labels)
    assert (task.views["all"].positives >= 0).all()
    assert len(set(task.pool)) == 2


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_mapped_rows_are_the_files_rows(tmp_path, dtype):
    rows = np.random.default_rng(0).normal(size=(5000, 7)).astype(dtype)
    np.save(tmp_path / "rows.npy", rows)
    mapped = MappedRows(tmp_path / "rows.npy")
    assert mapped.shape == rows.shape
    for wanted in (slice(0, 5000), slice(4999, 5000), np.array([7, 8, 4000])):
        assert np.array_equal(mapped.read(wanted), rows[wanted])


def test_a_file_cut_while_it_is_read_is_named(tmp_path):
    np.save(tmp_path / "rows.npy", np.ones((50, 4), dtype=np.float32))
    mapped = MappedRows(tmp_path / "rows.npy")
    with open(tmp_path / "rows.npy", "r+b") as file:
        file.truncate(500)
    assert mapped.read(np.array([0, 2])).sum() == 8
    for rows in (np.array([0, 49]), slice(0, 50)):
        with pytest.raises(UserError, match=r"rows\.npy is cut short"):
            mapped.read(rows)


def test_native_assets_win_over_the_references(tmp_path):
    world = write_native_world(tmp_path)
    assert load_mean(world / "data", "clip").manifest is not None
    assert load_mean(GOLDEN / "clip" / "data", "clip").manifest is None
    assert load_synthetic(world / "synthetic_data", "clip").manifest is not None


def test_cut_and_inconsistent_files_are_named(tmp_path):
    folder = write_native_world(tmp_path) / "features" / "clip_features" / "icir"
    database = folder / "database_image.npy"
    whole = database.read_bytes()
    database.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"database_image\.npy is cut short"):
        load_features(tmp_path / "features", "clip", "icir")
    database.write_bytes(whole)
    np.save(folder / "query_text.npy", np.zeros((70, 5), dtype=np.float32))
    with pytest.raises(UserError, match="query texts have 5 dimensions, not 96"):
        load_features(tmp_path / "features", "clip", "icir")
    np.save(folder / "query_text.npy", np.zeros((69, 96), dtype=np.float32))
    with pytest.raises(UserError, match="69 rows of query texts but 70"):
        load_features(tmp_path / "features", "clip", "icir")


def test_files_of_two_models_are_not_mixed(tmp_path):
    world = write_native_world(tmp_path)
    features = load_features(world / "features", "clip", "icir")
    corpus = load_corpus(world / "features", "clip", "generic_styles")
    check_same_model(features, [corpus])
    corpus.manifest["model"]["activation"] = "QuickGELU"
    with pytest.raises(
        UserError, match=r"generic_styles\.json.*activation is 'QuickGELU' and 'GEL"
    ):
        check_same_model(features, [corpus])


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut short"])
def test_broken_assets_are_named(tmp_path, content):
    world = write_native_world(tmp_path)
    mean_path(world / "data", "clip").write_bytes(content)
    with pytest.raises(UserError, match=r"mean_clip\.npz cannot be read"):
        load_mean(world / "data", "clip")
    (world / "features/clip_features/corpus/generic_styles.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"generic_styles\.npy is not a \.npy file"):
        load_corpus(world / "features", "clip", "generic_styles")


def test_a_missing_text_is_an_empty_one(tmp_path):
    """A text that no database row has is not the text of the rows that have none."""
    world = tmp_path / "clip_features" / "icir"
    shutil.copytree(GOLDEN / "clip" / "features" / "clip_features" / "icir", world)
    for split, text in (("database", None), ("query", "as nobody has it")):
        content = load_pickle(world / f"{split}_icir_features.pkl")
        content["texts"] = [text] * len(content["texts"])
        (world / f"{split}_icir_features.pkl").write_bytes(pickle.dumps(content))
    task = load_features(tmp_path, "clip", "icir").task
    assert set(task.gallery.note) == {""}
    assert (task.views["all"].positives < 0).all()


def test_a_database_without_any_text_has_no_positives():
    queries = pd.DataFrame([("1.jpg", "x", "b")], columns=["image_path", "text", "instance"])
    labels = pd.DataFrame({"text": ["x", "x"], "instance": ["b", "b"]}).astype("category")
    labels["text"] = labels["text"].cat.set_categories([])  # every text missing
    task = task_of_labels("made", queries, labels, ["1.jpg", "2.jpg"], ["", ""])
    (block,) = make_blocks(task)
    assert len(block.views["all"].positives.query) == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("size", [1, 3_000, 1 << 20])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_blocks_that_are_copied_are_the_files_rows(tmp_path, monkeypatch, dtype, size, device):
    """The way of the features to a GPU, through two buffers; also with the CPU at its end."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(utils_blocks, "PINNED_BYTES", size)
    rows = np.random.default_rng(0).normal(size=(900, 7)).astype(dtype)
    np.save(tmp_path / "rows.npy", rows)
    cuts = [slice(0, 5), slice(5, 300), np.arange(301, 900, 2), np.arange(300, 900, 2)]
    blocks = [Block(np.empty(0, np.int64), cut, {}) for cut in cuts]
    database = {"image": MappedRows(tmp_path / "rows.npy"), "twice": ArrayRows(tmp_path, 2 * rows)}
    copied = []
    for block, parts in _copied_blocks(database, blocks, torch.device(device)):
        copied.append(block)
        assert np.array_equal(parts["image"].cpu().numpy(), rows[block.rows])
        assert np.array_equal(parts["twice"].cpu().numpy(), 2 * rows[block.rows])
    assert copied == blocks


def test_blocks_are_searched_in_order_and_an_error_ends_the_search(tmp_path, four_threads):
    """Blocks lie in any order in the file, and several are searched at the same time."""
    rows = np.arange(600, dtype=np.float32).reshape(300, 2)
    np.save(tmp_path / "rows.npy", rows)
    starts = np.random.default_rng(0).permutation(300)
    blocks = [Block(np.zeros(1, np.int64), slice(i, i + 1), {}) for i in starts]
    database, device = {"image": MappedRows(tmp_path / "rows.npy")}, torch.device("cpu")
    searched, later = [], set(map(id, blocks[21:]))
    together = threading.Barrier(4, timeout=30)

    def search(block, raw):
        searched.append(block)
        assert torch.get_num_threads() == 1
        if any(block is first for first in blocks[:4]):
            together.wait()  # for ever, but for the three others
        if block is blocks[20]:
            raise UserError("a bad row")
        if id(block) in later:
            time.sleep(0.05)
        return raw["image"].tolist()

    found = search_blocks(search, database, blocks, device)
    assert [next(found) for _ in range(20)] == rows[starts[:20], None].tolist()
    with pytest.raises(UserError, match="a bad row"):
        next(found)
    assert torch.get_num_threads() == 4
    assert len(searched) < len(blocks)
