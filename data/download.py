"""Download what the published numbers need: i-CIR, LAION means, synthetic features, corpora.

    python3 data/download.py {icir,laion_mean,synthetic_data,corpora,all}
    python3 data/download.py {imagenet_r,nico,minidn,ltll,words}
    python3 data/download.py {cirr,circo,fashioniq,genecis}

The second form brings the lists of the data sets for domain conversion, says where their images
come from and which are missing, and brings FREEDOM's words. The third brings the annotation files
of four benchmarks and says the same of their images.

Every file is verified by the hash its publisher gives. Files that are there and right are kept;
wrong ones are named and left alone unless --overwrite is given. A download that was cut goes on
where it stopped (from the Hub: with the file it was at), and a file has its final name only when
it is whole and right; what --overwrite replaces stays until then.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

# Run as a script, Python looks for modules in data/; the shared ones lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data.annotation_files as annotation_files
import data.domain_lists as domain_lists
from benchmarks import find_folder
from benchmarks.annotations import load_json
from data.icir_files import ARCHIVE_URL, ICIR_FILES, fetch_archive, fetch_hub
from data.transfer import (
    Snapshot,
    Unreachable,
    download,
    read_record,
    refuse_wrong,
    require_digest,
    write_record,
)
from utils import Parser, UserError, add_flag, git_blob_id, read_json, refuse_idle, run_command, say

COMMIT = "463cc1d4881854f9667977b6dab0e775902ea760"  # of the reference repository
ASSETS_URL = f"https://raw.githubusercontent.com/billpsomas/icir/{COMMIT}"

CORPORA_DIR = Path("corpora/reference")


@dataclass(frozen=True)
class Asset:
    """One file of a publisher's repository: its path there and its git blob id, None: any JSON."""

    path: str
    blob_id: str | None

    @property
    def target(self) -> str:
        """The word of the command line that asks for it: the name of its folder."""
        return PurePosixPath(self.path).parent.name


ASSETS = (
    Asset("data/laion_mean/laion_1m_mean_clip.pkl", "1aac21d27bdb329e18f8e97f7ae33efcbfbe366d"),
    Asset("data/laion_mean/laion_1m_mean_siglip.pkl", "6466b75d0376934c8c5f063153cec0c1ad5bf6de"),
    Asset("synthetic_data/dataset_1_sd_clip.pkl.npy", "5bd67ba8e392751a46ecc7be3509b24885981b83"),
    Asset("synthetic_data/dataset_1_sd_siglip.pkl.npy", "63b62fef598d93c03e90793966e566a5f88b0972"),
    Asset("corpora/generic_styles.csv", "58f1f1e68133dc0262ad70b61ff842aaf7ca2e28"),
    Asset("corpora/generic_subjects.csv", "71b8339b64239d9c826a126d24ecadbe3bbf2444"),
)


CORPORA_ADVICE = """\
These are the lists behind the published figures; those in corpora/ are this toolkit's own. To
encode with them, give create_features.py the folder, for the corpora and for the data set:
    python3 create_features.py --dataset corpus --backbone clip --corpora_dir {folder}
    python3 create_features.py --dataset icir --backbone clip --corpora_dir {folder}
The first line of generic_subjects.csv, object_name, looks like a header but is one of the prompts
of the published figures, and one of the 100 that contextualise a query: leave it where it is."""


# ---------------------------------------------------------------------------------------------
# Files of the reference repository
# ---------------------------------------------------------------------------------------------


def fetch_assets(
    placed: Mapping[Path, Asset], base_url: str = ASSETS_URL, overwrite: bool = False
) -> None:
    """Download each asset to its path, verified by its blob id; say which were already right.

    Raises UserError before any download if a path holds something else and overwrite is off.
    """
    right, wrong = set(), set()
    for path, asset in placed.items():
        if path.is_file() and is_published(path, asset):
            right.add(path)
        elif path.exists():
            wrong.add(path)
    if not overwrite:
        refuse_wrong(sorted(wrong))
    for path, asset in placed.items():
        if path not in right:
            fetch_asset(asset, path, base_url)
        print(f"{'kept, already right' if path in right else 'downloaded'}: {path}")


def fetch_asset(asset: Asset, path: Path, base_url: str = ASSETS_URL) -> None:
    """Download one asset to `path`, which is replaced only by the right content."""
    url = f"{base_url.rstrip('/')}/{urllib.parse.quote(asset.path)}"
    part = path.with_name(f"{path.name}.part")
    download(url, part, path)
    if asset.blob_id is None:
        _require_json(part, url)
    else:
        require_digest(part, asset.blob_id, url)
    os.replace(part, path)


def _require_json(path: Path, url: str) -> None:
    """Raise UserError, and remove the file, unless it is whole JSON."""
    try:
        load_json(path)
    except UserError as error:
        path.unlink()
        raise UserError(f"{url}: {error}; nothing was installed") from None


def is_published(path: Path, asset: Asset) -> bool:
    """Whether a file has the content that was published, as far as that is known."""
    if asset.blob_id is not None:
        return git_blob_id(path) == asset.blob_id
    with contextlib.suppress(UserError):
        load_json(path)
        return True
    return False


# ---------------------------------------------------------------------------------------------
# Annotation files of benchmarks
# ---------------------------------------------------------------------------------------------


def fetch_annotations(
    target: str, data_dir: Path, files_url: str | None = None, overwrite: bool = False
) -> None:
    """Install a benchmark's annotation files, and say which of its images lack.

    Raises UserError and Unreachable as fetch_assets does.
    """
    repository = annotation_files.REPOSITORIES[target]
    files = annotation_files.place_annotations(target, data_dir)
    placed = {path: Asset(*published) for path, published in files.items()}
    fetch_assets(placed, files_url or repository.url, overwrite)
    print(f"{repository.name} is published under {repository.licence}")
    for line in annotation_files.describe_images(target, data_dir):
        say(line)


# ---------------------------------------------------------------------------------------------
# FREEDOM's lists
# ---------------------------------------------------------------------------------------------


def fetch_lists(
    targets: Iterable[str],
    data_dir: Path,
    corpora_dir: Path,
    listing_url: str = domain_lists.LISTING_URL,
    files_url: str = domain_lists.FILES_URL,
    overwrite: bool = False,
) -> None:
    """Install the lists of data sets for domain conversion, and say which of their images lack.

    Each file is verified by the blob id that the repository's listing at the pinned commit gives;
    without a connection, by the one that an earlier run wrote down. Raises UserError and
    Unreachable.
    """
    placed = domain_lists.place_lists(targets, data_dir, corpora_dir)
    listed = _read_listing(data_dir, listing_url, next(iter(placed.values())))
    found = domain_lists.read_listing(listed, list(placed))
    fetch_assets({placed[name]: Asset(*found[name]) for name in found}, files_url, overwrite)
    lost = [name for name in placed if name not in found]
    if lost:
        raise UserError(
            f"{domain_lists.REPOSITORY} has no data/{lost[0]} at commit {domain_lists.COMMIT[:7]}: "
            f"it has to come from elsewhere, to {placed[lost[0]]}"
        )
    for name in targets:
        if name in domain_lists.LISTS:
            print(domain_lists.describe_images(name, find_folder(data_dir, name)))


def _read_listing(data_dir: Path, url: str, missing: Path) -> dict:
    """GitHub's listing of the pinned commit or, unreachable, what is written down of it."""
    record = read_record(data_dir, "freedom")
    try:
        with tempfile.TemporaryDirectory() as folder:
            download(url, Path(folder, "listing.json"), missing)
            listing = read_json(Path(folder, "listing.json"))
    except Unreachable:
        if record is None or record.commit != domain_lists.COMMIT:
            raise
        tree = [{"path": path, "type": "blob", "sha": d} for path, d in record.digests.items()]
        return {"truncated": False, "tree": tree}
    every = domain_lists.place_lists(domain_lists.TARGETS, data_dir, data_dir)
    digests = dict(domain_lists.read_listing(listing, list(every)).values())
    commit = domain_lists.COMMIT
    write_record(data_dir, Snapshot("freedom", domain_lists.REPOSITORY, commit, commit, digests))
    return listing


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------

TARGETS = ("icir", "laion_mean", "synthetic_data", "corpora")

# The targets, and the source of i-CIR, without which a flag would do nothing.
FLAG_USES = {
    "source": (("icir",), None),
    "revision": (("icir",), "hf"),
    "archive_url": (("icir",), "tar"),
    "keep_archive": (("icir",), "tar"),
    "assets_url": (("laion_mean", "synthetic_data", "corpora"), None),
    "synthetic_dir": (("synthetic_data",), None),
    "corpora_dir": (("corpora", domain_lists.WORDS_TARGET), None),
    "listing_url": (domain_lists.TARGETS, None),
    "files_url": ((*domain_lists.TARGETS, *annotation_files.REPOSITORIES), None),
}

EPILOG = f"""\
environment:
  ICIR_ASSETS_URL      default of --assets_url
  ICIR_ARCHIVE_URL     default of --archive_url
  HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE
                       as huggingface_hub documents them (--source hf)

where files land:
  icir                 DATA_DIR/icir/{{webdataset,annotations}}/ (hf)
                       DATA_DIR/icir/{{query,database}}/ and two CSV files (tar)
  laion_mean           DATA_DIR/laion_mean/
  synthetic_data       SYNTHETIC_DIR/
  corpora, words       CORPORA_DIR/
  imagenet_r, nico, minidn, ltll
                       DATA_DIR/NAME/ (lists only: what is printed says where the images are)
  cirr, circo, fashioniq, genecis
                       DATA_DIR/NAME/ (annotations only, likewise)

i-CIR is released under CC BY-NC-SA 4.0, the other files under the MIT license. The files of
laion_mean, synthetic_data and corpora are those of commit {COMMIT[:12]} of the reference
repository, the lists those of commit {domain_lists.COMMIT[:12]} of {domain_lists.REPOSITORY}.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser; flags are accepted with dashes too."""
    parser = Parser(
        prog="download.py",
        description="Download the data set and the assets of the published numbers, verified.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target",
        choices=(*TARGETS, "all", *domain_lists.TARGETS, *annotation_files.REPOSITORIES),
        help="what to download (all: the first four)",
    )
    flag = partial(add_flag, parser)
    flag("data_dir", type=Path, default=Path("data"), help="folder of data sets (default: data)")
    flag(
        "source",
        choices=tuple(ICIR_FILES),
        help="i-CIR from the Hub or as an archive (default: hf)",
    )
    flag("revision", help="branch, tag or commit of the data set on the Hub (default: main)")
    for name, text, default in (
        ("synthetic_dir", "folder of synthetic features", "synthetic_data"),
        ("corpora_dir", "folder of the corpora", CORPORA_DIR),
    ):
        flag(name, type=Path, help=f"{text} (default: {default})")
    for name, text, default in (
        ("archive_url", "i-CIR's archive", f"$ICIR_ARCHIVE_URL, {ARCHIVE_URL}"),
        ("assets_url", "what the other files' paths follow", f"$ICIR_ASSETS_URL, {ASSETS_URL}"),
        ("listing_url", "listing of the lists' repository", domain_lists.LISTING_URL),
        ("files_url", "what the lists' paths are appended to", domain_lists.FILES_URL),
    ):
        flag(name, help=f"{text} (default: {default})")
    flag("keep_archive", action="store_true", help="keep the archive once it is extracted")
    flag("overwrite", action="store_true", help="replace files that are there but wrong")
    return parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for a flag that would do nothing."""
    args = build_parser().parse_args(argv)
    args.targets = TARGETS if args.target == "all" else (args.target,)
    _refuse_idle_flags(args)
    return args


def _refuse_idle_flags(args: argparse.Namespace) -> None:
    given = {flag: uses for flag, uses in FLAG_USES.items() if getattr(args, flag)}
    for flag, (targets, source) in given.items():
        if not set(targets) & set(args.targets):
            refuse_idle([flag], f"on {args.target}")
        if source not in (None, args.source or "hf"):
            refuse_idle([flag], f"without --source {source}")


def place_assets(args: argparse.Namespace) -> dict[Path, Asset]:
    """Path to asset, for the targets asked for."""
    folders = {
        "laion_mean": args.data_dir / "laion_mean",
        "synthetic_data": args.synthetic_dir or Path("synthetic_data"),
        "corpora": args.corpora_dir or CORPORA_DIR,
    }
    return {
        folders[asset.target] / PurePosixPath(asset.path).name: asset
        for asset in ASSETS
        if asset.target in args.targets
    }


def main(argv: list[str]) -> None:
    """Download what the command line asks for: small files first, i-CIR last."""
    args = parse_arguments(argv)
    try:
        placed = place_assets(args)
        base_url = args.assets_url or os.environ.get("ICIR_ASSETS_URL") or ASSETS_URL
        fetch_assets(placed, base_url, args.overwrite)
        if "corpora" in args.targets:
            print(CORPORA_ADVICE.format(folder=args.corpora_dir or CORPORA_DIR))
        if "icir" in args.targets and args.source == "tar":
            url = args.archive_url or os.environ.get("ICIR_ARCHIVE_URL") or ARCHIVE_URL
            fetch_archive(args.data_dir / "icir", url, args.overwrite, args.keep_archive)
        elif "icir" in args.targets:
            fetch_hub(args.data_dir / "icir", args.revision or "main", args.overwrite)
        lists = [target for target in args.targets if target in domain_lists.TARGETS]
        for target in args.targets:
            if target in annotation_files.REPOSITORIES:
                fetch_annotations(target, args.data_dir, args.files_url, args.overwrite)
        if lists:
            fetch_lists(
                lists,
                args.data_dir,
                args.corpora_dir or CORPORA_DIR,
                args.listing_url or domain_lists.LISTING_URL,
                args.files_url or domain_lists.FILES_URL,
                args.overwrite,
            )
    except Unreachable as error:
        command = f"python3 data/download.py {shlex.join(argv)}"
        raise UserError(f"{error}; with a network, run: {command}") from None
    except OSError as error:
        raise UserError(" ".join(str(error).split()) or type(error).__name__) from None


if __name__ == "__main__":
    run_command(main)
