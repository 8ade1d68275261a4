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
import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from extraction.flags import KINDS, Flag, list_flags
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
    Places,
    backbone_entry,
    backbone_folder,
    name_backbone,
    own_data,
    split_composed,
)
from utils_inputs import AskedTexts, Options
from utils_signs import doing

if TYPE_CHECKING:
    from composed import Options as SystemOptions
    from extraction.encoding import Clock
    from extraction.job import Job, Work

# What inputs may be told, and what is given for it.
OPTIONS = {"phi": "FILE", "captions": "DIR", "prompt": "TEXT"}


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The parser. A flag that was not given has the value None."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for title, flags in list_flags().items():
        group = parser.add_argument_group(title)
        for name, flag in flags.items():
            add_flag(group, name, help=flag.text, default=None, **flag.options)
    return parser


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
    flags = {name: flag for group in list_flags().values() for name, flag in group.items()}
    if not args.dataset:
        raise UserError("--dataset is missing: icir, tiny, corpus, mean, synthetic or a folder")
    args.kind = args.dataset if args.dataset in KINDS else "dataset"
    args.system = args.backbone and split_composed(args.backbone)
    _check_effects(args, flags)
    if args.format == "pkl" and args.save_dtype == "float16":
        raise UserError("--save_dtype float16: the reference's format (--format pkl) is float32")
    if args.kind in ("mean", "synthetic") and args.images is None:
        raise UserError(f"--dataset {args.kind} needs --images PATH, a folder tree or tar shards")
    if args.kind == "synthetic" and args.captions is None:
        raise UserError("--dataset synthetic needs --captions FILE, rows image_path,caption")
    for name, flag in flags.items():
        if getattr(args, name) is None:
            setattr(args, name, flag.default)
    args.backbone = name_backbone(args.backbone, args.preprocess)
    corpora_dir = own_data(Path(backbone_entry(args.backbone).corpora_dir))
    args.corpora_dir = args.corpora_dir or corpora_dir
    return args


def _check_effects(args: argparse.Namespace, flags: Mapping[str, Flag]) -> None:
    modes, where = {args.kind}, f"with --dataset {args.dataset}"
    if args.from_pkl:
        refuse_idle(["from_pkl"] if args.kind not in flags["format"].kinds else (), where)
        modes, where = {"from_pkl"}, "with --from_pkl"
    elif args.from_embeddings:
        refuse_idle(["from_embeddings"] if args.kind != "dataset" else (), where)
        modes, where = {"from_embeddings"}, "with --from_embeddings"
    elif args.system:
        _check_system(args)
        modes, where = {"dataset", "system"}, f"with --backbone {args.backbone}"
    elif args.inputs:
        modes |= {"inputs"} if args.kind == "dataset" else set()
    given = [name for name in flags if getattr(args, name) is not None]
    refuse_idle((name for name in given if modes.isdisjoint(flags[name].kinds)), where)
    if args.inputs:
        _check_options(args)


# What a system has no use for: it has no texts alone, and a preprocessing of its own.
NOT_OF_SYSTEMS = ("corpora_dir", "format", "inputs", "preprocess")


def _check_system(args: argparse.Namespace) -> None:
    """Raise UserError for what a system of composed/ cannot do, or does not take."""
    from composed import find_system

    where = f"with --backbone {args.backbone}"
    if args.kind != "dataset":
        raise UserError(f"--dataset {args.dataset} has no meaning {where}: it encodes data sets")
    refuse_idle((name for name in NOT_OF_SYSTEMS if getattr(args, name) is not None), where)
    system, _ = find_system(args.backbone)
    given = (name for name in list_flags()["systems with networks of their own"])
    given = {name for name in given if getattr(args, name) is not None}
    refuse_idle(sorted(given - {*system.takes}), where)


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
    if args.from_embeddings:
        with doing(f"reading {args.from_embeddings}"):
            take_embeddings(args)
    elif args.from_pkl:
        with doing(f"reading {args.from_pkl}"):
            convert(args)
    else:
        extract(args)


# ---------------------------------------------------------------------------------------------
# What the flags ask for
# ---------------------------------------------------------------------------------------------


def extract(args: argparse.Namespace) -> None:
    """Encode what the flags name, or say that it is there already."""
    from utils_ranks import find_ranks

    ranks = find_ranks(os.environ)
    if args.inputs and ranks.world > 1:
        raise UserError(f"--inputs {args.inputs} is the work of one process: leave torchrun")
    with doing("") if ranks.rank else contextlib.nullcontext():
        _extract(args)


def _extract(args: argparse.Namespace) -> None:
    with doing("loading PyTorch", at_once=True):
        from extraction.encoding import Settings
        from extraction.job import make_features
        from utils_ranks import joined_ranks

    with doing(f"reading {args.dataset}"):
        works = WORKS[args.kind](args)  # user errors first: loading a model takes seconds
    if args.system:
        works = _composed(args, works)
    if args.kind in ("dataset", "corpus"):
        for work in works:
            if args.overwrite or not any(work.folder.glob("*.json")):  # else it may be finished
                require_writable(args.features_dir, "--features_dir")
    settings = Settings(
        backbone=args.backbone,
        precision=args.precision,
        save_dtype=args.save_dtype,
        batch=args.batch,
        part_rows=args.part_rows,
        workers=_count_workers() if args.workers is None else args.workers,
        skip_bad=args.on_bad_image == "skip",
        overwrite=args.overwrite,
        patience=args.worker_timeout,
        system=_system_options(args) if args.system else None,
    )
    base = replace(settings, overwrite=settings.overwrite and not args.inputs)
    with joined_ranks(args.rank_timeout) as group:
        for job, clock in make_features(works, base, args.gpu, group):
            if clock:
                print_summary(job, clock)
        if args.format == "pkl" and group.ranks.rank == 0:
            with doing("writing the reference's files"):
                paths = [path for work in works for path in work.export()]
            print("the reference's files:", *paths)
        if args.inputs:
            inputs = [_input(args, works[-1])]
            for job, clock in make_features(inputs, settings, args.gpu, group):
                if clock:
                    print_summary(job, clock)


def _composed(args: argparse.Namespace, works: list[Work]) -> list[Work]:
    """The works, done by a system."""
    from composed import find_system
    from extraction.composed import of_system

    system, _ = find_system(args.backbone)
    return [of_system(work, system, args.prompt) for work in works]


def _system_options(args: argparse.Namespace) -> SystemOptions:
    from composed import Options as SystemOptions

    return SystemOptions(
        gallery_weights=args.gallery_weights,
        tokens=bool(args.tokens),
        seeds=tuple(args.seeds or (0,)),
        query_prompt=args.query_prompt,
        gallery_prompt=args.gallery_prompt,
        trust_remote_code=bool(args.trust_remote_code),
    )


def _input(args: argparse.Namespace, base: Work) -> Work:
    """The input of a method, of the features that are there."""
    from extraction.asked import AskedWork
    from extraction.inputs import InputWork
    from utils_labels import with_current_labels
    from utils_storage import load_features

    source = list_inputs()[args.inputs]
    features = load_features(args.features_dir, args.backbone, base.folder.name)
    features, news = with_current_labels(features, args.dataset, args.data_dir)
    if isinstance(source, AskedTexts):
        return AskedWork(source.method, features, Places(args.features_dir, args.data_dir))
    if news:
        raise UserError(
            f"--inputs {args.inputs}: the annotation has changed since the features were made, and "
            f"inputs are of their rows; first make them anew: python3 create_features.py --dataset "
            f"{args.dataset} --backbone {args.backbone} --overwrite"
        )
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


def take_embeddings(args: argparse.Namespace) -> None:
    """Take embeddings that somebody else has made as the features of a data set."""
    from extraction.embeddings import convert_embeddings

    folder = convert_embeddings(
        args.from_embeddings,
        args.dataset,
        args.data_dir,
        args.features_dir,
        args.backbone,
        args.save_dtype,
        args.overwrite,
    )
    print(f"the features of {args.dataset}: {folder}")


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
        pixels=args.pixels,
    )


def _corpora(args: argparse.Namespace) -> list[Work]:
    from extraction.assets import read_corpora

    return [read_corpora(args.corpora_dir, args.features_dir / backbone_folder(args.backbone))]


def _mean(args: argparse.Namespace) -> list[Work]:
    from extraction.assets import MeanWork, read_images
    from utils_assets import mean_path

    images = read_images(args.images, args.pixels or "viewed")
    return [MeanWork(images, mean_path(args.data_dir, args.backbone))]


def _synthetic(args: argparse.Namespace) -> list[Work]:
    from extraction.assets import read_synthetic
    from utils_assets import synthetic_path

    path = synthetic_path(args.path_to_synthetic_data, args.backbone)
    return [read_synthetic(args.images, args.captions, path, args.pixels or "viewed")]


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
