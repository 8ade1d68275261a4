"""How the house is built, read from its files: who imports whom, and how large things are."""

from __future__ import annotations

import ast
import json
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("create_captions", "create_features", "run_retrieval", "search")

# Who may import whom: a room those of its own floor and of the floors below.
FLOORS = (
    COMMANDS,
    (
        *("captioning", "distractors", "external", "extraction", "live", "report"),
        *("utils_plans", "utils_running", "utils_summary", "utils_tables"),
    ),
    (
        *("utils_assets", "utils_blocks", "utils_evaluation", "utils_explained", "utils_search"),
        "utils_texts",
    ),
    (
        *("utils_labels", "utils_protocol", "utils_runs", "utils_storage"),
        *("utils_submissions", "utils_values"),
    ),
    ("composed",),
    ("benchmarks", "methods"),
    (
        *("utils_backbones", "utils_captions", "utils_copies", "utils_datasets", "utils_features"),
        *("utils_inputs", "utils_metrics", "utils_model_files", "utils_pickles"),
        *("utils_pixels", "utils_ranks", "utils_records", "utils_retrieval", "utils_task"),
        *("utils_sweeps", "utils_text_tower"),
    ),
    ("utils", "utils_signs", "utils_startup"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# Who may name a benchmark's or a method's module: what reads and writes i-CIR's own forms, rows
# with labels and the reference's pickles.
NAMED = {
    ("extraction.labelled", "benchmarks.icir"),
    ("extraction.reference", "benchmarks.icir"),
    ("utils_labels", "benchmarks.icir"),
    ("utils_storage", "benchmarks.icir"),
}
ARGPARSE = {"utils"}  # the parser of all commands

LARGE = {"data/tiny/render.py"}
LINES_OF_A_FILE = 700
LINES_OF_A_FUNCTION = {"median": 9, "p90": 25, "longest": 89}

HELP_SECONDS = 1.0  # of processor time; a third of it where nothing else runs


@cache
def modules() -> dict[str, Path]:
    """The modules of the product by name."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] != "tests" and not any(part.startswith(".") for part in parts):
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def walk(node: ast.AST, *, functions: bool = True):
    """The nodes below one, but those for type checkers and, if asked, those in functions."""
    for child in ast.iter_child_nodes(node):
        in_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if not is_for_types(child) and (functions or not in_function):
            yield child
            yield from walk(child, functions=functions)


def imports(name: str, *, functions: bool = True) -> set[str]:
    """The modules that a module imports, as dotted names, also as `from package import module`."""
    found = set()
    package = name if modules()[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in walk(tree(name), functions=functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, *([base] if base else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    parts = {one.rpartition(".")[0] for one in found} & modules().keys()  # packages run first
    return {one for one in found | parts if one in modules() or not own(one)}


def own(name: str) -> bool:
    """Whether a dotted name begins in the product."""
    return name.partition(".")[0] in {module.partition(".")[0] for module in modules()}


def room(name: str) -> str:
    return name.partition(".")[0]


def rooms_and_imports() -> list[tuple[str, str]]:
    """Every (module on a floor, module of the product that it imports)."""
    pairs = [(name, one) for name in modules() if room(name) in FLOOR for one in imports(name)]
    return [(name, one) for name, one in pairs if one in modules()]


def test_every_module_has_a_floor():
    top = {name for name, path in modules().items() if path.parent == ROOT}
    packages = {room(name) for name, path in modules().items() if path.name == "__init__.py"}
    assert top | packages <= set(FLOOR)


def test_imports_lead_downward():
    upward = [pair for pair in rooms_and_imports() if FLOOR[room(pair[0])] > FLOOR[room(pair[1])]]
    assert not upward


def test_benchmarks_and_methods_do_not_know_each_other():
    rooms = {(room(name), room(one)) for name, one in rooms_and_imports()}
    assert not rooms & {("benchmarks", "methods"), ("methods", "benchmarks")}
    assert not {pair for pair in rooms if pair[1] in COMMANDS and pair[0] not in COMMANDS}
    assert not {one for name, one in rooms if name == "utils_evaluation"} & {"benchmarks"}


def is_offered(name: str) -> bool:
    """Whether a module is a benchmark or a method, not a helper of theirs."""
    assigned = [node for node in tree(name).body if isinstance(node, ast.Assign)]
    names = {ast.unparse(target) for node in assigned for target in node.targets}
    return bool(names & {"BENCHMARK", "METHOD", "METHODS"})


def test_benchmarks_and_methods_are_found_by_folder_alone():
    offered = {name for name in modules() if room(name) in ("benchmarks", "methods")}
    offered = {name for name in offered if is_offered(name)}
    assert offered
    named = {pair for pair in rooms_and_imports() if pair[1] in offered}
    assert named <= NAMED


def test_there_is_no_circle():
    edges = {name: imports(name) & modules().keys() - {name} for name in modules()}
    for package in {name for name in modules() if modules()[name].name == "__init__.py"}:
        for name, targets in edges.items():  # a package's own files may name it by its parts alone
            if room(name) == package:
                targets.discard(package)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_benchmarks_and_methods_import_no_large_library_at_the_top():
    for name in modules():
        if room(name) in ("benchmarks", "methods"):
            top = {room(one) for one in imports(name, functions=False)}
            assert not top & {"torch", "PIL", "open_clip"}, name


def test_no_star_imports_and_no_fcntl():
    for name in modules():
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.ImportFrom):
                assert all(alias.name != "*" for alias in node.names), name
        assert "fcntl" not in imports(name), name


def test_no_argparse_below_the_commands():
    users = {name for name in modules() if room(name) in FLOOR and "argparse" in imports(name)}
    assert users <= {*COMMANDS, *ARGPARSE}


def test_no_file_is_long():
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in modules().values()
    }
    assert not {n: size for n, size in lengths.items() if size > LINES_OF_A_FILE}.keys() - LARGE


def test_functions_are_short():
    lengths = {}
    for name in modules():
        for node in ast.walk(tree(name)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lengths[f"{name}.{node.name}:{node.lineno}"] = node.end_lineno - node.lineno + 1
    sizes = sorted(lengths.values())
    assert statistics.median(sizes) <= LINES_OF_A_FUNCTION["median"]
    assert sizes[int(0.9 * len(sizes))] <= LINES_OF_A_FUNCTION["p90"]
    longest = max(lengths, key=lengths.get)
    assert lengths[longest] <= LINES_OF_A_FUNCTION["longest"], longest


# ---------------------------------------------------------------------------------------------
# What is imported when it runs
# ---------------------------------------------------------------------------------------------


def loaded(code: str) -> tuple[set[str], float]:
    """The large libraries that some code loads, and the processor time it took, in seconds."""
    large = ["torch", "PIL", "open_clip", "pandas", "matplotlib"]
    report = (
        "import json, os, sys\n"
        f"known = [name for name in {large} if name in sys.modules]\n"
        "print(json.dumps([known, sum(os.times()[:2])]), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"try:\n    {code}\nexcept SystemExit:\n    pass\n{report}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found, seconds = json.loads(done.stderr.splitlines()[-1])
    return set(found), seconds


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_at_once(command):
    code = f"import sys, {command}; {command}.main(['--help'])"
    runs = [loaded(code) for _ in range(3)]
    assert not {"torch", "PIL", "open_clip", "pandas"} & runs[0][0]
    assert min(seconds for _, seconds in runs) < HELP_SECONDS


def test_retrieval_loads_neither_pillow_nor_open_clip():
    found, _ = loaded("import torch, utils_evaluation, utils_storage, utils_tables, run_retrieval")
    assert "torch" in found
    assert not found & {"PIL", "open_clip"}


def test_benchmarks_and_methods_load_no_torch():
    code = (
        "from benchmarks import list_benchmarks; from methods import list_methods; "
        "import benchmarks.own; assert list_methods(); list_benchmarks()"
    )
    assert not loaded(code)[0] & {"torch", "PIL", "open_clip"}
