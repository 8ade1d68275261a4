"""run_retrieval.py --distractors: tables, the curve, refusals; ranks, killed and continued."""

from __future__ import annotations

import csv
import re
import socket
from pathlib import Path

import numpy as np
import pytest
from distractor_world import make_rows, write_pool
from native import copy_world, world_arguments, write_native_world
from rank_processes import end_stopped, ended, start, start_ranks

import distractors.pool
import run_retrieval
from distractors.running import positive_rows
from utils import UserError
from utils_storage import load_features

RETRIEVAL = "run_retrieval.py"
KILLED = "tests/killed_counts.py"
ROWS = 600
FILES = 7
BASIC = ("--method", "basic", "--use_preset")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A golden world in native files, and a pool of several files in half precision."""
    folder = write_native_world(tmp_path_factory.mktemp("world"))
    features = load_features(folder / "features", "clip", "icir")
    sizes = [ROWS // FILES] * (FILES - 1)
    write_pool(folder / "pool", make_rows(features, ROWS), sizes, np.float16)
    return folder


def arguments(world: Path, results: Path, *flags: str) -> list[str]:
    own = world_arguments(world)
    own[own.index("--results_dir") + 1] = str(results)
    synthetic = ("--path_to_synthetic_data", str(world / "synthetic_data"))
    return [*own, *(synthetic if "basic" in flags else ()), *flags]


def among(world: Path, results: Path, *flags: str) -> list[str]:
    return arguments(world, results, *flags, "--distractors", str(world / "pool"))


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def results_of(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The last run of every table below a results folder, but for what equal runs differ in."""
    found = {}
    for path in sorted(folder.rglob("*.csv")):
        rows = read_table(path)
        if path.name == "mAP_table.csv" and "-curve" not in path.parent.name:
            rows = rows[-1:]
        for row in rows:
            for name in ("timestamp", "seconds", "total_seconds"):
                row.pop(name, None)
        found[str(path.relative_to(folder))] = rows
    return found


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """The results of one process that nothing disturbs: a curve of three points."""
    results = tmp_path_factory.mktemp("alone")
    command = among(world, results, *BASIC, "--distractors_limit", "0", "250", str(ROWS))
    (done,) = ended([start([RETRIEVAL, *command])])
    assert done[0] == 0, done[1]
    assert "nothing says by which model 7 of 7 files of distractors were made" in done[1]
    return results


def test_the_curve(world, alone, tmp_path):
    (folder,) = alone.glob("icir/*-curve")
    rows = read_table(folder / "mAP_table.csv")
    assert [row["distractors"] for row in rows] == ["0", "250", str(ROWS)]
    assert {row["pool"] for row in rows} == {"pool"}
    figures = [float(row["mAP"]) for row in rows]
    assert figures == sorted(figures, reverse=True)
    assert figures[0] > figures[-1]
    assert (folder / "basic.png").stat().st_size > 0
    run_retrieval.main(arguments(world, tmp_path, *BASIC))
    (ordinary,) = read_table(next(tmp_path.glob("icir/basic/mAP_table.csv")))
    assert all(rows[0][name] == ordinary[name] for name in ("mAP", "mmAP", "minmAP"))


def test_three_ranks_give_the_same_tables(world, alone, tmp_path):
    command = among(world, tmp_path, *BASIC, "--distractors_limit", f"0,250,{ROWS}")
    done = ended(start_ranks([RETRIEVAL, *command], 3))
    assert [status for status, _ in done] == [0] * 3, done
    assert results_of(tmp_path) == results_of(alone)
    assert all(not said for _, said in done[1:])


def test_killed_and_continued(world, alone, tmp_path):
    """By one process, then as two ranks of which one dies; two whole ones go on."""
    command = among(world, tmp_path, *BASIC, "--distractors_limit", "0", "250", str(ROWS))
    killed = [KILLED, *command]
    ((status, _),) = ended([start(killed, KILLED_AT="2")])
    assert status == -9
    assert len(list(tmp_path.rglob("*.npz"))) == 1  # of three: each rank has one to do
    first, second = ended(start_ranks(killed, 2, KILLED_AT="1", LOST=str(tmp_path / "lost")))
    assert (first[0], second[0]) == (2, -9)
    assert first[1].count("error:") == 1
    assert "rank 1 has ended" in first[1]
    assert "the same command continues" in first[1]
    done = ended(start_ranks([RETRIEVAL, *command], 2))
    assert [status for status, _ in done] == [0, 0], done
    assert results_of(tmp_path) == results_of(alone)


def test_a_rank_that_is_stopped(world, tmp_path):
    command = [KILLED, *among(world, tmp_path, "--method", "image", "--rank_timeout", "10")]
    fate = {"KILLED_AT": "1", "LOST": str(tmp_path / "lost"), "SIGNAL": "SIGSTOP"}
    first, second = start_ranks(command, 2, **fate)
    ((status, said),) = ended([first])
    end_stopped(second)
    assert status == 2
    assert "error: rank 1 did not come within 10 s (see --rank_timeout)" in said
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("*.csv"))


def test_a_rank_that_does_not_come(world, tmp_path):
    command = among(world, tmp_path, "--method", "image", "--rank_timeout", "2")
    places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ((status, said),) = ended([start([RETRIEVAL, *command], **places, MASTER_PORT=port)])
    assert status == 2
    assert "error: 2 ranks did not meet at localhost:" in said
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("*.csv"))


# ---------------------------------------------------------------------------------------------
# Shards that are not what they should be
# ---------------------------------------------------------------------------------------------


def spoiled(world: Path, tmp_path: Path, spoil) -> Path:
    """A copy of the pool, one of whose files is spoiled."""
    target = tmp_path / "pool"
    target.mkdir()
    for path in (world / "pool" / "img_emb").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    spoil(target / "img_emb_5.npy")
    return target


def with_nan(path: Path) -> None:
    rows = np.load(path)
    rows[3, 2] = np.nan
    np.save(path, rows)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def corrupt(path: Path) -> None:
    path.write_bytes(b"\x93NUMPY of another world" + path.read_bytes()[24:])


def narrow(path: Path) -> None:
    np.save(path, np.load(path)[:, :-1])


@pytest.mark.parametrize(
    ("spoil", "said", "kept"),
    [
        (with_nan, r"img_emb_5.npy: row 4 is zero or not finite", 5),
        (cut, r"img_emb_5.npy is cut short", 0),
        (corrupt, r"img_emb_5.npy", 0),
        (narrow, r"img_emb_5.npy has rows of 95 numbers, but .*img_emb_0.npy of 96", 0),
        (Path.unlink, None, 6),
    ],
)
def test_a_spoiled_file_is_named_and_the_others_counts_are_kept(
    world, tmp_path, monkeypatch, spoil, said, kept
):
    pool = spoiled(world, tmp_path, spoil)
    results = tmp_path / "results"
    command = arguments(world, results, "--method", "sum", "--distractors", str(pool))
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)  # the units come in their order
    if said:
        with pytest.raises(UserError, match=said):
            run_retrieval.main(command)
        assert not list(results.rglob("*.csv"))
    else:
        run_retrieval.main(command)
    assert len(list(results.rglob("*.npz"))) == kept
    (pool / "img_emb_5.npy").write_bytes((world / "pool/img_emb/img_emb_5.npy").read_bytes())
    read = []
    chunks = distractors.pool.Pool.chunks
    monkeypatch.setattr(
        distractors.pool.Pool,
        "chunks",
        lambda pool, unit, *rest: read.append(unit.shard) or chunks(pool, unit, *rest),
    )
    run_retrieval.main(command)
    first = min(kept, 5) if said else 5
    assert read == list(range(first, FILES))
    read.clear()
    run_retrieval.main([*command, "--fresh"])
    assert read == list(range(FILES))


def count_alike(world: Path, pool: Path, least: float) -> int:
    """How many good rows of a pool have so high a cosine with a positive."""
    features = load_features(world / "features", "clip", "icir")
    positives = positive_rows(features.task)
    images = features.database("image").read(positives).astype(np.float64)
    rows = np.concatenate([np.load(path) for path in sorted(pool.iterdir())]).astype(np.float64)
    rows = rows[np.isfinite(rows).all(1) & rows.any(1)]
    lengths = np.outer(np.linalg.norm(rows, axis=1), np.linalg.norm(images, axis=1))
    return int(((rows @ images.T / lengths) >= least).any(1).sum())


def test_bad_rows_are_left_out_on_demand(world, tmp_path):
    """The same tables from three ranks, and from a killed and continued process, which say so.

    They say too which distractors are copies of positives, and what half precision does.
    """
    pool = spoiled(world, tmp_path, with_nan)
    rows = np.load(pool / "img_emb_6.npy")
    rows[-1] = 0
    np.save(pool / "img_emb_6.npy", rows)

    def command(name: str, *flags: str) -> list[str]:
        places = ("--distractors", str(pool), "--distractors_limit", "250", str(ROWS))
        half = ("--distractors_precision", "bfloat16")
        return arguments(world, tmp_path / name, *BASIC, *places, *half, *flags)

    skipping = ("--on_bad_row", "skip", "--distractors_alike", "0.99")
    killed = start([KILLED, *command("killed", *skipping)], KILLED_AT="22")
    three = ended(start_ranks([RETRIEVAL, *command("three", *skipping)], 3))
    (lost,) = ended([killed])
    assert [status for status, _ in (*three, lost)] == [0, 0, 0, -9], three
    (continued,) = ended([start([RETRIEVAL, *command("killed", *skipping)])])
    bad = (
        f"2 of {ROWS} distractors are zero or not finite and were left out; the first: row 4 of "
        f"{pool / 'img_emb_5.npy'}"
    )
    copies = count_alike(world, pool, 0.99)
    assert copies >= 6
    alike = (
        f"{copies} of {ROWS} distractors have a cosine of 0.99 or more with a positive's image, "
        "and may be answers that nobody labelled; the first: row 1 of "
        f"{pool / 'img_emb_0.npy'}, 1.0000 with "
    )
    for text in (three[0][1], continued[1]):
        assert f"warning: {bad}\n" in text
        assert f"warning: {alike}" in text
        assert f"warning: bfloat16 products: among the first {ROWS} distractors" in text
    results = results_of(tmp_path / "three")
    assert results == results_of(tmp_path / "killed")
    (curve,) = (rows for name, rows in results.items() if "curve" in name)
    assert [row["distractors"] for row in curve] == ["250", str(ROWS - 2)]
    assert [bad in row["notes"] for row in curve] == [False, True]
    assert [alike in row["notes"] for row in curve] == [False, True]
    refused = r"img_emb_5.npy: row 4 is zero or not finite; .* --on_bad_row skip"
    with pytest.raises(UserError, match=refused):  # though it is counted without these rows
        run_retrieval.main(command("three"))


def test_products_in_half_precision(world, tmp_path, capsys):
    """What they do to ranks is said, and the counts in full precision are others."""
    command = among(world, tmp_path, "--method", "sum")
    run_retrieval.main(command)
    full = results_of(tmp_path)
    capsys.readouterr()
    run_retrieval.main([*command, "--distractors_precision", "bfloat16"])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "products" in line)
    said = (
        r"warning: bfloat16 products: among the first 600 distractors, .* \d+ of \d+ ranks differ"
    )
    assert re.match(said, line)
    folder = tmp_path / "icir" / f"sum_distractors-pool-{ROWS}_bfloat16"
    (row,) = read_table(folder / "mAP_table.csv")
    assert (row["products"], row["variant"]) == ("bfloat16", folder.name)
    assert row["notes"].endswith(line.removeprefix("warning: "))
    run_retrieval.main(command)
    found = results_of(tmp_path)
    assert {name: found[name] for name in full} == full


def test_all_leaves_out_what_distractors_cannot_be_ranked_by(world, tmp_path, capsys):
    """Said once for a curve; by name it is refused."""
    own = copy_world(world, tmp_path / "world")
    folder = own / "features/clip_features/icir"
    text, image = (np.load(folder / f"{name}.npy") for name in ("query_text", "database_image"))
    np.save(folder / "query_composed.npy", text)
    np.save(folder / "query_tokens.npy", text)
    np.save(folder / "database_tokens.npy", np.concatenate([image, image], axis=1))
    for name, values in {"text": text, "word": text, "caption": image}.items():
        side = "database" if name == "caption" else "query"
        np.save(folder / f"{side}_cvsi_{name}.npy", values)
    results = tmp_path / "results"
    command = [*among(own, results, "--method", "all"), "--distractors_limit", "0,250"]
    run_retrieval.main(command)
    said = capsys.readouterr().err
    pool = own / "pool/img_emb"
    for line in (
        "left out: composed_tokens (it compares several tokens of every row, and distractors have "
        "one vector each)",
        f"left out: cvsi (no database_cvsi_caption.npy of the distractors in {pool})",
    ):
        assert said.count(f"{line}\n") == 1, said
    lines = [line.replace("-250", "-N").replace("-0", "-N") for line in said.splitlines()]
    assert len(lines) == len(set(lines)), said
    assert any("in 43 queries a positive ties" in line for line in lines)
    rows = read_table(results / "icir/all/mAP_table.csv")
    methods = {row["method"] for row in rows}
    assert "composed" in methods
    assert not methods & {"composed_tokens", "cvsi"}
    with pytest.raises(UserError, match="--method composed_tokens: it compares several tokens"):
        run_retrieval.main(among(own, results, "--method", "composed_tokens"))


def test_half_precision_where_all_rows_that_would_be_checked_are_bad(
    world, tmp_path, monkeypatch, capsys
):
    """What is ranked is, and nothing is said of ranks that could not be held against others."""
    first = np.load(world / "pool/img_emb/img_emb_0.npy")
    monkeypatch.setattr("distractors.precision.CHECKED_ROWS", len(first))
    pool = spoiled(world, tmp_path, lambda path: None)
    np.save(pool / "img_emb_0.npy", np.zeros_like(first))
    flags = ("--distractors_precision", "bfloat16", "--on_bad_row", "skip")
    results = tmp_path / "results"
    command = arguments(world, results, "--method", "image", "--distractors", str(pool), *flags)
    run_retrieval.main(command)
    said = "bfloat16 products: how ranks differ from those of float32 is not known, as the first "
    said += f"{len(first)} distractors were all left out"
    assert f"warning: {said}\n" in capsys.readouterr().err
    (row,) = read_table(next(results.rglob("mAP_table.csv")))
    assert row["distractors"] == str(ROWS - len(first))
    assert row["notes"].endswith(said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--distractors", "nowhere"], "--distractors nowhere does not exist"),
        (["--distractors_limit", "5"], "--distractors_limit has no effect without --distractors"),
        (["--fresh"], "--fresh has no effect without --distractors"),
        (["--distractors", "{pool}", "--top_k", "3"], "--top_k with --distractors: .* without"),
        (["--distractors", "{pool}", "--report"], "--report with --distractors: .* without"),
        (["--distractors", "{pool}", "--export", "trec"], "--export with .* without"),
        (
            ["--distractors", "{pool}", "--external", "x.npz"],
            "--external with .* --from_embeddings",
        ),
        (
            ["--distractors", "{pool}", "--distractors_limit", "601"],
            "--distractors_limit 601: there are 600 distractors",
        ),
        (
            ["--distractors", "{pool}", "--distractors_limit", "1", "2", "--sweep", "a=1"],
            "take one --distractors_limit",
        ),
        (["--distractors", "{pool}", "--distractors_limit", "1,-2"], "-2 is negative"),
        (["--distractors", "{pool}", "--distractors_limit", "1,"], "invalid numbers value: '1,'"),
        (["--distractors", "{empty}"], "holds no .npy file"),
        (["--distractors", "{pool}", "{pool}/img_emb"], "img_emb_0.npy is named twice, and would"),
        (["--distractors", "{own}"], "database_image.npy: these are the rows of icir itself"),
    ],
)
def test_refusals(world, tmp_path, flags, said):
    places = {"pool": str(world / "pool"), "empty": str(tmp_path)}
    places["own"] = str(world / "features/clip_features/icir")
    flags = [flag.format(**places) for flag in flags]
    with pytest.raises(UserError, match=said):
        run_retrieval.main(arguments(world, tmp_path / "results", "--method", "image", *flags))
    assert not (tmp_path / "results").exists()
