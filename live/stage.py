"""The stage of a round's photographs: one of which none can be read is no mistake of the user's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from extraction.parts import Parts
from extraction.stage import FileStage, Summary


@dataclass(frozen=True, kw_only=True)
class PhotoStage(FileStage):
    """Photographs, each listed once, that may all be damaged while others are indexed."""

    def sum_up(self, parts: Parts, skip_bad: bool) -> Summary:
        keep = np.ones(len(self.rows), bool)
        skipped = []
        for part in parts.read(self, features=False):
            for item, path, cause in part.bad:
                keep[item] = False
                skipped.append({"row": item + 1, "image_path": path, "cause": cause})
        return Summary(keep, skipped)
