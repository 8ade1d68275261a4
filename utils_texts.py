"""Features of texts that methods make up as they go: encoded once each, and kept on disk.

features/{backbone}_features/texts/  texts.csv  texts.npy  manifest.json
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils import UserError, atomic_path, locked, read_json, write_csv, write_json
from utils_pickles import read_array
from utils_storage import Features, features_folder, read_csv_columns

if TYPE_CHECKING:
    import torch

    from utils_features import Encoder

TEXTS = "texts"  # the folder's name, beside those of data sets
BATCH = 256


@dataclass(eq=False)
class TextStore:
    """The texts of a backbone whose features are known, and the way to more.

    features: whose backbone and model it is. load: gives the encoder, when it is first needed.
    """

    folder: Path
    features: Features
    load: Callable[[], Encoder]
    _known: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def encode(self, texts: Sequence[str], device: torch.device) -> torch.Tensor:
        """Features (n, D) float32 on the device, of unit length, of n texts.

        What is not on disk is encoded, said on stderr, and written there. Raises UserError if the
        backbone cannot be loaded, or is another than that of the features.
        """
        import torch

        from utils_evaluation import unit_features

        with self._lock:
            if not self._known:
                self._known = self._read()
            new = [text for text in dict.fromkeys(texts) if text not in self._known]
            if new:
                self._add(new)
            rows = np.stack([self._known[text] for text in texts])
        return unit_features(rows, torch.device(device), f"{self.folder / 'texts.npy'}")

    def _read(self) -> dict[str, np.ndarray]:
        """What is on disk. Raises UserError if it is of another model, or damaged."""
        if not (self.folder / "manifest.json").exists():
            return {}
        self.check_model(read_json(self.folder / "manifest.json").get("model"), self.folder)
        table = read_csv_columns(self.folder / "texts.csv", ("text",))["text"]
        values = read_array(self.folder / "texts.npy")
        if len(values) != len(table) or values.shape[1] != self.features.dim:
            raise UserError(
                f"{self.folder}: texts.csv and texts.npy do not fit; remove the folder, its texts "
                "are encoded again"
            )
        return dict(zip(table, values, strict=True))

    def check_model(self, model: dict | None, place: object) -> None:
        """Raise UserError if a model is another than that of the features. place: where it is."""
        own = (self.features.manifest or {}).get("model")
        if own and model and own != model:
            raise UserError(
                f"{place} and {self.features.source} come from different models: extract the "
                "features again, or remove the texts"
            )

    def _add(self, new: list[str]) -> None:
        """Encode texts, and keep them."""
        backbone = self.features.backbone
        print(f"encoding {len(new)} texts with {backbone}, to {self.folder}", file=sys.stderr)
        encoder = self.load()
        self.check_model(encoder.identity, f"the backbone {backbone}")
        self.keep(new, encoder.encode_texts(new, BATCH), encoder.identity)

    def missing(self, texts: Sequence[str]) -> list[str]:
        """The distinct texts that are not kept, in their order."""
        known = self._read()
        return [text for text in dict.fromkeys(texts) if text not in known]

    def keep(self, texts: Sequence[str], values: np.ndarray, model: dict) -> None:
        """Write texts with their features (n, D) beside those that are there by now."""
        with locked(self.folder):
            self._known = {**self._read(), **dict(zip(texts, values, strict=True))}
            (self.folder / "manifest.json").unlink(missing_ok=True)
            write_csv(self.folder / "texts.csv", ["text"], ([text] for text in self._known))
            with atomic_path(self.folder / "texts.npy") as part, open(part, "wb") as file:
                np.save(file, np.stack(list(self._known.values())))
            write_json(self.folder / "manifest.json", {"kind": TEXTS, "model": model})


def open_texts(features_dir: Path, features: Features, device: torch.device) -> TextStore:
    """The texts of the features' backbone, which is loaded on the device when it is first asked."""

    @cache
    def load() -> Encoder:
        from utils_features import load_encoder

        precision = (features.manifest or {}).get("precision", "fp32")
        return load_encoder(features.backbone, device, precision)

    return TextStore(features_folder(features_dir, features.backbone, TEXTS), features, load)
