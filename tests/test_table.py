"""run_retrieval.py --table: what a results folder holds, beside the published figures."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import run_retrieval
from utils import UserError
from utils_summary import Figure, read_latest, read_published, tabulate, write_table
from utils_tables import write_rows

SEMANTIC = {
    "cirr": ("Recall@1", "Recall@5", "Recall@10", "Recall@50", "Recall_subset@1"),
    "circo": ("mAP@5", "mAP@10", "mAP@25", "mAP@50"),
    "fashioniq": ("R@10", "R@50"),
}
TIME = "2026-01-01T00:00:00"


def add_run(results: Path, dataset: str, variant: str, value: str, backbone: str = "clip") -> None:
    """One more row in a variant's table, as a run adds it."""
    path = results / dataset / variant / "mAP_table.csv"
    earlier = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    row = {"timestamp": TIME, "dataset": dataset, "backbone": backbone, "method": "?"}
    row |= {"variant": variant, "mAP": value, "R@10": "1.00", "queries": "9"}
    write_rows(path, [*earlier, row])


@pytest.fixture
def results(tmp_path) -> Path:
    folder = tmp_path / "results"
    add_run(folder, "nico", "freedom", "1.00")
    add_run(folder, "nico", "freedom", "26.30")
    add_run(folder, "icir", "basic", "31.60")
    add_run(folder, "icir", "basic_siglip", "30.00", "siglip")
    add_run(folder, "icir", "product", "17.48")
    add_run(folder, "mugs", "my_method", "50.00")
    path = folder / "icir" / "basic_sweep" / "mAP_table.csv"
    write_rows(path, [{"variant": "basic_aa0.1", "mAP": "99.00"}])
    path = folder / "icir" / "all" / "mAP_table.csv"
    write_rows(path, [{"variant": "image", "mAP": "98.00"}, {"variant": "text", "mAP": "97.00"}])
    return folder


def test_the_last_run_of_each_variant_beside_its_published_figure(results, capsys):
    run_retrieval.main(["--table", f"--results_dir={results}"])
    said = capsys.readouterr().out
    with open(results / "table.csv", encoding="utf-8", newline="") as file:
        rows = {row.pop("method"): row for row in csv.DictReader(file)}
    assert list(rows) == ["product", "freedom", "basic", "basic_siglip", "my_method"]
    assert [*rows["freedom"]] == [
        f"{dataset} mAP{part}"
        for dataset in ("nico", "icir", "mugs")
        for part in ("", " published", " difference")
    ]
    assert list(rows["freedom"].values())[:3] == ["26.30", "26.10", "+0.20"]
    assert list(rows["freedom"].values())[3:] == ["", "17.24", "", "", "", ""]  # not run
    assert rows["basic"]["icir mAP difference"] == "-0.04"
    assert rows["product"]["icir mAP difference"] == "+0.00"
    assert rows["basic_siglip"]["icir mAP"] == "30.00"
    assert rows["basic_siglip"]["icir mAP published"] == ""
    for word in ("26.30", "+0.20", "my_method", "table.md", "table.tex"):
        assert word in said
    assert not {"99.00", "98.00", "1.00 "} & set(said.split())


def test_markdown_and_latex_hold_the_same_cells(results):
    run_retrieval.main(["--table", f"--results_dir={results}"])
    with open(results / "table.csv", encoding="utf-8", newline="") as file:
        expected = list(csv.reader(file))
    lines = (results / "table.md").read_text(encoding="utf-8").splitlines()
    markdown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert markdown.pop(1) == [":--", *["--:"] * (len(expected[0]) - 1)]
    assert markdown == expected
    lines = (results / "table.tex").read_text(encoding="utf-8").splitlines()
    assert lines[0] == rf"\begin{{tabular}}{{l{'r' * (len(expected[0]) - 1)}}}"
    body = [line.removesuffix(r" \\") for line in lines if line.endswith(r"\\")]
    cells = [[cell.strip().replace(r"\_", "_") for cell in line.split("&")] for line in body]
    assert cells == expected
    assert any(r"my\_method" in line for line in body)


def test_a_system_s_own_results_stand_beside_its_published_figures():
    ours = [Figure("external_magiclens", "nico", "clip", "mAP", "19.60")]
    (row,) = tabulate(ours, read_published()).rows
    assert row == ["external_magiclens", "19.60", "19.66", "-0.06"]


def test_every_column_that_was_published_for_a_run_is_shown(tmp_path):
    folder = tmp_path / "results" / "fashioniq" / "searle_clip_targetpad"
    row = {"timestamp": TIME, "dataset": "fashioniq", "backbone": "clip+targetpad", "method": "?"}
    row |= {"variant": folder.name, "R@10": "25.50", "R@50": "46.23", "dress R@10": "20.00"}
    write_rows(folder / "mAP_table.csv", [row | {"queries": "9"}])
    table = tabulate(read_latest(tmp_path / "results"), read_published())
    shown = dict(zip(table.header, table.rows[0], strict=True))
    assert shown["method"] == "searle_clip_targetpad"
    assert shown["fashioniq R@10 difference"] == "-0.06"
    assert shown["fashioniq R@50 difference"] == "+0.00"
    assert not any("dress" in name for name in table.header)


def test_without_ground_truth_there_is_no_figure_of_ours(tmp_path):
    folder = tmp_path / "results" / "circo_test" / "searle_clip_targetpad"
    row = {"timestamp": TIME, "dataset": "circo_test", "backbone": "clip+targetpad", "method": "?"}
    write_rows(folder / "mAP_table.csv", [row | {"variant": folder.name, "queries": "800"}])
    table = tabulate(read_latest(tmp_path / "results"), read_published())
    assert table.header[1::3] == [f"circo_test {name}" for name in SEMANTIC["circo"]]
    cells = [cell for value in ("11.68", "12.73", "14.33", "15.12") for cell in ("", value, "")]
    assert table.rows == [[folder.name, *cells]]


def test_published_figures_are_of_the_columns_that_the_benchmarks_have():
    figures = read_published()
    domains = [f for f in figures if f.column == "mAP"]
    assert {f.dataset for f in domains} == {"imagenet_r", "nico", "minidn", "ltll", "icir"}
    assert len(domains) == 16 * 5
    columns = {(f.dataset.removesuffix("_test"), f.column) for f in figures if f not in domains}
    assert columns <= {(d, c) for d, names in SEMANTIC.items() for c in names}
    keys = [(f.variant, f.dataset, f.backbone, f.column) for f in figures]
    assert len(set(keys)) == len(keys)
    assert all(0 < float(f.value) < 100 for f in figures)


def test_special_characters_are_escaped(tmp_path):
    table = tabulate([Figure("a_b", "x_y", "clip", "R@1", "1.00")], [])
    _, markdown, latex = write_table(tmp_path, table)
    assert r"x\_y R@1" in latex.read_text()
    assert "a_b | 1.00 |" in markdown.read_text()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--table", "--method", "text"], "--method has no effect with --table"),
        (["--table", "--dataset", "icir"], "--dataset has no effect with --table"),
        (["--table", "--results-dir", "nowhere"], "no results in nowhere"),
    ],
)
def test_what_it_cannot_do_is_said(flags, said):
    with pytest.raises(UserError, match=said):
        run_retrieval.main(flags)


def test_a_table_that_is_damaged_is_named(results):
    path = results / "nico" / "freedom" / "mAP_table.csv"
    path.write_text("variant,mAP\nfreedom\n")
    with pytest.raises(UserError, match=r"nico/freedom/mAP_table.csv"):
        run_retrieval.main(["--table", f"--results_dir={results}"])


def test_systems_composed_here_stand_beside_their_published_figures():
    place = "models/magic_lens_clip_"
    runs = [("composed", f"magiclens:{place}large.pkl"), ("composed", f"magiclens:{place}base.pkl")]
    runs += [("composed", "covr:covr.ckpt"), ("external_mcl", "clip")]
    ours = [Figure(*run[:1], "icir", run[1], "mAP", "20.00") for run in runs]
    ours += [Figure(*run[:1], "circo_test", run[1], "", "") for run in runs[:2]]
    table = tabulate(ours, read_published())
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    large, base = (rows[f"composed_magiclens_magic_lens_clip_{size}"] for size in ("large", "base"))
    assert large["icir mAP published"] == "27.35"
    assert large["circo_test mAP@5 published"] == "29.50"
    assert (base["icir mAP published"], base["circo_test mAP@5 published"]) == ("", "22.30")
    assert rows["composed_covr_covr"]["icir mAP published"] == "28.50"
    assert rows["external_mcl"]["icir mAP published"] == "19.89"
