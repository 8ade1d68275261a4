"""The comparison of two runs: values on disk, averages with intervals, the page."""

import dataclasses
import json

import numpy as np
import pandas
import pytest
from report_world import make_rooms

import run_retrieval
from report import compare_means, compare_runs
from utils import UserError
from utils_metrics import reduce
from utils_task import Group, load_task
from utils_values import Average, QueryValues, query_values, read_values, write_values

AVERAGES = (
    Average("mAP", "AP"),
    Average("mmAP", "AP", (Group("instance"),)),
    Average("minmAP", "AP", (Group("instance", "min"),)),
)
MORE = (
    *AVERAGES,
    Average("kinds", "Hit@5", (Group("pair"), Group("instance"), Group(None, digits=2))),
    Average("one", "Hit@5", (Group("pair", only="p0"),)),
    Average("aspects", "AP", (Group("aspect"),)),
    Average("both", None, of=("mAP", "kinds")),
)
QUERIES = 40


def run_values(seed=3, queries=QUERIES):
    """Values of two runs, and tags: pairs inside instances, and aspects across them."""
    generator = np.random.default_rng(seed)
    number = generator.integers(7, size=queries)
    tags = {
        "instance": [f"instance {n}" for n in number],
        "pair": [f"p{n}" if generator.random() < 0.5 else f"q{n}" for n in number],
        "aspect": [
            tuple(name for name in ("color", "size", "number") if generator.random() < 0.4)
            for _ in number
        ],
    }
    ap = generator.random(queries)
    a = {"AP": ap, "Hit@5": (ap > 0.6).astype(float)}
    ap = np.clip(ap + generator.normal(0.05, 0.2, queries), 0, 1)
    return a, {"AP": ap, "Hit@5": (ap > 0.6).astype(float)}, tags


# --- averages and their intervals --------------------------------------------------------------


def unrounded(values, groups, tags):
    groups = [Group(group.tag, group.how, None, group.only) for group in groups]
    return reduce(values, groups, tags)


def naive_intervals(a, b, averages, tags, outer, resamples, seed):
    """95 % intervals by a loop over resamples, on the draws that compare_means makes."""
    generator = np.random.default_rng(seed)
    labels = np.array(tags[outer])
    order = np.argsort(labels, kind="stable")
    names = np.unique(labels)
    nested = ("instance", "pair")  # drawn twice, an instance counts as two, with pairs of its own
    ends = {}
    for unit, size in (("queries", len(labels)), ("groups", len(names))):
        differences = []
        for draw in generator.integers(size, size=(resamples, size)):
            if unit == "queries":
                rows, copy = order[draw], np.zeros(size, int)
            else:
                members = [np.flatnonzero(labels == names[i]) for i in draw]
                rows = np.concatenate(members)
                copy = np.repeat(np.arange(size), list(map(len, members)))
            drawn = {
                name: [
                    f"{own[row]}/{n}" if name in nested and unit == "groups" else own[row]
                    for row, n in zip(rows, copy, strict=True)
                ]
                for name, own in tags.items()
            }
            found = {}
            for average in averages:
                if average.of:
                    found[average.name] = np.mean([found[name] for name in average.of])
                elif not any(group.only for group in average.groups):
                    one, other = (
                        unrounded(v[average.values][rows], average.groups, drawn) for v in (a, b)
                    )
                    found[average.name] = other - one
            differences.append(found)
        frame = pandas.DataFrame(differences)
        ends[unit] = frame.quantile([0.025, 0.975])
    return ends


class TestCompareMeans:
    def test_agrees_with_a_naive_loop(self, monkeypatch):
        a, b, tags = run_values()
        monkeypatch.setattr("report.bootstrap.CELLS", 40 * 150)  # three pieces
        table = compare_means(a, b, MORE, tags, "instance", resamples=400, seed=5)
        table = table.set_index("mean")
        expected = naive_intervals(a, b, MORE, tags, "instance", 400, seed=5)
        for unit, ends in expected.items():
            for name in ends:
                found = table.loc[name, [f"{unit}_low", f"{unit}_high"]].tolist()
                if (unit, name) == ("queries", "minmAP"):
                    assert np.isnan(found).all()
                else:
                    assert found == pytest.approx(ends[name].tolist())
        assert np.isnan(table.loc["one", "groups_low"])
        assert table.loc["one", "queries_low"] < table.loc["one", "queries_high"]

    def test_means_and_differences(self):
        a, b, tags = run_values()
        table = compare_means(a, b, MORE, tags, "instance", resamples=10).set_index("mean")
        for average in MORE[:-1]:
            own = [reduce(values[average.values], average.groups, tags) for values in (a, b)]
            found = table.loc[average.name, ["a", "b", "difference"]].tolist()
            assert found == pytest.approx([*own, own[1] - own[0]])
        both = table.loc[["mAP", "kinds"], ["a", "b"]].mean()
        assert table.loc["both", ["a", "b"]].tolist() == pytest.approx(both.tolist())

    def test_seeded_and_paired(self):
        a, _, tags = run_values()
        once, again = (
            compare_means(a, a, AVERAGES, tags, "instance", resamples=400, seed=1) for _ in "ab"
        )
        pandas.testing.assert_frame_equal(once, again)
        higher = {name: values + 0.1 for name, values in a.items()}
        shifted = compare_means(a, higher, AVERAGES, tags, "instance", resamples=400)
        ends = shifted[["groups_low", "groups_high"]].to_numpy()
        assert ends == pytest.approx(10)  # what both runs share does not widen the interval

    def test_without_a_group_there_is_the_interval_over_queries_alone(self):
        a, b, _ = run_values()
        table = compare_means(a, b, AVERAGES[:1], {}, None, resamples=100)
        assert table["queries_low"].notna().all()
        assert table["groups_low"].isna().all()


# --- values on disk ----------------------------------------------------------------------------


def write_run(folder, values, tags, order=None, averages=AVERAGES):
    rows = list(range(len(values["AP"]))) if order is None else list(order)
    headers = dict.fromkeys(average.values for average in averages if average.values)
    folder.mkdir(parents=True)
    content = QueryValues(
        labels={
            "Image Query": [f"query/{n}.jpg" for n in rows],
            "Text Query": [f"text, {n}" for n in rows],
            "Instance": [tags["instance"][n] for n in rows],
        },
        values={name: values[name][rows] for name in headers},
        averages=averages,
        tags={name: [own[n] for n in rows] for name, own in tags.items()},
        image="Image Query",
        text="Text Query",
    )
    write_values(folder, content)
    return folder


class TestValues:
    def test_what_is_written_is_read(self, tmp_path):
        a, _, tags = run_values()
        read = read_values(write_run(tmp_path / "run", a, tags, averages=MORE))
        assert read.averages == MORE
        assert read.tags == tags
        assert list(read.labels) == ["Image Query", "Text Query", "Instance"]
        for name, own in a.items():
            assert (read.values[name] == own).all()
        assert (read.main, read.outer_tag, read.named_by) == (
            "AP",
            "instance",
            ["Text Query", "Instance"],
        )

    def test_both_average_precisions_keep_their_names(self, tmp_path):
        rooms = load_task(make_rooms(tmp_path).folder / "features" / "clip_features" / "rooms")
        values = np.zeros(4)
        names = {
            ("AP-T", "all"): "AP",
            ("AP-S", "all"): "AP-S",
            ("AP-S@5", "all"): "AP@5",
            ("AP-T", "subset"): "AP (subset)",
        }
        rooms = dataclasses.replace(rooms, columns=(), means=())
        assert list(query_values(rooms, dict.fromkeys(names, values)).values) == list(
            names.values()
        )

    def test_no_tag_of_several_labels_and_no_single_label_is_drawn(self, tmp_path):
        a, _, tags = run_values()
        averages = [average for average in MORE if average.name in ("mAP", "one", "aspects")]
        read = read_values(write_run(tmp_path / "run", a, tags, averages=tuple(averages)))
        assert read.outer_tag is None

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("x,y,z,high,1", "line 2: could not convert string to float"),
            ("x,y,z,nan,1", "line 2: AP is not from 0 to 1"),
            ("x,y,z,7.5,1", "line 2: AP is not from 0 to 1"),
            ('x,"y\n",z,0.5,1\nx,y,z,0.5,2', "line 4: Hit@5 is not from 0 to 1"),
            ("x,y,z,0.5", "line 2: 4 values where 5 are expected"),
            ('x,y,z,0.5,1"', "line 2: .*; run run_retrieval.py again"),
            ("x,y,z,0.5,1", "APs.csv and APs.json are of different runs"),
            ("", "has no queries"),
        ],
    )
    def test_a_row_that_is_wrong_is_named(self, tmp_path, row, message):
        a, _, tags = run_values()
        folder = write_run(tmp_path / "run", a, tags, averages=MORE)
        header = (folder / "APs.csv").read_text().splitlines()[0]
        (folder / "APs.csv").write_text(f"{header}\n{row}\n" if row else f"{header}\n")
        with pytest.raises(UserError, match=message):
            read_values(folder)

    def test_files_that_are_absent_or_others_are_refused(self, tmp_path):
        a, _, tags = run_values()
        with pytest.raises(UserError, match=r"APs\.csv does not exist; give a result folder"):
            read_values(tmp_path)
        folder = write_run(tmp_path / "run", a, tags)
        words = json.loads((folder / "APs.json").read_text())
        (folder / "APs.json").write_text(json.dumps({**words, "labels": ["Query"]}))
        with pytest.raises(UserError, match="has not the columns Query,AP"):
            read_values(folder)
        (folder / "APs.json").write_text(json.dumps({**words, "averages": [{"name": "mAP"}]}))
        with pytest.raises(UserError, match=r"does not describe APs\.csv"):
            read_values(folder)
        (folder / "APs.json").unlink()
        with pytest.raises(UserError, match=r"APs\.json does not exist.*run run_retrieval"):
            read_values(folder)


# --- the comparison ----------------------------------------------------------------------------


class TestCompareRuns:
    def test_writes_the_tables_and_the_page(self, tmp_path, capsys):
        a, b, tags = run_values()
        run_a = write_run(tmp_path / "sum", a, tags)
        run_b = write_run(tmp_path / "basic", b, tags, order=range(QUERIES)[::-1])
        comparison = compare_runs(run_a, run_b, tmp_path / "compared", resamples=300)
        expected = compare_means(a, b, AVERAGES, tags, "instance", resamples=300)
        pandas.testing.assert_frame_equal(comparison.means, expected)
        means = pandas.read_csv(tmp_path / "compared" / "means.csv")
        assert means["difference"].to_numpy() == pytest.approx(expected["difference"], rel=1e-4)
        queries = pandas.read_csv(tmp_path / "compared" / "queries.csv")
        best = int(np.argmax(b["AP"] - a["AP"]))
        assert queries["Image Query"][0] == f"query/{best}.jpg"
        assert (queries["row_a"][0], queries["row_b"][0]) == (best, QUERIES - 1 - best)
        assert queries["difference"].is_monotonic_decreasing
        page = comparison.page.read_text(encoding="utf-8")
        assert f"text, {best}</td>" in page
        assert f"better on {(b['AP'] > a['AP']).sum()} queries" in " ".join(page.split())
        assert "95 % interval by instance" in page
        assert "none over queries for minmAP" in page
        printed = capsys.readouterr().out
        assert "A: sum" in printed
        assert f"{expected['difference'][0]:+.2f}" in printed
        assert f"'text, {best}', {tags['instance'][best]} (query/{best}.jpg)" in printed

    def test_only_what_is_won_is_listed_as_won(self, tmp_path, capsys):
        a, _, tags = run_values(queries=8)
        b = {**a, "AP": a["AP"] - np.eye(8)[:3].sum(0) * 0.25}
        runs = [write_run(tmp_path / name, own, tags) for name, own in (("a", a), ("b", b))]
        compare_runs(*runs, tmp_path / "compared", resamples=50)
        won, lost = capsys.readouterr().out.split("B wins most")[1].split("A wins most:\n")
        assert won == ": no query\n"
        assert [line.split()[0] for line in lost.splitlines()] == ["-25.00"] * 3

    def test_a_task_without_groups_has_one_interval(self, tmp_path, capsys):
        a, b, tags = run_values()
        averages = (Average("R@5", "Hit@5"), Average("mAP", "AP"), Average("x", "AP"))
        runs = [
            write_run(tmp_path / name, values, tags, averages=averages)
            for name, values in (("a", a), ("b", b))
        ]
        comparison = compare_runs(*runs, tmp_path / "compared", resamples=50)
        page = comparison.page.read_text(encoding="utf-8")
        assert "interval by" not in page
        assert "none over queries" not in page
        assert "by instance" not in capsys.readouterr().out
        assert comparison.queries["difference"].isin([-100, 0, 100]).all()

    def test_links_lead_to_the_queries_in_the_runs_reports(self, tmp_path):
        a, b, tags = run_values()
        run_a, run_b = write_run(tmp_path / "sum", a, tags), write_run(tmp_path / "basic", b, tags)
        (run_b / "report").mkdir()
        (run_b / "report" / "index.html").write_text("")
        comparison = compare_runs(run_a, run_b, run_b / "against_sum", resamples=10)
        best = int(np.argmax(b["AP"] - a["AP"]))
        page = comparison.page.read_text(encoding="utf-8")
        assert f'href="../report/index.html#query-{best}"' in page
        assert "sum/report" not in page

    def test_other_queries_are_refused_by_the_first_that_differs(self, tmp_path):
        a, _, tags = run_values()
        run_a = write_run(tmp_path / "a", a, tags)
        run_b = write_run(tmp_path / "b", a, tags, order=[n for n in range(40) if n != 7])
        for pair in ((run_a, run_b), (run_b, run_a)):
            with pytest.raises(UserError, match=r"query/7\.jpg', Text Query 'text, 7'.*is not in"):
                compare_runs(*pair, tmp_path / "compared")
        assert not (tmp_path / "compared").exists()

    def test_runs_that_are_judged_in_other_ways_are_refused(self, tmp_path):
        a, _, tags = run_values()
        run_a = write_run(tmp_path / "a", a, tags)
        fewer = write_run(tmp_path / "fewer", a, tags, averages=AVERAGES[:1])
        rounded = (*AVERAGES[:1], Average("mmAP", "AP", (Group("instance", digits=2),)))
        other = write_run(tmp_path / "other", a, tags, averages=(*rounded, AVERAGES[2]))
        hidden = write_run(tmp_path / "hidden", a, tags, averages=())
        moved = dict(tags, pair=[*tags["pair"][:5], "elsewhere", *tags["pair"][6:]])
        moved = write_run(tmp_path / "moved", a, moved)
        for run, message in (
            (fewer, "are of different columns: the averages are mAP, mmAP, minmAP and mAP; run"),
            (other, "do not average mmAP in the same way"),
            (run_a, "/a is named twice; name two result folders"),
            (hidden, "hidden: the ground truth is hidden"),
            (moved, r"query 6 of .* has the pair '[pq]"),
        ):
            with pytest.raises(UserError, match=message):
                compare_runs(run_a, run, tmp_path / "compared")

    def test_a_query_twice_pairs_in_order(self, tmp_path):
        runs = []
        for name, values in (("a", (0.1, 0.5)), ("b", (0.2, 0.4))):
            (tmp_path / name).mkdir()
            labels = {"Text Query": ["red", "red"]}
            content = QueryValues(
                labels, {"AP": np.array(values)}, AVERAGES[:1], {}, None, "Text Query"
            )
            write_values(tmp_path / name, content)
            runs.append(tmp_path / name)
        comparison = compare_runs(*runs, tmp_path / "c", resamples=10)
        assert comparison.queries["difference"].to_numpy() == pytest.approx([10, -10])

    def test_runs_over_a_task_of_no_benchmark(self, tmp_path, capsys):
        make_rooms(tmp_path)
        places = {"features_dir": "features", "data_dir": "data", "results_dir": "results"}
        flags = [part for n, at in places.items() for part in (f"--{n}", str(tmp_path / at))]
        flags += ["--dataset", "rooms", "--gpu", "-1", "--report"]
        for method in ("image", "text"):
            run_retrieval.main([*flags, "--method", method])
        runs = [str(tmp_path / "results" / "rooms" / method) for method in ("image", "text")]
        run_retrieval.main(["--compare", *runs])
        means = pandas.read_csv(tmp_path / "results/rooms/text/against_image/means.csv")
        names = ["mAP@5", "R@1 subset", "kitchen", "rooms", "aspects", "mean"]
        assert list(means["mean"]) == names
        for run, side in zip(runs, "ab", strict=True):
            (row,) = pandas.read_csv(f"{run}/mAP_table.csv").to_dict("records")
            assert [row[name] for name in names] == pytest.approx(means[side].tolist(), abs=0.00501)
        assert "by room" in capsys.readouterr().out
        page = tmp_path / "results/rooms/text/against_image/index.html"
        assert "../report/index.html#query-" in page.read_text(encoding="utf-8")
