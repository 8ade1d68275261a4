"""Texts that a method asks for while it scores: found by a run of its preset, encoded, and kept.

The run itself would encode them too (utils_texts.py), but all at once and with nothing to continue.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from extraction.encoding import Settings
from extraction.job import Job
from extraction.manifest import identify
from extraction.parts import Parts, cut_ranges
from extraction.stage import Rows, Summary, TextStage
from utils_assets import load_assets
from utils_backbones import Places
from utils_evaluation import evaluate
from utils_runs import Run, Setting
from utils_storage import Features
from utils_texts import TextStore, open_texts

if TYPE_CHECKING:
    from utils_features import Encoder


@dataclass
class Recorder:
    """Stands in for an encoder: notes the texts that are asked for, and gives any unit rows."""

    dim: int
    device: torch.device
    texts: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        with self._lock:
            self.texts.update(texts)
        return torch.full((len(texts), self.dim), self.dim**-0.5, device=self.device)


def find_asked(features: Features, run: Run, places: Places, device: torch.device) -> list[str]:
    """The distinct texts that a run of a method asks for, sorted."""
    assets = load_assets(places, features, [run], device)
    recorder = Recorder(features.dim, device)
    evaluate(features, [run], replace(assets, encode_texts=recorder), device)
    return sorted(recorder.texts)


@dataclass(frozen=True)
class AskedWork:
    """The texts that the preset of a method asks for on a data set."""

    method: str
    features: Features
    places: Places

    def plan(self, settings: Settings, encoder: Encoder) -> Job:
        """The job of those that are not kept yet; no stages if all are.

        Raises UserError if the features are of another model, or an asset of the run is missing.
        """
        store = open_texts(self.places.features, self.features, encoder.device)
        store.check_model(encoder.identity, f"the backbone {settings.backbone}")
        setting = Setting({}, True, self.features.dataset, settings.backbone)
        run = setting.run(self.method)
        new = store.missing(find_asked(self.features, run, self.places, encoder.device))
        if not new:
            print(f"{store.folder}: every text is there already")
        rows = Rows.of(new, self.features.source, range(1, len(new) + 1))
        stage = TextStage(
            name="texts",
            rows=rows,
            units=cut_ranges(rows.count, settings.part_rows),
            fingerprint={"texts": hashlib.sha256(json.dumps(new).encode()).hexdigest()},
        )
        parts = Parts(store.folder / f".parts_{self.features.dataset}_{self.method}")
        return Job(
            title=f"{self.features.dataset} {self.method}",
            parts=parts,
            stages=[stage] if new else [],
            identity=identify(settings, encoder),
            outputs=[store.folder / "texts.npy"],
            finish=functools.partial(self._finish, store, stage, parts, encoder),
        )

    def _finish(
        self,
        store: TextStore,
        stage: TextStage,
        parts: Parts,
        encoder: Encoder,
        summaries: dict[str, Summary],
    ) -> None:
        """Add the texts to those that are kept."""
        values = np.concatenate([part.features for part in parts.read(stage)])
        store.keep(stage.rows.items, values, encoder.identity)
