"""The flags of run_retrieval.py that are about other systems' results. Imports nothing large."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from utils import SWITCH, UserError, refuse_idle

if TYPE_CHECKING:
    from external.results import ExternalFiles


def _files(text: str, count: str | None = None) -> dict:
    return {"nargs": count, "type": Path, "metavar": "FILE", "help": text}


FLAGS = {  # None: not given
    "external": {"metavar": "NAME", "help": "judge the results of a system of that name"},
    "query_embeddings": _files("its query vectors: one file, or one for each draw", "+"),
    "gallery_embeddings": _files(
        "its gallery vectors, files joined in the order of their numbers", "+"
    ),
    "scores": _files("its scores: a matrix, or a folder with one for each instance"),
    "rankings": _files("its ranked lists: JSON, TREC run, CSV or parquet", "+"),
    "query_ids": _files("ids of the rows of the query vectors (default: the data set's order)"),
    "gallery_ids": _files("ids of the rows of the gallery vectors"),
    "normalise": {
        "action": SWITCH,
        "help": "compare vectors by their cosine, or as they are by the dot product",
    },
    "distances": {"action": "store_true", "default": None, "help": "lower scores are better"},
    "late_interaction": {
        "choices": ("max", "maxsim", "mean"),
        "help": "how rows of several vectors are compared",
    },
    "allow_missing": {
        "action": "store_true",
        "default": None,
        "help": "queries without a list score 0",
    },
}
READ_BY = {  # the flag without which another changes nothing
    "query_ids": "query_embeddings",
    "gallery_ids": "query_embeddings",
    "normalise": "query_embeddings",
    "late_interaction": "query_embeddings",
    "distances": "scores",
    "allow_missing": "rankings",
}
OURS = ("method", "use_preset", "sweep", "ablation")  # of our own methods


def external_files(given: dict, parameters: dict) -> ExternalFiles | None:
    """The files of somebody else's results, None where none are named.

    given: the command's flags by name; parameters: those of our methods. Raises UserError for too
    few files, or for what has no effect.
    """
    if not given["external"]:
        for name in (name for name in FLAGS if given[name] is not None):
            raise UserError(f"--{name} has no effect without --external NAME: add it")
        return None
    from external.results import ExternalFiles

    if sum(map(bool, (given["query_embeddings"], given["scores"], given["rankings"]))) != 1:
        raise UserError(
            "--external takes one of --query_embeddings (with --gallery_embeddings), --scores and "
            "--rankings"
        )
    if bool(given["query_embeddings"]) != bool(given["gallery_embeddings"]):
        raise UserError("--query_embeddings and --gallery_embeddings belong together: give both")
    idle = [name for name in OURS if given[name]] + list(parameters)
    idle += [
        name for name, reader in READ_BY.items() if given[name] is not None and not given[reader]
    ]
    refuse_idle(idle, "with these results")
    return ExternalFiles(
        name=given["external"],
        query_embeddings=tuple(given["query_embeddings"] or ()),
        gallery_embeddings=tuple(given["gallery_embeddings"] or ()),
        scores=given["scores"],
        rankings=tuple(given["rankings"] or ()),
        query_ids=given["query_ids"],
        gallery_ids=given["gallery_ids"],
        normalise=given["normalise"],
        distances=bool(given["distances"]),
        late=given["late_interaction"],
        allow_missing=bool(given["allow_missing"]),
    )
