"""Running a plan: load what it needs, evaluate it in one pass, write its tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from utils import UserError, code_version, select_device
from utils_backbones import Places
from utils_plans import Output, Plan
from utils_ranks import device_index
from utils_runs import Protocol
from utils_signs import doing
from utils_startup import beside, quick_imports

if TYPE_CHECKING:
    from distractors.running import Added
    from utils_evaluation import Evaluation
    from utils_storage import Features
    from utils_task import Task

REPORT_TOP_K = 10
LEFT_OUT_SHOWN = 20  # rows that extraction left out, by name


def run_plan(
    plan: Plan,
    places: Places,
    dataset: str,
    gpu: int,
    protocol: Protocol,
    output: Output,
    added: Added | None = None,
) -> None:
    """Load what the plan's runs need, evaluate them in one pass, print and write their tables.

    dataset: its name or folder, as given. gpu: CUDA device, -1 for the CPU. added: distractors; of
    several ranks that share these the first one prints and writes.
    """
    backbone, name = plan.setting.backbone, plan.setting.dataset
    with quick_imports(), doing("loading PyTorch and the features", at_once=True):
        from tqdm import tqdm

        from utils_storage import is_native, load_features

        place = (places.features, backbone, name)
        # Pickles need torch first.
        with beside(load_features, *place) if is_native(*place) else nullcontext() as loaded:
            import torch

            from utils_assets import load_assets
            from utils_evaluation import evaluate
            from utils_labels import with_current_labels
            from utils_protocol import apply_protocol, describe_odd, describe_short, refuse_clashes

    with doing("reading features and annotation"):
        features = loaded() if loaded else plan.read_features(places, dataset)
        features, news = with_current_labels(features, dataset, places.data)
    features = replace(features, task=apply_protocol(features.task, protocol))
    if added:
        output = replace(output, tell=partial(added.tell, name))
    why_not = added.why_not if added else lambda method: ""
    plan, features = plan.ready(features, places, output.tell, why_not)
    refuse_clashes(features.task, plan.runs)
    device = select_device(device_index(gpu, added.group.ranks) if added else gpu, output.tell)
    distinct = list(dict.fromkeys(plan.runs))
    ties = output.ties or features.task.ties
    output = replace(_clamp_top_k(output, features.task), spelled=features.spelled)
    top_k = output.top_k or (REPORT_TOP_K if output.page else 0)
    with doing("reading assets"):
        assets = load_assets(places, features, distinct, device)
    try:
        if added:
            judged = added.evaluate(features, distinct, assets, device, ties)
            evaluated = judged.evaluations
        else:
            judged = None
            evaluated = evaluate(
                features,
                distinct,
                assets,
                device,
                ties=ties,
                tops=_rankings(features.task, top_k, output),
                explain=output.page is not None,
                progress=lambda blocks, count: tqdm(
                    blocks, total=count, unit="gallery", disable=None, leave=False
                ),
            )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory does not hold the work ({str(error).splitlines()[0]}); sweep fewer "
            "values at a time, or use the CPU with --gpu -1"
        ) from error
    if added and not added.is_first:
        return
    found = dict(zip(distinct, evaluated, strict=True))
    facts = _facts(features, ties, protocol, [*news, *(judged.notes if judged else ())])
    facts |= judged.facts if judged else {}
    if output.page:
        page = partial(output.page, about=_about(features, facts), viewed=features.viewed)
        output = replace(output, page=page)
    with doing("writing results"):
        plan.write([found[run] for run in plan.runs], facts, output)
    said = [*news, *(judged.lines if judged and added.is_largest else ())]
    said += describe_odd(features.task, features.manifest, protocol)
    more = int(judged.facts["distractors"]) if added and added.neighbours == "all" else 0
    for line in (*said, *describe_short(features.task, distinct, assets, more)):
        output.tell(line)


def _facts(
    features: Features, ties: str, protocol: Protocol, notes: Sequence[str]
) -> dict[str, str]:
    """What every row of the tables says of its run. notes: further ones than the task's."""
    from utils_protocol import left_out
    from utils_storage import manifest_hash

    return {
        "dataset": features.dataset,
        "ties": ties,
        "gallery": "all" if protocol.whole_gallery else "",
        "left_out": left_out(features.manifest),
        "notes": "; ".join((*features.task.notes, *notes)),
        "features": manifest_hash(features),
        "version": code_version() or "unknown",
    }


def _about(features: Features, facts: dict[str, str]) -> dict[str, str | list[str]]:
    """What a page says of its run, by name."""
    manifest = features.manifest or {}
    model = manifest.get("model") or {}
    skipped = manifest.get("skipped") or []
    lost = [f"{entry.get('image_path')} ({entry.get('cause')})" for entry in skipped]
    more = [f"and {len(lost) - LEFT_OUT_SHOWN} more"] if len(lost) > LEFT_OUT_SHOWN else []
    weights = [str(model[name]) for name in ("model", "pretrained") if model.get(name)]
    digest = model.get("weights_sha256")
    weights += [f"SHA-256 {digest[:12]}"] if digest else []
    said = {
        "Date": time.strftime("%Y-%m-%d %H:%M"),
        "Weights": ", ".join(weights),
        "Features": facts["features"],
        "Images": manifest.get("encoded", ""),
        "Version": facts["version"],
        "Ties rank by": facts["ties"],
        "Left out by extraction": [facts["left_out"], *lost[:LEFT_OUT_SHOWN], *more]
        if lost
        else "",
    }
    return {name: value for name, value in said.items() if value}


def _clamp_top_k(output: Output, task: Task) -> Output:
    """The output with rankings no longer than the largest gallery is, which is said."""
    largest = int(task.pool_sizes.max(initial=0))
    if output.top_k <= largest:
        return output
    print(f"--top_k {output.top_k}: the largest gallery has {largest} images", file=sys.stderr)
    return replace(output, top_k=largest)


def _rankings(task: Task, top_k: int, output: Output) -> dict[str, int]:
    """How many of the best rows are needed: view -> rows, for rankings, exports, submissions."""
    submissions = task.submitted
    if output.export:
        from external.export import export_rows, exported_submissions

        exported = exported_submissions(task, output.export, output.export_k)
        submissions = (*submissions, *exported)
        top_k = top_k if exported else max(top_k, export_rows(task, output.export_k))
    tops = {task.main_view: top_k}
    for submission in submissions:
        tops[submission.view] = max(submission.k, tops.get(submission.view, 0))
    return tops


def page_writer(places: Places, dataset: str, top_k: int) -> Callable:
    """What writes the page with the ranked images of some evaluations, and returns its path."""

    def write(
        folder: Path,
        evaluations: Sequence[Evaluation],
        about: dict | None = None,
        viewed: bool = False,
    ) -> Path:
        from benchmarks import find_images
        from report import write_report

        with doing("drawing the report"):
            return write_report(
                folder / "report",
                evaluations,
                find_images(dataset, places.data),
                top_k or REPORT_TOP_K,
                about=about,
                cache=folder.parent / "thumbnails",
                viewed=viewed,
            )

    return write
