#!/usr/bin/env python3
"""The tables in the documentation that the code itself knows: flags, methods, benchmarks, ...

    python3 docs/flags.py            writes them anew (make docs)
    python3 docs/flags.py --check    names those that are out of date, and changes nothing

A table stands between two comments of README.md or docs/*.md, <!-- table: NAME --> and
<!-- end -->; NAME is one of TABLES, or `flags of PROGRAM`.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

# Run as a script, Python looks for modules in docs/; the others lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import benchmarks
from methods import MethodFlag, list_flags, list_methods
from utils import Parser, UserError, run_command
from utils_backbones import BACKBONES, DEFAULT_BACKBONE
from utils_metrics import MEASURES
from utils_runs import limits_of, show_value
from utils_summary import read_published

ROOT = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"(<!-- table: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
FLAGS_OF = "flags of "
COMMAND_WIDTH = 96
MOST_IN_FLAG = 4  # choices written behind the flag; more are listed in its meaning
VALUE_WORDS = {int: "N", float: "X", Path: "PATH"}


# ---------------------------------------------------------------------------------------------
# Markdown
# ---------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the cells are Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def code(text: str) -> str:
    """Text as code in a cell, nothing for nothing."""
    return f"`{text}`".replace("|", "\\|") if text else ""


def prose(text: str) -> str:
    """Help text as a cell: the flags it names are code, and nothing in it is HTML."""
    parts = text.replace("|", "\\|").split("`")
    for i, part in enumerate(parts[::2]):
        parts[2 * i] = re.sub(r"(?<![\w-])--[a-z]\w*", r"`\g<0>`", part.replace("<", "&lt;"))
    return "`".join(parts)


# ---------------------------------------------------------------------------------------------
# Flags of a program
# ---------------------------------------------------------------------------------------------


def parser_of(program: str) -> argparse.ArgumentParser:
    """What build_parser of a program makes. Raises UserError if there is no such program."""
    if not (ROOT / program).is_file():
        raise UserError(f"there is no program {program}")
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    return module.build_parser()


def flags_table(program: str) -> str:
    """The flags of a program by group, but those of methods' parameters."""
    rows = []
    for group in parser_of(program)._action_groups:
        actions = [action for action in group._group_actions if _is_shown(action)]
        if actions and group.title not in ("options", "positional arguments"):
            rows.append((f"**{group.title}**", "", ""))
        rows += [_flag_row(action) for action in actions]
    return table(("flag", "meaning", "default"), rows)


def _is_shown(action: argparse.Action) -> bool:
    return action.dest not in ("help", "version", *list_flags())


def _flag_row(action: argparse.Action) -> tuple[str, str, str]:
    text, default = re.fullmatch(r"(.*?)(?: \(default: (.*)\))?", action.help, re.DOTALL).groups()
    if default is None and action.required:
        default = "required"
    elif default is None and action.nargs == 0 and not _is_open(action):
        default = "off"
    choices = [str(choice) for choice in action.choices or ()]
    if len(choices) > MOST_IN_FLAG:
        text += ": " + ", ".join(map(code, choices))
    is_name = default and " " not in default and default not in ("on", "off", "required")
    return code(_spelling(action)), prose(text), code(default) if is_name else prose(default or "")


def _is_open(action: argparse.Action) -> bool:
    """Whether a switch that is not given is neither on nor off."""
    return isinstance(action, argparse.BooleanOptionalAction) and action.default is None


def _spelling(action: argparse.Action) -> str:
    """A flag with its value: --top_k N, --ties row|best|worst, --compare RUN_A RUN_B."""
    name = next(iter(action.option_strings), "")
    if action.nargs == 0:
        return name
    choices = [str(choice) for choice in action.choices or ()]
    if isinstance(action.metavar, tuple):
        value = " ".join(action.metavar)
    elif 0 < len(choices) <= MOST_IN_FLAG:
        value = "|".join(choices)
    else:
        last_word = action.dest.rpartition("_")[2].upper()
        value = action.metavar or VALUE_WORDS.get(action.type) or last_word
    more = " ..." if action.nargs in ("+", "*") else ""
    return f"{name} {value}{more}".strip()


# ---------------------------------------------------------------------------------------------
# Methods
# ---------------------------------------------------------------------------------------------


def methods_table() -> str:
    """Every method in a line."""
    rows = [(code(name), prose(method.summary)) for name, method in list_methods().items()]
    return table(("`--method`", "score"), rows)


def parameters_tables() -> str:
    """The flags of the methods: those that several read, then each method's own."""
    found = list_flags()
    shared = [name for name, flag in found.items() if len(flag.methods) > 1]
    parts = [_parameters("several methods", {name: found[name] for name in shared})]
    for method in list_methods():
        own = {name: flag for name, flag in found.items() if flag.methods == (method,)}
        if own:
            parts.append(_parameters(f"`{method}`", own))
    return "\n".join(parts)


def _parameters(title: str, flags: dict[str, MethodFlag]) -> str:
    header = ("flag", "meaning", "default", "value", "only with", "in a variant's name")
    return f"**{title}**\n\n" + table(header, [_parameter_row(n, f) for n, f in flags.items()])


def _parameter_row(name: str, shown: MethodFlag) -> tuple[str, ...]:
    is_switch = isinstance(shown.default, bool)
    default = ("on" if shown.default else "off") if is_switch else code(show_value(shown.default))
    values = [code(choice) for choice in shown.flag.choices]
    values += [words for _, words in limits_of(shown.flag)]
    who = f" ({', '.join(map(code, shown.methods))})" if len(shown.methods) > 1 else ""
    return (
        code(f"--{name}"),
        prose(shown.flag.help) + who,
        default,
        ", ".join(values),
        " or ".join(code(f"--{switch}") for switch in shown.flag.only_with),
        code(f"[no_]{shown.flag.word}" if is_switch else f"{shown.flag.word}VALUE"),
    )


def preset_commands() -> str:
    """What --use_preset stands for, as commands."""
    found = [method for method in list_methods().values() if method.preset or method.presets]
    blocks = []
    for method in found:
        lines = _wrapped(["python3 run_retrieval.py", f"--method {method.name}"], method.preset)
        for dataset, own in method.presets.items():
            lines += _wrapped([f"# on {dataset} also"], own)
        blocks.append("```bash\n" + "\n".join(lines) + "\n```\n")
    others = ", ".join(code(name) for name, method in list_methods().items() if method not in found)
    return "\n".join(blocks) + (f"\nNothing to preset: {others}.\n" if others else "")


def _wrapped(words: list[str], values: dict) -> list[str]:
    """A command with these parameters, in lines of bounded width."""
    words = words + [_given(name, value) for name, value in values.items()]
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) > COMMAND_WIDTH - 3:
            lines[-1] += " \\"
            lines.append(f"  {word}")
        else:
            lines[-1] += f" {word}"
    return lines


def _given(name: str, value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {show_value(value)}"


# ---------------------------------------------------------------------------------------------
# Benchmarks, measures, backbones
# ---------------------------------------------------------------------------------------------


def benchmarks_table() -> str:
    """The benchmarks by file: names of --dataset, what it is, how it is got."""
    rows = []
    for module in pkgutil.iter_modules(benchmarks.__path__):
        content = importlib.import_module(f"benchmarks.{module.name}")
        benchmark = getattr(content, "BENCHMARK", None)
        if benchmark:
            own = ["a folder of your own"] if benchmark.fits else []
            names = ", ".join([*map(code, benchmark.tasks), *own])
            rows.append((names, _first_sentence(content), prose(benchmark.how_to_get)))
    return table(("`--dataset`", "benchmark", "how to get it"), rows)


def measures_table() -> str:
    """The measures that a column of a table may have."""
    rows = [(code(name), _first_sentence(value)) for name, value in MEASURES.items()]
    return table(("measure", "value of a query"), rows)


def _first_sentence(documented: object) -> str:
    """The first paragraph of a docstring, without the name it begins with."""
    text = " ".join(inspect.getdoc(documented).split("\n\n")[0].split())
    return prose(re.sub(r"^(AP-[TS]|Hit@k|Recall@k|P@k): ", "", text))


def published_table() -> str:
    """The mAP published for CLIP ViT-L/14 that --table shows beside ours."""
    figures = [f for f in read_published() if (f.backbone, f.column) == (DEFAULT_BACKBONE, "mAP")]
    value = {(figure.variant, figure.dataset): figure.value for figure in figures}
    datasets = list(dict.fromkeys(figure.dataset for figure in figures))
    variants = dict.fromkeys(figure.variant for figure in figures)
    rows = [[code(name), *(value.get((name, d), "") for d in datasets)] for name in variants]
    return table(("variant", *map(code, datasets)), rows)


def zero_shot_table() -> str:
    """The figures of zero-shot systems that --table shows beside ours."""
    figures = [figure for figure in read_published() if figure.column != "mAP"]
    columns = sorted(dict.fromkeys((f.dataset, f.column) for f in figures), key=lambda at: at[0])
    value = {(f.variant, f.backbone, f.dataset, f.column): f.value for f in figures}
    runs = dict.fromkeys((f.variant, f.backbone) for f in figures)
    rows = [[code(v), code(b), *(value.get((v, b, *at), "") for at in columns)] for v, b in runs]
    return table(("method", "backbone", *(f"{code(d)} {c}" for d, c in columns)), rows)


def backbones_table() -> str:
    """The backbones with a name of their own."""
    rows = [
        (code(name), code(entry.model), code(entry.pretrained or ""))
        for name, entry in BACKBONES.items()
    ]
    return table(("`--backbone`", "open_clip model", "weights"), rows)


TABLES = {
    "methods": methods_table,
    "parameters": parameters_tables,
    "presets": preset_commands,
    "benchmarks": benchmarks_table,
    "measures": measures_table,
    "backbones": backbones_table,
    "published": published_table,
    "published zero-shot": zero_shot_table,
}


# ---------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------


def list_pages(root: Path = ROOT) -> list[Path]:
    """README.md and the pages in docs/."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def render(name: str) -> str:
    """A table by its name. Raises UserError if there is none of that name."""
    if name.startswith(FLAGS_OF):
        return flags_table(name.removeprefix(FLAGS_OF))
    if name not in TABLES:
        raise UserError(f"no table {name!r}: there are {', '.join(TABLES)}, {FLAGS_OF}PROGRAM")
    return TABLES[name]()


def filled(text: str) -> tuple[str, list[str]]:
    """A page with its tables as they have to be, and the names of those that were not."""
    outdated = []

    def fill(place: re.Match) -> str:
        start, name, old, end = place.groups()
        new = f"\n{render(name)}\n"
        if new != old:
            outdated.append(name)
        return f"{start}{new}{end}"

    return PLACE.sub(fill, text), outdated


def main(argv: list[str]) -> None:
    """Write the tables, or check them: UserError if one is out of date."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args(argv).check
    found = []
    for page in list_pages():
        text, outdated = filled(page.read_text(encoding="utf-8"))
        found += [f"{page.relative_to(ROOT)} ({name})" for name in outdated]
        if outdated and not check:
            page.write_text(text, encoding="utf-8")
    if check and found:
        raise UserError(f"out of date: {', '.join(found)}; run: make docs")
    print(f"written: {', '.join(found)}" if found else "all tables are up to date")


if __name__ == "__main__":
    run_command(main)
