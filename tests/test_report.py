"""Reports, plots and comparisons: their data, without a browser."""

import dataclasses
import io
import json
import tarfile

import numpy as np
import pandas
import pytest
from PIL import Image
from report_world import (
    HOSTILE,
    LOST,
    UNANSWERED,
    evaluate_world,
    make_rooms,
    make_semantic,
    make_world,
    page_data,
)

from benchmarks import find_images
from report import (
    collect_report,
    make_thumbnails,
    plot_sweep,
    write_plots,
    write_report,
)
from report.page import MISSED_SHOWN
from report.thumbnails import THUMBNAILS, Crop, shrink
from utils_datasets import Dataset, ImageStore
from utils_task import View

TOP_K = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def evaluations(world):
    return evaluate_world(world, ("image", "text", "sum"), TOP_K)


@pytest.fixture
def store(world):
    return ImageStore(Dataset("world", world.data))


@pytest.fixture
def report(world, evaluations, store, tmp_path):
    """A written report's index.html."""
    folder = tmp_path / "results" / "report"
    return write_report(folder, evaluations, store, TOP_K)


# --- what a report shows -----------------------------------------------------------------------


class TestCollect:
    def test_frames_say_what_a_row_is(self, world, evaluations):
        shown = collect_report(evaluations, TOP_K)
        seen = ""
        for query, runs in zip(world.queries.itertuples(), shown.runs, strict=True):
            mine = world.queries[world.queries["instance"] == query.instance]
            for evaluation, run in zip(evaluations, runs, strict=True):
                rows = world.database.iloc[evaluation.main.top_rows[query.Index]]
                for row, kind in zip(rows.itertuples(), run["kinds"], strict=True):
                    assert row.instance == query.instance
                    assert (kind == "p") == (row.text == query.text)
                    assert (kind == "s") == (row.text != query.text and row.text in set(mine.text))
                    seen += kind
        assert set(seen) == set("pso")

    def test_rows_ranks_and_scores_are_the_evaluation_s(self, world, evaluations):
        shown = collect_report(evaluations, TOP_K)
        for i, runs in enumerate(shown.runs):
            for evaluation, run in zip(evaluations, runs, strict=True):
                best = evaluation.main.top_rows[i]
                assert [shown.rows[place] for place in run["rows"]] == list(best)
                assert run["scores"] == pytest.approx(evaluation.main.top_scores[i], rel=1e-4)
                assert run["values"] == [pytest.approx(evaluation.values["AP-T", "all"][i])]
                ranks = evaluation.positive_ranks[i]
                assert run["found"] == run["kinds"].count("p") == (ranks < TOP_K).sum()
                assert run["first"] == (ranks.min() + 1 if len(ranks) else None)
                assert run["marks"] == [[]] * len(best)
        assert shown.positives[world.queries["text"].eq(UNANSWERED).argmax()] == 0

    def test_missed_positives_come_with_their_ranks(self, evaluations):
        shown = collect_report(evaluations, 1)
        image = evaluations[0]
        some = 0
        for i, (run, *_) in enumerate(shown.runs):
            ranks, rows = image.positive_ranks[i], image.positive_rows[i]
            missed = ranks >= 1
            assert run["missedRanks"] == list(ranks[missed] + 1)
            places = [shown.rows[place] for place in run["missed"]]
            assert places == list(rows[missed])[:MISSED_SHOWN]
            some += len(run["missed"])
        assert some

    def test_a_gallery_smaller_than_k_ends_where_it_ends(self, evaluations):
        first = evaluations[0]
        short = first.main.top_rows.copy()
        short[0, 2:] = -1
        view = dataclasses.replace(first.main, top_rows=short)
        shown = collect_report([dataclasses.replace(first, views={"all": view})], TOP_K)
        assert len(shown.runs[0][0]["rows"]) == len(shown.runs[0][0]["scores"]) == 2
        assert len(shown.runs[1][0]["rows"]) == TOP_K

    def test_methods_of_one_name_are_told_apart_by_backbone(self, evaluations):
        other = dataclasses.replace(evaluations[0], backbone="siglip")
        shown = collect_report([evaluations[0], other], 1)
        assert shown.methods == ["image (clip)", "image (siglip)"]


# --- the page ----------------------------------------------------------------------------------


class TestPage:
    def test_one_folder_holds_all_it_names(self, report):
        data = page_data(report)
        names = {item[2] for item in data["rows"]}
        names |= {image[2] for query in data["queries"] for image in query["images"]}
        assert {path.name for path in (report.parent / "thumbnails").iterdir()} == names - {None}
        plots = {path.name for path in (report.parent / "plots").iterdir()}
        for name in ("histogram", "by_group", "by_query"):
            assert {f"{name}.png", f"{name}.svg", f"{name}.csv"} <= plots
        page = report.read_text(encoding="utf-8")
        assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")  # a name, no address
        assert "https://" not in page

    def test_no_text_becomes_markup(self, report, world):
        page = report.read_text(encoding="utf-8")
        assert page.count("<script") == 2
        assert page.count("</script>") == 2
        assert "<img src=x" not in page
        assert "<b>clock" not in page
        texts = [query["text"] for query in page_data(report)["queries"]]
        assert texts == list(world.queries["text"])
        assert HOSTILE in texts

    def test_header_shows_configuration_and_means(self, report, evaluations):
        page = report.read_text(encoding="utf-8")
        for evaluation in evaluations:
            for value in evaluation.means().values():
                assert f">{value:.2f}</td>" in page
        assert "<dt>fusion_weight</dt>" in page
        assert "19 queries, instance: 3;" in " ".join(page.split())

    def test_a_lost_image_is_named_and_said(self, world, store, tmp_path, capsys):
        k = len(world.database)
        all_rows = evaluate_world(world, ["sum"], k)
        data = page_data(write_report(tmp_path / "report", all_rows, store, k))
        assert [item[2] for item in data["rows"] if item[0] == LOST] == [None]
        assert sum(item[2] is None for item in data["rows"]) == 1
        warning = capsys.readouterr().err
        assert "1 of " in warning
        assert LOST in warning

    def test_a_failure_leaves_the_old_report_and_nothing_else(
        self, report, evaluations, store, monkeypatch
    ):
        before = report.read_bytes()

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr("report.page.write_plots", fail)
        with pytest.raises(OSError, match="disk full"):
            write_report(report.parent, evaluations[:1], store, 2)
        assert report.read_bytes() == before
        results = report.parent.parent
        assert sorted(path.name for path in results.iterdir()) == ["report", "thumbnails"]

    def test_a_new_report_takes_the_place_of_the_old(self, report, evaluations, store):
        again = write_report(report.parent, evaluations[:1], store, 2)
        assert again == report
        data = page_data(report)
        assert [method["label"] for method in data["methods"]] == ["image"]
        assert not (report.parent / "plots" / "by_query.csv").exists()


# --- a task of no benchmark --------------------------------------------------------------------


def images_of(rooms) -> ImageStore:
    return ImageStore(Dataset("rooms", rooms.folder / "data" / "rooms"))


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    return make_rooms(tmp_path_factory.mktemp("rooms"))


@pytest.fixture(scope="module")
def ranked(rooms):
    return evaluate_world(rooms, ("image", "sum"), 5, "rooms")


@pytest.fixture(scope="module")
def rooms_page(rooms, ranked):
    return write_report(rooms.folder / "results" / "report", ranked, images_of(rooms), 5)


class TestRooms:
    def test_names_and_numbers_are_the_task_s(self, rooms_page, ranked):
        data = page_data(rooms_page)
        assert data["measures"] == ["AP@5", "Hit@1 (subset)", "Recall@5"]
        assert data["labels"] == ["Query"]
        assert data["tags"] == [
            {"name": "room", "labels": ["bath", "kitchen"]},
            {"name": "aspect", "labels": ["color", "size"]},
        ]
        assert [query["tags"] for query in data["queries"]] == [
            [[1], [0, 1]],
            [[0], [0]],
            [[1], []],
            [[0], [1]],
        ]
        for i, query in enumerate(data["queries"]):
            for evaluation, run in zip(ranked, query["runs"], strict=True):
                values = [own[i] for own in evaluation.values.values()]
                assert run["values"] == pytest.approx(values)
        text = rooms_page.read_text(encoding="utf-8")
        for name, value in ranked[0].means().items():
            assert f">{name}</th>" in text
            assert f">{value:.2f}</td>" in text
        assert "References are &lt;left&gt; out." in text
        assert "instance" not in text
        assert "mmAP" not in text

    def test_left_out_related_and_candidate_rows_are_marked(self, rooms_page, ranked):
        data = page_data(rooms_page)
        paths = [row[0] for row in data["rows"]]
        left_out = [[paths[place] for place in query["leftOut"]] for query in data["queries"]]
        assert left_out == [[], [], ["db/0.png"], ["db/7.png", "db/8.png"]]
        assert data["marks"] == ["candidate of subset", "positive of subset"]
        targets = [{1}, {3}, {4}, set()]
        kinds = {"p": [{1, 2}, {3}, {4, 5, 6}, set()], "s": [{3, 4}, set(), {7}, set()]}
        for i, query in enumerate(data["queries"]):
            for run in query["runs"]:
                rows = [int(paths[place][3:-4]) for place in run["rows"]]
                assert not set(left_out[i]) & {f"db/{row}.png" for row in rows}
                for name, own in (
                    ("marks", rows),
                    ("missedMarks", [int(paths[place][3:-4]) for place in run["missed"]]),
                ):
                    marked = [[0] * (row < 6) + [1] * (row in targets[i]) for row in own]
                    assert run[name] == marked
                for row, kind in zip(rows, run["kinds"], strict=True):
                    assert [row in kinds[name][i] for name in "ps"] == [kind == n for n in "ps"]

    def test_boxes_and_several_images_are_shown(self, rooms_page):
        data = page_data(rooms_page)
        assert [len(query["images"]) for query in data["queries"]] == [1, 2, 1, 1]
        names = {path: name for path, _, name, _ in data["rows"]}
        assert names["db/3.png"].endswith("-4-4-20-20-160.webp")
        thumbnail = Image.open(rooms_page.parent / "thumbnails" / names["db/3.png"])
        assert thumbnail.size == (16, 16)

    def test_hidden_ground_truth_leaves_pictures_alone(self, rooms, ranked, tmp_path):
        task = dataclasses.replace(
            ranked[0].task, views={"all": View(None)}, columns=(), means=(), related=None
        )
        none = dataclasses.replace(
            ranked[0].main,
            positives=dataclasses.replace(
                ranked[0].main.positives,
                query=np.empty(0, np.int64),
                row=np.empty(0, np.int64),
                count=np.zeros(4, np.int64),
            ),
            ranks=np.empty(0, np.int32),
        )
        hidden = dataclasses.replace(ranked[0], task=task, views={"all": none}, values={})
        page = write_report(tmp_path / "report", [hidden], images_of(rooms), 5)
        data = page_data(page)
        assert data["measures"] == []
        runs = [run for query in data["queries"] for run in query["runs"]]
        assert {run["kinds"] for run in runs} == {"ooooo"}
        assert not (tmp_path / "report" / "plots").exists()
        assert 'id="plots"' not in page.read_text(encoding="utf-8")


def test_the_query_image_is_marked_where_it_is_ranked(tmp_path):
    """Of CIRCO's test, where no view is without it, as the views beside the main one are of val."""
    world, images = make_semantic(tmp_path, "circo_test")
    ranked = evaluate_world(world, ("image",), 60, "circo_test")
    data = page_data(write_report(tmp_path / "report", ranked, images, 60))
    assert data["marks"] == ["query image"]
    for query in data["queries"]:
        (run,) = query["runs"]
        shown = zip(run["rows"], run["marks"], strict=True)
        marked = [data["rows"][place][0] for place, marks in shown if marks]
        assert marked == [image[0] for image in query["images"]]


# --- thumbnails --------------------------------------------------------------------------------


class CountingStore:
    """Images by path, and how they were asked for."""

    def __init__(self, images: dict[str, bytes]):
        self.images = images

    def read(self, split: str, image_path: str) -> bytes:
        if image_path not in self.images:
            raise FileNotFoundError(image_path)
        return self.images[image_path]


def encoded(array: np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


class TestThumbnails:
    @pytest.mark.parametrize("split", THUMBNAILS)
    def test_the_worst_image_keeps_to_the_bounds(self, split):
        side, most_bytes = THUMBNAILS[split]
        small = shrink(encoded(noise(side * 2, side)), side, most_bytes)
        assert Image.open(io.BytesIO(small)).size == (side // 2, side)
        for content in (noise(side, side), noise(3 * side, 3 * side)):
            assert len(shrink(encoded(content), side, most_bytes)) <= most_bytes

    @pytest.mark.parametrize(("kind", "mode"), [("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P")])
    def test_every_mode_becomes_rgb(self, kind, mode):
        buffer = io.BytesIO()
        Image.fromarray(noise(300, 400)).convert(mode).save(buffer, kind)
        thumbnail = Image.open(io.BytesIO(shrink(buffer.getvalue(), 160, 8000)))
        assert (thumbnail.format, thumbnail.mode, thumbnail.size) == ("WEBP", "RGB", (160, 120))

    def test_a_box_is_what_is_shown(self, tmp_path):
        picture = np.zeros((40, 60, 3), np.uint8)
        picture[10:20, 30:60] = (250, 10, 10)
        store = CountingStore({"x.png": encoded(picture)})
        boxes = [None, (0, 0, 0, 0), (30, 10, 60, 20), (30, 10, 99, 20), (-5, 0, 20, 40)]
        wanted = [Crop("database", "x.png", box) for box in boxes]
        pictures = make_thumbnails(store, wanted, tmp_path / "cache", tmp_path / "a")
        shown = [Image.open(tmp_path / "a" / pictures[crop].name) for crop in wanted]
        assert [image.size for image in shown] == [(60, 40), (60, 40), (30, 10), (30, 10), (20, 40)]
        red = [np.asarray(image)[..., 0].mean() > 200 for image in shown]
        assert red == [False, False, True, True, False]
        assert pictures[wanted[0]] == pictures[wanted[1]]

    def test_made_once_and_shared_by_reports(self, tmp_path, monkeypatch):
        store = CountingStore({f"{n}.png": encoded(noise(40, 40, n % 3)) for n in range(6)})
        wanted = [Crop("database", path) for path in store.images]
        cache = tmp_path / "cache"
        first = make_thumbnails(store, wanted, cache, tmp_path / "a")
        assert len(list(cache.iterdir())) == 3  # equal bytes under two paths are one thumbnail
        monkeypatch.setattr("report.thumbnails.shrink", None)  # whatever is made again, fails
        assert make_thumbnails(store, wanted, cache, tmp_path / "b") == first
        for path in cache.iterdir():
            assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()
            assert (tmp_path / "b" / path.name).samefile(path)

    def test_a_cache_that_cannot_be_written_is_no_bad_image(self, tmp_path, monkeypatch):
        def refuse(path):
            raise PermissionError(13, "Permission denied", str(path))

        store = CountingStore({"x.png": encoded(noise(40, 40, 1))})
        monkeypatch.setattr("report.thumbnails.atomic_path", refuse)
        with pytest.raises(PermissionError):
            make_thumbnails(store, [Crop("database", "x.png")], tmp_path / "cache", tmp_path / "a")

    def test_a_changed_image_gets_a_new_thumbnail(self, tmp_path):
        store = CountingStore({"x.png": encoded(noise(40, 40, 1))})
        wanted = [Crop("database", "x.png")]
        old = make_thumbnails(store, wanted, tmp_path / "cache", tmp_path / "a")
        store.images["x.png"] = encoded(noise(40, 40, 2))
        new = make_thumbnails(store, wanted, tmp_path / "cache", tmp_path / "b")
        assert old != new
        assert [path.name for path in (tmp_path / "b").iterdir()] == [new[wanted[0]].name]

    def test_what_cannot_be_shown_has_a_cause(self, tmp_path):
        whole = encoded(noise(40, 40), "JPEG")
        store = CountingStore({"cut.jpg": whole[:300], "text.jpg": b"no image", "ok.jpg": whole})
        wanted = [Crop("database", path) for path in (*store.images, "absent.jpg")]
        pictures = make_thumbnails(store, wanted, tmp_path / "cache", tmp_path / "folder")
        assert [pictures[pair].name is None for pair in wanted] == [True, True, False, True]
        assert "truncated" in pictures[Crop("database", "cut.jpg")].cause.lower()
        assert "absent.jpg" in pictures[Crop("database", "absent.jpg")].cause
        assert len(list((tmp_path / "folder").iterdir())) == 1

    def test_shards_give_the_same_thumbnails_as_folders(self, world, store, tmp_path):
        paths = [path for path in world.database["image_path"] if path != LOST][:9]
        wanted = [Crop("database", path) for path in paths]
        shard = tmp_path / "world" / "webdataset" / "database" / "database-000000.tar"
        shard.parent.mkdir(parents=True)
        with tarfile.open(shard, "w") as tar:
            for n, path in enumerate(paths):
                sample = json.dumps({"img_path": path, "text": "", "instance": ""}).encode()
                for kind, content in (("png", store.read("database", path)), ("json", sample)):
                    member = tarfile.TarInfo(f"{n:06d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        shards = ImageStore(Dataset("world", tmp_path / "world"))
        from_shards = make_thumbnails(shards, wanted, tmp_path / "c", tmp_path / "a")
        assert from_shards == make_thumbnails(store, wanted, tmp_path / "c", tmp_path / "b")
        assert all(picture.name for picture in from_shards.values())


class TestFindImages:
    def test_the_first_rows_of_a_data_set_have_its_images(self, world, tmp_path, capsys):
        path = world.queries["image_path"][0]
        whole = find_images("world", world.data.parent).read("query", path)
        for name in ("world_first5", "world_first12_first5"):
            assert find_images(name, world.data.parent).read("query", path) == whole
        for name in ("world", "world_first5"):
            (tmp_path / name).symlink_to(world.data)
        assert find_images("world_first5", tmp_path).dataset.root == tmp_path / "world_first5"
        assert capsys.readouterr().err == ""

    def test_images_that_are_not_here_are_said_once(self, tmp_path, capsys):
        store = find_images("icir_first5", tmp_path)
        with pytest.raises(FileNotFoundError):
            store.read("query", "icir/query/1.jpg")
        said = capsys.readouterr().err
        assert said.count("no data set 'icir'") == said.count("\n") == 1
        assert "python3 data/download.py icir" in said


# --- plots -------------------------------------------------------------------------------------


def points(**columns) -> pandas.DataFrame:
    return pandas.DataFrame(columns)


def drawn(path) -> str:
    return path.read_text(encoding="utf-8")


def ap_of(evaluation) -> np.ndarray:
    return evaluation.values["AP-T", "all"]


class TestPlots:
    def test_numbers_are_those_of_the_runs(self, world, evaluations, tmp_path):
        paths = write_plots(tmp_path, evaluations)
        assert len(paths) == 9
        assert all(path.stat().st_size for path in paths)
        labels = ["image", "text", "sum"]
        histogram = pandas.read_csv(tmp_path / "histogram.csv")
        assert list(histogram[labels].sum()) == [len(world.queries)] * 3
        low = histogram["AP to"] <= 50
        for label, evaluation in zip(labels, evaluations, strict=True):
            assert histogram.loc[low, label].sum() == (ap_of(evaluation) < 0.5).sum()
        instances = pandas.read_csv(tmp_path / "by_group.csv").set_index("instance")
        for label, evaluation in zip(labels, evaluations, strict=True):
            means = evaluation.means()
            assert instances[label].mean() == pytest.approx(means["mmAP"], abs=1e-3)
            weighted = np.average(instances[label], weights=instances["queries"])
            assert weighted == pytest.approx(means["mAP"], abs=1e-3)
        assert instances["image"].is_monotonic_decreasing
        by_query = pandas.read_csv(tmp_path / "by_query.csv")
        assert by_query["sum"].to_numpy() == pytest.approx(100 * ap_of(evaluations[2]), abs=1e-3)

    def test_one_method_has_no_pairs(self, evaluations, tmp_path):
        paths = write_plots(tmp_path, evaluations[:1])
        assert {path.stem for path in paths} == {"histogram", "by_group"}
        assert "<!-- teddy bear -->" in drawn(tmp_path / "by_group.svg")

    def test_a_dollar_sign_in_a_name_is_no_mathematics(self, world, evaluations, tmp_path):
        name = r"$\frac$"
        tags = {"instance": world.queries["instance"].replace({"mug": name}).tolist()}
        task = evaluations[0].task
        task = dataclasses.replace(task, queries=dataclasses.replace(task.queries, tags=tags))
        write_plots(tmp_path, [dataclasses.replace(evaluations[0], task=task)])
        assert f"<!-- {name} -->" in drawn(tmp_path / "by_group.svg")
        table = points(corpus=[name, "plain"], mAP=[2.0, 1.0])
        svg = drawn(plot_sweep(tmp_path / "sweep", table, ["corpus"], {name: 1.5}, "mAP")[1])
        assert f"<!-- best: mAP 2.00 at corpus = {name} -->" in svg

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("name", ["猫 at night", "كوب", "by\tday\x06", "a mug " * 20])
    def test_names_that_the_font_lacks_are_drawn_by_their_numbers(
        self, world, evaluations, tmp_path, name
    ):
        """Nothing is drawn as a box, the wrong way round or without room, and nothing is warned."""
        tags = {"instance": world.queries["instance"].replace({"mug": name}).tolist()}
        task = evaluations[0].task
        task = dataclasses.replace(task, queries=dataclasses.replace(task.queries, tags=tags))
        first = dataclasses.replace(evaluations[0], task=task)
        write_plots(tmp_path, [first])
        shown = name.encode("unicode_escape").decode()
        assert f"<!-- {shown if len(name) < 18 else 'a mug a mug a mug…'} -->" in drawn(
            tmp_path / "by_group.svg"
        )
        assert name in pandas.read_csv(tmp_path / "by_group.csv")["instance"].tolist()
        run = dataclasses.replace(evaluations[1].run, variant=name)
        write_plots(tmp_path, [evaluations[0], dataclasses.replace(evaluations[1], run=run)])

    def test_the_same_numbers_give_the_same_files(self, evaluations, tmp_path):
        first, second = (write_plots(tmp_path / name, evaluations) for name in ("a", "b"))
        for one, other in zip(first, second, strict=True):
            assert one.read_bytes() == other.read_bytes()


class TestPlotSweep:
    def test_one_axis_gives_both_pictures(self, tmp_path):
        table = points(aa=[0.4, 0.0, 0.2], mAP=[20.0, 10.0, 30.0])
        png, svg = plot_sweep(tmp_path / "plots" / "aa0.1", table, ["aa"], None, "mAP")
        assert png == tmp_path / "plots" / "aa0.1.png"
        assert png.read_bytes().startswith(b"\x89PNG")
        assert "<!-- best: mAP 30.00 at aa = 0.2 -->" in drawn(svg)

    def test_what_it_is_compared_with_is_a_line(self, tmp_path):
        table = points(fusion_weight=[0.0, 0.5, 1.0], R1=[12.0, 25.0, 17.0])
        named = {"image only": 12.0, "text only": 17.0}
        svg = drawn(plot_sweep(tmp_path / "sweep", table, ["fusion_weight"], named, "R1")[1])
        assert "<!-- image only: 12.00 -->" in svg
        assert "<!-- text only: 17.00 -->" in svg
        assert "<!-- best: R1 25.00 at fusion_weight = 0.5 -->" in svg
        assert "<!-- R1 (%) -->" in svg

    def test_words_keep_their_order(self, tmp_path):
        table = points(ties=["row", "best", "worst"], mAP=[2.0, 3.0, 1.0])
        svg = drawn(plot_sweep(tmp_path / "sweep", table, ["ties"], None, "mAP")[1])
        assert svg.index("<!-- row -->") < svg.index("<!-- best -->") < svg.index("<!-- worst -->")
        assert "<!-- best: mAP 3.00 at ties = best -->" in svg

    def test_two_axes_give_a_heat_map_with_holes_where_no_point_is(self, tmp_path):
        table = points(aa=[0.2, 0.0, 0.2], k=[50, 250, 250], mAP=[31.0, 12.0, 33.5])
        svg = drawn(plot_sweep(tmp_path / "sweep", table, ["aa", "k"], None, "mAP")[1])
        assert "<!-- best: mAP 33.50 at aa = 0.2, k = 250 -->" in svg
        assert "<!-- 31.0 -->" in svg
        assert "nan" not in svg

    @pytest.mark.parametrize("axes", [[], ["a", "b", "c"]])
    def test_other_numbers_of_axes_are_refused(self, tmp_path, axes):
        with pytest.raises(ValueError, match="one or two axes"):
            plot_sweep(
                tmp_path / "sweep", points(a=[1], b=[1], c=[1], mAP=[1.0]), axes, None, "mAP"
            )
        assert not list(tmp_path.iterdir())
