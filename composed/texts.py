"""The text of a composed query, in the form that a system was published with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from composed.system import System
from methods.words import fill_forms

# Of most systems: the text as it is, of FashionIQ both captions.
FORMS = {"": "{caption}", "fashioniq": "{first_as_is} and {second_as_is}"}


def form_of(system: System, prompts: str, own: str | None) -> str:
    """The form of the texts of a task. prompts: the task's; own: in place of the published one."""
    return system.prompts.get(prompts, system.prompts[""]) if own is None else own


def query_texts(system: System, form: str, known: Mapping[str, Sequence[str]]) -> list[str]:
    """The text of each query in a form. known: Q texts by name (methods.words.task_texts).

    In a form, {caption} is the query's text and further texts go by their names: {concept} of
    CIRCO, {first_as_is} and {second_as_is} of FashionIQ. Raises UserError for an unknown name.
    """
    return [system.clean(text) for (text,) in fill_forms((form,), "", known)]
