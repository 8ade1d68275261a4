#!/usr/bin/env python3
"""Encode images and texts with a frozen vision-language model: images and texts -> features/.

The usual runs:
    python3 create_features.py --dataset icir --icir_source wds --backbone clip --batch 512 --gpu 0
    python3 create_features.py --dataset corpus --backbone clip
    torchrun --nproc_per_node 4 create_features.py --dataset icir --icir_source wds

A run that was killed continues when the same command is given again.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from utils import (
    Parser,
    UserError,
    add_flag,
    code_version,
    last_part,
    read_json,
    require_writable,
    run_command,
    select_device,
    sha256_file,
)
from utils_backbones import BACKBONES, Backbone, backbone_folder
from utils_datasets import (
    COLUMNS,
    IMAGE_SUFFIXES,
    SPLITS,
    Annotation,
    Dataset,
    find_dataset,
    find_image,
    list_shards,
    read_annotation,
    relative_image_path,
)
from utils_features import PRECISIONS, list_backbones

if TYPE_CHECKING:
    from utils_extraction import Clock, Job, Ranks, Settings, Stage, Summary, Unit
    from utils_features import Encoder

CONTEXT_CORPUS = "generic_subjects"  # its first rows are the words of contextualised texts
CONTEXT_WORDS = 100
CAPTION_COLUMNS = ("image_path", "caption")

# What --dataset stands for; any other value is a data set, by name or path.
KINDS = ("corpus", "mean", "synthetic")

# Where each flag has an effect: on which kinds of --dataset, and on --from_pkl.
ALL = ("dataset", "corpus", "mean", "synthetic")
EFFECTS = {
    "dataset": (*ALL, "from_pkl"),
    "backbone": (*ALL, "from_pkl"),
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
    "images": ("mean", "synthetic"),
    "captions": ("synthetic",),
    "data_dir": ("dataset", "mean"),
    "features_dir": ("dataset", "corpus", "from_pkl"),
    "corpora_dir": ("dataset", "corpus"),
    "path_to_synthetic_data": ("synthetic",),
    "rank_timeout": ALL,
}

# Settings of a finished run that a later one must share to count as the same.
SETTLED = ("model", "precision", "save_dtype", "sources", "limit", "context_words")


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
        help="icir, tiny, a folder of your own; corpus: every text corpus; mean: the mean of "
        "--images; synthetic: normalisation features of --images and --captions",
    )
    add_flag(
        what,
        "icir_source",
        choices=("folder", "wds"),
        help="images from folders or from tar shards (default: folder)",
    )
    add_flag(what, "backbone", help="clip, siglip, tiny or any open_clip model (default: clip)")
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
        help="synthetic: a CSV of rows image_path,caption, paths relative to --images",
    )
    add_flag(
        what,
        "from_pkl",
        type=Path,
        metavar="DIR",
        help="turn the reference's feature files under DIR into native ones; encodes nothing",
    )
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


DEFAULTS = {
    "icir_source": "folder",
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
    entry = BACKBONES.get(args.backbone, Backbone(args.backbone))
    args.corpora_dir = args.corpora_dir or Path(entry.corpora_dir)
    return args


def _check_effects(args: argparse.Namespace) -> None:
    mode = "from_pkl" if args.from_pkl else args.kind
    if mode == "from_pkl" and args.kind not in EFFECTS["format"]:
        raise UserError(f"--from_pkl has no effect with --dataset {args.kind}: leave it")
    for name, modes in EFFECTS.items():
        if getattr(args, name) is not None and mode not in modes:
            with_what = "--from_pkl" if mode == "from_pkl" else f"--dataset {args.dataset}"
            raise UserError(f"--{name} has no effect with {with_what}: leave it")


def main(argv: list[str]) -> None:
    """Run the command. Raises UserError, with nothing half-written, for a user's mistake."""
    args = read_arguments(argv)
    if args.list_backbones:
        print("\n".join(list_backbones()))
        return
    if args.kind in EFFECTS["features_dir"]:
        require_writable(args.features_dir, "--features_dir")
    if args.from_pkl:
        convert_pickles(args)
    else:
        extract(args)


# ---------------------------------------------------------------------------------------------
# Extraction
# ---------------------------------------------------------------------------------------------


def extract(args: argparse.Namespace) -> None:
    """Encode what the flags name, or say that it is there already."""
    # With it, matrix products on the CPU do not depend on the number of threads, which differs
    # between one process and several.
    os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
    from utils_extraction import find_ranks, in_plain_words, run_job
    from utils_features import load_encoder

    source = PLANNERS[args.kind].read(args)  # user errors first: loading a model takes seconds
    ranks = find_ranks(dict(os.environ))
    device = select_device(_device_index(args, ranks))
    with in_plain_words():
        encoder = load_encoder(args.backbone, device, args.precision)
    job = PLANNERS[args.kind].plan(args, encoder, source)
    if job.stages:
        clock = run_job(job, encoder, _settings(args, ranks), ranks)
        if clock:
            print_summary(job, clock)
    if ranks.rank == 0 and args.format == "pkl":
        PLANNERS[args.kind].export(args, source)


def _device_index(args: argparse.Namespace, ranks: Ranks) -> int:
    """The GPU of --gpu or, of several ranks, the one of the local rank among those it sees."""
    if ranks.world == 1 or args.gpu < 0:
        return args.gpu
    if args.gpu:
        raise UserError(f"--gpu {args.gpu}: several ranks take a GPU each; leave it, or give -1")
    import torch

    return ranks.local % max(1, torch.cuda.device_count())


def _settings(args: argparse.Namespace, ranks: Ranks) -> Settings:
    from utils_extraction import Settings

    workers = args.workers
    if workers is None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = max(1, _count_cores() // local)
    return Settings(
        batch=args.batch,
        workers=workers,
        skip_bad=args.on_bad_image == "skip",
        overwrite=args.overwrite,
        timeout=args.rank_timeout,
    )


def print_summary(job: Job, clock: Clock) -> None:
    """The closing line: what was made, how long it took, where the time went, where it lies."""
    import time

    seconds = time.monotonic() - clock.started
    shares = ", ".join(f"{name} {part / seconds:.0%}" for name, part in clock.seconds.items())
    speed = f"{clock.images / clock.image_seconds:.1f} images/s, " if clock.images else ""
    rows = ", ".join(f"{count} {name}" for name, count in clock.rows.items())
    print(f"{job.title}: {rows} rows in {seconds:.1f} s ({speed}{shares}): {job.outputs[-1]}")


def _manifest(args: argparse.Namespace, encoder: Encoder, kind: str, name: str) -> dict:
    packages = ("torch", "open_clip_torch", "pillow", "torchvision", "numpy", "webdataset")
    return {
        "kind": kind,
        "name": name,
        "backbone": args.backbone,
        "model": encoder.identity,
        "precision": args.precision,
        "save_dtype": args.save_dtype,
        "versions": {
            "toolkit": code_version(),
            "python": platform.python_version(),
            **{package.removesuffix("_torch"): _version(package) for package in packages},
        },
        "limit": args.limit,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _identity(args: argparse.Namespace, encoder: Encoder, manifest: dict) -> dict:
    """What may not change between two runs of one job: features or batches depend on it."""
    versions = {k: v for k, v in manifest["versions"].items() if k not in ("toolkit", "webdataset")}
    return {
        "model": encoder.identity,
        "precision": args.precision,
        "save_dtype": args.save_dtype,
        "batch": args.batch,
        "part_rows": args.part_rows,
        "device": encoder.device.type,
        "versions": versions,
    }


def is_finished(
    args: argparse.Namespace, path: Path, manifest: dict, read: Callable[[Path], dict] = read_json
) -> bool:
    """Whether a finished run of the same features is there, which is then said.

    read: how the manifest that may be found at `path` is read.
    Raises UserError if there is one of other features, or of fewer rows than --on_bad_image admits.
    """
    if args.overwrite or not path.exists():
        return False
    stored, manifest = read(path), json.loads(json.dumps(manifest))
    for key in SETTLED:
        if manifest.get(key) != stored.get(key):
            old, new = _narrow(stored.get(key), manifest.get(key))
            raise UserError(
                f"{path} belongs to finished features with another {key} ({old}, now {new}); "
                "--overwrite replaces them"
            )
    skipped = stored.get("skipped") or []
    if skipped and args.on_bad_image == "fail":
        raise UserError(
            f"{path}: finished without {len(skipped)} images, the first {skipped[0]['image_path']};"
            " accept that with --on_bad_image skip, or mend them and start afresh with --overwrite"
        )
    print(f"{path.parent if path.name == 'manifest.json' else path}: already finished")
    return True


def _narrow(old: object, new: object) -> tuple[object, object]:
    """Two differing values, or where both are dicts, their first difference."""
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(k for k in {**old, **new} if old.get(k) != new.get(k))
        return f"{key} {old.get(key)}", new.get(key)
    return old, new


# ---------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DatasetSource:
    """A data set's annotations, its shards (none for folders), and the contextual words."""

    dataset: Dataset
    name: str
    annotations: dict[str, Annotation]
    shards: dict[str, list[Path]]
    words: tuple[str, ...]
    words_sha256: str


def read_dataset(args: argparse.Namespace) -> DatasetSource:
    """Read what --dataset names. Raises UserError if anything is missing or malformed."""
    dataset = find_dataset(args.dataset, args.data_dir)
    annotations = {s: read_annotation(dataset, s, args.icir_source) for s in SPLITS}
    shards: dict[str, list[Path]] = {split: [] for split in SPLITS}
    if args.icir_source == "wds":
        shards = {split: list_shards(dataset, split) for split in SPLITS}
    else:
        _check_layout(dataset, annotations["query"])
    corpus = args.corpora_dir / f"{CONTEXT_CORPUS}.csv"
    words = tuple(read_corpus(corpus)[:CONTEXT_WORDS])
    name = dataset.name
    if args.limit:
        name = f"{name}_first{args.limit}"
        annotations = _limit(annotations, args.limit)
    _check_instances(annotations)
    return DatasetSource(dataset, name, annotations, shards, words, sha256_file(corpus))


def _check_layout(dataset: Dataset, annotation: Annotation) -> None:
    """Raise UserError if there are shards where images in folders were expected."""
    if not (dataset.root / "webdataset").is_dir():
        return
    for path in annotation.image_paths:
        with contextlib.suppress(FileNotFoundError):
            find_image(dataset, path)
            return
    raise UserError(
        f"{dataset.root} holds its images in shards, not in folders: add --icir_source wds"
    )


def _limit(annotations: dict[str, Annotation], limit: int) -> dict[str, Annotation]:
    """The first rows of each split, but queries whose instance then has no database row.

    Raises UserError if no query is left.
    """
    query, database = (
        _select(annotation, range(min(limit, len(annotation.image_paths))))
        for annotation in (annotations[split] for split in SPLITS)
    )
    known = set(database.instances)
    kept = [row for row, instance in enumerate(query.instances) if instance in known]
    if not kept:
        raise UserError(
            f"--limit {limit}: the first rows of {query.path} and of {database.path} have no "
            "instance in common; take more"
        )
    if len(kept) < len(query.instances):
        print(
            f"--limit {limit}: {len(kept)} of {len(query.instances)} queries kept, those whose "
            "instance is among the database rows"
        )
    return {"query": _select(query, kept), "database": database}


def _select(annotation: Annotation, rows: Sequence[int]) -> Annotation:
    """Those rows of an annotation, by number."""
    columns = {f"{n}s": [getattr(annotation, f"{n}s")[row] for row in rows] for n in COLUMNS}
    return replace(annotation, **columns)


def _check_instances(annotations: dict[str, Annotation]) -> None:
    """Raise UserError for a query whose instance has no database row: it cannot be evaluated."""
    query, database = (annotations[split] for split in SPLITS)
    known = set(database.instances)
    for row, instance in enumerate(query.instances, 1):
        if instance not in known:
            raise UserError(
                f"{query.path}, row {row}: the instance {instance!r} has no row in "
                f"{database.path}; add some, or remove its queries"
            )


def dataset_folder(args: argparse.Namespace, name: str) -> Path:
    """Where a data set's features go."""
    return args.features_dir / backbone_folder(args.backbone) / name


def plan_dataset(args: argparse.Namespace, encoder: Encoder, source: DatasetSource) -> Job:
    """The job of a data set; no stages if it is finished."""
    from utils_extraction import Job, Parts, drop_parts

    folder = dataset_folder(args, source.name)
    manifest = _manifest(args, encoder, "dataset", source.name)
    manifest["sources"] = {a.path.name: a.sha256 for a in source.annotations.values()}
    manifest["sources"][f"{CONTEXT_CORPUS}.csv"] = source.words_sha256
    manifest["context_words"] = len(source.words)
    path, parts = folder / "manifest.json", Parts(folder / ".parts")
    stages = _dataset_stages(args, source)
    if is_finished(args, path, manifest):
        drop_parts(parts.folder)
        stages = []
    names = ["manifest.json", *(f"{split}.csv" for split in SPLITS)]
    names += [f"{stage.name}.npy" for stage in stages]
    return Job(
        title=source.name,
        parts=parts,
        stages=stages,
        identity=_identity(args, encoder, manifest),
        outputs=[folder / name for name in names],
        finish=functools.partial(
            finish_dataset, folder, parts, stages, source, manifest, encoder.dim
        ),
    )


def _dataset_stages(args: argparse.Namespace, source: DatasetSource) -> list[Stage]:
    from utils_extraction import Stage, cut_ranges, encode_texts, share_items

    query = source.annotations["query"]
    texts, text_of_row = share_items(query.texts)
    prompts = max(1, 2 * len(source.words))
    common = {
        "encode": encode_texts,
        "items": texts,
        "item_of_row": text_of_row,
        "table": query.path,
    }
    fingerprint = {"annotation": query.sha256, "limit": args.limit}
    plain = Stage(
        name="query_text",
        units=cut_ranges(len(texts), args.part_rows),
        fingerprint=fingerprint,
        **common,
    )
    contextual = Stage(
        name="query_context_text",
        units=cut_ranges(len(texts), max(1, args.part_rows // prompts)),
        fingerprint=fingerprint | {"words": source.words_sha256},
        words=source.words,
        **common,
    )
    images = [_image_stage(args, source, split) for split in SPLITS]
    return [images[0], plain, contextual, images[1]]


def _image_stage(args: argparse.Namespace, source: DatasetSource, split: str) -> Stage:
    """The images of one split: ranges of files, or shards (all of the query's as one unit)."""
    from utils_extraction import (
        Stage,
        cut_ranges,
        encode_files,
        encode_shards,
        index_samples,
        share_items,
    )

    annotation, shards = source.annotations[split], source.shards[split]
    relative = functools.partial(relative_image_path, source.dataset)
    spell = relative if shards else str  # shards may spell a path otherwise than the annotation
    items, item_of_row = share_items([spell(path) for path in annotation.image_paths])
    # Shards are known by their sizes; the files of a folder are too many to look at, so by place.
    place = args.icir_source if shards else f"folder {source.dataset.root.resolve()}"
    fingerprint = {"annotation": annotation.sha256, "limit": args.limit, "source": place}
    stage = Stage(
        name=f"{split}_image",
        encode=encode_files,
        units=cut_ranges(len(items), args.part_rows),
        items=items,
        item_of_row=item_of_row,
        table=annotation.path,
        fingerprint=fingerprint,
        dtype=args.save_dtype if split == "database" else "float32",
        locate=functools.partial(find_image, source.dataset),
    )
    if not shards:
        return stage
    rows = zip(annotation.image_paths, annotation.texts, annotation.instances, strict=True)
    units = _shard_units(shards, together=split == "query")
    return replace(
        stage,
        encode=encode_shards,
        units=units,
        fingerprint=fingerprint | {"shards": _sizes(units)},
        locate=None,
        samples=index_samples(rows, item_of_row, relative),
        whole=args.limit is None,
    )


def _shard_units(shards: list[Path], together: bool) -> list:
    """A unit for each shard; or one of all, where an image recurs in several of them."""
    from utils_extraction import Unit

    if together:
        return [Unit(f"all-{len(shards)}", shards=tuple(shards))]
    return [Unit(shard.stem.replace("+", "-"), shards=(shard,)) for shard in shards]


def _sizes(units: list[Unit]) -> dict[str, list[int]]:
    """The bytes of the shards of every unit."""
    return {unit.name: [shard.stat().st_size for shard in unit.shards] for unit in units}


def finish_dataset(
    folder: Path,
    parts,
    stages: list[Stage],
    source: DatasetSource,
    manifest: dict,
    dim: int,
    summaries: dict[str, Summary],
) -> None:
    """Write a data set's tables, arrays and, last, its manifest."""
    from utils import write_json
    from utils_extraction import publishing, write_array, write_table

    kept = {split: summaries[f"{split}_image"] for split in SPLITS}
    manifest = manifest | {
        "counts": {split: int(kept[split].keep.sum()) for split in SPLITS},
        "skipped": [{"split": s, **entry} for s in SPLITS for entry in kept[s].skipped],
        "without_row": {split: kept[split].unmatched for split in SPLITS},
    }
    with publishing(parts.folder / "finished", folder, last="manifest.json") as staging:
        for split, annotation in source.annotations.items():
            rows = zip(*(getattr(annotation, f"{name}s") for name in COLUMNS), strict=True)
            chosen = (row for row, keep in zip(rows, kept[split].keep, strict=True) if keep)
            write_table(staging / f"{split}.csv", COLUMNS, chosen)
        for stage in stages:
            keep = kept[stage.name.partition("_")[0]].keep
            write_array(staging / f"{stage.name}.npy", stage, parts, dim, keep)
        write_json(staging / "manifest.json", manifest)


def export_dataset(args: argparse.Namespace, source: DatasetSource) -> None:
    """Write the reference's pickles beside finished features."""
    from utils_extraction import write_reference_dataset

    folder = dataset_folder(args, source.name)
    written = write_reference_dataset(folder, source.name, source.dataset.name)
    print("the reference's files:", *written)


# ---------------------------------------------------------------------------------------------
# Corpora
# ---------------------------------------------------------------------------------------------


def read_corpus(path: Path) -> list[str]:
    """The prompts of a text corpus: one column, no header, blank lines passed over.

    Raises UserError, naming the row, for a second column, and for an absent or empty file.
    """
    if not path.is_file():
        raise UserError(
            f"no {path}; a corpus is a CSV of one column (--corpora_dir names its folder)"
        )
    prompts = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.reader(file, strict=True), 1):
                if len(row) > 1:
                    raise UserError(
                        f"{path}, row {number}: {len(row)} columns where one is expected; put "
                        "double quotes around a prompt that holds a comma"
                    )
                prompts += row
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV of UTF-8 ({error})") from None
    if not prompts:
        raise UserError(f"{path} is empty: a prompt a row is expected")
    return prompts


def read_corpora(args: argparse.Namespace) -> dict[Path, list[str]]:
    """The prompts of every corpus of --corpora_dir."""
    paths = sorted(args.corpora_dir.glob("*.csv"))
    if not paths:
        raise UserError(f"no corpus (*.csv) in {args.corpora_dir}; --corpora_dir names the folder")
    return {path: read_corpus(path) for path in paths}


def plan_corpora(args: argparse.Namespace, encoder: Encoder, corpora: dict[Path, list[str]]) -> Job:
    """The job of the corpora that are not finished."""
    from utils_extraction import Job, Parts, Stage, cut_ranges, encode_texts, share_items

    folder = dataset_folder(args, "corpus")
    stages, manifests, outputs = [], {}, []
    for path, prompts in corpora.items():
        manifest = _manifest(args, encoder, "corpus", path.stem)
        manifest["sources"] = {path.name: sha256_file(path)}
        manifest["counts"], manifest["skipped"] = {"prompts": len(prompts)}, []
        stored = folder / f"{path.stem}.json"
        if is_finished(args, stored, manifest):
            continue
        items, item_of_row = share_items(prompts)
        units = cut_ranges(len(items), args.part_rows)
        prints = {"corpus": manifest["sources"][path.name]}
        stages.append(Stage(path.stem, encode_texts, units, items, item_of_row, path, prints))
        manifests[path.stem] = manifest
        outputs += [folder / f"{path.stem}.{suffix}" for suffix in ("json", "csv", "npy")]
    parts = Parts(folder / ".parts")
    return Job(
        title="corpus",
        parts=parts,
        stages=stages,
        identity=_identity(args, encoder, _manifest(args, encoder, "corpus", "")),
        outputs=outputs,
        finish=functools.partial(finish_corpora, folder, parts, stages, manifests, encoder.dim),
    )


def finish_corpora(
    folder: Path, parts, stages: list[Stage], manifests: dict[str, dict], dim: int, _: dict
) -> None:
    """Write the tables, arrays and manifests of corpora, one corpus after the other."""
    import numpy as np

    from utils import write_json
    from utils_extraction import publishing, write_array, write_table

    for stage in stages:
        last = f"{stage.name}.json"
        with publishing(parts.folder / "+finished", folder, last) as staging:
            prompts = ([stage.items[item]] for item in stage.item_of_row)
            write_table(staging / f"{stage.name}.csv", ["prompt"], prompts)
            keep = np.ones(stage.rows, bool)
            write_array(staging / f"{stage.name}.npy", stage, parts, dim, keep)
            write_json(staging / last, manifests[stage.name])


def export_corpora(args: argparse.Namespace, corpora: dict[Path, list[str]]) -> None:
    """Write the reference's pickles beside finished corpora."""
    from utils_extraction import write_reference_corpus

    folder = dataset_folder(args, "corpus")
    for path in corpora:
        write_reference_corpus(folder, path.stem)
    print("the reference's files:", *(folder / f"{path.stem}.pkl" for path in corpora))


# ---------------------------------------------------------------------------------------------
# The image mean and the normalisation features
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSource:
    """Images of the user's: files below a folder, or shards; with captions, those they name.

    sources: hashes of the images' names and sizes and of the captions, for the manifest; prints:
    those that may not change while a run is unfinished, which leave the sizes out.
    """

    root: Path
    files: list[str]
    shards: list[Path]
    captions: list[tuple[str, str]]
    sources: dict[str, str]
    prints: dict[str, str]


def read_images(args: argparse.Namespace) -> ImageSource:
    """Read what --images and --captions name. Raises UserError if there is nothing."""
    root = args.images
    if not root.exists():
        raise UserError(f"--images {root} does not exist")
    files = sorted(_list_images(root))
    shards = [root] if root.suffix == ".tar" else [] if files else sorted(root.rglob("*.tar"))
    if not shards and not files:
        raise UserError(
            f"--images {root} holds neither images ({', '.join(IMAGE_SUFFIXES)}) nor tar shards"
        )
    names = [*files, *(shard.relative_to(root).as_posix() for shard in shards)]
    sizes = [(root / name).stat().st_size for name in names]
    listing = [f"{name}\t{size}" for name, size in zip(names, sizes, strict=True)]
    sources, prints = {"images": _hash_lines(listing)}, {"images": _hash_lines(names)}
    captions = []
    if args.captions:
        captions = read_captions(args.captions)
        sources["captions"] = prints["captions"] = sha256_file(args.captions)
    return ImageSource(root, files, shards, captions, sources, prints)


def _hash_lines(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _list_images(root: Path) -> list[str]:
    found = (p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    names = [path.relative_to(root).as_posix() for path in found]
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"--images {root}: {name!a} is not UTF-8; rename the file") from None
    return names


def read_captions(path: Path) -> list[tuple[str, str]]:
    """The rows image_path,caption of a CSV; a header of just these two words is passed over."""
    if not path.is_file():
        raise UserError(f"--captions {path} does not exist")
    rows = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.reader(file, strict=True), 1):
                if not row or (number == 1 and tuple(row) == CAPTION_COLUMNS):
                    continue
                if len(row) != 2 or not all(row):
                    raise UserError(f"{path}, row {number}: image_path,caption is expected")
                rows.append((row[0], row[1]))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV of UTF-8 ({error})") from None
    if not rows:
        raise UserError(f"{path} is empty: rows image_path,caption are expected")
    return rows


def _same_path(path: str) -> str:
    return path.removeprefix("./")


def _below(root: Path, path: str) -> Path:
    return root / path


def plan_mean(args: argparse.Namespace, encoder: Encoder, source: ImageSource) -> Job:
    """The job of the mean of unit-length image features."""
    from utils_storage import mean_path

    path = mean_path(args.data_dir, args.backbone)
    return _plan_asset(args, encoder, source, path, [_loose_image_stage(args, source)])


def plan_synthetic(args: argparse.Namespace, encoder: Encoder, source: ImageSource) -> Job:
    """The job of the normalisation features: a row of images and of texts for each caption."""
    from utils_extraction import Stage, cut_ranges, encode_texts, index_samples, share_items
    from utils_storage import synthetic_path

    path = synthetic_path(args.path_to_synthetic_data, args.backbone)
    texts, text_of_row = share_items([caption for _, caption in source.captions])
    paths, image_of_row = share_items([_same_path(image) for image, _ in source.captions])
    images = replace(
        _loose_image_stage(args, source),
        items=paths,
        item_of_row=image_of_row,
        table=args.captions,
    )
    if source.shards:
        samples = index_samples(
            ((image,) for image, _ in source.captions), image_of_row, _same_path
        )
        images = replace(images, samples=samples)
    else:
        images = replace(images, units=cut_ranges(len(paths), args.part_rows))
    units = cut_ranges(len(texts), args.part_rows)
    captions = Stage("texts", encode_texts, units, texts, text_of_row, args.captions, source.prints)
    return _plan_asset(args, encoder, source, path, [images, captions])


def _loose_image_stage(args: argparse.Namespace, source: ImageSource) -> Stage:
    """Images without an annotation: all there are."""
    import numpy as np

    from utils_extraction import Stage, cut_ranges, encode_files, encode_shards

    if source.shards:
        units = [
            replace(unit, name=f"{i:06d}")
            for i, unit in enumerate(_shard_units(source.shards, together=False))
        ]
        nothing = np.empty(0, np.int64)
        prints = source.prints | {"shards": _sizes(units)}
        return Stage("images", encode_shards, units, None, nothing, source.root, prints)
    units = cut_ranges(len(source.files), args.part_rows)
    return Stage(
        name="images",
        encode=encode_files,
        units=units,
        items=source.files,
        item_of_row=np.arange(len(source.files)),
        table=source.root,
        fingerprint=source.prints,
        locate=functools.partial(_below, source.root),
    )


def _plan_asset(
    args: argparse.Namespace,
    encoder: Encoder,
    source: ImageSource,
    path: Path,
    stages: list[Stage],
) -> Job:
    from utils_extraction import Job, Parts, drop_parts

    manifest = _manifest(args, encoder, args.kind, path.stem) | {"sources": source.sources}
    parts = Parts(path.parent / f".{path.stem}.parts")
    if is_finished(args, path, manifest, _read_asset_manifest):
        drop_parts(parts.folder)
        stages = []
    finish = {"mean": finish_mean, "synthetic": finish_synthetic}[args.kind]
    return Job(
        title=args.kind,
        parts=parts,
        stages=stages,
        identity=_identity(args, encoder, manifest),
        outputs=[path],
        finish=functools.partial(finish, path, parts, stages, manifest, encoder.dim),
    )


def _read_asset_manifest(path: Path) -> dict:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as content:
            return json.loads(str(content["manifest"]))
    except Exception as error:  # not a zip, not an array, not JSON
        raise UserError(f"{path} cannot be read ({error}); --overwrite replaces it") from None


def _write_asset(path: Path, manifest: dict, arrays: dict) -> None:
    import numpy as np

    from utils import atomic_path

    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays, manifest=np.array(json.dumps(manifest, ensure_ascii=False)))


def finish_mean(
    path: Path, parts, stages: list[Stage], manifest: dict, dim: int, summaries: dict[str, Summary]
) -> None:
    """Write the mean (D,) float32."""
    from utils_extraction import mean_of_units

    mean, count = mean_of_units(stages[0], parts, dim)
    skipped = summaries["images"].skipped
    manifest = manifest | {"counts": {"images": count}, "skipped": skipped}
    _write_asset(path, manifest, {"mean": mean})


def finish_synthetic(
    path: Path, parts, stages: list[Stage], manifest: dict, dim: int, summaries: dict[str, Summary]
) -> None:
    """Write image_features and text_features, a row of each for every caption, (n, D) float32."""
    import numpy as np

    from utils_extraction import write_array

    keep = summaries["images"].keep
    arrays = {}
    for stage, name in zip(stages, ("image_features", "text_features"), strict=True):
        write_array(parts.folder / f"{name}.npy", stage, parts, dim, keep)
        arrays[name] = np.load(parts.folder / f"{name}.npy")
    skipped = summaries["images"].skipped
    manifest = manifest | {"counts": {"pairs": int(keep.sum())}, "skipped": skipped}
    _write_asset(path, manifest, arrays)


# ---------------------------------------------------------------------------------------------
# The reference's files
# ---------------------------------------------------------------------------------------------


def convert_pickles(args: argparse.Namespace) -> None:
    """Turn the reference's feature files into native ones (model unknown: null in the manifest)."""
    if args.kind == "corpus":
        _convert_corpora(args)
    else:
        _convert_dataset(args)


def _pickle_manifest(args: argparse.Namespace, kind: str, name: str, paths: list[Path]) -> dict:
    return {
        "kind": kind,
        "name": name,
        "backbone": args.backbone,
        "model": None,
        "precision": None,
        "save_dtype": "float32",
        "versions": {"toolkit": code_version(), "python": platform.python_version()},
        "limit": None,
        "sources": {path.name: sha256_file(path) for path in paths},
        "skipped": [],
    }


def _convert_dataset(args: argparse.Namespace) -> None:
    import numpy as np

    from utils import write_json
    from utils_extraction import native_path, publishing, write_table
    from utils_storage import features_folder, load_reference_features, read_database_table

    name = last_part(args.dataset)
    source = features_folder(args.from_pkl, args.backbone, name)
    pickles = [source / f"{split}_{name}_features.pkl" for split in SPLITS]
    for path in pickles:
        if not path.is_file():
            raise UserError(f"--from_pkl {args.from_pkl}: no {path}")
    manifest = _pickle_manifest(args, "dataset", name, pickles)
    folder = dataset_folder(args, name)
    stored = folder / "manifest.json"
    if is_finished(args, stored, manifest):
        return
    features = load_reference_features(args.from_pkl, args.backbone, name)
    tables = {"query": features.queries, "database": read_database_table(features)}
    manifest["counts"] = {split: len(table) for split, table in tables.items()}
    arrays = {
        "query_image": features.query_image,
        "query_text": features.query_text,
        "query_context_text": features.query_context_text,
        "database_image": features.database.read(slice(0, features.database.shape[0])),
    }
    with publishing(folder / ".from_pkl", folder, "manifest.json") as staging:
        for split, table in tables.items():
            table["image_path"] = [native_path(name, path) for path in table["image_path"]]
            write_table(staging / f"{split}.csv", COLUMNS, table[list(COLUMNS)].values.tolist())
        for key, array in arrays.items():
            if array is not None:
                np.save(staging / f"{key}.npy", array)
            else:
                (folder / "manifest.json").unlink(missing_ok=True)
                (folder / f"{key}.npy").unlink(missing_ok=True)
        write_json(staging / "manifest.json", manifest)
    counts = ", ".join(f"{count} {split}" for split, count in manifest["counts"].items())
    print(f"{name}: {counts} rows turned into native files: {folder}")


def _convert_corpora(args: argparse.Namespace) -> None:
    import numpy as np

    from utils import write_json
    from utils_extraction import publishing, write_table
    from utils_storage import features_folder, load_pickle, read_rows

    source = features_folder(args.from_pkl, args.backbone, "corpus")
    paths = sorted(source.glob("*.pkl"))
    if not paths:
        raise UserError(f"--from_pkl {args.from_pkl}: no corpora (*.pkl) in {source}")
    folder = dataset_folder(args, "corpus")
    for path in paths:
        manifest = _pickle_manifest(args, "corpus", path.stem, [path])
        stored = folder / f"{path.stem}.json"
        if is_finished(args, stored, manifest):
            continue
        content = load_pickle(path)
        prompts, features = content.get("prompts"), read_rows(content, "feats", path)
        if not isinstance(prompts, (list, tuple)) or len(prompts) != len(features):
            raise UserError(f"{path}: no prompt for each of its {len(features)} rows of features")
        manifest["counts"] = {"prompts": len(prompts)}
        with publishing(folder / ".from_pkl", folder, stored.name) as staging:
            write_table(staging / f"{path.stem}.csv", ["prompt"], ([p] for p in prompts))
            np.save(staging / f"{path.stem}.npy", features)
            write_json(staging / stored.name, manifest)
        print(f"{path.stem}: {len(prompts)} prompts turned into native files: {folder}")


# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planner:
    """How a kind of --dataset is read, planned and, with --format pkl, exported."""

    read: Callable
    plan: Callable
    export: Callable | None = None


PLANNERS = {
    "dataset": Planner(read_dataset, plan_dataset, export_dataset),
    "corpus": Planner(read_corpora, plan_corpora, export_corpora),
    "mean": Planner(read_images, plan_mean),
    "synthetic": Planner(read_images, plan_synthetic),
}


if __name__ == "__main__":
    run_command(main)
