"""Annotations, folder images, shards and random access to the images in them."""

from __future__ import annotations

import io
import json
import multiprocessing
import pickle
import tarfile
from pathlib import Path

import pytest

import benchmarks
import utils_backbones
from benchmarks import icir, list_folders
from utils import UserError, sha256_file
from utils_datasets import Dataset, ImageStore, find_image, relative_image_path
from utils_datasets import list_shards as list_shards_of


def find_dataset(dataset: str, data_dir: str | Path) -> Dataset:
    found = benchmarks.find_dataset(dataset, Path(data_dir))
    return Dataset(found.name, found.root)


def read_annotation(dataset: Dataset, split: str, source: str) -> icir.Annotation:
    return icir.read_annotation(dataset.root, split, source)


def list_shards(dataset: Dataset, split: str) -> list[Path]:
    return list_shards_of(dataset, split, icir.HOW_TO_GET)


def write_annotation(root: Path, content: str | bytes, split: str = "query") -> Dataset:
    root.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode()
    (root / f"{split}_files.csv").write_bytes(data)
    return Dataset(root.name, root)


def write_shard(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    """Write a tar of samples: key -> members {extension: bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def meta(image_path: str, text: str = "t", instance: str = "i") -> bytes:
    return json.dumps({"img_path": image_path, "text": text, "instance": instance}).encode()


# ---------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------


def test_a_name_is_looked_up_in_the_data_folder_first(tmp_path, monkeypatch):
    write_annotation(tmp_path / "data" / "icir", "q.jpg,t,i\n")
    write_annotation(tmp_path / "icir", "other.jpg,t,i\n")
    monkeypatch.chdir(tmp_path)
    assert find_dataset("icir", "data") == Dataset("icir", Path("data/icir"))


def test_what_begins_with_a_dot_is_a_path(tmp_path, monkeypatch):
    for place in ("data/mugs", "mugs"):
        write_annotation(tmp_path / place, "q.jpg,t,i\n")
    monkeypatch.chdir(tmp_path)
    assert find_dataset("mugs", "data").root == Path("data/mugs")
    assert find_dataset("./mugs", "data").root == Path("mugs")
    monkeypatch.chdir(tmp_path / "mugs")
    (tmp_path / "mugs/data").mkdir()
    assert find_dataset(".", "data").name == "mugs"


def test_a_path_is_a_data_set_named_after_its_folder(tmp_path, monkeypatch):
    write_annotation(tmp_path / "my set", "q.jpg,t,i\n")
    assert find_dataset(str(tmp_path / "my set"), "data").name == "my set"
    monkeypatch.chdir(tmp_path / "my set")
    assert find_dataset(".", "data").name == "my set"


def test_an_unknown_data_set_lists_the_known_ones(tmp_path):
    write_annotation(tmp_path / "bikes", "q.jpg,t,i\n")
    write_annotation(tmp_path / "cars" / "annotations", "q.jpg,t,i\n")
    (tmp_path / "laion_mean").mkdir()
    assert list_folders(tmp_path) == ["bikes", "cars"]
    with pytest.raises(UserError, match=r"no data set 'icir'.*bikes, cars.*download\.py icir"):
        find_dataset("icir", tmp_path)
    with pytest.raises(UserError, match=r"data sets under .*absent: none.*query_files\.csv"):
        find_dataset("trees", tmp_path / "absent")


def test_a_folder_for_a_mean_does_not_hide_the_toolkits_own_data(tmp_path, monkeypatch):
    write_annotation(tmp_path / "toolkit/data/tiny", "q.jpg,t,i\n")
    monkeypatch.setattr(utils_backbones, "ROOT", tmp_path / "toolkit")
    (tmp_path / "here/data/tiny/mean").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert find_dataset("tiny", "data").root == tmp_path / "toolkit/data/tiny"


def test_a_reserved_name_is_refused(tmp_path):
    write_annotation(tmp_path / "corpus", "q.jpg,t,i\n")
    with pytest.raises(UserError, match="rename the folder"):
        find_dataset(str(tmp_path / "corpus"), "data")


def test_the_name_of_a_published_data_set_is_refused(tmp_path):
    write_annotation(tmp_path / "x/icir", "q.jpg,t,i\n")  # a copy of i-CIR elsewhere is one
    assert find_dataset(str(tmp_path / "x/icir"), "data").name == "icir"
    write_annotation(tmp_path / "x/cirr", "q.jpg,t,i\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/queries.jsonl").touch()
    (tmp_path / "mine/benchmark.json").write_text('{"name": "tiny"}')
    for folder in ("x/cirr", "mine"):
        with pytest.raises(UserError, match=r"cannot be called '(cirr|tiny)', as a published one"):
            find_dataset(str(tmp_path / folder), "data")


# ---------------------------------------------------------------------------------------------
# Annotations
# ---------------------------------------------------------------------------------------------

AWKWARD = (
    'query/a b.jpg,"with a hat, at night",éléphant\n'
    'query/é.png,"the ""old"" one",éléphant\n'
    "query/a b.jpg,东京 夜,statue\n"
)
AWKWARD_ROWS = [
    ("query/a b.jpg", "with a hat, at night", "éléphant"),
    ("query/é.png", 'the "old" one', "éléphant"),
    ("query/a b.jpg", "东京 夜", "statue"),
]


@pytest.mark.parametrize(
    "content",
    [
        AWKWARD.encode(),
        AWKWARD.replace("\n", "\r\n").encode(),
        b"\xef\xbb\xbf" + AWKWARD.encode(),
        AWKWARD.rstrip("\n").encode(),
        AWKWARD.encode() + b"\n\n",
    ],
    ids=["plain", "crlf", "bom", "no last newline", "blank lines at the end"],
)
def test_commas_quotes_and_other_alphabets_survive(tmp_path, content):
    dataset = write_annotation(tmp_path / "set", content)
    annotation = read_annotation(dataset, "query", "folder")
    rows = zip(annotation.image_paths, annotation.texts, annotation.instances, strict=True)
    assert list(rows) == AWKWARD_ROWS
    assert annotation.sha256 == sha256_file(annotation.path)
    assert annotation.path == tmp_path / "set" / "query_files.csv"


def test_a_database_text_may_be_empty_and_a_query_text_may_not(tmp_path):
    dataset = write_annotation(tmp_path, "d.jpg,,mug\n", "database")
    assert read_annotation(dataset, "database", "folder").texts == [""]
    write_annotation(tmp_path, "q.jpg,t,mug\nq.jpg,,mug\n", "query")
    with pytest.raises(UserError, match=r"query_files\.csv, row 2: a query needs a text"):
        read_annotation(dataset, "query", "folder")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.jpg,t,i\nb.jpg,in red, at night,i\n", r"row 2: 4 columns where 3 are expected"),
        ("a.jpg,t,i\n\nb.jpg,i\n", r"row 3: 2 columns where 3 are expected"),
        ("a.jpg;t, u;i\n", r"row 1: 2 columns where 3 are expected .* double quotes"),
        ("a.jpg;t;i\n", r"row 1: 1 columns where 3 are expected .* the place of ';'"),
        ("a.jpg\tt\ti\n", r"row 1: 1 columns where 3 are expected .* the place of '\\t'"),
        ("image_path,text,instance\na.jpg,t,i\n", r"row 1: the file takes no header line"),
        (",t,i\n", r"row 1: the image path and the instance must not be empty"),
        ("a.jpg,t,\n", r"row 1: the image path and the instance must not be empty"),
        ('a.jpg,t,i\nb.jpg,"t,i\n', r"row 2: not CSV"),
        ("", r"is empty"),
        ("\n\n", r"is empty"),
        ("é.jpg,t,i\n".encode("latin-1"), r"is not UTF-8"),
    ],
)
def test_a_bad_annotation_names_file_and_row(tmp_path, content, message):
    dataset = write_annotation(tmp_path / "set", content)
    with pytest.raises(UserError, match=rf"set.query_files\.csv.*{message}"):
        read_annotation(dataset, "query", "folder")


def test_annotations_are_found_beside_shards(tmp_path):
    dataset = Dataset("icir", tmp_path)
    with pytest.raises(UserError, match=r"no query_files\.csv in .*annotations.*download\.py icir"):
        read_annotation(dataset, "query", "wds")
    for place in ("", "webdataset/annotations", "annotations"):  # each goes before the last
        write_annotation(tmp_path / place, f"from/{place}.jpg,t,i\n")
        assert read_annotation(dataset, "query", "wds").image_paths == [f"from/{place}.jpg"]
    assert read_annotation(dataset, "query", "folder").image_paths == ["from/.jpg"]


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------


def test_image_paths_are_relative_to_the_root_or_its_parent(tmp_path, monkeypatch):
    (tmp_path / "icir" / "query").mkdir(parents=True)
    (tmp_path / "icir" / "query" / "é 1.jpg").write_bytes(b"x")
    for root in (tmp_path / "icir", Path("icir"), Path(".")):
        monkeypatch.chdir(tmp_path / "icir" if root == Path(".") else tmp_path)
        dataset = Dataset("icir", root)
        assert find_image(dataset, "query/é 1.jpg").read_bytes() == b"x"
        assert find_image(dataset, "icir/query/é 1.jpg").read_bytes() == b"x"
        assert find_image(dataset, "./data/icir/query/é 1.jpg").read_bytes() == b"x"
        with pytest.raises(FileNotFoundError, match=r"query/2\.jpg"):
            find_image(dataset, "query/2.jpg")


def test_shards_come_in_the_order_of_their_numbers(tmp_path):
    dataset = Dataset("icir", tmp_path)
    folder = tmp_path / "webdataset" / "query"
    for number in (2, 0, 1):
        write_shard(folder / f"query-{number:06d}.tar", [])
    (folder / "query-000003.tar.part").touch()
    assert [path.name for path in list_shards(dataset, "query")] == [
        f"query-{number:06d}.tar" for number in range(3)
    ]


def test_missing_shards_are_named(tmp_path):
    dataset = Dataset("icir", tmp_path)
    with pytest.raises(UserError, match=r"no query-NNNNNN\.tar in .*download\.py icir"):
        list_shards(dataset, "query")
    folder = tmp_path / "webdataset" / "query"
    for number in (3, 5):
        write_shard(folder / f"query-{number:06d}.tar", [])
    with pytest.raises(UserError, match=r"query-000001\.tar, query-000002\.tar, query-000004"):
        list_shards(dataset, "query")


@pytest.fixture
def sharded(tmp_path: Path) -> Dataset:
    folder = tmp_path / "icir" / "webdataset" / "query"
    write_shard(
        folder / "query-000000.tar",
        [
            ("0001", {"json": meta("query/a b.jpg"), "jpg": b"first image"}),
            ("0002", {"PNG": b"second", "json": meta("icir/query/é.png")}),
            ("deep/er/0003", {"webp": b"third", "json": meta("query/c.webp")}),
        ],
    )
    write_shard(
        folder / "query-000001.tar",
        [
            ("0001", {"jpeg": b"fourth", "json": meta("query/d.jpeg")}),
            ("0002", {"json": meta("query/no image.jpg"), "txt": b"a note"}),
        ],
    )
    return Dataset("icir", tmp_path / "icir")


def test_images_are_read_out_of_shards(sharded):
    store = ImageStore(sharded)
    assert store.read("query", "query/a b.jpg") == b"first image"
    assert store.read("query", "icir/query/a b.jpg") == b"first image"
    assert store.read("query", "query/é.png") == b"second"
    assert store.read("query", "query/c.webp") == b"third"
    assert store.read("query", "query/d.jpeg") == b"fourth"
    for split, path in [("query", "query/no image.jpg"), ("database", "query/a b.jpg")]:
        with pytest.raises(FileNotFoundError):
            store.read(split, path)


def test_the_headers_of_a_split_are_read_once(sharded, monkeypatch):
    store = ImageStore(sharded)
    store.read("query", "query/a b.jpg")
    monkeypatch.setattr(tarfile, "open", None)
    assert store.read("query", "query/d.jpeg") == b"fourth"


def test_a_file_in_the_folder_goes_before_the_shards(sharded):
    (sharded.root / "query").mkdir()
    (sharded.root / "query" / "a b.jpg").write_bytes(b"the file")
    assert ImageStore(sharded).read("query", "query/a b.jpg") == b"the file"


def read_in_worker(store: ImageStore) -> bytes:
    return store.read("query", "query/d.jpeg")


def test_a_store_goes_to_worker_processes(sharded):
    store = ImageStore(sharded)
    assert pickle.loads(pickle.dumps(store)).read("query", "query/d.jpeg") == b"fourth"
    store.read("query", "query/a b.jpg")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(read_in_worker, (store,)) == b"fourth"


def test_both_forms_of_a_path_are_one(tmp_path):
    dataset = Dataset("icir", tmp_path / "icir")
    forms = ["query/a.jpg", "./query/a.jpg", "icir/query/a.jpg", "./data/icir/query/a.jpg"]
    assert {relative_image_path(dataset, form) for form in forms} == {"query/a.jpg"}
