"""Command lines at random: what anybody might type, right, half right and wrong."""

from __future__ import annotations

import argparse
import importlib
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from extraction_world import draw_image, encode_jpeg, write_rows

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("create_features", "run_retrieval", "create_captions", "search", "data/download")
WORDS = (
    *("mine", "icir", "tiny", "corpus", "mean", "", "-1", "0", "1", "3", "0.5", "nan", "1e9", "x"),
    *("é猫\u202e", "a,b", "a=1:2:1", "harris_lambda=0,0.1", "mAP@3", "up/..", "photos/a.jpg", "."),
    *("mine/query_files.csv", "features", "/proc/self/mem", "/dev/null", "no/such", "model.pt"),
)
SECONDS = 240
# What a command would wait for is none of this, nor is a browser.
LEFT_OUT = {"help", "version", "url", "list_backbones", "workers", "open"}
NO_NETWORK = "http://127.0.0.1:9"  # a proxy that is not there


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
    parser = importlib.import_module(program.replace("/", ".")).build_parser()
    actions = [a for a in parser._actions if a.option_strings and a.dest not in LEFT_OUT]
    flags = {action.dest for action in actions}
    is_known = rng.random() < 0.6
    known = {"dataset": "mine", "backbone": "tiny"} if is_known else {}
    known = {dest: value for dest, value in known.items() if dest in flags}
    places = [action for action in parser._actions if not action.option_strings]
    words = [word for dest, value in known.items() for word in (f"--{dest}", value)]
    for action in places:
        if "dataset" not in known or rng.random() < 0.3:
            words += ["mine"] if is_known and not action.choices else _values(action, rng)
    for action in rng.sample(actions, min(len(actions), rng.choice((0, 1, 1, 2, 3, 5)))):
        if action.dest not in ("dataset", "backbone", "gpu") or not known:
            words += [rng.choice(action.option_strings), *_values(action, rng)]
    if rng.random() < 0.1:
        words.append(rng.choice(WORDS))
    if "gpu" in flags:
        words += ["--gpu", "-1"]
    return [*words, "--no-open"] if program == "search" else words


def _values(action: argparse.Action, rng: random.Random) -> list[str]:
    if action.nargs == 0:
        return []
    count = {None: 1, "+": rng.randint(1, 2)}.get(action.nargs, action.nargs)
    count = count if isinstance(count, int) else 1
    choices = [*map(str, action.choices or ())]
    return [rng.choice(choices if choices and rng.random() < 0.8 else WORDS) for _ in range(count)]


def run_line(folder: Path, program: str, words: list[str]) -> tuple[int, str]:
    """Run a command line in a folder far from the toolkit, on a poor console, without a home.

    Its status, and all that it said. A page that is served is ended, as by Ctrl-C.
    """
    variables = {k: v for k, v in os.environ.items() if k not in ("HOME", "HF_HOME")}
    variables |= {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    variables |= {"https_proxy": NO_NETWORK, "http_proxy": NO_NETWORK, "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [
                "timeout",
                "--foreground",
                str(SECONDS),
                sys.executable,
                ROOT / f"{program}.py",
                *words,
            ],
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        said, served = "", False
        for line in process.stdout:
            said += line
            if line.startswith("the page: "):
                served = True
                process.send_signal(signal.SIGINT)
        status = process.wait()
        errors.seek(0)
        said += errors.read()
    return (0 if served and status == 130 else status), said


def try_lines(folder: Path, count: int, seed: int) -> dict[int, int]:
    """Run command lines, beside features that are there; how many ended with each status.

    Raises AssertionError for the first that ends in anything but 0 or 2, or with a traceback.
    """
    rng, statuses = random.Random(seed), {}
    known = ["--dataset", "mine", "--backbone", "tiny", "--gpu", "-1"]
    status, said = run_line(folder, "create_features", known)
    if status:
        raise AssertionError(said)
    for number in range(count):
        program = PROGRAMS[number % len(PROGRAMS)]
        words = command_line(program, rng)
        status, said = run_line(folder, program, words)
        if status not in (0, 2) or "Traceback" in said:
            raise AssertionError(
                f"{seed}, {number}: {program}.py {words}, status {status}:\n{said}"
            )
        statuses[status] = statuses.get(status, 0) + 1
    return statuses
