"""README and docs/ say what the programs do: tables, commands, links, counts, examples."""

import ast
import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from extraction_world import draw_image
from report_world import make_world

from benchmarks import Benchmark, own
from utils import UserError
from utils_retrieval import Method, unit_rows
from utils_summary import read_published

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

import flags

ROOT = Path(__file__).parents[1]
PAGES = flags.list_pages()
PROGRAMS = (
    *("create_captions.py", "create_features.py", "run_retrieval.py", "search.py"),
    "data/download.py",
)
EXAMPLES = {"geometric", "shoes"}  # of extend.md: what they are called, no parser knows
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
README_BYTES = 11_000  # one page

every_page = pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "data/tiny/README.md"], ids=lambda page: page.name
)


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return [content for own, content in FENCE.findall(text_of(page)) if own == language]


def commands(page: Path, program: str) -> list[list[str]]:
    """The words behind the program, of every command of the page's bash blocks that runs it."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    found = []
    for words in (shlex.split(line, comments=True) for line in lines if program in line):
        if program in words:
            words = words[words.index(program) + 1 :]
            found.append(words[: words.index("&&")] if "&&" in words else words)
    return found


# --- tables ------------------------------------------------------------------------------------


@every_page
def test_the_tables_are_those_of_the_code(page):
    """If this fails: make docs."""
    assert flags.filled(text_of(page))[1] == []


def test_a_table_that_is_out_of_date_is_named_and_written_anew():
    page = text_of(ROOT / "docs/methods.md")
    row = next(line for line in page.splitlines() if line.startswith("| `--aa` "))
    assert flags.filled(page.replace(f"{row}\n", "")) == (page, ["parameters"])
    with pytest.raises(UserError, match="no table 'flag'"):
        flags.filled("<!-- table: flag -->\n<!-- end -->")


def test_the_check_is_a_command():
    command = [sys.executable, "docs/flags.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "all tables are up to date\n"), done.stderr


def test_every_program_and_every_flag_has_its_table():
    """No flag of a parser is in none of the tables, and no program without them."""
    sources = [*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py")]
    programs = [path for path in sources if "def build_parser(" in path.read_text("utf-8")]
    assert {path.relative_to(ROOT).as_posix() for path in programs} >= {*PROGRAMS}
    everything = "".join(map(text_of, PAGES))
    for program in (path.relative_to(ROOT).as_posix() for path in programs):
        assert f"<!-- table: {flags.FLAGS_OF}{program} -->" in everything
        for action in flags.parser_of(program)._actions:
            for name in {*action.option_strings[:1]} - {"-h", "--version"}:
                assert re.search(rf"^\| `{name}[ `]", everything, re.MULTILINE), name


# --- commands ----------------------------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS)
def test_commands_are_understood(program):
    """Every flag of the commands exists, and takes what it is given."""
    parser, count = flags.parser_of(program), 0
    for page in (*PAGES, ROOT / "data/tiny/README.md"):
        for words in commands(page, program):
            count += 1
            if EXAMPLES.isdisjoint(words):
                parser.parse_args(words)
    assert count >= 3


@every_page
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z]+)", text_of(page), re.MULTILINE)) <= targets


# --- links -------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page):
    """Files that are linked to exist, and so do the sections of pages."""
    for link in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", text_of(page))):
        name, _, anchor = link.partition("#")
        if ":" in name:
            continue
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_rooms_that_the_design_names_exist():
    rooms = text_of(ROOT / "docs/DESIGN.md").split("## 1. Rooms")[1].split("## 2.")[0]
    rows = re.findall(r"^\| (`.*?) \|", rooms, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(.+?)`", row)]
    assert len(names) > 15
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("kind", [Benchmark, Method])
def test_the_design_names_what_a_file_may_declare(kind):
    design = text_of(ROOT / "docs/DESIGN.md")
    (signature,) = re.findall(rf"```\n{kind.__name__}\((.*?)\)\n```", design, re.DOTALL)
    assert signature.replace(",", " ").split() == [field.name for field in fields(kind)]


def test_the_readme_links_to_every_page():
    """A new page in docs/ has a line in README's list."""
    linked = re.findall(r"^\| \[[\w.]+\]\((docs/.+?)\) \|", text_of(PAGES[0]), re.MULTILINE)
    assert {page.relative_to(ROOT).as_posix() for page in PAGES[1:]} == {*linked}


def test_the_readme_is_one_page():
    assert len(text_of(ROOT / "README.md").encode()) < README_BYTES


def test_sections_that_docstrings_cite_exist():
    sections = anchors(ROOT / "docs/DESIGN.md")
    cited = set()
    sources = [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    for source in (path.read_text("utf-8") for path in sources if path != Path(__file__)):
        cited |= {f"{number}-" for number in re.findall(r"DESIGN(?:\.md)? section (\d+)", source)}
        cited |= {name.lower().replace(" ", "-") for name in re.findall(r'DESIGN, "(.+?)"', source)}
    assert len(cited) > 3
    assert [c for c in cited if not any(section.startswith(c) for section in sections)] == []


# --- counts ------------------------------------------------------------------------------------


def test_sizes_of_the_corpora_are_right():
    for number, what in (("generic_subjects", "objects"), ("generic_styles", "styles")):
        rows = (ROOT / "corpora" / f"{number}.csv").read_text(encoding="utf-8").count("\n")
        assert f"{rows:,} {what}" in text_of(ROOT / "docs/data.md")


def test_the_results_in_the_readme_are_the_published_ones():
    at = {figure.variant: figure.value for figure in read_published() if figure.dataset == "icir"}
    names = ("text", "image", "sum", "product", "basic", "basic_no_query_expansion")
    rows = re.findall(r"^\| .* \| `--method .*` \| ([\d.]+) \|$", text_of(PAGES[0]), re.MULTILINE)
    assert rows == [at[name] for name in names]


def test_the_number_of_recorded_figures_is_right():
    worlds = [ROOT / f"tests/golden/{world}/golden.json" for world in ("clip", "siglip")]
    golden = [json.loads(path.read_text(encoding="utf-8")) for path in worlds]
    count = sum(len(entry["queries"]) for own in golden for entry in own.values())
    (sets,) = {len(own) for own in golden}
    for page in ("docs/DESIGN.md", "docs/reproduce.md"):
        assert f"{sets} flag sets ({count:,} APs" in " ".join(text_of(ROOT / page).split())


# --- the examples of extend.md, as they stand --------------------------------------------------


def example(path: str) -> str:
    """The code of extend.md that stands under a file's name."""
    page = text_of(ROOT / "docs/extend.md")
    return re.search(rf"\*\*`{re.escape(path)}`\*\*\n\n```python\n(.*?)```", page, re.DOTALL)[1]


EXAMPLE_FILES = ("methods/geometric.py", "benchmarks/shoes.py")


def test_the_examples_are_as_short_as_they_say():
    method, benchmark = (len(example(path).splitlines()) for path in EXAMPLE_FILES)
    assert (method < 30, benchmark < 50) == (True, True)
    for path in EXAMPLE_FILES:
        tops = [node for node in ast.parse(example(path)).body if isinstance(node, ast.Import)]
        assert {alias.name for node in tops for alias in node.names} <= {"numpy"}


@pytest.fixture(scope="module")
def product(tmp_path_factory) -> Path:
    """A copy of the toolkit that the two examples have been added to, and nothing else."""
    folder = tmp_path_factory.mktemp("product")
    for path in ROOT.iterdir():
        if path.suffix == ".py":
            shutil.copy(path, folder)
        elif (path / "__init__.py").exists():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, folder / path.name, ignore=ignored)
    for path in EXAMPLE_FILES:
        (folder / path).write_text(example(path), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A data set with features."""
    return make_world(tmp_path_factory.mktemp("world"))


def run(product: Path, *arguments: str, program: str = "run_retrieval.py") -> str:
    done = subprocess.run(
        [sys.executable, str(product / program), *arguments],
        cwd=product,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_example_of_a_method_is_in_help_and_table(product, world):
    assert "--text_share" in run(product, "--help")
    output = run(product, *world.flags(), "--method", "all")
    results = world.folder / "results/world"
    at = {row["method"]: row for row in read(results / "all/mAP_table.csv")}
    assert {"geometric", "image", "text", "sum", "product", "basic"} <= {*at}
    assert at["geometric"]["text_share"] == "0.5"
    assert at["geometric"]["mAP"] in output
    # At equal weights it is the square root of product, and ranks like it.
    assert at["geometric"]["mAP"] == at["product"]["mAP"] != at["image"]["mAP"]


def test_the_example_of_a_method_is_swept(product, world):
    run(product, *world.flags(), "--method", "geometric", "--sweep", "text_share=0:1:0.5")
    folder = world.folder / "results/world/geometric_sweep"
    rows = read(folder / "mAP_table.csv")
    assert [row["text_share"] for row in rows] == ["0", "0.5", "1"]
    assert len({row["mAP"] for row in rows}) == 3
    assert [row["variant"] for row in rows][::2] == ["geometric_share0", "geometric_share1"]
    assert (folder / "text_share.png").exists()


SHOES = [
    {"reference": "images/0.jpg", "caption": "in red", "targets": ["images/1.jpg"], "kind": "a"},
    {"reference": "images/2.jpg", "caption": "in blue", "targets": ["images/3.jpg"], "kind": "b"},
    {"reference": "images/2.jpg", "caption": "old", "targets": ["images/4.jpg"], "kind": "b"},
]


@pytest.fixture
def shoes(tmp_path):
    """The folder of the made-up data set."""
    root = tmp_path / "data/shoes"
    root.mkdir(parents=True)
    (root / "queries.json").write_text(json.dumps(SHOES))
    (root / "gallery.json").write_text(json.dumps([f"images/{i}.jpg" for i in range(6)]))
    return root


def read_shoes(root: Path):
    names = {}
    exec(example("benchmarks/shoes.py"), names)
    return names["BENCHMARK"].tasks["shoes"](root)


def test_the_example_of_a_benchmark_reads_and_refuses(shoes):
    task = read_shoes(shoes)
    assert [task.rows_of(task.views["all"].positives, i).tolist() for i in range(3)] == [
        *([1], [3], [4])
    ]
    wrong = [SHOES[0], SHOES[1] | {"targets": ["images/9.jpg"]}]
    (shoes / "queries.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError, match=r"queries.json, entry 2: 'targets' names 'images/9.jpg'"):
        read_shoes(shoes)


def test_the_example_of_a_benchmark_goes_from_images_to_a_table(product, shoes, small_clip):
    (shoes / "images").mkdir()
    for number, seed in enumerate((0, 0, 2, 2, 4, 5)):  # two targets look as their reference does
        draw_image(seed).save(shoes / f"images/{number}.jpg")
    folder = shoes.parents[1]
    where = ["--data_dir", str(shoes.parent), "--features_dir", str(folder / "features")]
    same = [*where, "--dataset", "shoes", "--backbone", f"local-dir:{small_clip}", "--gpu", "-1"]
    corpora = ["--corpora_dir", str(ROOT / "data/tiny/corpora")]
    run(product, *same, *corpora, "--workers", "0", program="create_features.py")
    output = run(product, *same, "--method", "image", "--results_dir", str(folder / "results"))
    ((table,), (query,), (gallery,)) = (
        [*folder.glob(pattern)]
        for pattern in (
            "results/shoes/image_*/mAP_table.csv",
            *(f"features/*/shoes/{name}.csv" for name in ("query", "database")),
        )
    )
    (row,) = read(table)
    figures = [row[name] for name in ("mAP@10", "R@1", "R@1 by kind")]
    assert all(figure in output for figure in figures)

    features = unit_rows(torch.from_numpy(np.load(gallery.with_name("database_image.npy"))))
    shown = [int(line["image_row"]) for line in read(query)]  # query images are gallery rows here
    assert shown == [0, 2, 2]
    scores = features[shown] @ features.T
    scores[range(3), shown] = -2  # the reference is left out
    rank = (scores > scores[range(3), [1, 3, 4]][:, None]).sum(1)
    assert (rank == 0).tolist() == [True, True, False]
    precise = (1 / (rank + 1)).mean().item()
    assert figures == [f"{100 * precise:.2f}", "66.67", "75.00"]


def test_the_readme_s_own_data_set_is_read(tmp_path):
    block = next(b for b in blocks(PAGES[0], "bash") if "queries.jsonl" in b)
    lines = re.search(r"JSONL'\n(.*?)JSONL", block, re.DOTALL)[1]
    (tmp_path / "queries.jsonl").write_text(lines, encoding="utf-8")
    names = re.search(r"put images there: (.*)", block)[1].split()
    for number, name in enumerate(names):
        draw_image(number).save(tmp_path / name)
    task = own.read(tmp_path)
    assert (list(task.queries.images), sorted(task.gallery.path)) == (
        [("red.jpg",)] * 2,
        sorted(names),
    )
