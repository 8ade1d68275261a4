"""The command that extracts features: what it writes, and a line for every mistake."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from extraction_world import (
    COMMAND,
    NATIVE,
    add_member,
    arguments,
    draw_image,
    encode_jpeg,
    environment,
    make_rows,
    make_world,
    native_bytes,
    output_folder,
    run,
    write_rows,
)

import create_features
from extraction.reference import native_path, reference_path
from utils import UserError
from utils_assets import load_mean, load_synthetic, mean_path, synthetic_path
from utils_features import load_encoder
from utils_pickles import load_pickle
from utils_storage import load_features

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def command(world: Path, small_clip: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that runs the command in this process, in the world's folder."""
    monkeypatch.chdir(world)

    def run_here(*flags: str, dataset: str = "shop") -> None:
        workers = () if "--from_pkl" in flags or dataset == "corpus" else ("--workers", "0")
        create_features.main(arguments(small_clip, *flags, *workers, dataset=dataset)[1:])

    return run_here


@pytest.fixture(scope="module")
def encoder(small_clip: Path):
    return load_encoder(f"local-dir:{small_clip}", torch.device("cpu"))


# ---------------------------------------------------------------------------------------------
# What is written
# ---------------------------------------------------------------------------------------------


def test_features_of_a_data_set(world, small_clip, encoder, command, capsys):
    """Every row against plain open_clip calls on it alone; then a second run does nothing."""
    from PIL import Image

    command("--features_dir", "plain")
    closing = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r"100 database_image rows in [\d.]+ s \([\d.]+ images/s, .*plain", closing)
    assert all(word in closing for word in ("waiting for data", "encoding", "writing"))
    folder = output_folder(world, small_clip, "plain")
    for split, rows in make_rows().items():
        table = pd.read_csv(folder / f"{split}.csv", keep_default_na=False)
        assert list(table.columns) == ["image_path", "text", "instance"]
        assert [tuple(row) for row in table.to_numpy().tolist()] == rows
        features = np.load(folder / f"{split}_image.npy")
        assert features.dtype == np.float32
        for (path, _, _), feature in zip(rows, features, strict=True):
            with Image.open(world / "data" / "shop" / path) as image:
                pixels = encoder.preprocess(image.convert("RGB"))
            expected = encoder.encode_images(pixels[None]).numpy()[0]
            np.testing.assert_allclose(feature, expected, rtol=1e-4, atol=1e-5)
    texts = [row[1] for row in make_rows()["query"]]
    with torch.inference_mode():
        plain = encoder.model.encode_text(encoder.tokenizer(texts)).numpy()
    np.testing.assert_allclose(np.load(folder / "query_text.npy"), plain, rtol=1e-4, atol=1e-5)
    words = ("mug", "cup, blue", "hat")
    contextual = encoder.encode_contextual_texts(texts, words, 64)
    written = np.load(folder / "query_context_text.npy")
    np.testing.assert_allclose(written, contextual, rtol=1e-4, atol=1e-5)

    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["model"] == encoder.identity
    assert manifest["counts"] == {"query": 12, "database": 100}
    assert manifest["precision"] == "fp32"
    assert set(manifest["sources"]) == {
        "query_files.csv",
        "database_files.csv",
        "generic_subjects.csv",
    }
    before = {name: (folder / name).stat().st_mtime_ns for name in NATIVE}
    command("--features_dir", "plain", "--batch", "5")
    assert "already finished" in capsys.readouterr().out
    assert before == {name: (folder / name).stat().st_mtime_ns for name in NATIVE}


def test_dashes_and_underscores(world, small_clip, command):
    command("--features-dir", "dashes", "--icir-source", "wds", "--save-dtype", "float16")
    folder = output_folder(world, small_clip, "dashes")
    assert np.load(folder / "database_image.npy").dtype == np.float16
    assert np.load(folder / "query_image.npy").dtype == np.float32
    assert load_features(world / "dashes", f"local-dir:{small_clip}", "shop").dim == 48


def test_corpora(world, small_clip, encoder, command, capsys):
    command(dataset="corpus")
    folder = output_folder(world, small_clip, "features", "corpus")
    names = ("generic_styles", "generic_subjects")
    suffixes = ("csv", "json", "npy")
    assert sorted(os.listdir(folder)) == [f"{n}.{s}" for n in names for s in suffixes]
    prompts = ["old", "wet", "old"]
    assert (folder / "generic_styles.csv").read_text() == "prompt\nold\nwet\nold\n"
    features = np.load(folder / "generic_styles.npy")
    np.testing.assert_allclose(features, encoder.encode_texts(prompts, 4), rtol=1e-4, atol=1e-5)
    manifest = json.loads((folder / "generic_styles.json").read_text())
    assert manifest["kind"] == "corpus"
    assert manifest["counts"] == {"prompts": 3}
    (world / "corpora" / "late.csv").write_text("late\n")
    capsys.readouterr()
    command(dataset="corpus")
    assert capsys.readouterr().out.count("already finished") == 2
    assert (folder / "late.npy").exists()
    (world / "corpora" / "late.csv").write_text("later\n")
    with pytest.raises(UserError, match=r"late\.json belongs to .*with another late\.csv \("):
        command(dataset="corpus")
    (world / "corpora" / "late.csv").unlink()


def test_limit_is_another_data_set(world, small_clip, command):
    for source in ("folder", "wds"):
        command("--limit", "5", "--icir_source", source, "--features_dir", source)
    folders = [output_folder(world, small_clip, s, "shop_first5") for s in ("folder", "wds")]
    assert not output_folder(world, small_clip, "folder").exists()
    for name in ("query.csv", "database.csv"):
        first, second = ((folder / name).read_bytes() for folder in folders)
        assert first == second
    for folder in folders:
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["limit"] == 5
        assert manifest["counts"] == {"query": 5, "database": 5}
        assert not (folder / ".parts").exists()
    arrays = [np.load(folder / "database_image.npy") for folder in folders]
    np.testing.assert_allclose(*arrays, rtol=1e-4, atol=1e-6)


def test_a_limit_keeps_queries_that_can_be_evaluated(world, small_clip, command, capsys):
    """The first database row is of one instance, and so are some of the first queries."""
    command("--limit", "2", "--features_dir", "two")  # instances o0 and o1 in both
    assert "queries kept" not in capsys.readouterr().out
    command("--limit", "1", "--features_dir", "one")
    rows = [path.read_text().splitlines() for path in (world / "data/shop").glob("*_files.csv")]
    assert {row[0].rpartition(",")[2] for row in rows} == {"o0"}
    shutil.copytree(world / "data" / "shop", world / "data" / "sorted")
    path = world / "data" / "sorted" / "database_files.csv"
    by_instance = sorted(path.read_text().splitlines(), key=lambda row: row.rpartition(",")[2])
    path.write_text("\n".join(by_instance))
    command("--limit", "6", "--features_dir", "six", dataset="sorted")
    assert "--limit 6: 2 of 6 queries kept" in capsys.readouterr().out
    features = load_features("six", f"local-dir:{small_clip}", "sorted_first6")
    assert list(features.task.queries.tags["instance"]) == ["o0", "o0"]
    assert features.manifest["counts"] == {"query": 2, "database": 6}
    command("--limit", str(10**12), "--features_dir", "all")
    assert "queries kept" not in capsys.readouterr().out


def test_data_set_of_ones_own(world, small_clip, command):
    """A folder anywhere; its name is the data set's."""
    command("--features_dir", "own", dataset=str(world / "data" / "shop"))
    assert output_folder(world, small_clip, "own", "shop").is_dir()


@pytest.mark.parametrize("shards", [False, True])
def test_image_mean(world, small_clip, encoder, command, tmp_path, shards):
    root = world / "data" / "shop"
    images = root / "webdataset" / "query" if shards else root / "query"
    command("--images", str(images), "--data_dir", str(tmp_path), dataset="mean")
    path = mean_path(tmp_path, f"local-dir:{small_clip}")
    assert sorted(os.listdir(path.parent)) == [path.name]
    command("--features_dir", str(tmp_path / "features"))
    features = np.load(output_folder(world, small_clip, tmp_path / "features") / "query_image.npy")
    if not shards:
        features = features[:5]  # the distinct ones
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    mean = load_mean(tmp_path, f"local-dir:{small_clip}")
    np.testing.assert_allclose(mean.arrays["mean"][0], units.mean(axis=0), rtol=1e-4, atol=1e-6)
    assert mean.manifest["counts"] == {"images": len(features)}
    assert mean.manifest["model"] == encoder.identity


@pytest.mark.parametrize("shards", [False, True])
def test_normalisation_features(world, small_clip, encoder, command, tmp_path, shards):
    root = world / "data" / "shop"
    images = root / "webdataset" / "query" if shards else root
    number = {
        row: i for i, row in reversed(list(enumerate(row[0] for row in make_rows()["query"])))
    }
    names = [f"{number[p]:06d}.jpg" if shards else p for p in ("query/q 1.jpg", "query/q 3.jpg")]
    captions = tmp_path / "captions.csv"
    rows = [(names[0], "one, red"), (names[1], "two"), (names[0], "two")]
    write_rows(captions, [("image_path", "caption"), *rows])
    flags = ("--images", str(images), "--captions", str(captions))
    command(*flags, "--path_to_synthetic_data", str(tmp_path / "s"), dataset="synthetic")
    assert synthetic_path(tmp_path / "s", f"local-dir:{small_clip}").exists()
    found = load_synthetic(tmp_path / "s", f"local-dir:{small_clip}")
    command("--features_dir", "plain")
    query = np.load(output_folder(world, small_clip, "plain") / "query_image.npy")
    expected = query[[1, 3, 1]]
    np.testing.assert_allclose(found.arrays["image_features"], expected, rtol=1e-4, atol=1e-6)
    texts = encoder.encode_texts(["one, red", "two", "two"], 8)
    np.testing.assert_allclose(found.arrays["text_features"], texts, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# The reference's files
# ---------------------------------------------------------------------------------------------


def describe(content: dict) -> dict:
    """Keys in order, with types, and the dtype and rank of arrays."""
    found = {}
    for key, value in content.items():
        array = isinstance(value, np.ndarray)
        found[key] = (type(value), value.dtype, value.ndim) if array else type(value)
    return found


def test_pickles_round_trip(world, small_clip, command):
    command("--features_dir", "reference", "--format", "pkl")
    command("--features_dir", "reference", "--format", "pkl", dataset="corpus")
    folder = output_folder(world, small_clip, "reference")
    golden = GOLDEN / "clip" / "features" / "clip_features"
    for split in ("query", "database"):
        content = pickle.loads((folder / f"{split}_shop_features.pkl").read_bytes())
        known = pickle.loads((golden / "icir" / f"{split}_icir_features.pkl").read_bytes())
        assert list(content) == list(known)
        assert describe(content) == describe(known)
    assert content["paths"][0] == "./data/shop/database/d0.jpg"
    corpus = pickle.loads((folder.parent / "corpus" / "generic_styles.pkl").read_bytes())
    known = pickle.loads((golden / "corpus" / "generic_styles.pkl").read_bytes())
    assert describe(corpus) == describe(known)
    for dataset in ("shop", "corpus"):
        command_line = ["--dataset", dataset, "--backbone", f"local-dir:{small_clip}"]
        create_features.main([*command_line, "--from_pkl", "reference", "--features_dir", "back"])
    back = output_folder(world, small_clip, "back")
    first, second = native_bytes(folder), native_bytes(back)
    for name in NATIVE[:-1]:
        assert first[name] == second[name]
    assert json.loads(second["manifest.json"])["model"] is None
    for name in ("generic_styles.csv", "generic_styles.npy"):
        corpora = (path.parent / "corpus" / name for path in (folder, back))
        first, second = (path.read_bytes() for path in corpora)
        assert first == second


def test_golden_pickles_become_native(tmp_path):
    flags = ("--backbone", "clip", "--from_pkl", str(GOLDEN / "clip" / "features"))
    command = ("--features_dir", str(tmp_path), *flags)
    create_features.main(["--dataset", "icir", *command])
    create_features.main(["--dataset", "corpus", *command])
    native = load_features(tmp_path, "clip", "icir")
    known = load_features(GOLDEN / "clip" / "features", "clip", "icir")
    context = [features.query("context_text").values for features in (native, known)]
    np.testing.assert_array_equal(*context)
    rows = slice(0, known.database("image").shape[0])
    database = [features.database("image").read(rows) for features in (native, known)]
    np.testing.assert_array_equal(*database)
    assert native.task.queries.images[0][0] == "query/temple_of_poseidon/0.jpg"
    assert len(list((tmp_path / "clip_features" / "corpus").glob("*.npy"))) == 3


def test_pickles_replace_what_was_there(tmp_path):
    """An unfinished extraction's parts stay; texts that the pickles lack do not."""
    pickles = tmp_path / "given" / "clip_features" / "icir"
    shutil.copytree(GOLDEN / "clip" / "features" / "clip_features" / "icir", pickles)
    flags = ("--dataset", "icir", "--backbone", "clip", "--features_dir", str(tmp_path / "made"))
    command = (*flags, "--from_pkl", str(tmp_path / "given"))
    parts = tmp_path / "made" / "clip_features" / "icir" / ".parts"
    parts.mkdir(parents=True)
    (parts / "run.json").write_text("{}")
    create_features.main([*command])
    assert os.listdir(parts) == ["run.json"]
    path = pickles / "query_icir_features.pkl"
    content = load_pickle(path)
    del content["context_text_feats"]
    path.write_bytes(pickle.dumps(content))
    create_features.main([*command, "--overwrite"])
    assert not load_features(tmp_path / "made", "clip", "icir").has_query("context_text")


def test_a_folder_named_as_the_data_set(tmp_path, small_clip, monkeypatch):
    """ROOT/shop/a.jpg and ROOT/a.jpg are two images of the data set `shop`."""
    root = tmp_path / "data" / "shop"
    (root / "shop").mkdir(parents=True)
    make_world(tmp_path / "corpora_of")
    draw_image(1).save(root / "a.jpg")
    draw_image(2).save(root / "shop" / "a.jpg")
    for split in ("query", "database"):
        write_rows(root / f"{split}_files.csv", [("shop/a.jpg", "x", "i"), ("./a.jpg", "x", "i")])
    monkeypatch.chdir(tmp_path)
    flags = ("--workers", "0", "--corpora_dir", "corpora_of/corpora")
    create_features.main(arguments(small_clip, *flags)[1:])
    features = np.load(output_folder(tmp_path, small_clip, "features") / "database_image.npy")
    assert np.abs(features[0] - features[1]).max() > 0.01


def test_a_row_number_is_a_line_of_the_file(tmp_path, small_clip, monkeypatch, capsys):
    """Blank lines, and values with line breaks, stand between the rows."""
    world = make_world(tmp_path)
    table = world / "data" / "shop" / "database_files.csv"
    lines = table.read_text(encoding="utf-8").splitlines()
    text = "\n".join([lines[0], "", "", 'database/d1.jpg,"two\nlines",o1', *lines[2:]])
    table.write_text(text, encoding="utf-8")
    (world / "data" / "shop" / "database" / "d2.jpg").write_bytes(b"no image")
    monkeypatch.chdir(world)
    flags = ("--workers", "0")
    with pytest.raises(UserError, match=r"d2\.jpg \(data/shop/database_files\.csv, row 6\): "):
        create_features.main(arguments(small_clip, *flags)[1:])
    create_features.main(arguments(small_clip, *flags, "--on_bad_image", "skip")[1:])
    assert "skipped database_image row 6: database/d2.jpg" in capsys.readouterr().out
    folder = output_folder(world, small_clip, "features")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert [entry["row"] for entry in manifest["skipped"]] == [6, 96]
    query = world / "data" / "shop" / "query_files.csv"
    query.write_text("\n\n" + query.read_text(encoding="utf-8") + "q.jpg,t,none\n")
    with pytest.raises(UserError, match=r"query_files\.csv, row 15: the instance 'none'"):
        create_features.main(arguments(small_clip, *flags)[1:])
    write_rows(world / "captions.csv", [("image_path", "caption"), (), ("absent.jpg", "a")])
    flags = (*flags, "--images", "data/shop", "--captions", "captions.csv")
    with pytest.raises(UserError, match=r"absent\.jpg \(captions\.csv, row 3\): No such file"):
        create_features.main(arguments(small_clip, *flags, dataset="synthetic")[1:])


def test_corpora_may_have_any_name(tmp_path, small_clip, monkeypatch):
    """Also those of the files that a run keeps for itself; continued, and started afresh."""
    names = ("lock", "run.json", "finished")
    for name in names:
        write_rows(tmp_path / "corpora" / f"{name}.csv", [(f"{name} one",), ("two",)])
    monkeypatch.chdir(tmp_path)
    command = arguments(small_clip, dataset="corpus")[1:]
    with monkeypatch.context() as patch:
        patch.setattr("extraction.assets.write_csv", _stop)
        with pytest.raises(KeyboardInterrupt):
            create_features.main(command)
    create_features.main([*command, "--overwrite"])
    folder = output_folder(tmp_path, small_clip, "features", "corpus")
    assert not (folder / ".parts").exists()
    for name in names:
        assert (folder / f"{name}.csv").read_text() == f"prompt\n{name} one\ntwo\n"
        assert np.load(folder / f"{name}.npy").shape == (2, 48)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_paths_that_differ_in_a_leading_folder(tmp_path, small_clip, monkeypatch):
    """a.jpg, ./a.jpg and shop/a.jpg: as the files are, folder and shards have the same features.

    Whatever the shards call them: as the annotation does, or behind the data set's name.
    """
    make_world(tmp_path / "corpora_of")
    monkeypatch.chdir(tmp_path)
    rows = [(path, "x", "i") for path in ("a.jpg", "./a.jpg", "shop/a.jpg", "b.jpg")]
    labels = {
        "two files": ("a.jpg", "./a.jpg", "shop/a.jpg", "shop/b.jpg"),
        "two files, behind the name": ("shop/a.jpg",) * 2 + ("shop/shop/a.jpg", "shop/b.jpg"),
        "one file": ("a.jpg", "a.jpg", "a.jpg", "b.jpg"),
    }
    for name, sample_paths in labels.items():
        root = tmp_path / name / "shop"
        images = {"a.jpg": encode_jpeg(draw_image(1)), "b.jpg": encode_jpeg(draw_image(3))}
        if name != "one file":
            images["shop/a.jpg"] = encode_jpeg(draw_image(2))
        for path, data in images.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        for split in ("query", "database"):
            write_rows(root / f"{split}_files.csv", rows)
            shard = root / "webdataset" / split / f"{split}-000000.tar"
            shard.parent.mkdir(parents=True)
            with tarfile.open(shard, "w") as tar:
                for number, (path, (row, text, instance)) in enumerate(
                    zip(sample_paths, rows, strict=True)
                ):
                    shown = row.removeprefix("./")
                    add_member(tar, f"{number}.jpg", images.get(shown, images["a.jpg"]))
                    label = {"img_path": path, "text": text, "instance": instance}
                    add_member(tar, f"{number}.json", json.dumps(label).encode())
        found = {}
        for source in ("folder", "wds"):
            flags = ("--workers", "0", "--corpora_dir", "corpora_of/corpora", "--data_dir", name)
            flags += ("--features_dir", f"{name} {source}", "--icir_source", source)
            create_features.main(arguments(small_clip, *flags)[1:])
            folder = output_folder(tmp_path, small_clip, f"{name} {source}")
            found[source] = [np.load(folder / f"{s}_image.npy") for s in ("query", "database")]
        for plain, sharded in zip(found["folder"], found["wds"], strict=True):
            np.testing.assert_allclose(plain, sharded, rtol=1e-5, atol=1e-6)
            assert (np.abs(plain[0] - plain[2]).max() > 0.01) == (name != "one file")
            np.testing.assert_allclose(plain[0], plain[1], rtol=1e-5, atol=1e-6)


def test_as_a_library_it_leaves_the_environment_alone(world, small_clip):
    """Only the command itself says to MKL that bits must not depend on the threads."""
    code = (
        "import os, sys, create_features\n"
        "create_features.main(sys.argv[1:])\n"
        "assert 'MKL_CBWR' not in os.environ"
    )
    command = arguments(small_clip, "--features_dir", "library", dataset="corpus")[1:]
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        cwd=world,
        env=environment(PYTHONPATH=str(COMMAND.parent)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_skipped_images_are_not_passed_off_as_finished(tmp_path, small_clip, monkeypatch, capsys):
    world = make_world(tmp_path)
    (world / "data" / "shop" / "database" / "d3.jpg").write_bytes(b"no image")
    (world / "data" / "shop" / "query" / "q 0.jpg").unlink()  # the first; there are shards too
    monkeypatch.chdir(world)
    flags = ("--workers", "0")
    create_features.main(arguments(small_clip, *flags, "--on_bad_image", "skip")[1:])
    assert "98 database_image rows in" in capsys.readouterr().out  # d3 stands in two of 100
    with pytest.raises(UserError, match=r"finished without 5 images, the first query/q 0\.jpg"):
        create_features.main(arguments(small_clip, *flags)[1:])
    create_features.main(arguments(small_clip, *flags, "--on_bad_image", "skip")[1:])
    assert "already finished" in capsys.readouterr().out


def test_an_image_mended_between_two_runs_of_the_mean(tmp_path, small_clip, monkeypatch):
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(6):
        draw_image(number).save(tree / f"{number}.png")
    good = (tree / "4.png").read_bytes()
    (tree / "4.png").write_bytes(good[:50])
    monkeypatch.chdir(tmp_path)
    flags = ("--images", "tree", "--workers", "0", "--part_rows", "2")
    command = arguments(small_clip, *flags, dataset="mean")[1:]
    with pytest.raises(UserError, match=r"4\.png .*mend the image and run the same command again"):
        create_features.main(command)
    (tree / "4.png").write_bytes(good)
    create_features.main(command)
    assert load_mean(tmp_path / "data", f"local-dir:{small_clip}").manifest["counts"] == {
        "images": 6
    }


def test_overwrite_replaces_what_cannot_be_read(tmp_path, small_clip, monkeypatch):
    world = make_world(tmp_path)
    monkeypatch.chdir(world)
    folder = output_folder(world, small_clip, "features")
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{")
    theirs = folder / "query_shop_features.pkl"
    theirs.write_bytes(b"the user's own")
    command = arguments(small_clip, "--workers", "0")[1:]
    with pytest.raises(UserError, match=r"manifest\.json is not valid JSON"):
        create_features.main(command)
    create_features.main([*command, "--overwrite"])
    assert json.loads((folder / "manifest.json").read_text())["kind"] == "dataset"
    assert theirs.read_bytes() == b"the user's own"


def test_paths_of_the_reference():
    assert reference_path("icir", "query/mug/0.jpg") == "./data/icir/query/mug/0.jpg"
    for path in ("./data/icir/query/0.jpg", "data/icir/query/0.jpg", "icir/query/0.jpg"):
        assert native_path("icir", path) == "query/0.jpg"
    assert reference_path("icir", "data/a.jpg") == "./data/icir/data/a.jpg"


# ---------------------------------------------------------------------------------------------
# A line for every mistake
# ---------------------------------------------------------------------------------------------

MISTAKES = {
    "corpus limit": (("--limit", "3"), "corpus", "--limit has no effect with --dataset corpus"),
    "corpus source": (("--icir_source", "wds"), "corpus", "--icir_source has no effect"),
    "corpus workers": (("--workers", "1"), "corpus", "--workers has no effect"),
    "dataset images": (("--images", "."), "shop", "--images has no effect with --dataset shop"),
    "mean captions": (("--images", ".", "--captions", "c.csv"), "mean", "--captions has no effect"),
    "mean format": (("--images", ".", "--format", "pkl"), "mean", "--format has no effect"),
    "pickle batch": (("--from_pkl", "."), "shop", "--batch has no effect with --from_pkl"),
    "pickle mean": (("--from_pkl", "."), "mean", "--from_pkl has no effect with --dataset mean"),
    "mean without images": ((), "mean", "--dataset mean needs --images"),
    "no captions": (("--images", "."), "synthetic", "--dataset synthetic needs --captions"),
    "no such images": (("--images", "nowhere"), "mean", "--images nowhere does not exist"),
    "no images there": (("--images", "corpora"), "mean", "--images corpora holds neither images"),
    "pkl float16": (("--format", "pkl", "--save_dtype", "float16"), "shop", "is float32"),
    "no such data set": ((), "nothing", "no data set 'nothing'"),
    "no corpora": (("--corpora_dir", "data/shop/query"), "corpus", "no corpus (*.csv) in data/"),
    "no subjects": (("--corpora_dir", "data"), "shop", "no data/generic_subjects.csv"),
    "two columns": (("--corpora_dir", "bad"), "corpus", "bad/c.csv, row 2: 2 columns"),
    "shards alone": (
        (),
        "sharded",
        "holds its images in shards, not in folders: add --icir_source",
    ),
    "features in a file": (
        ("--features_dir", "corpora/generic_styles.csv"),
        "shop",
        "not a folder",
    ),
    "a carriage return": ((), "return", "query_files.csv, row 1: a carriage return inside a value"),
    "no shards": (("--icir_source", "wds"), "bare", "no query-NNNNNN.tar in"),
    "an instance without images": (
        (),
        "stray",
        "stray/query_files.csv, row 2: the instance 'kite' has no row in data/stray/database_files",
    ),
    "a limit that leaves nothing": (("--limit", "1"), "apart", "have no instance in common"),
    "a text of spaces": ((), "blank", "query_files.csv, row 1: a query needs a text"),
    "wrong columns": ((), "torn", "query_files.csv, row 2: 2 columns where 3 are expected"),
    "absent image": (
        (),
        "bare",
        "query/absent.jpg (data/bare/query_files.csv, row 1): no such file",
    ),
    "captions of one column": (
        ("--images", "data/shop", "--captions", "data/one.csv"),
        "synthetic",
        "data/one.csv, row 1: image_path,caption is expected",
    ),
}


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory) -> Path:
    """A world with every kind of broken file in it."""
    world = make_world(tmp_path_factory.mktemp("mistaken"))
    write_rows(world / "bad" / "c.csv", [("one",), ("two", "three")])
    write_rows(world / "data" / "one.csv", [("a.jpg",)])
    write_rows(world / "data" / "torn" / "query_files.csv", [("a", "b", "c"), ("a", "b")])
    write_rows(world / "data" / "return" / "query_files.csv", [("a", "one\rtwo", "c")])
    mug, kite, blank = ("m.jpg", "red", "mug"), ("k.jpg", "red", "kite"), ("b.jpg", " ", "mug")
    for name, query, database in (
        ("stray", [mug, kite], [mug]),
        ("apart", [mug, kite], [kite, mug]),
        ("blank", [blank], [mug]),
    ):
        write_rows(world / "data" / name / "query_files.csv", query)
        write_rows(world / "data" / name / "database_files.csv", database)
    (world / "data" / "sharded" / "webdataset").mkdir(parents=True)
    for split in ("query", "database"):
        rows = [(f"{split}/absent.jpg", "text", "it")]
        write_rows(world / "data" / "bare" / f"{split}_files.csv", rows)
        write_rows(world / "data" / "sharded" / "annotations" / f"{split}_files.csv", rows)
    return world


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(mistaken, small_clip, monkeypatch, capsys, name):
    flags, dataset, expected = MISTAKES[name]
    monkeypatch.chdir(mistaken)
    before = sorted(p for p in mistaken.rglob("*") if ".parts" not in p.parts)
    monkeypatch.setattr(sys, "argv", arguments(small_clip, *flags, dataset=dataset))
    with pytest.raises(SystemExit) as stopped:
        create_features.run_command(create_features.main)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert expected in lines[0]
    made = {p for p in mistaken.rglob("*") if ".parts" not in p.parts} - set(before)
    assert all(path.is_dir() for path in made)  # nothing but, perhaps, the folder of the parts


def test_mistake_from_the_shell(mistaken, small_clip):
    done = run(mistaken, small_clip, "--workers", "2", dataset="bare")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: query/absent.jpg (data/bare/query_files")


def test_no_data_set_named(capsys):
    with pytest.raises(UserError, match="--dataset is missing"):
        create_features.main([])


def test_hostile_pickle(tmp_path, small_clip):
    """Nothing in a pickle runs."""

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    folder = tmp_path / "f" / "clip_features" / "corpus"
    folder.mkdir(parents=True)
    (folder / "c.pkl").write_bytes(pickle.dumps({"feats": Hostile(), "prompts": ["a"]}))
    flags = ["--dataset", "corpus", "--backbone", "clip", "--features_dir", str(tmp_path / "n")]
    with pytest.raises(UserError, match=r"c\.pkl is refused"):
        create_features.main([*flags, "--from_pkl", str(tmp_path / "f")])
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "n").exists()


def test_help_does_not_import_torch():
    code = (
        "import sys, runpy; sys.argv[1:] = ['--help']\n"
        f"try: runpy.run_path({str(COMMAND)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'open_clip' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=COMMAND.parent,
        env=environment(PYTHONPATH=str(COMMAND.parent)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--on_bad_image" in done.stdout


def test_fall_back_to_the_cpu_is_said(mistaken, small_clip, monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(mistaken)
    command = arguments(small_clip, "--images", "data/shop/query", dataset="mean")[1:]
    command[command.index("--gpu") + 1] = "0"
    create_features.main([*command, "--workers", "0", "--data_dir", str(mistaken / "m")])
    assert "no CUDA device here: running on the CPU" in capsys.readouterr().err


def test_backbones_are_listed(capsys):
    create_features.main(["--list_backbones"])
    listed = capsys.readouterr().out.splitlines()
    assert {"clip", "siglip", "tiny", "ViT-B-32/laion2b_s34b_b79k"} <= set(listed)


def test_images_in_a_tree(tmp_path, small_clip, monkeypatch):
    """Sub-folders, other files between the images, and captions that name a missing image."""
    (tmp_path / "tree" / "sub folder").mkdir(parents=True)
    draw_image(1).save(tmp_path / "tree" / "sub folder" / "A.PNG")
    (tmp_path / "tree" / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    flags = ("--images", "tree", "--workers", "0")
    create_features.main(arguments(small_clip, *flags, dataset="mean")[1:])
    mean = load_mean(tmp_path / "data", f"local-dir:{small_clip}")
    assert mean.manifest["counts"] == {"images": 1}
    assert np.linalg.norm(mean.arrays["mean"]) == pytest.approx(1, abs=1e-5)
    write_rows(tmp_path / "c.csv", [("sub folder/A.PNG", "one"), ("B.png", "two")])
    with pytest.raises(UserError, match=r"B\.png \(c\.csv, row 2\): No such file"):
        create_features.main(
            arguments(small_clip, *flags, "--captions", "c.csv", dataset="synthetic")[1:]
        )
