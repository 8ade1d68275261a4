"""Live search without a page: a folder's features as it changes, rankings, saved queries."""

import csv
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from extraction_world import draw_image, encode_jpeg, environment
from filelock import FileLock
from live_world import BROKEN, PHOTOS, World, add_dataset, make_photos, make_world

from live import opening
from live.answers import describe_ranked, numbers
from live.choices import Choices
from live.gallery import LiveGallery, LiveRows, find_again, find_best, first_rows
from live.packed import _memory, has_fbgemm
from live.photos import name_of, read_stored, see
from live.saved import command_of, save_query
from live.searcher import Column
from live.server import listen, serve
from live.threads import at_once
from methods import flags_of, list_methods
from search import open_dataset, open_folder
from utils import UserError, read_json, write_json
from utils_backbones import backbone_folder
from utils_features import Encoder
from utils_protocol import describe_texts
from utils_retrieval import Gallery
from utils_task import Images

ROOT = Path(__file__).resolve().parent.parent
SHOWN = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_clip) -> World:
    world = make_world(tmp_path_factory.mktemp("live"), small_clip)
    add_dataset(world, "shots")
    return world


@pytest.fixture(scope="module")
def photos(world):
    return open_folder(world.photos, world.backbone, where=world.where)


@pytest.fixture(scope="module")
def shots(world):
    return open_dataset("shots", world.backbone, where=world.where)


def folder_of(world: World) -> Path:
    return world.folder / "features" / backbone_folder(world.backbone) / name_of(world.photos)


# --- a folder as it changes --------------------------------------------------------------------


@pytest.fixture
def changing(tmp_path, small_clip, monkeypatch):
    """A world of its own, what indexes it, and the number of images that each time encodes."""
    world, counts = World(tmp_path, small_clip), []
    make_photos(world.photos)
    encode = Encoder.encode_images

    def counted(self, batch, half_pixels=False):
        counts.append(len(batch))
        return encode(self, batch, half_pixels)

    monkeypatch.setattr(Encoder, "encode_images", counted)

    def index(**options) -> tuple[dict[str, np.ndarray], int]:
        counts.clear()
        found = open_folder(world.photos, world.backbone, where=world.where, **options)
        rows = found.features.database("image").read(slice(0, len(found)))
        return dict(zip(found.paths, rows, strict=True)), sum(counts)

    return world, index


def test_only_what_is_new_or_changed_is_encoded(changing):
    world, index = changing
    first, encoded = index()
    assert encoded == len(first) == PHOTOS
    assert BROKEN not in first
    assert index()[1] == 0
    (world.photos / "new.png").write_bytes(encode_jpeg(draw_image(100)))
    (world.photos / "trip/day 1/03.jpg").write_bytes(encode_jpeg(draw_image(101)))
    (world.photos / "trip/day 1/05.jpg").unlink()
    second, encoded = index()
    assert encoded == 2
    assert {*second} == ({*first} | {"new.png"}) - {"trip/day 1/05.jpg"}
    assert list(second) == sorted(second)
    for path in first.keys() & second.keys() - {"trip/day 1/03.jpg"}:
        assert np.array_equal(first[path], second[path]), path
    assert not np.allclose(first["trip/day 1/03.jpg"], second["trip/day 1/03.jpg"])
    (world.photos / BROKEN).write_bytes(encode_jpeg(draw_image(102)))  # mended
    assert index()[1] == 1
    (world.photos / "new.png").unlink()
    assert index()[1] == 0
    assert index(overwrite=True)[1] == PHOTOS
    third, encoded = index()
    assert (len(third), encoded) == (PHOTOS, 0)


def test_features_are_those_of_the_ordinary_extraction(changing, tmp_path):
    world, index = changing
    found, _ = index(save_dtype="float32")
    listed = tmp_path / "data" / "listed"
    listed.parent.mkdir()
    listed.symlink_to(world.photos)
    (world.photos / "gallery.csv").write_text("trip/day 1/00.jpg\ntrip/day 1/07.jpg\n")
    query = '{"image": "trip/day 1/00.jpg", "text": "x", "positives": []}\n'
    (world.photos / "queries.jsonl").write_text(query)
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "generic_subjects.csv").write_text("mug\n")
    command = [sys.executable, str(ROOT / "create_features.py"), "--dataset", "listed"]
    always = ["--backbone", world.backbone, "--gpu", "-1"]
    done = subprocess.run(
        [*command, *always], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "features" / backbone_folder(world.backbone) / "listed"
    rows = np.load(folder / "database_image.npy")
    for row, path in zip(rows, ("trip/day 1/00.jpg", "trip/day 1/07.jpg"), strict=True):
        np.testing.assert_allclose(found[path], row, rtol=0, atol=1e-5)


KILLED = """
import os, signal, sys
import numpy as np
from live import opening
from pathlib import Path
opening.PART_ROWS = 8
save, parts = np.savez, []
def save_or_die(file, **arrays):
    parts.append(1)
    if len(parts) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    save(file, **arrays)
np.savez = save_or_die
at = Path(sys.argv[1])
where = opening.Where(at / "features", at / "data", None, at / "corpora", -1)
opening.open_folder(at / "photos", sys.argv[2], where)
"""


def test_a_killed_run_continues_and_sees_what_changed_meanwhile(changing, monkeypatch):
    world, index = changing
    monkeypatch.setattr(opening, "PART_ROWS", 8)
    command = [sys.executable, "-c", KILLED, str(world.folder), world.backbone]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not (folder_of(world) / "manifest.json").exists()
    (world.photos / "trip/day 1/01.jpg").unlink()  # was encoded
    (world.photos / "trip/day 1/20.jpg").unlink()  # was not
    (world.photos / "late.jpg").write_bytes(encode_jpeg(draw_image(200)))
    found, encoded = index()
    assert "late.jpg" in found
    assert not {"trip/day 1/01.jpg", "trip/day 1/20.jpg"} & {*found}
    assert len(found) == PHOTOS - 1
    rest = PHOTOS + 1 - 16 - 1  # two parts were done, and one of the others is gone
    assert encoded == rest + 1  # and one has come
    assert not (folder_of(world) / ".parts").exists()


def test_a_damaged_photograph_among_finished_ones_is_named_and_not_tried_again(changing, capsys):
    world, index = changing
    index()
    capsys.readouterr()
    (world.photos / "zero.jpg").write_bytes(b"")
    found, _ = index()
    assert len(found) == PHOTOS
    said = capsys.readouterr().out
    assert "2 cannot be read, the first 'broken.jpg': not an image" in said
    assert "1, the first 'phone.heic'" in said
    bad = read_stored(folder_of(world)).bad
    assert [photo.path for photo in bad] == [BROKEN, "zero.jpg"]
    assert index()[1] == 0


def test_a_run_killed_while_it_publishes_is_finished_first(changing, monkeypatch):
    world, index = changing
    first, _ = index()
    (world.photos / "new.png").write_bytes(encode_jpeg(draw_image(100)))
    move, moved = os.replace, []

    def kill(source, target):
        if Path(target).parent == folder_of(world):
            moved.append(target)
            if len(moved) == 3:
                raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        index()
    monkeypatch.setattr(os, "replace", move)
    assert not (folder_of(world) / "manifest.json").exists()
    (world.photos / "trip/day 1/05.jpg").unlink()
    found, encoded = index()
    assert encoded == 0
    assert {*found} == {*first, "new.png"} - {"trip/day 1/05.jpg"}


def test_two_at_work_on_one_folder_are_one_too_many(changing):
    world, index = changing
    lock = folder_of(world) / ".lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock), pytest.raises(UserError, match=r"another search\.py is at work"):
        index()
    assert index()[1] == PHOTOS


def test_one_photograph_that_is_mended_after_none_could_be_read(changing):
    world, index = changing
    for path in world.photos.rglob("*"):
        if path.is_file() and path.name != BROKEN:
            path.unlink()
    (world.photos / "gone.jpg").symlink_to(world.photos / "absent.jpg")
    with pytest.raises(UserError, match=r"no photograph can be read, .* broken\.jpg: not an image"):
        index()
    (world.photos / BROKEN).write_bytes(encode_jpeg(draw_image(1)))
    assert index()[1] == 1
    alone = open_folder(world.photos, world.backbone, where=world.where)
    for method in list_methods():
        if alone.choices.lacking(list_methods()[method]) is None:
            ranked = alone.rank(alone.find("g0"), "at night", method, {}, 5)
            assert describe_ranked(alone, ranked)["columns"]["composed"][0]["row"] == 0


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("manifest.json", b"{", "manifest.json"),
        ("photos.csv", b"image_path\nx.jpg\n", "photos.csv"),
        ("photos.csv", None, "photos.csv"),
        ("photos.csv", "short", "index the folder again with --overwrite"),
        ("database_image.npy", b"nothing", "database_image.npy is not"),
        ("database_image.npy", "short", "is cut short"),
    ],
)
def test_damaged_features_are_named_and_replaced_on_demand(damaged, name, content, words):
    index, folder, kept = damaged
    path = folder / name
    try:
        if content is None:
            path.unlink()
        else:
            lines = kept[name].splitlines(keepends=True)
            fewer = b"".join([lines[0], *lines[2:]])
            short = fewer if path.suffix == ".csv" else kept[name][:-8]
            path.write_bytes(short if content == "short" else content)
        with pytest.raises(UserError, match=words):
            index()
    finally:
        path.write_bytes(kept[name])


@pytest.fixture(scope="module")
def damaged(world, photos):
    folder = folder_of(world)
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return lambda: open_folder(world.photos, world.backbone, where=world.where), folder, kept


def test_another_precision_is_refused_in_a_line(changing):
    _, index = changing
    first, _ = index(save_dtype="float32")
    again, encoded = index()
    assert encoded == 0
    assert {rows.dtype for rows in (*first.values(), *again.values())} == {np.dtype("float32")}
    said = r"save_dtype \(float32, now float16\); --save_dtype float32 takes them as they are"
    with pytest.raises(UserError, match=said):
        index(save_dtype="float16")
    assert index(overwrite=True)[1] == PHOTOS


def test_features_of_other_pixels_are_refused_and_replaced_on_demand(changing):
    """A manifest that does not say is of plain pixels."""
    world, index = changing
    index()
    path = folder_of(world) / "manifest.json"
    manifest = read_json(path)
    assert manifest.pop("pixels") == "viewed"
    write_json(path, manifest)
    (world.photos / "new.png").write_bytes(encode_jpeg(draw_image(100)))
    with pytest.raises(UserError, match=r"another pixels \(plain, now viewed\).*--overwrite"):
        index()
    assert index(overwrite=True)[1] == PHOTOS + 1
    assert read_json(path)["pixels"] == "viewed"


def test_a_folder_without_photographs_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no \.jpg"):
        see(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        see(tmp_path / "absent")


def test_names_that_are_no_utf8_are_passed_and_counted(tmp_path):
    (tmp_path / "good.jpg").write_bytes(b"")
    with open(os.fsencode(tmp_path) + b"/\xff.jpg", "wb"):
        pass
    seen = see(tmp_path)
    assert ([photo.path for photo in seen.photos], len(seen.passed)) == (["good.jpg"], 1)


# --- candidates --------------------------------------------------------------------------------

CROWD = 4000


@pytest.fixture(scope="module")
def crowd(world):
    """A data set of image features alone, in which a few candidates are a choice."""
    add_dataset(world, "crowd", rows=CROWD)
    folder = world.where.features / backbone_folder(world.backbone) / "crowd"
    for path in folder.glob("database_*.npy"):
        if path.stem != "database_image":
            path.unlink()

    def open_crowd(most: int):
        return open_dataset("crowd", world.backbone, where=replace(world.where, candidates=most))

    return open_crowd


def test_candidates_that_are_all_rows_rank_as_all_rows_do(crowd):
    pytest.importorskip("faiss", reason="faiss is not installed: no candidates")
    whole, found = crowd(0), crowd(CROWD)
    text = whole.features.task.queries.text[1]
    for method in ("sum", "basic", "weicom"):
        for searcher in (whole, found):
            image = searcher.find("q1")
            searcher.last = searcher.rank(image, text, method, {}, SHOWN)
        for name, column in whole.last.columns.items():
            other = found.last.columns[name]
            assert other.rows.tolist() == column.rows.tolist(), (method, name)
            np.testing.assert_allclose(other.values, column.values, rtol=2e-5, atol=2e-6)
            assert other.ranks(other.places).tolist() == column.ranks(column.places).tolist()


def test_candidates_are_few_and_said_to_be_approximate(crowd):
    pytest.importorskip("faiss", reason="faiss is not installed: no candidates")
    whole, few = crowd(0), crowd(500)
    image, text = whole.find("g7"), whole.features.task.queries.text[0]
    ranked = [s.rank(image, text, "basic", {}, SHOWN, leave_out=True) for s in (whole, few)]
    assert describe_ranked(whole, ranked[0])["approximate"] == ""
    answer = describe_ranked(few, ranked[1])
    count = len(ranked[1].image)
    assert SHOWN < count < 0.5 * CROWD
    assert f"the {count:,} images that faiss finds nearest" in answer["approximate"]
    for name, column in ranked[0].columns.items():
        same = {*column.rows} & {*ranked[1].columns[name].rows}
        assert len(same) >= 0.9 * SHOWN, name
        assert 7 not in ranked[1].columns[name].rows
    similarity = whole.gallery.similarity(torch.from_numpy(whole.find("g7").vector)[None])[0]
    rows = ranked[1].columns["image"].rows
    scale = np.linalg.norm(image.vector)
    shown = [row["score"] for row in answer["columns"]["image"]]
    np.testing.assert_allclose(shown, similarity[rows] / scale, rtol=1e-5)


def test_candidates_resemble_image_and_text_together(crowd, monkeypatch):
    pytest.importorskip("faiss", reason="faiss is not installed: no candidates")
    whole, few = crowd(0), crowd(SHOWN // 2)

    def recall(mixed: tuple[float, ...]) -> float:
        monkeypatch.setattr("live.candidates.MIXED", mixed)
        found = []
        for row in range(5):
            text = whole.features.task.queries.text[row % 3]
            best = [s.rank(s.find(f"g{row}"), text, "basic", {}, SHOWN) for s in (whole, few)]
            first, second = ({*ranked.columns["composed"].rows} for ranked in best)
            found.append(len(first & second) / SHOWN)
        return sum(found) / len(found)

    without = recall(())
    assert recall((0.25, 0.5, 0.75)) > without + 0.1


def test_a_damaged_index_of_candidates_is_named(crowd):
    pytest.importorskip("faiss", reason="faiss is not installed: no candidates")
    path = next((crowd(50).features.folder / ".live").glob("candidates-*.faiss"))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"faiss is damaged: remove it"):
        crowd(50)
    path.unlink()
    assert crowd(50).candidates.most == 50


def test_candidates_without_faiss_name_what_to_install(crowd, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="--candidates needs faiss: pip install faiss-cpu"):
        crowd(10)


def test_candidates_of_other_features_are_refused(world, shots):
    with pytest.raises(UserError, match="--candidates finds image features alone"):
        open_dataset("shots", world.backbone, where=replace(world.where, candidates=5))


# --- rankings ----------------------------------------------------------------------------------


def run(words: list[str], *more: str) -> None:
    command = [sys.executable, str(ROOT / "run_retrieval.py"), *words, *map(str, more)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def read_top(path: Path) -> list[tuple[list[str], np.ndarray]]:
    """The best rows of every query in a topK.csv: their paths and scores."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    k = int(path.stem.removeprefix("top"))
    return [
        (
            [row[f"path_{n}"] for n in range(1, k + 1)],
            np.array([float(row[f"score_{n}"]) for n in range(1, k + 1)]),
        )
        for row in rows
    ]


def same_ranking(searcher, column, expected: tuple[list[str], np.ndarray]) -> None:
    paths, scores = expected
    np.testing.assert_allclose(column.values, scores, rtol=2e-5, atol=2e-6)
    assert [searcher.paths[row] for row in column.rows] == paths


@pytest.fixture(scope="module")
def all_methods(world, photos, shots, tmp_path_factory) -> Path:
    """Where run_retrieval.py --method all wrote its rankings of the data set's queries."""
    results = tmp_path_factory.mktemp("results")
    places = {"features_dir": "features", "data_dir": "data"}
    words = [word for n, at in places.items() for word in (f"--{n}", str(world.folder / at))]
    words += ["--dataset", "shots", "--backbone", world.backbone, "--method", "all", "--gpu", "-1"]
    run(words, "--top_k", SHOWN, "--results_dir", results)
    return results


@pytest.mark.parametrize("method", list_methods())
def test_every_method_ranks_as_run_retrieval_does(shots, all_methods, method):
    defaults = {name: default for name, (default, _) in flags_of(list_methods()[method]).items()}
    variant = shots.choices.run(list_methods()[method], defaults).variant
    found = read_top(all_methods / "shots" / variant / f"top{SHOWN}.csv")
    for number, expected in enumerate(found):
        text = shots.features.task.queries.text[number]
        ranked = shots.rank(shots.find(f"q{number}"), text, method, defaults, SHOWN)
        same_ranking(shots, ranked.columns["composed"], expected)


QUERIES = {
    "basic": {"harris_lambda": 0.3},
    "freedom": {"kappa": 5},
    "weicom": {"contextualize": True},
}
TEXT = 'at "night", \u00e9'


@pytest.mark.parametrize("method", QUERIES)
def test_the_command_of_a_live_query_ranks_the_same(photos, tmp_path, method):
    """Of an image that was brought or, but by freedom, of one of the gallery, which is left out."""
    leave_out = method != "freedom"
    image = photos.find("g4") if leave_out else photos.give(encode_jpeg(draw_image(77)))
    ranked = photos.rank(image, TEXT, method, QUERIES[method], SHOWN, leave_out)
    name = save_query(photos, ranked.run, image, TEXT)
    assert save_query(photos, ranked.run, image, TEXT) == name
    expected = run_command_of(photos, ranked.run, name, image, leave_out, tmp_path)
    same_ranking(photos, ranked.columns["composed"], expected)
    assert image.path not in expected[0]


def test_of_a_text_that_is_cut_it_is_said(photos):
    image, long = photos.find("g4"), "at night " * 40
    assert photos.rank(image, "at night", "sum", {}, 5).remark == ""
    ranked = photos.rank(image, long, "sum", {}, 5)
    said = f"longer than the backbone's {photos.encoder.context_length} tokens: what is behind"
    assert said in describe_ranked(photos, ranked)["remark"]
    assert said in photos.rank(None, long, "sum", {}, 5).remark
    folder = photos.features.folder.parent / save_query(photos, ranked.run, image, long)
    [line] = describe_texts(read_json(folder / "manifest.json"))
    assert f"1 of 1 distinct query texts are {said}" in line
    folder = photos.features.folder.parent / save_query(photos, ranked.run, image, "at night")
    assert describe_texts(read_json(folder / "manifest.json")) == []


def test_what_is_said_of_a_data_sets_texts_is_not_said_of_another_query(world):
    add_dataset(world, "cut")
    path = world.where.features / backbone_folder(world.backbone) / "cut" / "manifest.json"
    own = "in a place like 1"
    cut = {"count": 1, "first": own, "row": 2, "all": [own]}
    texts = {"query": {"context_length": 9, "count": 3, "cut": cut}}
    write_json(path, {**read_json(path), "texts": texts})
    found = open_dataset("cut", world.backbone, where=world.where)
    lines = []
    for number, text in enumerate(found.features.task.queries.text[:2]):
        image = found.find(f"q{number}")
        ranked = found.rank(image, text, "sum", {}, 5)
        assert bool(ranked.remark) == (number == 1)
        name = save_query(found, ranked.run, image, text)
        lines.append(describe_texts(read_json(path.parents[1] / name / "manifest.json")))
    assert [len(own) for own in lines] == [0, 1]


def run_command_of(searcher, run_asked, name: str, image, leave_out: bool, results: Path):
    """What the command of a saved query finds."""
    command = shlex.split(command_of(searcher, run_asked, name, image, SHOWN, leave_out))
    run(command[2:], "--results_dir", results)
    [file] = (results / name).glob(f"*/top{SHOWN}.csv")
    [found] = read_top(file)
    return found


def test_a_query_whose_image_is_in_the_gallery_leaves_it_out(world, tmp_path):
    """As CIRR's and FashionIQ's are: its feature is the gallery's."""
    add_dataset(world, "groups", in_gallery=True)
    groups = open_dataset("groups", world.backbone, where=world.where)
    image, text = groups.find("q1"), groups.features.task.queries.text[1]
    ranked = groups.rank(image, text, "basic", {}, SHOWN, leave_out=True)
    assert groups.paths[1] == image.path
    assert groups.rank(image, text, "image", {}, SHOWN).columns["composed"].rows[0] == 1
    name = save_query(groups, ranked.run, image, text)
    expected = run_command_of(groups, ranked.run, name, image, True, tmp_path)
    same_ranking(groups, ranked.columns["composed"], expected)
    assert image.path not in expected[0]


def test_the_command_leaves_out_only_what_is_in_the_gallery(shots):
    image, text = shots.find("q0"), shots.features.task.queries.text[0]
    run = shots.rank(image, text, "sum", {}, SHOWN, leave_out=True).run
    command = command_of(shots, run, "saved", image, SHOWN, leave_out=True)
    assert "--exclude_query_image" not in command
    own = command_of(shots, run, "saved", shots.find("g3"), SHOWN, leave_out=True)
    assert own.endswith(" --exclude_query_image")


def test_all_rows_of_an_image_are_left_out(shots, monkeypatch):
    paths = list(shots.paths)
    paths[50] = paths[3]
    gallery = replace(shots.features.task.gallery, path=paths)
    monkeypatch.setattr(
        shots,
        "features",
        replace(shots.features, task=replace(shots.features.task, gallery=gallery)),
    )
    ranked = shots.rank(shots.find("g3"), "", "sum", {}, 120, leave_out=True)
    assert not {3, 50} & {*ranked.columns["image"].rows}
    assert len(ranked.columns["image"].rows) == 118


def test_an_image_that_is_in_several_rows_is_ranked_once(world, tmp_path):
    """As those of FashionIQ's categories, whose galleries overlap."""
    add_dataset(world, "twice", in_gallery=True, again=40)
    twice = open_dataset("twice", world.backbone, where=world.where)
    image, text = twice.find("q1"), twice.features.task.queries.text[1]
    ranked = twice.rank(image, text, "basic", {}, 120)
    answer = describe_ranked(twice, ranked)
    for name, rows in answer["columns"].items():
        assert sorted(row["row"] for row in rows) == list(range(80)), name
        assert all(max(row["ranks"].values()) <= 80 for row in rows)
        assert {row["listed"] for row in rows if row["row"] < 40} == {2}
        assert {row["listed"] for row in rows if row["row"] >= 40} == {1}
    assert answer["scatter"]["of"] == 80
    name = save_query(twice, ranked.run, image, text)
    expected = run_command_of(twice, ranked.run, name, image, False, tmp_path)
    shown = twice.rank(image, text, "basic", {}, SHOWN).columns["composed"]
    same_ranking(twice, shown, expected)


def test_boxes_of_one_image_are_images_of_their_own():
    box = np.array([[0, 0, 9, 9], [0, 0, 5, 5], [0, 0, 9, 9], [0, 0, 9, 9]])
    first = first_rows(Images(["a", "a", "b", "a"], box))
    assert first.tolist() == [0, 1, 2, 0]
    assert find_again(first).tolist() == [3]
    assert find_again(first[[1, 2, 3]]).tolist() == []  # of candidates, the first may not be one


def test_parameters_start_at_the_preset_as_far_as_its_assets_are_there(world, photos, shots):
    start = photos.choices.start(list_methods()["basic"])
    assert start["use_laion_mean"]
    assert start["normalize_similarities"]
    assert not start["contextualize"]  # 200 prompts a text
    places = opening.Where(world.where.features, world.folder / "none", Path("none")).places
    start = Choices(photos.features, places).start(list_methods()["basic"])
    assert start["standardize_features"]
    assert start["project_features"]
    assert not start["use_laion_mean"]
    assert not start["normalize_similarities"]


def test_what_is_fused_decides_the_level(photos):
    """The level's scores are the method's own: at a row's similarities they are the row's score."""
    image = photos.find("g1")
    for method, given in (("basic", {}), ("sum", {"fusion_weight": 0.3}), ("weicom", {})):
        ranked = photos.rank(image, "a drawing", method, given, 5)
        scores, across, up = ranked.level
        row = int(ranked.columns["composed"].rows[0])
        a, b = float(ranked.image[row]), float(ranked.text[row])
        i = np.clip(np.searchsorted(across, a) - 1, 0, len(across) - 2)
        j = np.clip(np.searchsorted(up, b) - 1, 0, len(up) - 2)
        cell = scores[i : i + 2, j : j + 2]
        score, room = ranked.columns["composed"].values[0], np.ptp(cell) + 1e-6
        assert cell.min() - room <= score <= cell.max() + room
    assert photos.rank(image, "a drawing", "freedom", {"kappa": 3}, 5).level is None


def test_a_change_of_the_fusion_alone_takes_no_product(photos, monkeypatch):
    calls = []
    product = LiveRows.product

    def counted(self, vectors):
        calls.append(len(vectors))
        return product(self, vectors)

    monkeypatch.setattr(LiveRows, "product", counted)
    image, text = photos.find("g2"), "seen from above"
    photos.rank(image, text, "basic", {}, 5)
    first, calls[:] = sum(calls), []
    assert first > 0
    for value in (0.0, 0.05, 0.2):
        photos.rank(image, text, "basic", {"harris_lambda": value}, 5)
    photos.rank(image, text, "weicom", {"weicom_lambda": 0.2}, 5)
    assert calls == []


def test_an_input_of_the_data_set_is_for_its_own_queries_alone(shots):
    with pytest.raises(UserError, match="made for the data set's own queries"):
        shots.rank(shots.find("q0"), "another text", "searle", {}, 5)


def test_keys_outlive_rows_that_move(photos):
    key = photos.key_of(5)
    digest = key.partition("-")[2]
    assert photos.find(f"g999-{digest}").row == 5
    assert photos.find(f"g0-{digest}").row == 5
    for wrong in ("g999", "g0-" + "0" * 16, "q0", "u" + "0" * 16, "x1", "", "g-1", "g\u0661"):
        with pytest.raises(UserError):
            photos.find(wrong)


def test_the_table_of_a_notebook(photos, tmp_path):
    path = tmp_path / "query.jpg"
    path.write_bytes(encode_jpeg(draw_image(3)))
    table = photos.search(path, k=4)
    assert list(table.columns) == ["rank", "path", "score", "image"]
    assert table["path"][0] == "trip/day 1/03.jpg"
    assert table["score"][0] == pytest.approx(1, abs=1e-3)
    both = photos.search(path, "at night", method="sum", k=3, fusion_weight=0.25)
    assert list(both["score"]) == pytest.approx(list(0.75 * both["image"] + 0.25 * both["text"]))
    for wrong in ({}, {"text": "x", "lambda": 1}, {"image": b"nothing"}):
        with pytest.raises(UserError):
            photos.search(**wrong)


def test_features_of_another_model_are_not_searched_by_this_one(photos, monkeypatch, tmp_path):
    pytest.importorskip("starlette", reason="starlette is not installed: no live search")
    from live.pictures import Given
    from live.server import Desk

    said = []
    desk = Desk(photos, Given(tmp_path), said.append)
    monkeypatch.setattr(photos, "_encoder", None)
    monkeypatch.setitem(photos.features.manifest, "model", {"source": "another"})
    desk.warm()
    assert "is of another model than" in desk.failed
    assert said == [f"error: {desk.failed}"]
    with pytest.raises(UserError, match="extract the features again"):
        photos.search(text="not encoded before")


@pytest.mark.parametrize("scores", ["distinct", "tied", "zero"])
def test_ranks_are_those_of_a_stable_sort(scores):
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(500, generator=draw)
    values = {"distinct": values, "tied": values.round(decimals=1), "zero": values * 0}[scores]
    order = values.sort(descending=True, stable=True).indices.numpy()
    expected = np.empty(500, np.int64)
    expected[order] = np.arange(1, 501)
    column = Column.of(values.numpy(), np.arange(500) + 7, 60)
    assert np.array_equal(column.rows - 7, order[:60])
    assert np.array_equal(column.values, values[order[:60]])
    places = np.random.default_rng(0).permutation(500)[:60]
    assert np.array_equal(column.ranks(places), expected[places])


def test_what_is_left_out_and_what_is_no_number_of_a_column():
    scores = np.array([2, -np.inf, np.nan, 3, -np.inf], np.float32)
    column = Column.of(scores, np.arange(5), 9)
    assert {*column.rows} == {0, 2, 3}
    assert list(Column.of(scores[[0, 1, 3]], np.arange(3), 2).rows) == [2, 0]
    assert len(Column.of(scores[[1, 4]], np.arange(2), 1).rows) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 3, 20])
@pytest.mark.parametrize("packed", [True, False])
def test_rows_read_by_parts_give_what_a_gallery_gives(dtype, count, packed):
    draw = torch.Generator().manual_seed(2)
    raw = torch.randn(20_001, 16, generator=draw).to(dtype)
    vectors = torch.randn(count, 16, generator=draw)
    rows = LiveRows.of(raw).pack() if packed else LiveRows.of(raw)
    parts, whole = LiveGallery({"image": rows}), Gallery.of(raw)
    assert (parts.kinds["image"].packed is not None) == (packed and has_fbgemm())
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        torch.testing.assert_close(parts.similarity(vectors), whole.similarity(vectors))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(parts.mean(), whole.mean())
    for _ in range(2):
        for found, expected in zip(
            parts.nearest(vectors, 5), whole.nearest(vectors, 5), strict=True
        ):
            torch.testing.assert_close(found, expected)
    weights, rows = torch.rand(2, 5, generator=draw), torch.arange(10).reshape(2, 5)
    torch.testing.assert_close(
        parts.weighted_rows(weights, rows), whole.weighted_rows(weights, rows)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_packed_rows_are_no_less_exact_than_a_product_of_float32(dtype, size, monkeypatch):
    if not has_fbgemm():
        pytest.skip("this PyTorch has no FBGEMM: rows are not packed")
    draw = torch.Generator().manual_seed(4)
    raw = torch.randn(5000, 512, generator=draw) * torch.logspace(-3, 0, 512)
    raw = (raw * size).to(dtype)
    vectors = torch.randn(4, 512, generator=draw)
    rows = LiveRows.of(raw).pack()
    exact = vectors.double() @ (raw.double() / raw.double().norm(dim=1, keepdim=True)).T
    plain = (vectors @ raw.float().T / rows.length - exact).abs().mean()
    assert (rows.packed.product(vectors) - exact).abs().mean() < 3 * plain
    monkeypatch.setattr("live.packed._memory", lambda: 4 * raw.nbytes - 1)
    assert LiveRows.of(raw).pack().packed is None  # a copy would take too much


LIMITS = {
    "none": ("0::/", {}, None),
    "v2": ("0::/", {"memory.max": "max\n"}, None),
    "v2 of its own": ("0::/a/b", {"a/b/memory.max": "7000\n", "memory.max": "9000\n"}, 7000),
    "v2 around it": ("0::/a/b", {"a/b/memory.max": "max\n", "a/memory.max": "800\n"}, 800),
    "v1": ("9:cpu:/\n4:memory:/x\n0::/", {"memory/x/memory.limit_in_bytes": "600\n"}, 600),
    "v1, its own on top": ("3:cpu,memory:/host/x", {"memory/memory.limit_in_bytes": "50\n"}, 50),
    "v1, none": ("4:memory:/", {"memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"}, None),
}


@pytest.mark.parametrize("name", LIMITS)
def test_memory_is_what_a_container_may_have(tmp_path, name):
    said, files, expected = LIMITS[name]
    for path, content in {
        "proc/self/cgroup": said,
        **{f"sys/fs/cgroup/{p}": c for p, c in files.items()},
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    machine = os.sysconf("SC_PAGESIZE") * os.sysconf("SC_PHYS_PAGES")
    assert _memory(tmp_path) == (expected or machine)


def test_ctrl_c_ends_the_packing_soon(monkeypatch):
    if not has_fbgemm():
        pytest.skip("this PyTorch has no FBGEMM: rows are not packed")
    packs, steps = [], 400

    def pack(rows: torch.Tensor) -> None:
        packs.append(len(rows))
        if len(packs) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.005)

    monkeypatch.setattr("live.packed._pack", pack)
    monkeypatch.setattr("live.packed.ROWS_PACKED", 4)
    raw = torch.ones(4 * steps, 8)
    known = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in the background: none
    try:
        with pytest.raises(KeyboardInterrupt):
            LiveRows.of(raw).pack()
    finally:
        signal.signal(signal.SIGINT, known)
    everyone = threading.Barrier(os.cpu_count())
    at_once(lambda _: everyone.wait(20), range(os.cpu_count()))  # no thread works on
    assert len(packs) < steps


def test_rows_that_cannot_be_searched_are_said_before_they_are_packed(world, monkeypatch):
    add_dataset(world, "spoiled")
    folder = world.where.features / backbone_folder(world.backbone) / "spoiled"
    rows = np.load(folder / "database_image.npy")
    rows[7] = 0
    np.save(folder / "database_image.npy", rows)
    monkeypatch.setattr("live.packed.PackedRows.of", None)
    with pytest.raises(UserError, match=r"database_image\.npy: row 8 is zero or not finite"):
        open_dataset("spoiled", world.backbone, where=world.where)


@pytest.mark.parametrize("count", [30, 5000, 20_480])
def test_the_best_are_those_of_a_sort(count):
    draw = torch.Generator().manual_seed(6)
    scores = torch.randn(3, count, generator=draw)
    scores[1] = scores[1].round(decimals=1)  # many are equal
    for k in (1, 4, 19, 25):
        values, places = find_best(scores, k)
        torch.testing.assert_close(values, scores.sort(descending=True).values[:, :k])
        torch.testing.assert_close(scores.gather(1, places), values)
        assert all(len(set(row)) == k for row in places.tolist())


def test_numbers_have_seven_digits():
    draw = np.random.default_rng(0)
    drawn = draw.normal(size=500) * 10.0 ** draw.integers(-12, 6, 500)
    assert numbers(drawn) == [float(f"{value:.7g}") for value in drawn]
    assert numbers(np.array([0, np.nan, 1 / 3, -np.inf])) == [0, None, 0.3333333, None]


def test_what_is_expected_is_multiplied_along(monkeypatch):
    draw = torch.Generator().manual_seed(3)
    gallery = LiveGallery({"image": LiveRows.of(torch.randn(50, 8, generator=draw))})
    first, second, third = torch.randn(3, 1, 8, generator=draw)
    calls, product = [], LiveRows.product
    monkeypatch.setattr(
        LiveRows, "product", lambda self, v: calls.append(len(v)) or product(self, v)
    )
    gallery.expect([first, second])
    alone = gallery.similarity(third, third[0])
    gallery.expect([first, second])
    found = gallery.shared({"x": (second, None)})["x"]
    assert calls == [3]
    torch.testing.assert_close(found, Gallery(gallery.kinds).similarity(second))
    torch.testing.assert_close(alone, Gallery(gallery.kinds).similarity(third, third[0]))
    alone.zero_()  # the caller's own
    assert gallery.similarity(third, third[0]).any()


def test_ctrl_c_while_the_page_is_opened_is_no_error(shots):
    """The address stands on the console before the server waits: the key may come in between."""

    def press(address: str) -> None:
        raise KeyboardInterrupt

    with listen("127.0.0.1", 0) as listening:
        assert serve(shots, listening, "127.0.0.1", press) is None
