#!/usr/bin/env python3
"""Encode images and texts with a frozen vision-language model: images and texts -> features/.

The usual runs:
    python3 create_features.py --dataset icir --icir_source wds --backbone clip --batch 512 --gpu 0
    python3 create_features.py --dataset corpus --backbone clip
    torchrun --nproc_per_node 4 create_features.py --dataset icir --icir_source wds
    python3 create_features.py --dataset circo --inputs searle --phi SEARLE_ViT-L14.pt

A run that was killed continues when the same command is given again.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import list_benchmarks
from methods import list_inputs
from utils import (
    Parser,
    UserError,
    add_flag,
    refuse_idle,
    require_writable,
    run_command,
)
from utils_backbones import (
    PRECISIONS,
    PREPROCESSES,
    Places,
    backbone_entry,
    backbone_folder,
    name_backbone,
)
from utils_inputs import AskedTexts, Options

if TYPE_CHECKING:
    from extraction.encoding import Clock
    from extraction.job import Job, Work

# What --dataset stands for; any other value is a data set, by name or path.
KINDS = ("corpus", "mean", "synthetic")

# Where each flag has an effect: on which kinds of --dataset, and on --from_pkl.
ALL = ("dataset", "corpus", "mean", "synthetic")
EFFECTS = {
    "dataset": (*ALL, "from_pkl"),
    "backbone": (*ALL, "from_pkl"),
    "preprocess": ALL,
    "icir_source": ("dataset",),
    "batch": ALL,
    "part_rows": ALL,
    "gpu": ALL,
    "workers": ("dataset", "mean", "synthetic"),
    "precision": ALL,
    "save_dtype": ("dataset",),
    "format": ("dataset", "corpus"),
    "from_pkl": ("from_pkl",),
    "limit": ("dataset",),
    "overwrite": (*ALL, "from_pkl"),
    "on_bad_image": ("dataset", "mean", "synthetic"),
    "on_missing_image": ("dataset",),
    "images": ("mean", "synthetic"),
    "captions": ("synthetic", "inputs"),
    "inputs": ("dataset",),
    "phi": ("inputs",),
    "prompt": ("inputs",),
    "data_dir": ("dataset", "mean"),
    "features_dir": ("dataset", "corpus", "from_pkl"),
    "corpora_dir": ("dataset", "corpus"),
    "path_to_synthetic_data": ("synthetic",),
    "rank_timeout": ALL,
    "worker_timeout": ("dataset", "mean", "synthetic"),
}

# What inputs may be told, and what is given for it.
OPTIONS = {"phi": "FILE", "captions": "DIR", "prompt": "TEXT"}


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The parser. A flag that was not given has the value None, see DEFAULTS."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to encode")
    add_flag(
        what,
        "dataset",
        help=f"{', '.join(list_benchmarks())}; a folder of your own; corpus: every text corpus; "
        "mean: the mean of --images; synthetic: normalisation features of --images and --captions",
    )
    add_flag(
        what,
        "icir_source",
        choices=("folder", "wds"),
        help="images from folders or from tar shards (default: folder)",
    )
    add_flag(what, "backbone", help="clip, siglip, tiny or any open_clip model (default: clip)")
    add_flag(
        what,
        "preprocess",
        choices=PREPROCESSES,
        help="the model's own, or TargetPad before it: images wider or taller than 1.25 are padded "
        "with zeros to that ratio (SEARLE, CIReVL, CVSI); its features are those of another "
        "backbone, BACKBONE+targetpad (default: model)",
    )
    add_flag(what, "list_backbones", action="store_true", help="print the backbones and stop")
    add_flag(
        what,
        "limit",
        type=positive,
        metavar="N",
        help="only the first N rows of each split, as the data set NAME_firstN",
    )
    add_flag(what, "images", type=Path, help="mean, synthetic: a folder tree, or tar shards")
    add_flag(
        what,
        "captions",
        type=Path,
        help="synthetic: a CSV of rows image_path,caption, paths relative to --images; inputs: the "
        "folder of caption files",
    )
    add_flag(
        what,
        "from_pkl",
        type=Path,
        metavar="DIR",
        help="turn the reference's feature files under DIR into native ones; encodes nothing",
    )
    _add_inputs(parser.add_argument_group("what further methods read"))
    _add_how(parser.add_argument_group("how"))
    where = parser.add_argument_group("where things are")
    for name, text in {
        "data_dir": "data sets and image means (default: data)",
        "features_dir": "where features go (default: features)",
        "corpora_dir": "text corpora, one column, no header (default: the backbone's, corpora)",
        "path_to_synthetic_data": "where normalisation features go (default: the backbone's)",
    }.items():
        add_flag(where, name, type=Path, metavar="DIR", help=text)
    return parser


def _add_inputs(group: argparse._ArgumentGroup) -> None:
    add_flag(
        group,
        "inputs",
        choices=sorted(list_inputs()),
        help="features that a method reads beside those of images and texts, which are made before "
        "if they are not there",
    )
    add_flag(group, "phi", type=Path, metavar="FILE", help="checkpoint of an image-to-word network")
    add_flag(
        group, "prompt", metavar="TEXT", help="in place of the published one, e.g. 'a $ {caption}'"
    )


def _add_how(group: argparse._ArgumentGroup) -> None:
    for name, text in {
        "batch": "images or texts encoded at once (default: 512)",
        "part_rows": "images or texts between two savings of progress; of shards, it is a batch "
        "(default: 4096)",
    }.items():
        add_flag(group, name, type=positive, metavar="N", help=text)
    add_flag(group, "gpu", type=int, help="CUDA device, -1 for the CPU (default: 0)")
    add_flag(
        group,
        "workers",
        type=not_negative,
        metavar="N",
        help="processes that read and decode images (default: as many as there are cores)",
    )
    add_flag(group, "precision", choices=tuple(PRECISIONS), help="arithmetic (default: fp32)")
    add_flag(
        group,
        "save_dtype",
        choices=("float32", "float16"),
        help="type of the database features on disk (default: float32)",
    )
    add_flag(
        group,
        "format",
        choices=("npy", "pkl"),
        help="pkl: write the reference's pickles beside the native files (default: npy)",
    )
    add_flag(
        group,
        "on_bad_image",
        choices=("fail", "skip"),
        help="stop at an image that cannot be read, or leave its rows out (default: fail)",
    )
    add_flag(
        group,
        "on_missing_image",
        choices=("fail", "skip"),
        help="published data sets: stop, before anything is encoded, if image files are missing, "
        "or leave out their rows, which tables then say (default: fail, but with --on_bad_image "
        "skip)",
    )
    add_flag(
        group,
        "overwrite",
        action="store_true",
        default=None,
        help="start afresh, every time it is given: leave it to continue",
    )
    add_flag(
        group,
        "rank_timeout",
        type=positive,
        metavar="S",
        help="seconds of silence after which another rank counts as dead (default: 60; at the "
        "start, while models are loaded, five times as long)",
    )
    add_flag(
        group,
        "worker_timeout",
        type=positive,
        metavar="S",
        help="seconds without an image after which the workers count as stuck (default: 600)",
    )


DEFAULTS = {
    "backbone": "clip",
    "batch": 512,
    "part_rows": 4096,
    "gpu": 0,
    "precision": "fp32",
    "save_dtype": "float32",
    "format": "npy",
    "on_bad_image": "fail",
    "overwrite": False,
    "rank_timeout": 60,
    "worker_timeout": 600,
    "data_dir": Path("data"),
    "features_dir": Path("features"),
}


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def not_negative(text: str) -> int:
    """An integer of at least 0, for argparse."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return int(text)


def _count_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def read_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse and check the command line; flags that were not given get their defaults.

    Raises UserError for a flag that would have no effect.
    """
    args = build_parser().parse_args(argv)
    if args.list_backbones:
        return args
    if not args.dataset:
        raise UserError("--dataset is missing: icir, tiny, corpus, mean, synthetic or a folder")
    args.kind = args.dataset if args.dataset in KINDS else "dataset"
    _check_effects(args)
    if args.format == "pkl" and args.save_dtype == "float16":
        raise UserError("--save_dtype float16: the reference's format (--format pkl) is float32")
    if args.kind in ("mean", "synthetic") and args.images is None:
        raise UserError(f"--dataset {args.kind} needs --images PATH, a folder tree or tar shards")
    if args.kind == "synthetic" and args.captions is None:
        raise UserError("--dataset synthetic needs --captions FILE, rows image_path,caption")
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.backbone = name_backbone(args.backbone, args.preprocess)
    args.corpora_dir = args.corpora_dir or Path(backbone_entry(args.backbone).corpora_dir)
    return args


def _check_effects(args: argparse.Namespace) -> None:
    mode = "from_pkl" if args.from_pkl else args.kind
    if mode == "from_pkl" and args.kind not in EFFECTS["format"]:
        refuse_idle(["from_pkl"], f"with --dataset {args.kind}")
    with_what = "--from_pkl" if mode == "from_pkl" else f"--dataset {args.dataset}"
    modes = {mode, "inputs"} if args.inputs and mode == "dataset" else {mode}
    given = [name for name in EFFECTS if getattr(args, name) is not None]
    refuse_idle((name for name in given if not modes & {*EFFECTS[name]}), f"with {with_what}")
    if args.inputs:
        _check_options(args)


def _check_options(args: argparse.Namespace) -> None:
    """Raise UserError for an option that the input needs, or does not take."""
    source = list_inputs()[args.inputs]
    if isinstance(source, AskedTexts) and args.overwrite:
        refuse_idle(["overwrite"], f"with --inputs {args.inputs}, whose texts are kept for good")
    given = {name for name in OPTIONS if getattr(args, name) is not None}
    refuse_idle(sorted(given - {*source.needs, *source.takes}), f"with --inputs {args.inputs}")
    for name in source.needs:
        if name not in given:
            raise UserError(f"--inputs {args.inputs} needs --{name} {OPTIONS[name]}")


def main(argv: list[str]) -> None:
    """Run the command. Raises UserError, with nothing half-written, for a user's mistake."""
    args = read_arguments(argv)
    if args.list_backbones:
        from utils_features import list_backbones

        print("\n".join(list_backbones()))
        return
    if args.kind in EFFECTS["features_dir"]:
        require_writable(args.features_dir, "--features_dir")
    convert(args) if args.from_pkl else extract(args)


# ---------------------------------------------------------------------------------------------
# What the flags ask for
# ---------------------------------------------------------------------------------------------


def extract(args: argparse.Namespace) -> None:
    """Encode what the flags name, or say that it is there already."""
    from extraction.encoding import Settings
    from extraction.job import make_features
    from extraction.ranks import find_ranks

    works = WORKS[args.kind](args)  # user errors first: loading a model takes seconds
    settings = Settings(
        backbone=args.backbone,
        precision=args.precision,
        save_dtype=args.save_dtype,
        batch=args.batch,
        part_rows=args.part_rows,
        workers=_count_workers() if args.workers is None else args.workers,
        skip_bad=args.on_bad_image == "skip",
        overwrite=args.overwrite,
        timeout=args.rank_timeout,
        patience=args.worker_timeout,
    )
    base = replace(settings, overwrite=settings.overwrite and not args.inputs)
    for job, clock in make_features(works, base, args.gpu):
        if clock:
            print_summary(job, clock)
    if args.format == "pkl" and find_ranks(os.environ).rank == 0:
        print("the reference's files:", *(path for work in works for path in work.export()))
    if args.inputs:
        for job, clock in make_features([_input(args, works[-1])], settings, args.gpu):
            if clock:
                print_summary(job, clock)


def _input(args: argparse.Namespace, base: Work) -> Work:
    """The input of a method, of the features that are there."""
    from extraction.asked import AskedWork
    from extraction.inputs import InputWork
    from utils_storage import load_features

    source = list_inputs()[args.inputs]
    features = load_features(args.features_dir, args.backbone, base.folder.name)
    if isinstance(source, AskedTexts):
        return AskedWork(source.method, features, Places(args.features_dir, args.data_dir))
    options = Options(phi=args.phi, captions=args.captions, prompt=args.prompt)
    return InputWork(args.inputs, source, options, features, base)


def convert(args: argparse.Namespace) -> None:
    """Turn the reference's feature files into native ones."""
    from extraction.reference import convert_corpora, convert_dataset

    place = (args.from_pkl, args.features_dir, args.backbone)
    if args.kind == "corpus":
        convert_corpora(*place, args.overwrite)
    else:
        convert_dataset(*place, args.dataset, args.overwrite)


def _count_workers() -> int:
    return max(1, _count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _dataset(args: argparse.Namespace) -> list[Work]:
    from extraction.dataset import read_dataset

    return read_dataset(
        args.dataset,
        args.data_dir,
        args.icir_source,
        args.corpora_dir,
        args.limit,
        args.features_dir / backbone_folder(args.backbone),
        pickles=args.format == "pkl",
        missing=args.on_missing_image,
        skip_bad=args.on_bad_image == "skip",
    )


def _corpora(args: argparse.Namespace) -> list[Work]:
    from extraction.assets import read_corpora

    return [read_corpora(args.corpora_dir, args.features_dir / backbone_folder(args.backbone))]


def _mean(args: argparse.Namespace) -> list[Work]:
    from extraction.assets import MeanWork, read_images
    from utils_assets import mean_path

    return [MeanWork(read_images(args.images), mean_path(args.data_dir, args.backbone))]


def _synthetic(args: argparse.Namespace) -> list[Work]:
    from extraction.assets import read_synthetic
    from utils_assets import synthetic_path

    path = synthetic_path(args.path_to_synthetic_data, args.backbone)
    return [read_synthetic(args.images, args.captions, path)]


# How each kind of --dataset is read.
WORKS = {"dataset": _dataset, "corpus": _corpora, "mean": _mean, "synthetic": _synthetic}


def print_summary(job: Job, clock: Clock) -> None:
    """The closing line: what was made, how long it took, where the time went, where it lies."""
    seconds = time.monotonic() - clock.started
    shares = ", ".join(f"{name} {part / seconds:.0%}" for name, part in clock.seconds.items())
    speed = f"{clock.images / clock.image_seconds:.1f} images/s, " if clock.images else ""
    rows = ", ".join(f"{count} {name}" for name, count in clock.rows.items())
    print(f"{job.title}: {rows} rows in {seconds:.1f} s ({speed}{shares}): {job.outputs[-1]}")


def run() -> None:
    """The command. With MKL_CBWR, which MKL reads at its first product, matrix products on the CPU
    do not depend on the number of threads, which differs between one process and several.
    """
    os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
    run_command(main)


if __name__ == "__main__":
    run()
