"""Manifests: what vouches for finished features, and tells whether they are those asked for."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from extraction.encoding import Settings
from utils import UserError, code_version
from utils_records import read_manifest

if TYPE_CHECKING:
    from utils_features import Encoder

# Settings of a finished run that a later one must share to count as the same.
SETTLED = (
    *("model", "pixels", "precision", "save_dtype", "sources", "rows", "limit"),
    "context_words",
)
ANNOTATED = ("sources", "rows")  # what another annotation changes of them
OTHERS = {"rows": "other rows", "context_words": "another number of context words"}
# What holds of manifests, and of unfinished runs, that do not say.
UNSAID = {"pixels": "plain"}

PACKAGES = ("torch", "open_clip_torch", "pillow", "torchvision", "numpy", "webdataset")


def describe(
    settings: Settings, encoder: Encoder, kind: str, name: str, limit: int | None = None
) -> dict:
    """What a manifest says of how features were made, before it says of what."""
    return {
        "kind": kind,
        "name": name,
        "backbone": settings.backbone,
        "model": encoder.identity,
        "precision": settings.precision,
        "save_dtype": settings.save_dtype,
        "versions": list_versions(),
        "limit": limit,
    }


def list_versions() -> dict[str, str | None]:
    """The versions of the toolkit, of Python and of what features depend on."""
    return {
        "toolkit": code_version(),
        "python": platform.python_version(),
        **{package.removesuffix("_torch"): _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def identify(settings: Settings, encoder: Encoder) -> dict:
    """What may not change between two runs of one job: features or batches depend on it."""
    versions = describe(settings, encoder, "", "")["versions"]
    return {
        "model": encoder.identity,
        "precision": settings.precision,
        "save_dtype": settings.save_dtype,
        "batch": settings.batch,
        "part_rows": settings.part_rows,
        "device": encoder.device.type,
        "versions": {k: v for k, v in versions.items() if k not in ("toolkit", "webdataset")},
    }


def is_finished(
    path: Path,
    manifest: dict,
    overwrite: bool,
    skip_bad: bool,
    read: Callable[[Path], dict] = read_manifest,
    covers: Callable[[dict], bool] = lambda stored: False,
) -> bool:
    """Whether a finished run of the same features is there, which is then said.

    read: how the manifest that may be found at `path` is read. covers: whether its features hold
    all that another annotation names; may raise UserError for the first that they do not.
    Raises UserError if there is one of other features, or of fewer rows than skip_bad admits.
    """
    if overwrite or not path.exists():
        return False
    stored, manifest, changed = read(path), json.loads(json.dumps(manifest)), False
    for key in SETTLED:
        old, new = (one.get(key, UNSAID.get(key)) for one in (stored, manifest))
        if old != new and key in ANNOTATED and covers(stored):
            changed = True
        elif old != new:
            what, old, new = _narrow(key, old, new)
            keep = f"--{key} {old} keeps them, " if key in UNSAID else ""
            raise UserError(
                f"{path} belongs to finished features with {what} ({old}, now {new}); "
                f"{keep}--overwrite replaces them"
            )
    skipped = stored.get("skipped") or []
    if skipped and not skip_bad:
        raise UserError(
            f"{path}: finished without {len(skipped)} images, the first {skipped[0]['image_path']};"
            " accept that with --on_bad_image skip, or mend them and start afresh with --overwrite"
        )
    then, now = (one.get("image_bytes") for one in (stored, manifest))
    if None not in (then, now) and then != now and not changed:
        raise UserError(
            f"{path} belongs to finished features of other image files ({then:,} bytes in all, now "
            f"{now:,}); --overwrite replaces them"
        )
    print(f"{path.parent if path.name == 'manifest.json' else path}: already finished")
    if changed:
        print(
            "the annotation has changed since, but every image and text has its feature: "
            "run_retrieval.py reads the labels anew"
        )
    return True


def image_bytes(paths: Iterable[str], locate: Callable[[str], Path]) -> dict[str, int]:
    """What a manifest says of image files: their bytes, of those that are there, all together.

    An image in the place of another shows in it, a copy of the data set elsewhere does not.
    """
    total = 0
    for path in dict.fromkeys(paths):
        with contextlib.suppress(OSError):
            total += locate(path).stat().st_size
    return {"image_bytes": total}


def _narrow(key: str, old: object, new: object) -> tuple[str, object, object]:
    """What differs of a setting, in words, and both its values; of dicts the first difference."""
    what = OTHERS.get(key, f"another {key}")
    if isinstance(old, dict) and isinstance(new, dict):
        name = next(k for k in {**old, **new} if old.get(k) != new.get(k))
        old, new = old.get(name), new.get(name)
        return (f"another {name}", old, new) if key == "sources" else (what, f"{name} {old}", new)
    return what, old, new
