"""Inputs: the further features that a method reads, declared by it and made by create_features.

A method's inputs are {name: Input}; `create_features.py --inputs NAME` asks the producer what the
rows are made of, and encodes them beside the data set's other features (extraction/inputs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

    from utils_task import Task


class Widths(Protocol):
    """What a producer may ask of the encoder: the widths of features and of token embeddings."""

    dim: int
    token_dim: int


@dataclass(frozen=True)
class Options:
    """What the command line says to a producer: the network, the caption files, the prompt."""

    phi: Path | None = None
    captions: Path | None = None
    prompt: str | None = None


@dataclass(frozen=True, eq=False)
class Words:
    """Pseudo words made of the query images, in place of a mark in the texts.

    make: image features float32 (n, D), as the model gives them -> vectors float32 (n, W).
    everywhere: wherever the mark stands. half_pixels: the images are encoded again, their
    normalised pixels rounded to half precision before.
    """

    mark: str
    make: Callable[[np.ndarray], np.ndarray]
    everywhere: bool = False
    half_pixels: bool = False


@dataclass(frozen=True, eq=False)
class InputArray:
    """One array: a row is the mean of the unit features of its texts.

    name: of its file, without ending: "query_NAME", a row a query, or "database_NAME", a row a
    gallery image. words: stand in the texts of queries. with_image: bool (rows,), queries whose row
    is made unit length and averaged with the unit feature of their image, or None for none. unit:
    rows of queries are made unit length when they are read, as all others are.
    """

    name: str
    texts: Sequence[tuple[str, ...]]
    words: Words | None = None
    with_image: np.ndarray | None = None
    unit: bool = True


@dataclass(frozen=True)
class Produced:
    """What an input consists of. facts: what it was made with, for its manifest and to tell it from
    another: hashes of networks and files, prompts."""

    arrays: Sequence[InputArray]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Input:
    """An input that a method declares. produce(task, encoder, options): what it consists of.

    needs, takes: the options it cannot do without, and those it may have besides.
    """

    produce: Callable[[Task, Widths, Options], Produced]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AskedTexts:
    """An input that is no array: the texts that a method asks for while its preset scores, which
    are encoded and kept beforehand. It takes no options."""

    method: str
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
