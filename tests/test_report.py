"""Reports, plots and comparisons: their data, without a browser."""

import io
import json
import tarfile

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from report_world import HOSTILE, LOST, UNANSWERED, make_world, page_data

from report import (
    collect_report,
    compare_means,
    compare_runs,
    make_thumbnails,
    plot_sweep,
    write_plots,
    write_report,
)
from report.compare import CHUNK
from report.page import MISSED_SHOWN
from report.thumbnails import THUMBNAILS, shrink
from utils import MEANS, UserError, summarise
from utils_datasets import Dataset, ImageStore, find_images
from utils_evaluation import evaluate
from utils_retrieval import Assets
from utils_runs import DEFAULTS, Run
from utils_storage import load_features

TOP_K = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def evaluations(world):
    features = load_features(world.folder / "features", "clip", "world")
    runs = [Run(method, DEFAULTS, method) for method in ("image", "text", "sum")]
    return evaluate(features, runs, Assets(), torch.device("cpu"), top_k=TOP_K)


@pytest.fixture
def store(world):
    return ImageStore(Dataset("world", world.data))


@pytest.fixture
def report(world, evaluations, store, tmp_path):
    """A written report's index.html."""
    folder = tmp_path / "results" / "report"
    return write_report(folder, evaluations, world.queries, world.database, store, "world", TOP_K)


# --- what a report shows -----------------------------------------------------------------------


class TestCollect:
    def test_frames_say_what_a_row_is(self, world, evaluations):
        shown = collect_report(evaluations, world.queries, world.database, TOP_K)
        seen = ""
        for query, runs in zip(world.queries.itertuples(), shown.runs, strict=True):
            mine = world.queries[world.queries["instance"] == query.instance]
            for evaluation, run in zip(evaluations, runs, strict=True):
                rows = world.database.iloc[evaluation.top_rows[query.Index]]
                for row, kind in zip(rows.itertuples(), run["kinds"], strict=True):
                    assert row.instance == query.instance
                    assert (kind == "p") == (row.text == query.text)
                    assert (kind == "s") == (row.text != query.text and row.text in set(mine.text))
                    seen += kind
        assert set(seen) == set("pso")

    def test_rows_ranks_and_scores_are_the_evaluation_s(self, world, evaluations):
        shown = collect_report(evaluations, world.queries, world.database, TOP_K)
        paths = world.database["image_path"].to_numpy()
        for i, runs in enumerate(shown.runs):
            for evaluation, run in zip(evaluations, runs, strict=True):
                assert [shown.row_items[row][0] for row in run["rows"]] == list(
                    paths[evaluation.top_rows[i]]
                )
                assert run["scores"] == pytest.approx(evaluation.top_scores[i], rel=1e-4)
                assert run["ap"] == pytest.approx(evaluation.ap[i], abs=1e-5)
                ranks = evaluation.positive_ranks[i]
                assert run["found"] == run["kinds"].count("p") == (ranks < TOP_K).sum()
                assert run["first"] == (ranks.min() + 1 if len(ranks) else None)
        assert shown.positives[world.queries["text"].eq(UNANSWERED).argmax()] == 0

    def test_missed_positives_come_with_their_ranks(self, world, evaluations):
        shown = collect_report(evaluations, world.queries, world.database, 1)
        image = evaluations[0]
        some = 0
        for i, (run, *_) in enumerate(shown.runs):
            ranks, rows = image.positive_ranks[i], image.positive_rows[i]
            missed = ranks >= 1
            assert run["missedRanks"] == list(ranks[missed] + 1)
            assert [shown.row_items[row][0] for row in run["missed"]] == list(
                world.database["image_path"].to_numpy()[rows[missed]]
            )[:MISSED_SHOWN]
            some += len(run["missed"])
        assert some

    def test_a_gallery_smaller_than_k_ends_where_it_ends(self, world, evaluations):
        short = evaluations[0].top_rows.copy()
        short[0, 2:] = -1
        cut = type(evaluations[0])(**{**vars_of(evaluations[0]), "top_rows": short})
        shown = collect_report([cut], world.queries, world.database, TOP_K)
        assert len(shown.runs[0][0]["rows"]) == len(shown.runs[0][0]["scores"]) == 2
        assert len(shown.runs[1][0]["rows"]) == TOP_K

    def test_methods_of_one_name_are_told_apart_by_backbone(self, world, evaluations):
        other = type(evaluations[0])(**{**vars_of(evaluations[0]), "backbone": "siglip"})
        shown = collect_report([evaluations[0], other], world.queries, world.database, 1)
        assert shown.labels == ["image (clip)", "image (siglip)"]


def vars_of(evaluation) -> dict:
    return {name: getattr(evaluation, name) for name in evaluation.__dataclass_fields__}


# --- the page ----------------------------------------------------------------------------------


class TestPage:
    def test_one_folder_holds_all_it_names(self, report):
        data = page_data(report)
        names = {item[2] for item in data["rows"]} | {q["item"][2] for q in data["queries"]}
        assert {path.name for path in (report.parent / "thumbnails").iterdir()} == names - {None}
        plots = {path.name for path in (report.parent / "plots").iterdir()}
        for name in ("ap_histogram", "instance_map", "ap_by_query"):
            assert {f"{name}.png", f"{name}.svg", f"{name}.csv"} <= plots
        page = report.read_text(encoding="utf-8")
        assert "http://" not in page
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

    def test_a_lost_image_is_named_and_said(self, world, evaluations, store, tmp_path, capsys):
        k = len(world.database)
        features = load_features(world.folder / "features", "clip", "world")
        run = Run("sum", DEFAULTS, "sum")
        all_rows = evaluate(features, [run], Assets(), torch.device("cpu"), top_k=k)
        arguments = (all_rows, world.queries, world.database, store, "world", k)
        data = page_data(write_report(tmp_path / "report", *arguments))
        assert [item[2] for item in data["rows"] if item[0] == LOST] == [None]
        assert sum(item[2] is None for item in data["rows"]) == 1
        warning = capsys.readouterr().err
        assert "1 of " in warning
        assert LOST in warning

    def test_a_failure_leaves_the_old_report_and_nothing_else(
        self, report, world, evaluations, store, monkeypatch
    ):
        before = report.read_bytes()

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr("report.page.write_plots", fail)
        arguments = (world.queries, world.database, store, "world", 2)
        with pytest.raises(OSError, match="disk full"):
            write_report(report.parent, evaluations[:1], *arguments)
        assert report.read_bytes() == before
        results = report.parent.parent
        assert sorted(path.name for path in results.iterdir()) == ["report", "thumbnails"]

    def test_a_new_report_takes_the_place_of_the_old(self, report, world, evaluations, store):
        again = write_report(
            report.parent, evaluations[:1], world.queries, world.database, store, "world", 2
        )
        assert again == report
        data = page_data(report)
        assert [method["label"] for method in data["methods"]] == ["image"]
        assert not (report.parent / "plots" / "ap_by_query.csv").exists()


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

    def test_made_once_and_shared_by_reports(self, tmp_path, monkeypatch):
        store = CountingStore({f"{n}.png": encoded(noise(40, 40, n % 3)) for n in range(6)})
        wanted = [("database", path) for path in store.images]
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
            make_thumbnails(store, [("database", "x.png")], tmp_path / "cache", tmp_path / "a")

    def test_a_changed_image_gets_a_new_thumbnail(self, tmp_path):
        store = CountingStore({"x.png": encoded(noise(40, 40, 1))})
        wanted = [("database", "x.png")]
        old = make_thumbnails(store, wanted, tmp_path / "cache", tmp_path / "a")
        store.images["x.png"] = encoded(noise(40, 40, 2))
        new = make_thumbnails(store, wanted, tmp_path / "cache", tmp_path / "b")
        assert old != new
        assert [path.name for path in (tmp_path / "b").iterdir()] == [new[wanted[0]].name]

    def test_what_cannot_be_shown_has_a_cause(self, tmp_path):
        whole = encoded(noise(40, 40), "JPEG")
        store = CountingStore({"cut.jpg": whole[:300], "text.jpg": b"no image", "ok.jpg": whole})
        wanted = [("database", path) for path in (*store.images, "absent.jpg")]
        pictures = make_thumbnails(store, wanted, tmp_path / "cache", tmp_path / "folder")
        assert [pictures[pair].name is None for pair in wanted] == [True, True, False, True]
        assert "truncated" in pictures["database", "cut.jpg"].cause.lower()
        assert "absent.jpg" in pictures["database", "absent.jpg"].cause
        assert len(list((tmp_path / "folder").iterdir())) == 1

    def test_shards_give_the_same_thumbnails_as_folders(self, world, store, tmp_path):
        paths = [path for path in world.database["image_path"] if path != LOST][:9]
        wanted = [("database", path) for path in paths]
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
        (tmp_path / "world_first5").mkdir()
        (tmp_path / "world").symlink_to(world.data)
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


class TestPlots:
    def test_numbers_are_those_of_the_runs(self, world, evaluations, tmp_path):
        paths = write_plots(tmp_path, evaluations, world.queries)
        assert len(paths) == 9
        assert all(path.stat().st_size for path in paths)
        labels = ["image", "text", "sum"]
        histogram = pandas.read_csv(tmp_path / "ap_histogram.csv")
        assert list(histogram[labels].sum()) == [len(world.queries)] * 3
        low = histogram["AP to"] <= 50
        for label, evaluation in zip(labels, evaluations, strict=True):
            assert histogram.loc[low, label].sum() == (evaluation.ap < 0.5).sum()
        instances = pandas.read_csv(tmp_path / "instance_map.csv").set_index("instance")
        for label, evaluation in zip(labels, evaluations, strict=True):
            means = evaluation.means()
            assert instances[label].mean() == pytest.approx(means["mmAP"], abs=1e-3)
            weighted = np.average(instances[label], weights=instances["queries"])
            assert weighted == pytest.approx(means["mAP"], abs=1e-3)
        assert instances["image"].is_monotonic_decreasing
        by_query = pandas.read_csv(tmp_path / "ap_by_query.csv")
        assert by_query["sum"].to_numpy() == pytest.approx(100 * evaluations[2].ap, abs=1e-3)

    def test_one_method_has_no_pairs(self, world, evaluations, tmp_path):
        paths = write_plots(tmp_path, evaluations[:1], world.queries)
        assert {path.stem for path in paths} == {"ap_histogram", "instance_map"}
        assert "<!-- teddy bear -->" in drawn(tmp_path / "instance_map.svg")

    def test_a_dollar_sign_in_a_name_is_no_mathematics(self, world, evaluations, tmp_path):
        name = r"$\frac$"
        queries = world.queries.replace({"instance": {"mug": name}})
        write_plots(tmp_path, evaluations[:1], queries)
        assert f"<!-- {name} -->" in drawn(tmp_path / "instance_map.svg")
        table = points(corpus=[name, "plain"], mAP=[2.0, 1.0])
        svg = drawn(plot_sweep(tmp_path / "sweep", table, ["corpus"], {name: 1.5})[1])
        assert f"<!-- best: mAP 2.00 at corpus = {name} -->" in svg

    def test_the_same_numbers_give_the_same_files(self, world, evaluations, tmp_path):
        first, second = (
            write_plots(tmp_path / name, evaluations, world.queries) for name in ("a", "b")
        )
        for one, other in zip(first, second, strict=True):
            assert one.read_bytes() == other.read_bytes()


class TestPlotSweep:
    def test_one_axis_gives_both_pictures(self, tmp_path):
        table = points(aa=[0.4, 0.0, 0.2], mAP=[20.0, 10.0, 30.0])
        png, svg = plot_sweep(tmp_path / "plots" / "aa0.1", table, ["aa"])
        assert png == tmp_path / "plots" / "aa0.1.png"
        assert png.read_bytes().startswith(b"\x89PNG")
        assert "<!-- best: mAP 30.00 at aa = 0.2 -->" in drawn(svg)

    def test_a_sweep_of_the_fusion_weight_marks_its_two_ends(self, tmp_path):
        table = points(fusion_weight=[0.0, 0.5, 1.0], mAP=[12.0, 25.0, 17.0])
        svg = drawn(plot_sweep(tmp_path / "sweep", table, ["fusion_weight"])[1])
        assert "<!-- fusion_weight = 0: 12.00 -->" in svg
        assert "<!-- fusion_weight = 1: 17.00 -->" in svg
        named = {"image only": 12.0, "text only": 17.0}
        svg = drawn(plot_sweep(tmp_path / "sweep", table, ["fusion_weight"], named)[1])
        assert "<!-- image only: 12.00 -->" in svg
        assert "fusion_weight = 0:" not in svg

    def test_words_keep_their_order(self, tmp_path):
        table = points(ties=["row", "best", "worst"], mAP=[2.0, 3.0, 1.0])
        svg = drawn(plot_sweep(tmp_path / "sweep", table, ["ties"])[1])
        assert svg.index("<!-- row -->") < svg.index("<!-- best -->") < svg.index("<!-- worst -->")
        assert "<!-- best: mAP 3.00 at ties = best -->" in svg

    def test_two_axes_give_a_heat_map_with_holes_where_no_point_is(self, tmp_path):
        table = points(aa=[0.2, 0.0, 0.2], k=[50, 250, 250], mAP=[31.0, 12.0, 33.5])
        svg = drawn(plot_sweep(tmp_path / "sweep", table, ["aa", "k"])[1])
        assert "<!-- best: mAP 33.50 at aa = 0.2, k = 250 -->" in svg
        assert "<!-- 31.0 -->" in svg
        assert "nan" not in svg

    @pytest.mark.parametrize("axes", [[], ["a", "b", "c"]])
    def test_other_numbers_of_axes_are_refused(self, tmp_path, axes):
        with pytest.raises(ValueError, match="one or two axes"):
            plot_sweep(tmp_path / "sweep", points(a=[1], b=[1], c=[1], mAP=[1.0]), axes)
        assert not list(tmp_path.iterdir())


# --- comparison --------------------------------------------------------------------------------


def naive_intervals(ap_a, ap_b, instances, resamples, seed):
    """The 95 % intervals by a loop over resamples, on the draws that compare_means makes."""
    generator = np.random.default_rng(seed)
    instances = np.array(instances)
    names = np.unique(instances)
    ends = {}
    for unit, size in (("queries", len(ap_a)), ("instances", len(names))):
        differences = []
        for first in range(0, resamples, CHUNK):
            count = min(CHUNK, resamples - first)
            for draw in generator.integers(size, size=(count, size)):
                if unit == "queries":
                    rows = np.argsort(instances, kind="stable")[draw]
                    labels = instances[rows]
                else:  # an instance drawn twice counts as two instances
                    members = [np.flatnonzero(instances == names[i]) for i in draw]
                    rows = np.concatenate(members)
                    labels = np.repeat(np.arange(size), [len(member) for member in members])
                a, b = (summarise(ap[rows], labels) for ap in (ap_a, ap_b))
                differences.append([b[name] - a[name] for name in MEANS])
        ends[unit] = np.percentile(differences, [2.5, 97.5], axis=0)
    return ends


@pytest.fixture
def two_runs():
    generator = np.random.default_rng(3)
    instances = [f"instance {n}" for n in generator.integers(7, size=40)]
    ap_a = generator.random(40)
    return ap_a, np.clip(ap_a + generator.normal(0.05, 0.2, 40), 0, 1), instances


def write_run(folder, ap, instances, order=None):
    rows = list(range(len(ap))) if order is None else order
    folder.mkdir(parents=True)
    pandas.DataFrame(
        {
            "Image Query": [f"query/{n}.jpg" for n in rows],
            "Text Query": [f"text, {n}" for n in rows],
            "Instance": [instances[n] for n in rows],
            "AP": [repr(float(ap[n])) for n in rows],
        }
    ).to_csv(folder / "APs.csv", index=False)
    return folder


class TestCompareMeans:
    def test_agrees_with_a_naive_loop(self, two_runs):
        resamples = CHUNK + 70  # two chunks
        table = compare_means(*two_runs, resamples=resamples, seed=5).set_index("mean")
        expected = naive_intervals(*two_runs, resamples, seed=5)
        for i, name in enumerate(("mAP", "mmAP", "minmAP")):
            low, high = expected["instances"][:, i]
            assert table.loc[name, "instances_low"] == pytest.approx(low)
            assert table.loc[name, "instances_high"] == pytest.approx(high)
            if name != "minmAP":
                low, high = expected["queries"][:, i]
                assert table.loc[name, "queries_low"] == pytest.approx(low)
                assert table.loc[name, "queries_high"] == pytest.approx(high)
        assert np.isnan(table.loc["minmAP", "queries_low"])

    def test_means_and_differences(self, two_runs):
        ap_a, ap_b, instances = two_runs
        table = compare_means(*two_runs, resamples=10).set_index("mean")
        a, b = (summarise(ap, np.array(instances)) for ap in (ap_a, ap_b))
        assert dict(table["a"]) == pytest.approx(a)
        assert dict(table["b"]) == pytest.approx(b)
        assert dict(table["difference"]) == pytest.approx({name: b[name] - a[name] for name in a})

    def test_seeded_and_paired(self, two_runs):
        ap_a, _, instances = two_runs
        once, again = (compare_means(*two_runs, resamples=400, seed=1) for _ in range(2))
        pandas.testing.assert_frame_equal(once, again)
        shifted = compare_means(ap_a, ap_a + 0.1, instances, resamples=400)
        ends = shifted[["instances_low", "instances_high"]].to_numpy()
        assert ends == pytest.approx(10)  # what both runs share does not widen the interval


class TestCompareRuns:
    def test_writes_the_tables_and_the_page(self, two_runs, tmp_path, capsys):
        ap_a, ap_b, instances = two_runs
        a = write_run(tmp_path / "sum", ap_a, instances)
        b = write_run(tmp_path / "basic", ap_b, instances, order=list(range(40))[::-1])
        comparison = compare_runs(a, b, tmp_path / "compared", resamples=300)
        expected = compare_means(ap_a, ap_b, instances, resamples=300)
        pandas.testing.assert_frame_equal(comparison.means, expected)
        means = pandas.read_csv(tmp_path / "compared" / "means.csv")
        assert means["difference"].to_numpy() == pytest.approx(expected["difference"], rel=1e-4)
        queries = pandas.read_csv(tmp_path / "compared" / "queries.csv")
        best = int(np.argmax(ap_b - ap_a))
        assert queries["image"][0] == f"query/{best}.jpg"
        assert (queries["row_a"][0], queries["row_b"][0]) == (best, 39 - best)
        assert queries["difference"].is_monotonic_decreasing
        page = comparison.page.read_text(encoding="utf-8")
        assert f"text, {best}</td>" in page
        assert f"better on {(ap_b > ap_a).sum()} queries" in " ".join(page.split())
        printed = capsys.readouterr().out
        assert "A: sum" in printed
        assert f"{expected['difference'][0]:+.2f}" in printed

    def test_links_lead_to_the_queries_in_the_runs_reports(self, two_runs, tmp_path):
        ap_a, ap_b, instances = two_runs
        a = write_run(tmp_path / "sum", ap_a, instances)
        b = write_run(tmp_path / "basic", ap_b, instances)
        (b / "report").mkdir()
        (b / "report" / "index.html").write_text("")
        comparison = compare_runs(a, b, b / "against_sum", resamples=10)
        best = int(np.argmax(ap_b - ap_a))
        page = comparison.page.read_text(encoding="utf-8")
        assert f'href="../report/index.html#query-{best}"' in page
        assert "sum/report" not in page

    def test_other_queries_are_refused_by_the_first_that_differs(self, two_runs, tmp_path):
        ap_a, _, instances = two_runs
        a = write_run(tmp_path / "a", ap_a, instances)
        b = write_run(tmp_path / "b", ap_a, instances, order=[n for n in range(40) if n != 7])
        for pair in ((a, b), (b, a)):
            with pytest.raises(UserError, match=r"query/7\.jpg, 'text, 7'.*is not in"):
                compare_runs(*pair, tmp_path / "compared")
        assert not (tmp_path / "compared").exists()

    def test_a_query_twice_pairs_in_order(self, tmp_path):
        header = "Image Query,Text Query,Instance,AP\n"
        for name, values in (("a", (0.1, 0.5)), ("b", (0.2, 0.4))):
            (tmp_path / name).mkdir()
            rows = "".join(f"x.jpg,red,mug,{value}\n" for value in values)
            (tmp_path / name / "APs.csv").write_text(header + rows)
        comparison = compare_runs(tmp_path / "a", tmp_path / "b", tmp_path / "c", resamples=10)
        assert comparison.queries["difference"].to_numpy() == pytest.approx([10, -10])

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "does not exist; give a result folder"),
            ("image,ap\nx,1\n", "not a table with the columns"),
            ("Image Query,Text Query,Instance,AP\nx,y,z,high\n", "not a table with the columns"),
            ("Image Query,Text Query,Instance,AP\nx,y,z,nan\n", "row 2: AP is not from 0 to 1"),
            ("Image Query,Text Query,Instance,AP\nx,y,z,7.5\n", "row 2: AP is not from 0 to 1"),
            ("Image Query,Text Query,Instance,AP\n", "has no queries"),
            ("", "not a table with the columns"),
        ],
    )
    def test_what_is_no_result_folder_is_refused(self, two_runs, tmp_path, content, message):
        good = write_run(tmp_path / "good", two_runs[0], two_runs[2])
        bad = tmp_path / "bad"
        bad.mkdir()
        if content is not None:
            (bad / "APs.csv").write_text(content)
        with pytest.raises(UserError, match=message):
            compare_runs(good, bad, tmp_path / "compared")
