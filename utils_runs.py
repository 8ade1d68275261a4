"""From flags to runs: presets, flags without effect, names of variants, sweeps and ablations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from utils import UserError, file_safe
from utils_retrieval import EFFECTIVE_WITH, METHODS, Parameters

DEFAULTS = Parameters()
MOST_POINTS = 10_000  # of a sweep: more is a mistyped step, and a point costs memory

# How a departure from the preset is written in a variant's name: a switch as it is named when off
# ("no_projection") or on ("projection"), anything else as this word and its value ("aa0.5").
VARIANT_WORDS = {
    "contextualize": "contextualization",
    "fusion_weight": "weight",
    "standardize_features": "standardization",
    "use_laion_mean": "laion_mean",
    "project_features": "projection",
    "specified_corpus": "corpus-",
    "specified_ncorpus": "ncorpus-",
    "aa": "aa",
    "num_principal_components_for_projection": "components",
    "do_query_expansion": "query_expansion",
    "qe_k": "k",
    "normalize_similarities": "normalization",
    "normalize_text_by": "text_by_",
    "harris_lambda": "lambda",
}

# What a parameter may be: a test and how the error says it.
LIMITS = {
    "fusion_weight": (lambda value: 0 <= value <= 1, "between 0 and 1"),
    "aa": (lambda value: 0 <= value <= 1, "between 0 and 1"),
    "num_principal_components_for_projection": (
        lambda value: 0 < value < 1 or (value >= 1 and value % 1 == 0),
        "a whole number of components, or a share of energy above 0 and below 1",
    ),
    "qe_k": (lambda value: value >= 1, "at least 1"),
    "harris_lambda": (lambda value: abs(value) <= 1e6, "between -1e6 and 1e6"),
}

# The steps of the paper's component table, in its order.
STEPS = {
    "standardization": {"standardize_features": False, "use_laion_mean": False},
    "projection": {"project_features": False},
    "query expansion": {"do_query_expansion": False},
    "contextualization": {"contextualize": False},
    "normalisation": {"normalize_similarities": False},
    "Harris": {"harris_lambda": 0.0},
}


@dataclass(frozen=True)
class Run:
    """A method (its name in METHODS), its parameters, and the name of its results' folder."""

    method: str
    parameters: Parameters
    variant: str


# ---------------------------------------------------------------------------------------------
# Parameters of a run
# ---------------------------------------------------------------------------------------------


def settle_parameters(method: str, given: Mapping, use_preset: bool) -> Parameters:
    """A method's parameters: defaults, then its preset if asked for, then what was given.

    given: parameters named on the command line; those that the method does not read are left out.
    Parameters without effect return to their defaults, so that equal computations are equal.
    Raises UserError for a value out of bounds.
    """
    preset = METHODS[method].preset if use_preset else {}
    read = {name: value for name, value in given.items() if name in METHODS[method].reads}
    parameters = replace(DEFAULTS, **{**preset, **read})
    _check_limits(parameters)
    return without_idle(parameters)


def without_idle(parameters: Parameters) -> Parameters:
    """The same computation with every parameter that has no effect at its default."""
    for name, switches in EFFECTIVE_WITH.items():
        if not any(getattr(parameters, switch) for switch in switches):
            parameters = replace(parameters, **{name: getattr(DEFAULTS, name)})
    return parameters


def _check_limits(parameters: Parameters) -> None:
    for name, (holds, words) in LIMITS.items():
        value = getattr(parameters, name)
        if not holds(value):
            raise UserError(f"--{name} {value:g}: it has to be {words}")


def check_effects(given: Mapping, runs: Sequence[Run], swept: Sequence[str] = ()) -> None:
    """Raise UserError for a given or swept parameter that changes nothing in any of the runs.

    A switch turned off (--no-...) is a statement, not a setting, and never an error where a run's
    method reads it.
    """
    for name in (*given, *swept):
        readers = [run for run in runs if name in METHODS[run.method].reads]
        if not readers:
            methods = ", ".join(m for m, method in METHODS.items() if name in method.reads)
            raise UserError(
                f"--{name} has no effect on --method {runs[0].method}: only {methods} read it"
            )
        switches = EFFECTIVE_WITH.get(name, ())
        if given.get(name) is False or not switches:
            continue
        if not any(getattr(run.parameters, s) for run in readers for s in switches):
            needed = " or ".join(f"--{switch}" for switch in switches)
            raise UserError(f"--{name} has no effect without {needed}: add it, or leave --{name}")


def name_variant(method: str, parameters: Parameters, *extra: str) -> str:
    """The method and, word by word, what departs from its preset: basic_no_query_expansion.

    extra: words for departures outside the parameters.
    """
    preset = without_idle(replace(DEFAULTS, **METHODS[method].preset))
    words = []
    for name in METHODS[method].reads:
        value = getattr(parameters, name)
        switches = EFFECTIVE_WITH.get(name, ())
        idle = switches and not any(getattr(parameters, switch) for switch in switches)
        if value == getattr(preset, name) or idle:
            continue
        word = VARIANT_WORDS[name]
        if isinstance(value, bool):
            words.append(word if value else f"no_{word}")
        else:
            words.append(f"{word}{show_value(value)}")
    return file_safe("_".join([method, *words, *extra]).replace("+", ""))


def show_value(value: bool | int | float | str) -> str:
    """A parameter as tables and names have it: as short as tells it from every other value."""
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return repr(value) if isinstance(value, float) and float(short) != value else short


# ---------------------------------------------------------------------------------------------
# Sweeps and ablations
# ---------------------------------------------------------------------------------------------


def parse_axis(text: str) -> tuple[str, list[bool | int | float]]:
    """NAME=V1,V2,... or NAME=START:STOP:STEP (STOP included) as (name, values).

    Raises UserError if the name is no numeric or boolean parameter, or a value does not fit it.
    """
    name, _, values = text.partition("=")
    name = name.lstrip("-").replace("-", "_")
    known = [n for n, default in asdict(DEFAULTS).items() if not isinstance(default, str)]
    if name not in known:
        raise UserError(f"--sweep {text}: {name!r} is none of {', '.join(known)}")
    kind = type(getattr(DEFAULTS, name))
    try:
        parsed = [_as_kind(kind, value) for part in values.split(",") for value in _expand(part)]
    except ValueError:
        raise UserError(
            f"--sweep {text}: write NAME=V1,V2,... or NAME=START:STOP:STEP (at most {MOST_POINTS} "
            f"values), with values of type {kind.__name__}"
        ) from None
    return name, list(dict.fromkeys(parsed))


def _expand(part: str) -> list[str]:
    """A range START:STOP:STEP as its values, anything else as it is."""
    if ":" not in part:
        return [part]
    start, stop, step = (float(number) for number in part.split(":"))
    count = (stop - start) / step if step else math.inf
    if not 0 <= count < MOST_POINTS:
        raise ValueError(part)
    return [f"{start + i * step:.12g}" for i in range(int(count + 1e-9) + 1)]


def _as_kind(kind: type, text: str) -> bool | int | float:
    if kind is not bool:
        return kind(text)
    words = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


def sweep_points(
    method: str, given: Mapping, use_preset: bool, axes: Mapping[str, list]
) -> list[tuple[dict, Parameters]]:
    """Every point of the grid: (its values on the axes, the parameters), last axis fastest."""
    count = math.prod(map(len, axes.values()))
    if count > MOST_POINTS:
        raise UserError(f"--sweep: {count} points; at most {MOST_POINTS} make one table")
    grid = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    return [(at, settle_parameters(method, {**given, **at}, use_preset)) for at in grid]


def ablation_points(full: Parameters) -> list[tuple[str, Parameters]]:
    """The paper's kind of component table: steps added one by one, then each taken from the full.

    full: parameters of basic. Returns (components, parameters); steps that `full` does not have are
    left out. Raises UserError if it has none.
    """
    steps = {name: off for name, off in STEPS.items() if without_idle(replace(full, **off)) != full}
    if not steps.keys() - {"Harris"}:
        raise UserError("--ablation: no component is on; add --use_preset or the steps' own flags")
    points = []
    for count in range(len(steps)):
        off = {k: v for name in list(steps)[count:] for k, v in steps[name].items()}
        label = f"+ {list(steps)[count - 1]}" if count else "bare fusion"
        points.append((label, without_idle(replace(full, **off))))
    points.append((f"+ {list(steps)[-1]} (full)", full))
    points += [(f"full - {name}", without_idle(replace(full, **steps[name]))) for name in steps]
    return points
