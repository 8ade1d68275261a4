"""From flags to runs: presets, flags without effect, names of variants, sweeps and ablations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from methods import find_method, flags_of, list_flags
from utils import UserError, file_safe
from utils_backbones import DEFAULT_BACKBONE, backbone_folder
from utils_retrieval import Flag, Method

MOST_POINTS = 10_000  # of a sweep: more is a mistyped step, and a point costs memory


@dataclass(frozen=True)
class Run:
    """A method, its parameters, and the name of its results' folder."""

    method: Method
    parameters: Any
    variant: str


@dataclass(frozen=True)
class Protocol:
    """What a command changes of a task's own protocol.

    whole_gallery: every query searches all rows, not those of its own gallery. exclude_query_image:
    gallery rows that show a query's own image are not ranked for it. metrics: further measures.
    """

    whole_gallery: bool = False
    exclude_query_image: bool = False
    metrics: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """What the names of results say of it."""
        named = {"gallery_all": self.whole_gallery, "no_query_image": self.exclude_query_image}
        return tuple(word for word, is_on in named.items() if is_on)


@dataclass(frozen=True)
class Setting:
    """What the command line says of runs, beside the method: given holds its parameters by name.

    words: what departs from the usual outside the parameters, for the variants' names; synthetic:
    the same for normalisation features, named only where a run reads them.
    """

    given: Mapping[str, Any]
    use_preset: bool
    dataset: str
    backbone: str
    words: tuple[str, ...] = ()
    synthetic: str = ""

    def run(self, method: str, over: Mapping[str, Any] | None = None) -> Run:
        """A run of a method; `over` goes before what was given. Raises UserError out of bounds."""
        found = find_method(method)
        return self.named(found, settle_parameters(found, {**self.given, **(over or {})}, self))

    def named(self, method: Method, parameters: Any) -> Run:
        """A run of settled parameters, with its name."""
        return Run(method, parameters, name_variant(method, parameters, self))


# ---------------------------------------------------------------------------------------------
# Parameters of a run
# ---------------------------------------------------------------------------------------------


def preset_of(method: Method, dataset: str) -> dict[str, Any]:
    """The published settings of a method on a data set."""
    return {**method.preset, **method.presets.get(dataset, {})}


def settle_parameters(method: Method, given: Mapping[str, Any], setting: Setting) -> Any:
    """A method's parameters: defaults, then its preset if asked for, then what was given.

    given: parameters named on the command line; those that the method does not read are left out.
    Parameters without effect return to their defaults, so that equal computations are equal.
    Raises UserError for a value out of bounds.
    """
    preset = preset_of(method, setting.dataset) if setting.use_preset else {}
    read = {name: value for name, value in given.items() if name in flags_of(method)}
    parameters = method.parameters(**{**preset, **read})
    for name, (_, flag) in flags_of(method).items():
        _check_limits(name, flag, getattr(parameters, name))
    return without_idle(method, parameters)


def without_idle(method: Method, parameters: Any) -> Any:
    """The same computation with every parameter that has no effect at its default."""
    for name, (default, flag) in flags_of(method).items():
        if _is_idle(flag, parameters):
            parameters = replace(parameters, **{name: default})
    return parameters


def _is_idle(flag: Flag, parameters: Any) -> bool:
    return bool(flag.only_with) and not any(getattr(parameters, s) for s in flag.only_with)


def limits_of(flag: Flag) -> list[tuple[Callable[[Any], bool], str]]:
    """What a parameter's value has to be: tests, each with its words."""
    limits = []
    if flag.allowed:
        limits.append(flag.allowed)
    if flag.low is not None and flag.high is not None:
        words = f"between {flag.low:g} and {flag.high:g}"
        limits.append((lambda value: flag.low <= value <= flag.high, words))
    elif flag.low is not None:
        limits.append((lambda value: value >= flag.low, f"at least {flag.low:g}"))
    elif flag.high is not None:
        limits.append((lambda value: value <= flag.high, f"at most {flag.high:g}"))
    return limits


def _check_limits(name: str, flag: Flag, value: Any) -> None:
    for holds, words in limits_of(flag):
        if not holds(value):
            raise UserError(f"--{name} {value:g}: it has to be {words}")


def check_effects(given: Mapping[str, Any], runs: Sequence[Run], swept: Sequence[str] = ()) -> None:
    """Raise UserError for a given or swept parameter that changes nothing in any of the runs.

    A switch turned off (--no-...) is a statement, not a setting, and never an error where a run's
    method reads it.
    """
    for name in (*given, *swept):
        readers = [run for run in runs if name in flags_of(run.method)]
        if not readers:
            methods = list_flags()[name].methods
            read = f"{', '.join(methods)} {'read' if len(methods) > 1 else 'reads'} it"
            raise UserError(
                f"--{name} has no effect on --method {runs[0].method.name}: only {read}"
            )
        flag = list_flags()[name].flag
        if given.get(name) is False or not flag.only_with:
            continue
        if all(_is_idle(flag, run.parameters) for run in readers):
            needed = " or ".join(f"--{switch}" for switch in flag.only_with)
            raise UserError(f"--{name} has no effect without {needed}: add it, or leave --{name}")


def name_variant(method: Method, parameters: Any, setting: Setting) -> str:
    """The method and, word by word, what departs from its preset: basic_no_query_expansion.

    The backbone is named where it is not the default one.
    """
    preset = without_idle(method, method.parameters(**preset_of(method, setting.dataset)))
    words = []
    for name, (_, flag) in flags_of(method).items():
        value = getattr(parameters, name)
        if value == getattr(preset, name) or _is_idle(flag, parameters):
            continue
        if isinstance(value, bool):
            words.append(flag.word if value else f"no_{flag.word}")
        else:
            words.append(f"{flag.word}{show_value(value)}")
    words += setting.words
    if setting.synthetic and method.needs([parameters]).synthetic:
        words.append(f"synthetic-{setting.synthetic}")
    name = "_".join([method.name, *words]).replace("+", "")
    return file_safe(f"{name}{backbone_suffix(setting.backbone)}")


def backbone_suffix(backbone: str) -> str:
    """What a backbone adds to the names of results: nothing for the default one."""
    if backbone == DEFAULT_BACKBONE:
        return ""
    return f"_{backbone_folder(backbone).removesuffix('_features')}"


def shown_parameters(parameters: Any) -> dict[str, str]:
    """A method's parameters by name, as tables show them."""
    return {f.name: show_value(getattr(parameters, f.name)) for f in fields(parameters)}


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
    known = {
        n: flag.default for n, flag in list_flags().items() if not isinstance(flag.default, str)
    }
    if name not in known:
        raise UserError(f"--sweep {text}: {name!r} is none of {', '.join(known)}")
    kind = type(known[name])
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


def sweep_points(axes: Mapping[str, list]) -> list[dict[str, Any]]:
    """Every point of the grid, by its values on the axes, last axis fastest.

    Raises UserError if there are too many for one table.
    """
    count = math.prod(map(len, axes.values()))
    if count > MOST_POINTS:
        raise UserError(f"--sweep: {count} points; at most {MOST_POINTS} make one table")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def ablation_points(full: Run) -> list[tuple[str, Any]]:
    """The paper's kind of component table: steps added one by one, then each taken from the full.

    full: the run of all components. Returns (components, parameters); steps that it does not have
    are left out. Raises UserError if it has none but the last, which every run has.
    """
    method, every = full.method, full.parameters

    def without(off: Mapping[str, Any]) -> Any:
        return without_idle(method, replace(every, **off))

    steps = {name: off for name, off in method.steps.items() if without(off) != every}
    if not steps.keys() - {[*method.steps][-1]}:
        raise UserError("--ablation: no component is on; add --use_preset or the steps' own flags")
    names = [*steps]
    points = []
    for count in range(len(steps)):
        off = {k: v for name in names[count:] for k, v in steps[name].items()}
        points.append((f"+ {names[count - 1]}" if count else "bare fusion", without(off)))
    points.append((f"+ {names[-1]} (full)", every))
    return [*points, *((f"full - {name}", without(steps[name])) for name in names)]
