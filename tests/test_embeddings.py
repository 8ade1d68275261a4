"""Embeddings of somebody else's as features of a data set: --from_embeddings."""

from pathlib import Path

import numpy as np
import pytest
from extraction_world import make_world

import create_features
from benchmarks import find_dataset
from extraction.embeddings import convert_embeddings
from utils import UserError
from utils_storage import load_features

D = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("embeddings"))


@pytest.fixture(scope="module")
def task(world):
    found = find_dataset("shop", world / "data")
    return found.read(found.root)


def vector(name: str) -> np.ndarray:
    """A vector of its own for every name."""
    return np.random.default_rng(list(name.encode())).normal(size=D)


def vectors(names) -> np.ndarray:
    return np.stack([vector(name) for name in names])


def write_parts(folder: Path, task, dtype=np.float64) -> Path:
    """Gallery and query images by id, in another order, one too many; texts in order."""
    folder.mkdir()
    for name, paths in (
        ("database_image", {*task.gallery.path}),
        ("query_image", {images[0] for images in task.queries.images}),
    ):
        order = [*sorted(paths, reverse=True), "nobody.jpg"]
        np.save(folder / f"{name}.npy", vectors(order).astype(dtype))
        (folder / f"{name}_ids.txt").write_text("\n".join(order))
    np.save(folder / "query_text.npy", vectors(task.queries.text).astype(np.float16))
    return folder


def take(source: Path, world: Path, features: Path, **options) -> Path:
    return convert_embeddings(source, "shop", world / "data", features, "theirs", **options)


def test_rows_find_their_places(world, task, tmp_path, capsys):
    source = write_parts(tmp_path / "in", task)
    take(source, world, tmp_path)
    said = capsys.readouterr().out
    assert said.count("float64, converted to float32") == 2
    assert "1 embeddings are of no gallery; left out" in said
    features = load_features(tmp_path, "theirs", "shop")
    database = features.database("image").read(slice(0, len(task.gallery)))
    assert database.dtype == np.float32
    assert np.allclose(database, vectors(task.gallery.path), atol=1e-6)
    images = features.query("image")
    expected = vectors(images[0] for images in task.queries.images)
    assert np.allclose(images.values[images.row], expected, atol=1e-6)
    texts = features.query("text")
    assert np.allclose(texts.values[texts.row], vectors(task.queries.text), atol=2e-3)
    assert features.manifest["model"]["model"] == "embeddings"
    with pytest.raises(UserError, match="--overwrite replaces them"):
        take(source, world, tmp_path)
    take(source, world, tmp_path, overwrite=True, dtype="float16")
    assert load_features(tmp_path, "theirs", "shop").database("image").dtype == np.float16


def test_a_clip_retrieval_folder(world, task, tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    source = write_parts(tmp_path / "in", task)
    paths = sorted({*task.gallery.path})
    (source / "database_image.npy").unlink()
    for folder in ("img_emb", "metadata"):
        (source / "database_image" / folder).mkdir(parents=True)
    for number, part in enumerate((paths[:40], paths[40:])):
        place = source / "database_image"
        np.save(place / f"img_emb/img_emb_{number}.npy", vectors(part).astype(np.float16))
        table = pandas.DataFrame({"image_path": [f"./{p}" for p in part], "caption": ""})
        table.to_parquet(place / f"metadata/metadata_{number}.parquet")
    take(source, world, tmp_path)
    database = load_features(tmp_path, "theirs", "shop").database("image")
    expected = vectors(task.gallery.path)
    assert np.allclose(database.read(slice(0, len(expected))), expected, atol=5e-3)
    (source / "database_image/metadata/metadata_1.parquet").unlink()
    with pytest.raises(UserError, match="one of each number is expected"):
        take(source, world, tmp_path, overwrite=True)


def without(name: str):
    return lambda source: (source / name).unlink()


def saved(name: str, array: np.ndarray):
    return lambda source: np.save(source / name, array)


MISTAKES = {
    "no gallery": (without("database_image.npy"), "has neither database_image.npy nor a folder"),
    "no texts": (without("query_text.npy"), "has neither query_text.npy"),
    "no query images": (without("query_image.npy"), "5 query images are not in the gallery"),
    "another width": (saved("query_text.npy", np.ones((12, 3))), "come from different models"),
    "too few texts": (
        saved("query_text.npy", np.ones((11, D))),
        "11 rows, but the data set has 12",
    ),
    "integers": (saved("query_text.npy", np.ones((12, D), int)), "rows of floats are expected"),
    "NaN": (saved("query_text.npy", np.full((12, D), np.nan)), "12 rows hold NaN or infinity"),
    "a zero row": (saved("query_text.npy", np.eye(12, D)), "row 7 is zero"),
    "no array": (lambda source: (source / "query_text.npy").write_text("x"), "is not a .npy file"),
    "fewer ids": (
        lambda source: (source / "database_image_ids.txt").write_text("a.jpg"),
        "91 rows, but 1 ids",
    ),
    "other ids": (
        lambda source: (source / "database_image_ids.txt").write_text(
            "\n".join(f"{n}.jpg" for n in range(91))
        ),
        "90 gallery ids have no row, the first ",
    ),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_a_mistake_is_one_line_and_nothing_is_written(world, task, tmp_path, name):
    source = write_parts(tmp_path / "in", task, np.float32)
    change, message = MISTAKES[name]
    change(source)
    with pytest.raises(UserError) as refused:
        take(source, world, tmp_path / "out")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_flags_without_effect_are_refused(world, tmp_path):
    flags = ["--from_embeddings", str(tmp_path), "--backbone", "theirs"]
    with pytest.raises(UserError, match="--batch has no effect with --from_embeddings"):
        create_features.main([*flags, "--dataset", "shop", "--batch", "4"])
    with pytest.raises(UserError, match="--from_embeddings has no effect"):
        create_features.main([*flags, "--dataset", "corpus"])
