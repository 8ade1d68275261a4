#!/usr/bin/env python3
"""Rank a data set's database for its composed queries, from features on disk to mAP tables.

The usual run: python3 run_retrieval.py --dataset icir --backbone clip --method basic --use_preset
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from utils import (
    MEANS,
    TIE_RULES,
    Parser,
    UserError,
    add_flag,
    code_version,
    last_part,
    quick_exit,
    quick_imports,
    require_writable,
    run_command,
    select_device,
    sha256_file,
)
from utils_retrieval import METHODS, Parameters
from utils_runs import (
    DEFAULTS,
    Run,
    ablation_points,
    check_effects,
    name_variant,
    parse_axis,
    settle_parameters,
    show_value,
    sweep_points,
)

if TYPE_CHECKING:
    from concurrent.futures import Executor

    import pandas as pd
    import torch

    from utils_evaluation import Evaluation
    from utils_retrieval import Assets
    from utils_storage import Features

REPORT_TOP_K = 10

PARAMETER_HELP = {
    "contextualize": "use the contextualised query texts (text, sum, product, basic)",
    "fusion_weight": "sum: (1 - w) image + w text",
    "standardize_features": "subtract the image mean and the text mean",
    "use_laion_mean": "take the backbone's stored image mean, not each database's own",
    "project_features": "project the query image on the contrastive PCA",
    "specified_corpus": "positive corpus: what to keep, and the text mean",
    "specified_ncorpus": "negative corpus: what to suppress",
    "aa": "alpha, weight of the negative corpus in the contrastive PCA, 0 to 1",
    "num_principal_components_for_projection": "components to keep; below 1, the share of energy",
    "do_query_expansion": "add the nearest database images to the query image",
    "qe_k": "images added by query expansion",
    "normalize_similarities": "rescale both similarities by the normalisation features",
    "normalize_text_by": "the minimum that divides the text similarity: image (as the published "
    "figures) or text (as the paper's text)",
    "harris_lambda": "lambda of the Harris fusion",
}


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The parser. A method's parameters appear in its result only if they were given."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to run")
    add_flag(what, "dataset", default="icir", help="name or folder of the data set (default: icir)")
    add_flag(what, "backbone", default="clip", help="whose features to read (default: clip)")
    add_flag(
        what,
        "method",
        default="basic",
        choices=[*METHODS, "all"],
        help="the method, or all of them on one load of the features (default: basic)",
    )
    add_flag(
        what,
        "use_preset",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="start from the published settings of the method; flags given win (default: off)",
    )
    add_flag(what, "gpu", type=int, default=0, help="CUDA device, -1 for the CPU (default: 0)")

    where = parser.add_argument_group("where things are")
    folders = {
        "features_dir": "features of data sets and corpora",
        "data_dir": "data sets and image means",
        "results_dir": "where results go",
    }
    for name, text in folders.items():
        default = name.removesuffix("_dir")
        add_flag(where, name, type=Path, default=Path(default), help=f"{text} (default: {default})")
    add_flag(
        where,
        "path_to_synthetic_data",
        type=Path,
        help="folder of the normalisation features (default: the backbone's, ./synthetic_data)",
    )

    parameters = parser.add_argument_group("parameters of the methods (basic, unless said)")
    for name, default in asdict(DEFAULTS).items():
        _add_parameter(parameters, name, default)

    output = parser.add_argument_group("output")
    add_flag(
        output,
        "ties",
        choices=TIE_RULES,
        default="row",
        help="equal scores rank in database order, or positives first / last (default: row)",
    )
    add_flag(
        output, "top_k", type=int, default=0, help="also write the K best images of each query"
    )
    add_flag(
        output,
        "report",
        action="store_true",
        help=f"also write a page of ranked images (top_k, else {REPORT_TOP_K}, per query)",
    )

    several = parser.add_argument_group("several runs at once")
    add_flag(
        several,
        "sweep",
        nargs="+",
        metavar="NAME=VALUES",
        help="grid over parameters: V1,V2,... or START:STOP:STEP, e.g. harris_lambda=0:0.2:0.05",
    )
    add_flag(
        several, "ablation", action="store_true", help="the table of basic's components, in one go"
    )
    add_flag(
        several,
        "compare",
        nargs=2,
        type=Path,
        metavar=("RUN_A", "RUN_B"),
        help="compare two result folders query by query; runs nothing",
    )
    return parser


def _add_parameter(group: argparse._ArgumentGroup, name: str, default: bool | float | str) -> None:
    options = {"default": argparse.SUPPRESS}
    if isinstance(default, bool):
        options |= {"action": argparse.BooleanOptionalAction}
        shown = "on" if default else "off"
    else:
        options |= {"type": type(default)}
        shown = default if isinstance(default, str) else f"{default:g}"
    if name == "normalize_text_by":
        options |= {"choices": ("image", "text")}
    add_flag(group, name, help=f"{PARAMETER_HELP[name]} (default: {shown})", **options)


def main(argv: list[str]) -> None:
    """Run the command. Raises UserError, before anything is written, for a user's mistake."""
    args = build_parser().parse_args(argv)
    if args.compare:
        _check_alone(args)
        from report import compare_runs

        compare_runs(*args.compare, _comparison_folder(*args.compare))
        return
    check_combination(args)
    runs, labels = plan_runs(args)
    for folder in written_folders(args, runs):
        require_writable(folder, "--results_dir")
    with _painter(bool(args.sweep) and _is_drawn(labels)) as painter:
        run_all(args, runs, labels, painter)


def _check_alone(args: argparse.Namespace) -> None:
    """Raise UserError for a flag beside --compare."""
    defaults = vars(build_parser().parse_args([]))
    for name, value in vars(args).items():
        if name != "compare" and (name not in defaults or value != defaults[name]):
            raise UserError(f"--{name} has no effect with --compare: leave it")


def _comparison_folder(run_a: Path, run_b: Path) -> Path:
    return run_b / f"against_{run_a.resolve().name}"


def given_parameters(args: argparse.Namespace) -> dict[str, bool | int | float | str]:
    """The parameters named on the command line."""
    names = [f.name for f in fields(Parameters)]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def check_combination(args: argparse.Namespace) -> None:
    """Raise UserError for flags that contradict each other."""
    if args.top_k < 0:
        raise UserError(f"--top_k {args.top_k}: it has to be at least 1, or 0 for none")
    many = "--sweep" if args.sweep else "--ablation" if args.ablation else None
    if args.sweep and args.ablation:
        raise UserError("--sweep and --ablation exclude each other: run them one after the other")
    if many and args.method == "all":
        raise UserError(f"{many} needs one method: name it with --method")
    if args.ablation and args.method != "basic":
        raise UserError(f"--ablation has no effect on --method {args.method}: only basic has steps")
    if many and (args.top_k or args.report):
        raise UserError(
            f"{many} writes one table: leave --top_k and --report, or run a point alone"
        )
    if args.ties != "row" and (args.top_k or args.report):
        raise UserError(f"--ties {args.ties} bounds the means; rankings need --ties row")


# ---------------------------------------------------------------------------------------------
# Planning
# ---------------------------------------------------------------------------------------------


def plan_runs(args: argparse.Namespace) -> tuple[list[Run], list[dict]]:
    """The runs that the flags ask for and, for each, the columns that tell it from the others."""
    given = given_parameters(args)
    if args.sweep:
        return _plan_sweep(args, given)
    methods = list(METHODS) if args.method == "all" else [args.method]
    runs = [_named(args, m, settle_parameters(m, given, args.use_preset)) for m in methods]
    check_effects(given, runs)
    _check_synthetic(args, runs)
    if args.ablation:
        points = ablation_points(runs[0].parameters)
        ablation = [_named(args, "basic", parameters) for _, parameters in points]
        return ablation, [{"components": label} for label, _ in points]
    return runs, [{} for _ in runs]


def _plan_sweep(args: argparse.Namespace, given: dict) -> tuple[list[Run], list[dict]]:
    axes = dict(parse_axis(text) for text in args.sweep)
    if len(axes) < len(args.sweep):
        raise UserError("--sweep names a parameter twice: give all its values at once")
    both = sorted(set(axes) & set(given))
    if both:
        raise UserError(f"--{both[0]} is swept and given: leave one of the two")
    points = sweep_points(args.method, given, args.use_preset, axes)
    runs = [_named(args, args.method, parameters) for _, parameters in points]
    check_effects(given, runs, swept=list(axes))
    _check_synthetic(args, runs)
    return runs, [at for at, _ in points]


def _named(args: argparse.Namespace, method: str, parameters: Parameters) -> Run:
    extra = [f"ties_{args.ties}"] if args.ties != "row" else []
    if args.path_to_synthetic_data and parameters.normalize_similarities:
        folder = args.path_to_synthetic_data.resolve().name
        extra += [f"synthetic-{folder}"] if folder != "synthetic_data" else []
    return Run(method, parameters, name_variant(method, parameters, *extra))


def _check_synthetic(args: argparse.Namespace, runs: list[Run]) -> None:
    used = any(run.parameters.normalize_similarities for run in runs)
    if args.path_to_synthetic_data and not used:
        raise UserError(
            "--path_to_synthetic_data has no effect without --normalize_similarities: "
            "add it, or leave --path_to_synthetic_data"
        )


def written_folders(args: argparse.Namespace, runs: list[Run]) -> list[Path]:
    """Where tables go: the data set's folder, then that of a sweep or ablation, else one a run."""
    folder = args.results_dir / dataset_name(args.dataset)
    if not args.sweep and not args.ablation:
        return [folder, *(folder / run.variant for run in runs)]
    base = settle_parameters(args.method, given_parameters(args), args.use_preset)
    kind = "sweep" if args.sweep else "ablation"
    return [folder, folder / f"{_named(args, args.method, base).variant}_{kind}"]


# ---------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------


def run_all(
    args: argparse.Namespace, runs: list[Run], labels: list[dict], painter: Executor | None
) -> None:
    """Load what the runs need, evaluate them in one pass, print and write their tables.

    painter: where to draw a sweep, None where there is nothing to draw.
    """
    with quick_imports():
        from concurrent.futures import ThreadPoolExecutor

        from tqdm import tqdm

        from utils_storage import is_native, load_features, manifest_hash

        # The tables are parsed while torch is imported, which pickles need first.
        with ThreadPoolExecutor(1) as reader:
            place = (args.features_dir, args.backbone, dataset_name(args.dataset))
            loading = reader.submit(load_features, *place) if is_native(*place) else None
            import torch

            from utils_evaluation import evaluate

    features = loading.result() if loading else load_features(*place)
    check_folder(args.dataset, features)
    check_context(features, runs)
    device = select_device(args.gpu)
    wanted = runs + _ends(args, runs, labels)
    distinct = list(dict.fromkeys(wanted))
    try:
        evaluated = evaluate(
            features,
            distinct,
            load_assets(args, features, [run.parameters for run in runs], device),
            device,
            ties=args.ties,
            top_k=args.top_k or (REPORT_TOP_K if args.report else 0),
            progress=lambda blocks, count: tqdm(
                blocks, total=count, unit="instance", disable=None, leave=False
            ),
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory does not hold the work ({str(error).splitlines()[0]}); sweep fewer "
            "values at a time, or use the CPU with --gpu -1"
        ) from error
    found = dict(zip(distinct, evaluated, strict=True))
    evaluations = [found[run] for run in wanted]
    facts = {
        "dataset": features.dataset,
        "ties": args.ties,
        "features": manifest_hash(features),
        "version": code_version() or "unknown",
    }
    folder, own, *_ = written_folders(args, runs)
    if args.sweep:
        write_sweep(own, evaluations, labels, facts, painter)
    elif args.ablation:
        write_ablation(own, evaluations, labels, facts)
    else:
        write_runs(args, folder, features, evaluations, facts)


def dataset_name(dataset: str) -> str:
    """The name of a data set given by name or by path: the last part of the path.

    Raises UserError for a path that is no folder.
    """
    if not dataset or (os.sep in dataset and not os.path.isdir(dataset)):
        raise UserError(f"--dataset {dataset!r} is no folder; give the name or the folder")
    return last_part(dataset)


def check_folder(dataset: str, features: Features) -> None:
    """Raise UserError if a data set is given by its folder, and the features are of another."""
    sources = (features.manifest or {}).get("sources") or {}
    for name, digest in sources.items() if os.sep in dataset else ():
        places = (Path(dataset, name), Path(dataset, "annotations", name))
        found = [path for path in places if path.is_file()]
        if found and digest not in map(sha256_file, found):
            raise UserError(
                f"{features.source} is of another {name} than {found[0]}; extract the features of "
                "this folder, or name another --features_dir"
            )


def check_context(features: Features, runs: list[Run]) -> None:
    """Raise UserError if a run wants contextualised texts that the features do not have."""
    wanted = any(run.parameters.contextualize for run in runs)
    if wanted and features.query_context_text is None:
        raise UserError(
            f"{features.source.parent} has no contextualised query texts: extract them with "
            f"python3 create_features.py --dataset {features.dataset} --backbone "
            f"{features.backbone} --overwrite, or add --no-contextualize"
        )


def load_assets(
    args: argparse.Namespace,
    features: Features,
    points: list[Parameters],
    device: torch.device,
) -> Assets:
    """Corpora, image mean and normalisation features, as far as the points use them, on the device.

    Raises UserError if one is missing, holds a row that cannot be used, or was made by another
    model than the features.
    """
    import numpy as np
    import torch

    from utils_evaluation import unit_features
    from utils_retrieval import Assets
    from utils_storage import check_same_model, load_corpus, load_mean, load_synthetic

    projecting = [p for p in points if p.project_features]
    projected = {n for p in projecting for n in (p.specified_corpus, p.specified_ncorpus)}
    corpora = projected | {p.specified_corpus for p in points if p.standardize_features}
    loaded = {
        name: load_corpus(args.features_dir, features.backbone, name) for name in sorted(corpora)
    }
    mean = synthetic = None
    if any(p.use_laion_mean for p in points):
        mean = load_mean(args.data_dir, features.backbone)
    if any(p.normalize_similarities for p in points):
        synthetic = load_synthetic(args.path_to_synthetic_data, features.backbone)
    check_same_model(features, [a for a in (*loaded.values(), mean, synthetic) if a])

    for name in sorted(projected):
        if len(loaded[name].arrays["feats"]) < 2:
            raise UserError(f"{loaded[name].source}: one prompt; the projection needs two or more")
    if mean and not np.isfinite(mean.arrays["mean"]).all():
        raise UserError(f"{mean.source}: the mean is not finite; make it again")

    def rows(asset, name: str) -> torch.Tensor:
        return unit_features(asset.arrays[name], device, f"{asset.source}, {name}")

    return Assets(
        corpora={name: rows(asset, "feats") for name, asset in loaded.items()},
        image_mean=mean and torch.from_numpy(mean.arrays["mean"]).to(device)[0],
        synthetic_images=synthetic and rows(synthetic, "image_features"),
        synthetic_texts=synthetic and rows(synthetic, "text_features"),
    )


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def write_runs(
    args: argparse.Namespace,
    folder: Path,
    features: Features,
    evaluations: list[Evaluation],
    facts: dict,
) -> None:
    """Write each run's folder, for several runs their comparison, and the report if asked for."""
    from utils_storage import read_database_table
    from utils_tables import (
        CONSOLE_COLUMNS,
        describe_empty,
        describe_ties,
        format_table,
        result_row,
        write_results,
        write_table,
    )

    rows = [result_row(evaluation, facts) for evaluation in evaluations]
    needs_paths = args.top_k or args.report
    database = read_database_table(features) if needs_paths else None
    for evaluation, row in zip(evaluations, rows, strict=True):
        own = folder / evaluation.variant
        write_results(own, evaluation, row, features.queries, database, args.top_k)
    if args.method == "all":
        write_table(folder / "mAP_table.csv", rows)
        shutil.rmtree(folder / "report", ignore_errors=True)
    print(format_table(rows, CONSOLE_COLUMNS))
    _warn([*describe_empty(evaluations[0]), *describe_ties(evaluations, args.ties)])
    print(f"written to {folder if len(rows) > 1 else folder / evaluations[0].variant}")
    if args.report:
        print(write_page(args, folder, features, evaluations, database))


def _warn(lines: list[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)


def write_page(
    args: argparse.Namespace,
    folder: Path,
    features: Features,
    evaluations: list[Evaluation],
    database: pd.DataFrame,
) -> Path:
    """Write the page with the ranked images and return its path."""
    from report import write_report
    from utils_datasets import find_images

    own = folder if len(evaluations) > 1 else folder / evaluations[0].variant
    return write_report(
        own / "report",
        evaluations,
        features.queries,
        database,
        find_images(args.dataset, args.data_dir),
        features.dataset,
        args.top_k or REPORT_TOP_K,
        cache=folder / "thumbnails",
    )


def write_ablation(
    folder: Path, evaluations: list[Evaluation], labels: list[dict], facts: dict
) -> None:
    """Write mAP_table.csv into the folder, results/{dataset}/{variant}_ablation, and print it."""
    from utils_tables import describe_empty, format_table, result_row, write_table

    rows = [
        {**label, **result_row(evaluation, facts)}
        for label, evaluation in zip(labels, evaluations, strict=True)
    ]
    table = folder / "mAP_table.csv"
    write_table(table, rows)
    print(format_table(rows, ["components", *MEANS]))
    _warn(describe_empty(evaluations[0]))
    print(f"written to {table}")


def _ends(args: argparse.Namespace, runs: list[Run], labels: list[dict]) -> list[Run]:
    """The uni-modal runs that a sweep of fusion_weight is compared with."""
    if not args.sweep or "fusion_weight" not in labels[0]:
        return []
    texts = dict.fromkeys(
        replace(DEFAULTS, contextualize=run.parameters.contextualize) for run in runs
    )
    return [_named(args, "image", DEFAULTS), *(_named(args, "text", text) for text in texts)]


def write_sweep(
    folder: Path,
    evaluations: list[Evaluation],
    labels: list[dict],
    facts: dict,
    painter: Executor | None,
) -> None:
    """Write results/{dataset}/{variant}_sweep: a row a point, and a plot over one or two axes."""
    from utils_tables import describe_empty, format_table, result_row, write_table

    points, ends = evaluations[: len(labels)], evaluations[len(labels) :]
    axes = list(labels[0])
    rows = [
        {**result_row(evaluation, facts), **{name: show_value(at) for name, at in label.items()}}
        for evaluation, label in zip(points, labels, strict=True)
    ]
    means = [evaluation.means()["mAP"] for evaluation in points]
    end_means = {evaluation.variant: evaluation.means()["mAP"] for evaluation in ends}
    for old in (*folder.glob("*.png"), *folder.glob("*.svg")):
        old.unlink()
    write_table(folder / "mAP_table.csv", rows)
    drawing = painter and painter.submit(_draw, folder / "_".join(axes), labels, means, end_means)
    best = max(range(len(rows)), key=means.__getitem__)
    print(format_table(rows, [*axes, *MEANS]))
    _warn(describe_empty(evaluations[0]))
    print(f"best: {_values(labels[best])} with mAP {rows[best]['mAP']}")
    if ends:
        print(
            "composition gain: "
            f"{means[best] - max(end_means.values()):+.2f} mAP over the better of "
            + ", ".join(f"{name} {value:.2f}" for name, value in end_means.items())
        )
    print(f"written to {folder / 'mAP_table.csv'}")
    for path in drawing.result() if drawing else []:
        print(f"written to {path}")


@contextlib.contextmanager
def _painter(wanted: bool) -> Iterator[Executor | None]:
    """A process that draws: it imports matplotlib while this one imports torch and evaluates."""
    if not wanted:
        yield None
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as painter:
        painter.submit(_prepare_to_draw)
        yield painter


def _prepare_to_draw() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits for it says so
    with quick_imports():
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401

        import report.plots  # noqa: F401


def _is_drawn(labels: list[dict]) -> bool:
    """Whether a sweep has one or two axes, of numbers only."""
    is_switch = any(isinstance(value, bool) for value in labels[0].values())
    return len(labels[0]) <= 2 and not is_switch


def _draw(
    path_stem: Path, labels: list[dict], means: list[float], ends: dict[str, float]
) -> list[Path]:
    import pandas as pd

    from report import plot_sweep

    return plot_sweep(
        path_stem, pd.DataFrame(labels).assign(mAP=means), list(labels[0]), ends or None
    )


def _values(label: dict) -> str:
    return ", ".join(f"{name} {show_value(value)}" for name, value in label.items())


if __name__ == "__main__":
    run_command(main)
    quick_exit()
