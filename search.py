#!/usr/bin/env python3
"""Search one's own photographs by an image and words, live, on a page of this machine.

The usual runs:
    python3 search.py ~/Pictures --backbone ViT-B-32/laion2b_s34b_b79k
    python3 search.py --dataset icir --backbone clip
    python3 search.py --demo

A folder is indexed first: what is new or changed since the last time is encoded, and a run that was
killed continues. Ctrl-C ends it. In a notebook: `from search import open_folder, open_dataset`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import Parser, UserError, add_flag, positive, refuse_idle, require_writable, run_command
from utils_backbones import DEFAULT_BACKBONE, PRECISIONS, PREPROCESSES, name_backbone
from utils_signs import doing
from utils_startup import quick_exit

if TYPE_CHECKING:
    from live.opening import Where
    from live.searcher import Searcher

ROOT = Path(__file__).resolve().parent
DEMO = "tiny"
OF_FOLDERS = ("precision", "save_dtype", "batch", "overwrite")  # flags that say how one is indexed


def open_folder(root: str | Path, backbone: str = DEFAULT_BACKBONE, **options: Any) -> Searcher:
    """A folder of photographs, indexed as far as it has changed: see live.opening.open_folder."""
    from live import opening

    return opening.open_folder(root, backbone, **options)


def open_dataset(dataset: str, backbone: str = DEFAULT_BACKBONE, **options: Any) -> Searcher:
    """A data set that has features: see live.opening.open_dataset."""
    from live import opening

    return opening.open_dataset(dataset, backbone, **options)


def build_parser() -> argparse.ArgumentParser:
    """The parser. A flag that was not given has the value None, where that makes a difference."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="the folder of photographs")
    _add_what(parser.add_argument_group("what to search"))
    _add_how(parser.add_argument_group("how a folder is indexed"))
    _add_page(parser.add_argument_group("the page"))
    return parser


def _add_what(group: argparse._ArgumentGroup) -> None:
    add_flag(group, "dataset", help="a data set that has features, in place of a folder")
    add_flag(
        group,
        "demo",
        action="store_true",
        help="the tiny world, made and encoded first where it is not there: no download",
    )
    add_flag(
        group,
        "backbone",
        help=f"clip, siglip, tiny or any open_clip model (default: {DEFAULT_BACKBONE})",
    )
    add_flag(
        group,
        "preprocess",
        choices=PREPROCESSES,
        help="of the backbone, as create_features.py has it (default: model)",
    )
    add_flag(group, "gpu", type=int, default=0, help="CUDA device, -1 for the CPU (default: 0)")
    add_flag(
        group,
        "candidates",
        type=positive,
        help="rank only the so many images nearest to each vector, which faiss finds: approximate, "
        "for many millions (default: all)",
    )
    folders = {
        "features_dir": ("where features are, and go (default: features)", Path("features")),
        "data_dir": ("data sets and image means (default: data)", Path("data")),
        "corpora_dir": ("text corpora (default: the backbone's, corpora)", None),
        "path_to_synthetic_data": ("normalisation features (default: the backbone's)", None),
    }
    for name, (text, default) in folders.items():
        add_flag(group, name, type=Path, default=default, help=text)


def _add_how(group: argparse._ArgumentGroup) -> None:
    add_flag(
        group, "precision", choices=tuple(PRECISIONS), help="arithmetic of a folder (default: fp32)"
    )
    add_flag(
        group,
        "save_dtype",
        choices=("float16", "float32"),
        help="type of its features on disk (default: as they are, float16 where there are none)",
    )
    add_flag(group, "batch", type=positive, help="images encoded at once (default: 64)")
    add_flag(
        group, "overwrite", action="store_true", default=None, help="encode all photographs again"
    )


def _add_page(group: argparse._ArgumentGroup) -> None:
    add_flag(
        group, "port", type=int, default=0, help="of the page, 0 for one that is free (default: 0)"
    )
    add_flag(
        group,
        "host",
        default="127.0.0.1",
        help="the address that is listened at; any but this machine's own lets others in who have "
        "the token (default: 127.0.0.1)",
    )
    add_flag(
        group,
        "open",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="open the page in a browser (default: on)",
    )


def main(argv: list[str]) -> None:
    """Run the command. Raises UserError for a user's mistake."""
    args = build_parser().parse_args(argv)
    _check(args)
    if args.demo:
        _make_demo(args)
    require_writable(args.features_dir, "--features_dir")
    args.backbone = name_backbone(args.backbone or DEFAULT_BACKBONE, args.preprocess)
    with doing("loading PyTorch", at_once=True):
        from live.opening import Where
        from live.server import listen, serve

    where = Where(
        *(args.features_dir, args.data_dir, args.path_to_synthetic_data, args.corpora_dir),
        *(args.gpu, args.candidates or 0),
    )
    with listen(args.host, args.port) as listening:  # before all the work: it may be taken
        searcher = _open(args, where)
        with doing(""):  # it is served, and waits
            serve(searcher, listening, args.host, lambda address: _tell(args, address))


def _check(args: argparse.Namespace) -> None:
    asked = [name for name in ("folder", "dataset", "demo") if getattr(args, name)]
    if len(asked) != 1:
        raise UserError("name a folder of photographs, or --dataset NAME, or --demo: one of them")
    if not args.folder:
        given = (name for name in OF_FOLDERS if getattr(args, name) is not None)
        refuse_idle(given, f"with --{asked[0]}")
    if args.demo and (args.backbone or args.preprocess):
        raise UserError(f"--demo has a backbone of its own, {DEMO}: leave --backbone, --preprocess")
    if not args.host:
        raise UserError("--host is empty: name an address, 0.0.0.0 for all of this machine's")
    if not 0 <= args.port < 65536:
        raise UserError(f"--port {args.port}: a port is from 0 to 65535")


def _open(args: argparse.Namespace, where: Where) -> Searcher:
    if args.folder:
        options = {name: getattr(args, name) for name in OF_FOLDERS}
        options = {name: value for name, value in options.items() if value is not None}
        return open_folder(args.folder, args.backbone, where=where, **options)
    return open_dataset(args.dataset, args.backbone, where=where)


def _make_demo(args: argparse.Namespace) -> None:
    """Make the tiny world and its features, as far as they are not there."""
    if Path.cwd() != ROOT:  # the tiny backbone is a folder of this toolkit
        for name in ("features_dir", "data_dir"):
            setattr(args, name, Path(os.path.abspath(getattr(args, name))))
        os.chdir(ROOT)
    args.dataset, args.backbone = DEMO, DEMO
    places = ["--features_dir", args.features_dir, "--data_dir", args.data_dir]
    always = ["create_features.py", "--backbone", DEMO, "--gpu", args.gpu, *places]
    for words in (
        ["data/tiny/make_split.py", "--out", args.data_dir / DEMO],
        [*always[:-2], "--dataset", "corpus"],
        [*always, "--dataset", DEMO],
    ):
        done = subprocess.run([sys.executable, *map(str, words)])
        if done.returncode:
            raise UserError(f"--demo: {words[0]} has failed; what it said stands above")


def _tell(args: argparse.Namespace, address: str) -> None:
    print(f"the page: {address}\n(Ctrl-C ends it)", flush=True)
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"--host {args.host}: other machines reach this page, unencrypted; whoever has the "
            "address sees all of the gallery",
            file=sys.stderr,
        )
    if args.open:
        import webbrowser

        webbrowser.open(address)


def run() -> None:
    """The command, whose features are those of create_features.py, rounded to float16."""
    os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
    run_command(main)
    quick_exit()


if __name__ == "__main__":
    run()
