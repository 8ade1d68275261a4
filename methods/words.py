"""What methods of pseudo words share: image-to-word networks, their checkpoints, prompts."""

from __future__ import annotations

import itertools
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import UserError
from utils_captions import STRIPPED, instructions
from utils_inputs import Widths, Words

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from utils_task import Task


# ---------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """An image-to-word network: linear layers with an activation between them.

    key: where the checkpoint has its weights. layers: the names of the linear layers, in order.
    activation: a function of torch.nn.functional. Dropout does nothing when a network is applied.
    """

    key: str
    layers: tuple[str, ...]
    activation: str

    @property
    def tensors(self) -> list[str]:
        """The names of its weights and biases."""
        return [f"{layer}.{kind}" for layer in self.layers for kind in ("weight", "bias")]


# SEARLE (section 3.2), taken over by LinCIR and CVSI: d -> 4 d -> 4 d -> width, exact GELU.
PHI = Network("Phi", ("layers.0", "layers.3", "layers.6"), "gelu")
# Pic2Word (section 3.1), IM2TEXT: d -> 512 -> 512 -> width, ReLU.
IM2TEXT = Network("state_dict_img2text", ("layers.0.0", "layers.1.0", "fc_out"), "relu")


def read_network(path: Path, network: Network, dim: int, token_dim: int) -> dict[str, Tensor]:
    """The weights of a network, float32, from a checkpoint in torch's format.

    dim, token_dim: of the backbone's features and of its token embeddings. Only tensors and plain
    values are read, nothing in the file is run. Raises UserError for a file that is absent, holds
    anything else or another network, and for a network that does not fit the backbone.
    """
    from utils_pickles import load_checkpoint

    if not path.is_file():
        raise UserError(f"--phi {path} does not exist")
    content = load_checkpoint(path, f"--phi {path}")
    state = content.get(network.key) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        held = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content)
        raise UserError(
            f"--phi {path} has no {network.key!r} (it holds {held}); SEARLE, LinCIR and CVSI have "
            f"{PHI.key!r}, Pic2Word has {IM2TEXT.key!r}"
        )
    state = {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
    _check_tensors(path, network, state)
    weights = {name: state[name].float() for name in network.tensors}
    _check_shapes(path, network, weights, dim, token_dim)
    return weights


def _check_tensors(path: Path, network: Network, state: Mapping[str, Any]) -> None:
    import torch

    missing = [name for name in network.tensors if name not in state]
    surplus = [name for name in state if name not in network.tensors]
    if missing or surplus:
        problem = f"lacks {missing[0]!r}" if missing else f"has {surplus[0]!r} beside its layers"
        raise UserError(f"--phi {path}: {network.key!r} {problem}; it is another network")
    for name in network.tensors:
        tensor = state[name]
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise UserError(f"--phi {path}: {name!r} is no tensor of floating point numbers")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise UserError(f"--phi {path}: {name!r} is sparse or without numbers")
        if not bool(tensor.float().isfinite().all()):
            raise UserError(f"--phi {path}: {name!r} holds numbers that are not finite")


def _check_shapes(
    path: Path, network: Network, weights: Mapping[str, Tensor], dim: int, token_dim: int
) -> None:
    shapes = [tuple(weights[f"{layer}.weight"].shape) for layer in network.layers]
    biases = [tuple(weights[f"{layer}.bias"].shape) for layer in network.layers]
    chained = all(len(shape) == 2 for shape in shapes) and all(
        first[0] == second[1] for first, second in itertools.pairwise(shapes)
    )
    if not chained or biases != [shape[:1] for shape in shapes]:
        raise UserError(f"--phi {path}: its layers do not follow each other: {shapes}")
    found = shapes[0][1], shapes[-1][0]
    if found != (dim, token_dim):
        raise UserError(
            f"--phi {path} turns features of {found[0]} dimensions into words of {found[1]}, but "
            f"the backbone has {dim} and {token_dim}: it was trained for another backbone"
        )


def apply_network(network: Network, weights: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """Words (n, W) of image features (n, D), as the model gives them; float32 both."""
    from torch.nn import functional

    activate = getattr(functional, network.activation)
    x = features
    for number, layer in enumerate(network.layers):
        x = activate(x) if number else x
        x = functional.linear(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"])
    return x


# ---------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inversion:
    """A method: its network, its mark, and its prompts.

    prompts: by the task's prompts, "" for all others. A prompt of several texts is the mean of
    their unit features. everywhere: the mark is replaced wherever it stands, not where it stands
    first.
    """

    network: Network
    mark: str
    prompts: Mapping[str, tuple[str, ...]]
    everywhere: bool = False


def texts_of(inversion: Inversion, task: Task, prompt: str | None = None) -> list[tuple[str, ...]]:
    """The texts of each query, one or several. prompt: one's own, in place of the published one.

    In a prompt {caption} is the query's text; FashionIQ has {first} and {second}, stripped of
    ".?, ", and {first_as_is}, {second_as_is}; any further text of the task goes by its name.
    Raises UserError for a prompt without the mark, or with a name that the task has not.
    """
    chosen = inversion.prompts.get(task.prompts, inversion.prompts[""])
    return fill_prompts((prompt,) if prompt is not None else chosen, inversion.mark, task, {})


def fill_prompts(
    prompts: Sequence[str], mark: str, task: Task, more: Mapping[str, Sequence[str]]
) -> list[tuple[str, ...]]:
    """The texts of each query: each prompt with the query's texts in it. more: texts by name."""
    return fill_forms(prompts, mark, {**task_texts(task), **more})


def fill_forms(
    prompts: Sequence[str], mark: str, known: Mapping[str, Sequence[str]]
) -> list[tuple[str, ...]]:
    """For each query, each prompt with the query's texts in it. known: Q texts by name.

    Raises UserError for a prompt without the mark ("": none is due), or with an unknown name.
    """
    for prompt in prompts:
        _check_prompt(prompt, mark, known)
    filled = []
    for row in range(len(next(iter(known.values())))):
        own = {name: texts[row] for name, texts in known.items()}
        filled.append(tuple(prompt.format(**own) for prompt in prompts))
    return filled


def task_texts(task: Task) -> dict[str, Sequence[str]]:
    """The texts that a prompt may name, Q each."""
    known: dict[str, Sequence[str]] = {**task.queries.fields, "caption": instructions(task)}
    for name in ("first", "second"):
        if name in task.queries.fields:
            known[f"{name}_as_is"] = task.queries.fields[name]
            known[name] = [text.strip(STRIPPED) for text in task.queries.fields[name]]
    return known


def _check_prompt(prompt: str, mark: str, known: Mapping[str, Sequence[str]]) -> None:
    if not prompt.isascii() and prompt != prompt.encode("utf-8", "replace").decode("utf-8"):
        raise UserError(f"--prompt {prompt!r} is not text in UTF-8")
    if mark not in prompt:
        raise UserError(f"--prompt {prompt!r}: the mark {mark!r}, where the word goes, is missing")
    try:
        parts = list(string.Formatter().parse(prompt))
    except ValueError as error:
        raise UserError(f"--prompt {prompt!r}: {error}; write {{{{ for a brace") from None
    for _, name, form, conversion in parts:
        if name in known and (form or conversion):
            raise UserError(f"--prompt {prompt!r}: write {{{name}}} alone, as it takes no format")
        if name is not None and name not in known:
            names = ", ".join(f"{{{name}}}" for name in known)
            raise UserError(f"--prompt {prompt!r}: {{{name}}} is unknown; there are {names}")


# ---------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------


def make_words(
    path: Path, inversion: Inversion, encoder: Widths, half_pixels: bool = False
) -> Words:
    """The pseudo words of query images by the network of a checkpoint."""
    import torch

    weights = read_network(path, inversion.network, encoder.dim, encoder.token_dim)

    def make(features: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return apply_network(inversion.network, weights, torch.from_numpy(features)).numpy()

    return Words(inversion.mark, make, inversion.everywhere, half_pixels)
