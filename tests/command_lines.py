"""Command lines at random: what anybody might type, right, half right and wrong."""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
from pathlib import Path

from extraction_world import draw_image, encode_jpeg, write_rows

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("create_features", "run_retrieval", "create_captions")
WORDS = (
    *("mine", "icir", "tiny", "corpus", "mean", "", "-1", "0", "1", "3", "0.5", "nan", "1e9", "x"),
    *("é猫\u202e", "a,b", "a=1:2:1", "harris_lambda=0,0.1", "mAP@3", "up/..", "photos/a.jpg", "."),
    *("mine/query_files.csv", "features", "/proc/self/mem", "/dev/null", "no/such", "model.pt"),
)
SECONDS = 240
# What a command would fetch, or wait for, is none of this.
LEFT_OUT = {"help", "version", "url", "list_backbones", "workers"}


def make_folder(folder: Path) -> None:
    """A data set of one's own with a name that is no ASCII."""
    for seed, name in enumerate(("q", "a", "bé")):
        path = folder / f"mine/{name}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode_jpeg(draw_image(seed)))
    write_rows(folder / "mine/query_files.csv", [("q.jpg", "at night, 猫", "í")])
    write_rows(
        folder / "mine/database_files.csv",
        [("a.jpg", "at night, 猫", "í"), ("bé.jpg", "", "í")],
    )


def command_line(program: str, rng: random.Random) -> list[str]:
    """A command line; half of them name a data set and a model that are there."""
    parser = __import__(program).build_parser()
    actions = [a for a in parser._actions if a.option_strings and a.dest not in LEFT_OUT]
    known = ["--dataset", "mine", "--backbone", "tiny"] if rng.random() < 0.6 else []
    if program == "create_captions":
        known = known[:2]
    words = [*known]
    for action in rng.sample(actions, rng.choice((0, 1, 1, 2, 3, 5))):
        if action.dest not in ("dataset", "backbone", "gpu") or not known:
            words += [rng.choice(action.option_strings), *_values(action, rng)]
    if rng.random() < 0.1:
        words.append(rng.choice(WORDS))
    if any(action.dest == "gpu" for action in actions):
        words += ["--gpu", "-1"]
    return words


def _values(action: argparse.Action, rng: random.Random) -> list[str]:
    if action.nargs == 0:
        return []
    count = {None: 1, "+": rng.randint(1, 2)}.get(action.nargs, action.nargs)
    count = count if isinstance(count, int) else 1
    choices = [*map(str, action.choices or ())]
    return [rng.choice(choices if choices and rng.random() < 0.8 else WORDS) for _ in range(count)]


def run_line(folder: Path, program: str, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command line in a folder far from the toolkit, on a poor console, without a home."""
    variables = {k: v for k, v in os.environ.items() if k not in ("HOME", "HF_HOME")}
    variables |= {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, ROOT / f"{program}.py", *words],
        cwd=folder,
        env=variables | {"CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def try_lines(folder: Path, count: int, seed: int) -> dict[int, int]:
    """Run command lines, beside features that are there; how many ended with each status.

    Raises AssertionError for the first that ends in anything but 0 or 2, or with a traceback.
    """
    rng, statuses = random.Random(seed), {}
    done = run_line(
        folder, "create_features", [*["--dataset", "mine", "--backbone", "tiny", "--gpu", "-1"]]
    )
    if done.returncode:
        raise AssertionError(done.stderr)
    for number in range(count):
        program = PROGRAMS[number % len(PROGRAMS)]
        words = command_line(program, rng)
        done = run_line(folder, program, words)
        if done.returncode not in (0, 2) or "Traceback" in done.stdout + done.stderr:
            raise AssertionError(f"{seed}, {number}: {program}.py {words}:\n{done.stderr}")
        statuses[done.returncode] = statuses.get(done.returncode, 0) + 1
    return statuses
