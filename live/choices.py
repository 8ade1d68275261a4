"""What there is to choose from: methods whose inputs exist, their parameters, where they start.

All of it is read from the methods themselves; none is known here by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from methods import flags_of, list_methods
from utils import UserError
from utils_assets import missing_asset
from utils_backbones import Places
from utils_retrieval import Flag, Method
from utils_runs import Run, Setting, preset_of, settle_parameters, show_value
from utils_storage import features_folder

if TYPE_CHECKING:
    from utils_storage import Features

PLAIN = ("image", "text")  # what every live query has
COSTLY = {"contextualize": False}  # a text is encoded 200 times: nothing to start typing with
WIDE = 100.0  # a range of values that is wider is no slider's
REACH = 4.0  # such a slider goes from 0 to so many times the preset


@dataclass(frozen=True, eq=False)
class Choices:
    """What can be chosen on some features. places: where assets are looked for."""

    features: Features
    places: Places
    _starts: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)

    @property
    def setting(self) -> Setting:
        """What the runs have in common: parameters are given one by one, no preset."""
        return Setting({}, False, self.features.dataset, self.features.backbone)

    def run(self, method: Method, given: Mapping[str, Any]) -> Run:
        """A run of these parameters. Raises UserError for a value out of bounds."""
        return self.setting.named(method, settle_parameters(method, given, self.setting))

    def start(self, method: Method) -> dict[str, Any]:
        """Where a method's parameters start: its preset, as far as its assets are there.

        Without what makes typing slow (COSTLY).
        """
        if method.name not in self._starts:
            self._starts[method.name] = self._find_start(method)
        return dict(self._starts[method.name])

    def _find_start(self, method: Method) -> dict[str, Any]:
        preset = {**preset_of(method, self.features.dataset), **COSTLY}
        preset = {name: value for name, value in preset.items() if name in flags_of(method)}
        switches = [name for name, value in preset.items() if value is True]
        chosen = {**preset, **dict.fromkeys(switches, False)}
        for name in switches:
            tried = {**chosen, name: True}
            if missing_asset(self.places, self.features, self.run(method, tried)) is None:
                chosen = tried
        return {n: chosen.get(n, default) for n, (default, _) in flags_of(method).items()}

    def lacking(self, method: Method) -> str | None:
        """Why a method cannot be chosen for a live query, None if it can."""
        others = [name for name in method.reads if name not in PLAIN]
        if others and not all(self.features.has_query(name) for name in others):
            return (
                f"reads query_{others[0]}.npy, which is made for the queries of a "
                "data set (create_features.py --inputs)"
            )
        for name in method.gallery_reads:
            if name not in self.features.database_files:
                return f"reads database_{name}.npy, which is not there"
        return missing_asset(self.places, self.features, self.run(method, self.start(method)))

    def corpora(self) -> list[str]:
        """The corpora that are encoded: what a parameter that names one may be."""
        folder = features_folder(self.places.features, self.features.backbone, "corpus")
        return sorted({path.stem for kind in ("*.json", "*.pkl") for path in folder.glob(kind)})

    def parse(self, method: Method, given: Mapping[str, str]) -> dict[str, Any]:
        """A method's parameters: where they start, and what is given as text over it.

        Raises UserError for a name or value that there is not.
        """
        values = self.start(method)
        for name, text in given.items():
            if name not in values:
                raise UserError(f"{method.name} has no parameter {name!r}")
            default, flag = flags_of(method)[name]
            values[name] = parse_value(name, text, default, self._words(flag, values[name]))
        return values

    def _words(self, flag: Flag, start: Any) -> list[str]:
        """The values there are of a parameter that is a word."""
        if not isinstance(start, str):
            return []
        return list(flag.choices) or list(dict.fromkeys([*self.corpora(), start]))

    @cached_property
    def described(self) -> list[dict]:
        """All methods and parameters, as the page shows them: as they are when first asked for."""
        return [self._describe(method) for method in list_methods().values()]

    def _describe(self, method: Method) -> dict:
        lacking, start = self.lacking(method), self.start(method)
        preset = preset_of(method, self.features.dataset)
        return {
            "name": method.name,
            "summary": method.summary,
            "lacking": lacking,
            "reads": list(method.reads),
            "parameters": [
                {
                    "name": name,
                    "start": start[name],
                    "preset": preset.get(name, default),
                    "help": flag.help,
                    "kind": type(default).__name__,
                    "words": self._words(flag, start[name]),
                    "only_with": list(flag.only_with),
                    **_slider(preset.get(name, default), flag),
                }
                for name, (default, flag) in flags_of(method).items()
            ],
        }


def _slider(preset: Any, flag: Flag) -> dict[str, float]:
    """The ends of a parameter's slider, and the limits of the number beside it."""
    if isinstance(preset, (bool, str)):
        return {}
    low = 0.0 if flag.low is None else flag.low
    high = math.inf if flag.high is None else flag.high
    if high - low > WIDE:
        low, high = max(low, 0.0), max(1.0, REACH * abs(preset))
        if isinstance(preset, float) and 0 < abs(preset) < 1:
            high = REACH * abs(preset)
    return {"low": low, "high": high}


def parse_value(name: str, text: str, default: Any, words: list[str]) -> bool | int | float | str:
    """A parameter's value from its text. Raises UserError if it is none."""
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise UserError(f"{name} is true or false, not {text!r}")
        return text == "true"
    if isinstance(default, str):
        if text not in words:
            raise UserError(f"{name} {text!r} is none of {', '.join(words)}")
        return text
    try:
        value = type(default)(text)
    except ValueError:
        raise UserError(f"{name} {text!r} is no number") from None
    if not math.isfinite(value):
        raise UserError(f"{name} {text!r} is not finite")
    return value


def command_flags(run: Run) -> list[str]:
    """The flags of run_retrieval.py that give these parameters, without a preset."""
    words = ["--method", run.method.name]
    defaults = {name: default for name, (default, _) in flags_of(run.method).items()}
    for name, value in asdict(run.parameters).items():
        if value == defaults[name]:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", show_value(value)]
    return words
