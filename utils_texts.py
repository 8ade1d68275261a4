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
from utils_storage import Features, MappedRows, features_folder, read_csv_columns

if TYPE_CHECKING:
    import torch

    from utils_features import Encoder

TEXTS = "texts"  # the folder's name, beside those of data sets
BATCH = 256
ROWS_READ = 4096  # of the features, together


@dataclass(eq=False)
class TextStore:
    """The texts of a backbone whose features are known, and the way to more.

    features: whose backbone and model it is. load: gives the encoder, when it is first needed.
    """

    folder: Path
    features: Features
    load: Callable[[], Encoder]
    _row: dict[str, int] = field(default_factory=dict, repr=False)
    _file: MappedRows | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def encode(self, texts: Sequence[str], device: torch.device) -> torch.Tensor:
        """Features (n, D) float32 on the device, of unit length, of n texts.

        What is not on disk is encoded, said on stderr, and written there. Raises UserError if the
        backbone cannot be loaded, or is another than that of the features, and for a row that is
        zero, infinite or NaN.
        """
        import torch

        from utils_evaluation import check_lengths

        with self._lock:
            if not self._row:
                self._row, self._file = self._read()
            new = [text for text in dict.fromkeys(texts) if text not in self._row]
            if new:
                self._add(new)
            row, file = np.array([self._row[text] for text in texts]), self._file
        found = torch.empty((len(row), self.features.dim), device=device)
        for place in np.split(row.argsort(), range(ROWS_READ, len(row), ROWS_READ)):
            raw = torch.from_numpy(file.read(row[place])).to(device).float()
            length = raw.norm(dim=1)
            check_lengths(length, file.path, row[place].__getitem__)
            found[torch.from_numpy(place).to(device)] = raw / length[:, None]
        return found

    def _read(self) -> tuple[dict[str, int], MappedRows | None]:
        """The texts on disk with the rows of their features. Raises UserError if these are damaged.

        Or of another model.
        """
        if not (self.folder / "manifest.json").exists():
            return {}, None
        self.check_model(read_json(self.folder / "manifest.json").get("model"), self.folder)
        table = read_csv_columns(self.folder / "texts.csv", ("text",))["text"]
        row = {text: number for number, text in enumerate(table)}
        file = MappedRows(self.folder / "texts.npy")
        if file.shape != (len(row), self.features.dim):
            raise UserError(
                f"{self.folder}: texts.csv and texts.npy do not fit; remove the folder, its texts "
                "are encoded again"
            )
        return row, file

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
        known, _ = self._read()
        return [text for text in dict.fromkeys(texts) if text not in known]

    def keep(self, texts: Sequence[str], values: np.ndarray, model: dict) -> None:
        """Write texts with their features (n, D) beside those that are there by now."""
        with locked(self.folder):
            known, file = self._read()
            new = {text: row for row, text in enumerate(texts) if text not in known}
            kept = [file.read(slice(0, len(known)))] if file else []
            (self.folder / "manifest.json").unlink(missing_ok=True)
            write_csv(self.folder / "texts.csv", ["text"], ([text] for text in (*known, *new)))
            with atomic_path(self.folder / "texts.npy") as part, open(part, "wb") as target:
                np.save(target, np.concatenate([*kept, values[list(new.values())]]))
            write_json(self.folder / "manifest.json", {"kind": TEXTS, "model": model})
            self._row, self._file = self._read()


def open_texts(features_dir: Path, features: Features, device: torch.device) -> TextStore:
    """The texts of the features' backbone, which is loaded on the device when it is first asked."""

    @cache
    def load() -> Encoder:
        from utils_features import load_encoder

        precision = (features.manifest or {}).get("precision", "fp32")
        return load_encoder(features.backbone, device, precision)

    return TextStore(features_folder(features_dir, features.backbone, TEXTS), features, load)
