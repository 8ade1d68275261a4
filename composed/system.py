"""What a system is: a network that composes, its texts, and the encoder that extraction drives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import UserError
from utils_backbones import PRECISIONS, inference

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

# Of the pixels that OpenAI's CLIP takes, red, green and blue from 0 to 1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Options:
    """What the command line says to a system; None or empty where it says nothing.

    gallery_weights: the checkpoint that encodes the gallery. tokens: keep each token's vector.
    seeds: of draws. query_prompt, gallery_prompt: instructions of a model. trust_remote_code:
    run code that lies beside it.
    """

    gallery_weights: Path | None = None
    tokens: bool = False
    seeds: tuple[int, ...] = ()
    query_prompt: str | None = None
    gallery_prompt: str | None = None
    trust_remote_code: bool = False


class Composer:
    """A loaded system, as its file implements it.

    network: the module that is moved to the device. preprocess: image -> tensor, of one shape, or
    image, picklable; query_preprocess: that of query images where it is another. identity: what
    tells the model from another. dim: the width of a query vector and of a gallery vector. unit:
    rows are of unit length; False: they are compared as they are.
    """

    network: torch.nn.Module
    preprocess: Callable[[Image.Image], Any]
    identity: dict[str, Any]
    dim: int
    query_preprocess: Callable[[Image.Image], Any] | None = None
    unit: bool = True

    @property
    def query_columns(self) -> dict[str, int]:
        """The arrays of a query, name of the file -> width."""
        return {"query_composed": self.dim}

    @property
    def gallery_columns(self) -> dict[str, int]:
        """The arrays of a gallery row, name of the file -> width."""
        return {"database_image": self.dim}

    def queries(
        self, images: Tensor | list, texts: Sequence[str], numbers: Sequence[int]
    ) -> Tensor:
        """Rows (B, sum of query_columns) of preprocessed images (B, ...) with a text each.

        numbers: which queries these are, so that what is drawn for one does not depend on others.
        """
        raise NotImplementedError

    def gallery(self, images: Tensor | list) -> Tensor:
        """Rows (B, sum of gallery_columns) of preprocessed images (B, ...)."""
        raise NotImplementedError

    def is_cut(self, text: str) -> bool:
        """Whether a text is longer than the model reads."""
        return False


@dataclass(frozen=True)
class System:
    """A system, as its file declares it.

    load(place, options) -> Composer, on the CPU. prompts: the form of the text by the task's
    prompts, "" for all others, see composed/texts.py; clean: what is done to it then. takes: the
    Options it reads.
    """

    load: Callable[[str, Options], Composer]
    prompts: Mapping[str, str] = field(default_factory=lambda: {"": "{caption}"})
    clean: Callable[[str], str] = str
    takes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ComposedEncoder:
    """A system on its device, in the place of a backbone's encoder (utils_features.Encoder).

    dim: the width of a gallery row, of all its arrays together. The rows are float32.
    """

    composer: Composer
    device: torch.device
    precision: str

    @classmethod
    def of(
        cls, backbone: str, composer: Composer, device: torch.device, precision: str
    ) -> ComposedEncoder:
        """Move a system to a device. Raises UserError for a precision that there is not."""
        if precision not in PRECISIONS:
            raise UserError(f"--precision {precision}: choose among {', '.join(PRECISIONS)}")
        composer.network.eval().to(device)
        return cls(composer, device, precision)

    @property
    def identity(self) -> dict[str, Any]:
        return {**self.composer.identity, "unit": self.composer.unit}

    @property
    def preprocess(self) -> Callable:
        return self.composer.preprocess

    @property
    def query_preprocess(self) -> Callable:
        """That of query images."""
        return self.composer.query_preprocess or self.composer.preprocess

    @property
    def gallery_columns(self) -> dict[str, int]:
        """The arrays of a gallery row, name of the file -> width."""
        return self.composer.gallery_columns

    @property
    def query_columns(self) -> dict[str, int]:
        """The arrays of a query, name of the file -> width."""
        return self.composer.query_columns

    @property
    def dim(self) -> int:
        return sum(self.gallery_columns.values())

    def encode_images(self, batch: Tensor | list, half_pixels: bool = False) -> Tensor:
        """Gallery rows (B, dim) float32 on the CPU of preprocessed images (B, ...) on the CPU."""
        with inference(self.device, self.precision):
            return self.composer.gallery(self._on_device(batch)).float().cpu()

    def encode_queries(
        self, batch: Tensor | list, texts: Sequence[str], numbers: Sequence[int]
    ) -> Tensor:
        """Query rows float32 on the CPU of preprocessed images (B, ...) and a text each."""
        with inference(self.device, self.precision):
            rows = self.composer.queries(self._on_device(batch), list(texts), list(numbers))
            return rows.float().cpu()

    def _on_device(self, batch: Tensor | list[Image.Image]) -> Tensor | list[Image.Image]:
        return batch if isinstance(batch, list) else batch.to(self.device)
