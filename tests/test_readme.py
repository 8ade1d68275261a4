"""The README says what the programs do: flags, commands, links and counts."""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import utils_retrieval

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = ["create_features.py", "run_retrieval.py", "data/download.py"]
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")

every_program = pytest.mark.parametrize("program", PROGRAMS)


@cache
def help_text(program: str) -> str:
    done = subprocess.run(
        [sys.executable, program, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def plain(flag: str) -> str:
    """One spelling of a flag's three: --qe-k, --qe_k; --no-report stands for --report."""
    name = flag.removeprefix("--").replace("-", "_")
    return name.removeprefix("no_")


def flags_in_help(program: str) -> set[str]:
    """Flags that --help defines (at the start of a line, not merely mentions)."""
    lines = re.findall(r"^ {1,4}(-.*?)(?:  |$)", help_text(program), re.MULTILINE)
    return {plain(flag) for line in lines for flag in FLAG.findall(line)} - {"help"}


def section(heading: str) -> str:
    """The text under a heading, down to the next one."""
    found = re.search(
        rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", README, re.MULTILINE | re.DOTALL
    )
    assert found, f"README.md has no section {heading!r}"
    return found[1]


def flags_in_table(program: str) -> set[str]:
    rows = re.findall(r"^\| (`--.*?) \|", section(f"Flags of `{program}`"), re.MULTILINE)
    return {plain(flag) for row in rows for flag in FLAG.findall(row)}


def commands(program: str) -> list[list[str]]:
    """The words of every command of the README's bash blocks that runs the program."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", README, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if program in line]
    return [line[line.index(program) + 1 :] for line in words if program in line]


@every_program
def test_every_flag_of_help_is_in_the_table(program):
    assert flags_in_help(program) - flags_in_table(program) == set()


@every_program
def test_every_flag_of_the_table_is_in_help(program):
    assert flags_in_table(program) - flags_in_help(program) == set()


@every_program
def test_commands_use_flags_that_exist(program):
    used = {plain(w) for line in commands(program) for w in line if w.startswith("--")}
    assert used, "the README shows the program at work"
    assert used - flags_in_help(program) == set()


@every_program
def test_choices_in_the_table_are_those_of_help(program):
    """A cell such as `--format npy\\|pkl` lists exactly the choices {npy,pkl} of --help."""
    shown = re.findall(
        r"^\| `--(\w+) ([\w.]+(?:\\\|[\w.]+)+)`", section(f"Flags of `{program}`"), re.M
    )
    found = re.findall(r"--([\w-]+) \{([^}]+)\}", help_text(program))
    offered = {name.replace("-", "_"): choices for name, choices in found}
    assert shown
    for name, choices in shown:
        assert sorted(choices.split("\\|")) == sorted(offered[name].split(",")), name


def test_defaults_in_the_table_are_those_of_help():
    """Where both name a default, a word or a number, they name the same."""
    program = "run_retrieval.py"
    text = re.sub(r"\n {20,}", " ", help_text(program))
    offered = dict(re.findall(r"^  --(\w+).*?\(default: ([\w.]+)\)$", text, re.MULTILINE))
    rows = re.findall(r"^\| `--(\w+).*\| `?([\w.]+)`? \|$", section(f"Flags of `{program}`"), re.M)
    both = {name: (shown, offered[name]) for name, shown in rows if name in offered}
    assert len(both) > 15
    assert {name: pair for name, pair in both.items() if pair[0] != pair[1]} == {}


def test_the_example_of_a_method_works():
    """The README's new method, run as it stands, gives the scores that its docstring states."""
    block = next(
        b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "METHODS[" in b
    )
    names = {"METHODS": {}, "Method": utils_retrieval.Method}
    exec(block, names)
    ((name, method),) = names["METHODS"].items()
    assert name not in utils_retrieval.METHODS
    random = torch.Generator().manual_seed(0)
    image, text = torch.randn(3, 4, generator=random), torch.randn(3, 4, generator=random)
    rows = utils_retrieval.unit_rows(torch.randn(5, 4, generator=random))
    queries = utils_retrieval.Queries(image, text, None)
    gallery = utils_retrieval.Gallery.of(rows)
    (scores,) = method.scores(queries, gallery, [utils_retrieval.Parameters()])
    assert torch.allclose(scores, text @ rows.T + 0.1 * image @ rows.T, atol=1e-6)


def test_files_it_links_to_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_sections_it_links_to_exist():
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", README, flags=re.DOTALL), re.M)
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    assert [a for a in re.findall(r"\]\(#([^)]+)\)", README) if a not in anchors] == []


def test_make_targets_it_names_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z]+)", README, re.MULTILINE))
    assert {"demo", "test", "install"} <= named <= targets


def test_sizes_of_the_corpora_are_right():
    for number, what in (("generic_subjects", "objects"), ("generic_styles", "styles")):
        rows = (ROOT / "corpora" / f"{number}.csv").read_text(encoding="utf-8").count("\n")
        assert f"{rows:,} {what}" in README
