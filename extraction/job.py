"""A job's run: its parts checked, its stages dealt among the ranks, its files put together."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from extraction.encoding import Clock, Run, Settings
from extraction.manifest import UNSAID
from extraction.parts import Parts, drop_parts
from extraction.stage import Stage, Summary
from utils import UserError, held, naming, read_json, say, select_device, write_json
from utils_features import load_encoder
from utils_ranks import Group, device_index
from utils_signs import doing

if TYPE_CHECKING:
    from utils_features import Encoder

LOCK = "lock"  # of a folder of parts, which starting afresh leaves
ALONE = Group()


@dataclass(frozen=True)
class Job:
    """What one command makes. identity: what may not change between two runs of it.

    finish writes the finished files from the parts, outputs are the files that --overwrite drops,
    in this order: each after the manifest that vouches for it.
    """

    title: str
    parts: Parts
    stages: list[Stage]
    identity: dict
    outputs: list[Path]
    finish: Callable[[dict[str, Summary]], None]


class Work(Protocol):
    """What is to be made, as far as it is known before the model is there."""

    def plan(self, settings: Settings, encoder: Encoder) -> Job:
        """Its job; no stages if it is finished."""


def make_features(
    works: Sequence[Work], settings: Settings, gpu: int, group: Group
) -> Iterator[tuple[Job, Clock | None]]:
    """Load the model and make what the works say, one after the other, as one of the ranks.

    gpu: the device's number, -1 for the CPU. Gives each job and its times, None if there was
    nothing to do, or on another rank than the first.
    Raises UserError, with everything done so far safe on disk.
    """
    device = select_device(device_index(gpu, group.ranks))
    with in_plain_words(), doing(f"loading {settings.backbone}", at_once=True):
        encoder = _load(settings, device)
    for work in works:
        with doing("looking at what there is"):
            job = work.plan(settings, encoder)
        yield job, run_job(job, encoder, settings, group) if job.stages else None


def _load(settings: Settings, device: torch.device) -> Encoder:
    if settings.system is None:
        return load_encoder(settings.backbone, device, settings.precision)
    from composed import load_composed

    return load_composed(settings.backbone, settings.system, device, settings.precision)


def run_job(job: Job, encoder: Encoder, settings: Settings, group: Group = ALONE) -> Clock | None:
    """Do this rank's share of a job; the first rank puts the parts together and gives its times.

    No rank goes on before the files are finished: another work may read them.
    Raises UserError, with everything done so far safe on disk.
    """
    run, first = Run(encoder, job.parts, settings, Clock(), group), group.ranks.rank == 0
    lock = held(job.parts.folder / LOCK, "another run is at work on these features")
    with in_plain_words(), naming(job.parts.folder), lock if first else contextlib.nullcontext():
        missing = group.gather(_prepare(job, settings) if first else None)[0]
        for stage in job.stages:
            names = missing[stage.name]
            if units := [unit for unit in stage.units if unit.name in names]:
                stage.encode(units, run)
        with doing("waiting for the other ranks"):
            group.gather("encoded")
        if first:
            _finish(job, settings, run.clock)
        group.gather("finished")
    return run.clock if first else None


@contextlib.contextmanager
def in_plain_words() -> Iterator[None]:
    """Turn what a machine's limits raise into a line for the user; the parts done are safe."""
    safe = "what is done is safe, and the same command continues"
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory does not hold the model and a batch ({str(error).splitlines()[0]}); "
            "start afresh with a smaller --batch and --overwrite"
        ) from error
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{name}{error.strerror or error}; {safe}") from error
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            raise UserError(
                "no memory for a batch; start afresh with a smaller --batch and --overwrite"
            ) from error
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a worker process died, perhaps for lack of (shared) memory; {safe}, best with fewer "
            "--workers"
        ) from error


def _prepare(job: Job, settings: Settings) -> dict[str, set[str]]:
    """Check the parts there are, and note what this run may not change; the units that are missing.

    They are given by name, for every stage.
    """
    folder = job.parts.folder
    if settings.overwrite:
        for path in job.outputs:
            path.unlink(missing_ok=True)
        for name in os.listdir(folder):
            if name != LOCK:
                _remove(folder / name)
    before = read_json(folder / "run.json") if (folder / "run.json").exists() else {"stages": {}}
    stages = {stage.name: stage.fingerprint for stage in job.stages}
    if "identity" in before:
        _refuse_change(folder, before["identity"], job.identity)
    for stage in job.stages:
        if stage.name in before["stages"]:
            _refuse_change(folder, before["stages"][stage.name], stage.fingerprint)
            _drop_changed(job.parts, stage, before["stages"][stage.name].get("shards", {}))
    write_json(folder / "run.json", {"identity": job.identity, "stages": before["stages"] | stages})
    return {stage.name: {unit.name for unit in job.parts.missing(stage)} for stage in job.stages}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _drop_changed(parts: Parts, stage: Stage, before: dict) -> None:
    """Drop the parts of units whose shards have other sizes now: mended or fetched again."""
    for unit, sizes in stage.fingerprint.get("shards", {}).items():
        if before.get(unit, sizes) != sizes:
            parts.drop(stage, unit)
            say(f"{stage.name}: the shards of {unit} have changed; encoding them again")


def _refuse_change(folder: Path, before: dict, now: dict) -> None:
    """Raise UserError if two fingerprints differ in more than their shards."""
    before, now = json.loads(json.dumps(before)), json.loads(json.dumps(now))
    for key in sorted((before.keys() | now.keys()) - {"shards"}):
        old, new = (one.get(key, UNSAID.get(key)) for one in (before, now))
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            key, old, new = next(
                (f"{key}, {k}", old.get(k), new.get(k))
                for k in sorted(old.keys() | new.keys())
                if old.get(k) != new.get(k)
            )
        raise UserError(
            f"{folder} holds an unfinished run with another {key} ({old}, now {new}); continue "
            "it with what it was begun with, or start afresh with --overwrite"
        )


def _finish(job: Job, settings: Settings, clock: Clock) -> None:
    """Write the finished files, report what was left out, and drop the parts."""
    missing = [unit for stage in job.stages for unit in job.parts.missing(stage)]
    if missing:
        raise UserError(f"{len(missing)} parts are missing; the same command continues")
    with doing("putting the parts together"):
        summaries = {stage.name: stage.sum_up(job.parts, settings.skip_bad) for stage in job.stages}
        job.finish(summaries)
    for name, summary in summaries.items():
        clock.rows[name] = int(summary.keep.sum())
        _report(name, summary)
    drop_parts(job.parts.folder)


def _report(name: str, summary: Summary) -> None:
    for entry in summary.skipped:
        row = f" row {entry['row']}" if entry["row"] else ""
        say(f"skipped {name}{row}: {entry['image_path']}: {entry['cause']}")
    if summary.unmatched:
        print(f"{name}: {summary.unmatched} samples of the shards belong to no row; left out")
