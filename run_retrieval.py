#!/usr/bin/env python3
"""Rank a data set's database for its composed queries, from features on disk to mAP tables.

The usual run: python3 run_retrieval.py --dataset icir --backbone clip --method basic --use_preset
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distractors.flags import FLAGS as DISTRACTOR_FLAGS
from distractors.flags import adding, asked_for
from external.flags import FLAGS as EXTERNAL_FLAGS
from external.flags import external_files
from methods import MethodFlag, list_flags, list_methods
from utils import (
    TIE_RULES,
    Parser,
    UserError,
    add_flag,
    last_part,
    refuse_idle,
    require_writable,
    run_command,
)
from utils_backbones import (
    DEFAULT_BACKBONE,
    PREPROCESSES,
    Places,
    backbone_folder,
    name_backbone,
)
from utils_plans import Output, Plan, make_plan
from utils_running import REPORT_TOP_K, page_writer, run_plan
from utils_runs import Protocol, Setting
from utils_startup import quick_exit

if TYPE_CHECKING:
    from distractors.running import Added

DEFAULT_METHOD = "basic"
USUAL_SYNTHETIC = "synthetic_data"  # a folder of that name is no departure


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The parser. A method's parameters appear in its result only if they were given."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_what(parser.add_argument_group("what to run"))
    _add_where(parser.add_argument_group("where things are"))
    flags = list_flags()
    shared = {name: flag for name, flag in flags.items() if len(flag.methods) > 1}
    groups = {"several methods": shared}
    for name, flag in flags.items():
        if name not in shared:
            groups.setdefault(flag.methods[0], {})[name] = flag
    for title, some in groups.items():
        group = parser.add_argument_group(f"parameters of {title}")
        for name, flag in some.items():
            _add_parameter(group, name, flag, name in shared)
    _add_output(parser.add_argument_group("output"))
    _add_several(parser.add_argument_group("several runs at once"))
    tables = {"results of other systems": EXTERNAL_FLAGS, "distractors": DISTRACTOR_FLAGS}
    for title, table in tables.items():
        group = parser.add_argument_group(title)
        for name, options in table.items():
            add_flag(group, name, **options)
    return parser


def _add_what(group: argparse._ArgumentGroup) -> None:
    add_flag(
        group,
        "dataset",
        nargs="+",
        default=["icir"],
        help="name or folder of the data set, or of several, one after the other (default: icir)",
    )
    add_flag(
        group,
        "backbone",
        default=DEFAULT_BACKBONE,
        help=f"whose features to read (default: {DEFAULT_BACKBONE})",
    )
    add_flag(
        group,
        "preprocess",
        choices=PREPROCESSES,
        help="the preprocessing that they were extracted with (default: model)",
    )
    add_flag(
        group,
        "method",
        choices=[*list_methods(), "all"],
        help="the method, or all whose inputs are there, on one load of the features (default: "
        f"{DEFAULT_METHOD})",
    )
    add_flag(
        group,
        "use_preset",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="start from the published settings of the method; flags given win (default: off)",
    )
    add_flag(
        group,
        "gallery",
        choices=("instance", "all"),
        default="instance",
        help="rank a query against its own gallery (of i-CIR: its instance's rows) or against all "
        "rows (default: instance)",
    )
    add_flag(
        group,
        "exclude_query_image",
        action="store_true",
        help="leave the gallery rows that show a query's own image out of its ranking",
    )
    add_flag(
        group,
        "metrics",
        nargs="+",
        default=(),
        metavar="NAME",
        help="further columns: AP-S, AP-T, mAP@K, Hit@K, Recall@K, P@K",
    )
    add_flag(group, "gpu", type=int, default=0, help="CUDA device, -1 for the CPU (default: 0)")


def _add_where(group: argparse._ArgumentGroup) -> None:
    folders = {
        "features_dir": "features of data sets and corpora",
        "data_dir": "data sets and image means",
        "results_dir": "where results go",
    }
    for name, text in folders.items():
        default = name.removesuffix("_dir")
        add_flag(group, name, type=Path, default=Path(default), help=f"{text} (default: {default})")
    add_flag(
        group,
        "path_to_synthetic_data",
        type=Path,
        help="folder of the normalisation features (default: the backbone's, ./synthetic_data)",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    add_flag(
        group,
        "ties",
        choices=TIE_RULES,
        help="equal scores rank in database order, or positives first / last (default: the data "
        "set's own rule, mostly row)",
    )
    add_flag(group, "top_k", type=int, default=0, help="also write the K best images of each query")
    add_flag(
        group,
        "export",
        choices=("trec", "ranx", "csv", "cirr", "circo"),
        help="also write the rankings as files of other evaluators, or of the servers of CIRR and "
        "CIRCO",
    )
    add_flag(
        group,
        "export_k",
        type=int,
        metavar="K",
        help="rows of each query that are exported (default: all of a gallery below 10,000 rows, "
        "else 1,000)",
    )
    add_flag(
        group,
        "report",
        action="store_true",
        help=f"also write a page of ranked images (top_k, else {REPORT_TOP_K}, per query)",
    )


def _add_several(group: argparse._ArgumentGroup) -> None:
    add_flag(
        group,
        "sweep",
        nargs="+",
        metavar="NAME=VALUES",
        help="grid over parameters: V1,V2,... or START:STOP:STEP, e.g. harris_lambda=0:0.2:0.05",
    )
    add_flag(
        group, "ablation", action="store_true", help="the table of basic's components, in one go"
    )
    add_flag(
        group,
        "compare",
        nargs=2,
        type=Path,
        metavar=("RUN_A", "RUN_B"),
        help="compare two result folders query by query; runs nothing",
    )
    add_flag(
        group,
        "check_submission",
        type=Path,
        metavar="FILE",
        help="check a file for the data set's evaluation server, and score it where there is "
        "ground truth; runs nothing",
    )
    add_flag(
        group,
        "table",
        action="store_true",
        help="gather the results there are into one table, beside the published figures; runs "
        "nothing",
    )


def _add_parameter(
    group: argparse._ArgumentGroup, name: str, flag: MethodFlag, is_shared: bool
) -> None:
    options = {"default": argparse.SUPPRESS}
    if isinstance(flag.default, bool):
        options |= {"action": argparse.BooleanOptionalAction}
        shown = "on" if flag.default else "off"
    else:
        options |= {"type": type(flag.default)}
        shown = flag.default if isinstance(flag.default, str) else f"{flag.default:g}"
    if flag.flag.choices:
        options |= {"choices": flag.flag.choices}
    who = f" ({', '.join(flag.methods)})" if is_shared else ""
    add_flag(group, name, help=f"{flag.flag.help}{who} (default: {shown})", **options)


def main(argv: list[str]) -> None:
    """Run the command. Raises UserError, before anything is written, for a user's mistake."""
    args = build_parser().parse_args(argv)
    args.backbone = name_backbone(args.backbone, args.preprocess)
    if args.table:
        _check_alone(argv, "--table", "--results_dir")
        _print_table(args.results_dir)
        return
    if args.compare:
        _check_alone(argv, "--compare")
        from report import compare_runs

        run_a, run_b = args.compare
        compare_runs(run_a, run_b, run_b / f"against_{run_a.resolve().name}")
        return
    if args.check_submission:
        _check_combination(args)
        _check_alone(argv, "--check_submission", "--dataset", "--data_dir")
        from benchmarks import read_task
        from utils_submissions import check_file

        (dataset,) = args.dataset
        print("\n".join(check_file(read_task(dataset, args.data_dir), args.check_submission)))
        return
    asked = asked_for(vars(args), not (args.sweep or args.ablation))
    with adding(asked, args.results_dir) as every:
        _run_all(args, every)


def _run_all(args: argparse.Namespace, every: Sequence[Added | None]) -> None:
    """Run each data set's plan, with each number of distractors where these are added."""
    plans = {
        (dataset, added): plan_of(args, dataset, added.words if added else ())
        for dataset in args.dataset
        for added in every
    }
    places = Places(args.features_dir, args.data_dir, args.path_to_synthetic_data)
    for plan in plans.values():
        for folder in plan.folders:
            require_writable(folder, "--results_dir")
        if len(args.dataset) > 1:
            _require_features(places, plan)
    for (dataset, added), plan in plans.items():
        page = page_writer(places, dataset, args.top_k) if args.report else None
        with plan.painter() as painter:
            output = Output(args.ties, args.top_k, page, painter, args.export, args.export_k)
            run_plan(plan, places, dataset, args.gpu, protocol_of(args), output, added)
    if len(every) > 1:
        from distractors.running import write_curves

        write_curves(plans)


def _require_features(places: Places, plan: Plan) -> None:
    """Raise UserError where a data set has no features: before another one is run."""
    folder = places.features / backbone_folder(plan.setting.backbone) / plan.setting.dataset
    if not folder.is_dir():
        raise UserError(
            f"{folder} holds no features; run: python3 create_features.py --dataset "
            f"{plan.setting.dataset} --backbone {plan.setting.backbone}"
        )


def _check_alone(argv: list[str], flag: str, *read: str) -> None:
    """Raise UserError for a flag beside this one and those that it reads.

    Also for one that restates a default.
    """
    given = {word.partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    others = given - {name.replace("-", "_") for name in (flag, *read)}
    refuse_idle(sorted(name.removeprefix("__") for name in others), f"with {flag}")


def _print_table(results: Path) -> None:
    """Print the table of the results there are, and write it beside them."""
    from utils_summary import read_latest, read_published, show_table, tabulate, write_table

    table = tabulate(read_latest(results), read_published())
    print(show_table(table))
    for path in write_table(results, table):
        print(f"written to {path}")


def plan_of(args: argparse.Namespace, dataset: str, words: tuple[str, ...] = ()) -> Plan:
    """What the flags ask for. words: what else the names of results say.

    Raises UserError for flags that contradict each other.
    """
    _check_combination(args)
    name = dataset_name(dataset, args.data_dir)
    synthetic = args.path_to_synthetic_data
    ties = (f"ties_{args.ties}",) if args.ties not in (None, "row") else ()
    setting = Setting(
        given={name: getattr(args, name) for name in list_flags() if hasattr(args, name)},
        use_preset=args.use_preset,
        dataset=name,
        backbone=args.backbone,
        words=(*protocol_of(args).words, *ties, *words),
        synthetic=_unusual(synthetic),
    )
    results = args.results_dir / name
    files = external_files(vars(args), setting.given)
    if files:
        from external.plan import ExternalPlan

        return ExternalPlan(results, setting, files)
    plan = make_plan(args.method or DEFAULT_METHOD, setting, results, args.sweep, args.ablation)
    plan.check()
    if synthetic and not any(run.method.needs([run.parameters]).synthetic for run in plan.runs):
        raise UserError(
            "--path_to_synthetic_data has no effect without --normalize_similarities: "
            "add it, or leave --path_to_synthetic_data"
        )
    return plan


def protocol_of(args: argparse.Namespace) -> Protocol:
    """What the flags change of the data set's own protocol."""
    return Protocol(args.gallery == "all", args.exclude_query_image, tuple(args.metrics))


def _unusual(synthetic: Path | None) -> str:
    """The name of a folder of normalisation features where it is not the usual one."""
    name = last_part(synthetic) if synthetic else USUAL_SYNTHETIC
    return "" if name == USUAL_SYNTHETIC else name


def _check_combination(args: argparse.Namespace) -> None:
    if args.top_k < 0:
        raise UserError(f"--top_k {args.top_k}: it has to be at least 1, or 0 for none")
    many = "--sweep" if args.sweep else "--ablation" if args.ablation else None
    if args.sweep and args.ablation:
        raise UserError("--sweep and --ablation exclude each other: run them one after the other")
    if many and args.method == "all":
        raise UserError(f"{many} needs one method: name it with --method")
    rankings = args.top_k or args.report or args.export
    if many and rankings:
        raise UserError(
            f"{many} writes one table: leave --top_k, --report and --export, or run a point alone"
        )
    if len(args.dataset) > 1 and (args.external or args.check_submission):
        raise UserError("the results of another system are of one data set: name it alone")
    if args.export_k is not None and (not args.export or args.export_k < 1):
        raise UserError("--export_k is the number of rows that --export writes: at least 1")
    if args.ties not in (None, "row") and rankings:
        raise UserError(f"--ties {args.ties} bounds the means; rankings need --ties row")


def dataset_name(dataset: str, data_dir: Path) -> str:
    """The name of a data set given by name or by path: its own, else the last part of the path.

    Raises UserError for a path that is no folder.
    """
    from benchmarks import NoDataset, find_dataset

    if not dataset or (os.sep in dataset and not os.path.isdir(dataset)):
        raise UserError(f"--dataset {dataset!r} is no folder; give the name or the folder")
    try:
        return find_dataset(dataset, data_dir).name
    except NoDataset:  # it need not be here: its features are enough
        return last_part(dataset)


if __name__ == "__main__":
    run_command(main)
    quick_exit()
