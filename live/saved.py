"""A live query as features of a task of one query, which run_retrieval.py ranks as the page did.

features/{backbone}_features/{NAME}_query_{HASH}/ is whole: the gallery's arrays are linked into it,
so that it outlives changes of the photographs.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
from pathlib import Path

import numpy as np

from live.choices import PLAIN, command_flags
from live.searcher import Searcher, Shown
from utils import publishing, sha256_file, write_csv, write_json
from utils_retrieval import name_of_texts
from utils_runs import Run
from utils_task import Images, QueryTable, RowSets, Task, View, save_task, whole_gallery


def save_query(searcher: Searcher, run: Run, image: Shown, text: str) -> str:
    """Write a query's features, as far as a run reads them, and give the name of the data set."""
    from dataclasses import replace

    features, names = searcher.features, run.method.query_features(run.parameters)
    again = searcher.again
    facts = repr((searcher.version, image.path, image.row, text, sorted(names), len(again)))
    digest = hashlib.sha256(facts.encode()).hexdigest()[:10]
    name = f"{features.dataset}_query_{digest}"
    folder = features.folder.parent / name
    if (folder / "manifest.json").is_file():
        return name
    gallery: Images = replace(features.task.gallery, shared=None)
    sets, excluded, notes = RowSets.of([]), None, []
    if len(again):
        sets, excluded = RowSets.of([again]), np.zeros(1, np.int64)
        notes = [f"{len(again)} gallery rows that show an image again are not ranked"]
    task = Task(
        name=name,
        gallery=gallery,
        queries=QueryTable(["1"], [(image.path,)], [text]),
        sets=sets,
        pool=whole_gallery(1),
        views={"all": View(None, excluded)},
        columns=(),
        notes=(f"a live query on {features.dataset}: nothing is known of what is right", *notes),
    )
    with publishing(folder / ".making", folder, last="manifest.json") as staging:
        save_task(task, staging)
        _write_arrays(staging, searcher, names, image, text)
        for own, file in features.database_files.items():
            _link(file, staging / f"database_{own}.npy")
        manifest = {"model": {}, **(features.manifest or {}), **_own_remarks(searcher, image, text)}
        counts = {"query": 1, "database": len(searcher)}
        manifest |= {"kind": "dataset", "name": name, "counts": counts, "skipped": []}
        write_json(staging / "manifest.json", manifest)
        _name_inputs(staging, searcher, names)
    return name


def _own_remarks(searcher: Searcher, image: Shown, text: str) -> dict:
    """What a manifest remarks of queries: of this one, not of the data set's."""
    texts = {}
    if length := searcher.cut_at(image, text):
        cut = {"count": 1, "first": text, "row": 1, "all": [text]}
        texts = {"query": {"context_length": length, "count": 1, "cut": cut}}
    return {"texts": texts, "repeated": None, "own_images": None}


def _write_arrays(
    folder: Path, searcher: Searcher, names: tuple[str, ...], image: Shown, text: str
) -> None:
    """The query's features, a row each; an image of the gallery is a row of it."""
    write_csv(folder / "query.csv", ["key", "image_row", "text_row"], [["1", max(0, image.row), 0]])
    if image.row < 0:
        np.save(folder / "query_image.npy", image.vector[None])
    np.save(folder / "query_text.npy", searcher.text_of(image, text)[None])
    if name_of_texts(True) in names:
        vector = searcher.text_of(image, text, True).astype(np.float32)
        np.save(folder / f"query_{name_of_texts(True)}.npy", vector[None])
    for name in _inputs(names):
        vector = searcher.own_input(name, image, text)
        np.save(folder / f"query_{name}.npy", vector[None])


def _inputs(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if name not in (*PLAIN, name_of_texts(True))]


def _name_inputs(folder: Path, searcher: Searcher, names: tuple[str, ...]) -> None:
    """Say of the further inputs which are not of unit length, and what features they are of."""
    features = searcher.features
    arrays = {f"query_{n}": {"unit": n not in features.as_they_are} for n in _inputs(names)}
    if arrays:
        sources = {"features": sha256_file(folder / "manifest.json")}
        content = {"kind": "input", "arrays": arrays, "sources": sources}
        write_json(folder / "live_inputs.json", content)


def _link(file, target: Path) -> None:
    """The rows of a file at another place: linked, or copied where that cannot be."""
    if file.path.suffix != ".npy":  # the reference's pickles
        np.save(target, file.read(slice(0, file.shape[0])))
        return
    try:
        os.link(file.path, target)
    except OSError:
        shutil.copyfile(file.path, target)


def command_of(
    searcher: Searcher, run: Run, name: str, image: Shown, k: int, leave_out: bool
) -> str:
    """The command that ranks a saved query, of an image, with a run's parameters.

    leave_out: the rows of that image, where there are any; where not, the flag would be refused.
    """
    places, device = searcher.places, searcher.device
    words = ["python3", "run_retrieval.py", "--dataset", name]
    words += ["--backbone", searcher.features.backbone, *command_flags(run)]
    words += ["--top_k", str(k), "--gpu", str(device.index or 0) if device.type == "cuda" else "-1"]
    folders = {"features_dir": places.features, "data_dir": places.data}
    for flag, folder in folders.items():
        if folder != Path(flag.removesuffix("_dir")):
            words += [f"--{flag}", str(folder)]
    if places.synthetic and run.method.needs([run.parameters]).synthetic:
        words += ["--path_to_synthetic_data", str(places.synthetic)]
    if leave_out and searcher.rows_of(image):
        words.append("--exclude_query_image")
    return shlex.join(words)
