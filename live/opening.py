"""From a folder of photographs, or a data set's features, to a Searcher."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import image_below
from extraction.assets import read_corpora
from extraction.encoding import Settings
from extraction.job import run_job
from extraction.words import ContextWords, read_context_words
from live.photos import Stored, index_photos, name_of, open_photo, stored_dtype
from live.searcher import Searcher
from utils import UserError, last_part, say, select_device
from utils_backbones import Places, backbone_entry, backbone_folder
from utils_datasets import Dataset, ImageStore
from utils_features import load_encoder
from utils_pixels import decode_image
from utils_storage import Features, MappedRows, load_features
from utils_task import Images, QueryTable, RowSets, Task, View, whole_gallery

if TYPE_CHECKING:
    import torch

    from utils_features import Encoder

BATCH, PART_ROWS = 64, 256  # of photographs: what a kill costs on a machine without a GPU


@dataclass(frozen=True)
class Where:
    """Where things are, and on what they are computed. gpu: the CUDA device, -1 for the CPU.

    corpora: the folder of text corpora, None for the backbone's own. candidates: how many rows
    faiss finds for each vector of a query, which alone are ranked then; 0: all rows are.
    """

    features: Path = Path("features")
    data: Path = Path("data")
    synthetic: Path | None = None
    corpora: Path | None = None
    gpu: int = 0
    candidates: int = 0

    @property
    def places(self) -> Places:
        return Places(self.features, self.data, self.synthetic)

    def corpora_of(self, backbone: str) -> Path:
        """The folder of the text corpora of a backbone."""
        return self.corpora or Path(backbone_entry(backbone).corpora_dir)


def open_folder(
    root: str | Path,
    backbone: str = "clip",
    where: Where | None = None,
    *,
    precision: str = "fp32",
    save_dtype: str | None = None,
    batch: int = BATCH,
    overwrite: bool = False,
    say: Callable[[str], None] = say,
) -> Searcher:
    """Index a folder of photographs, as far as it has changed, and open it for search.

    precision, batch: as create_features.py has them. save_dtype: the type of the features on disk,
    None for float16, or what they are stored as already. overwrite: encode all again.
    Raises UserError for a folder without photographs, and a backbone that cannot be loaded.
    """
    where, root = where or Where(), Path(root).expanduser()
    device = select_device(where.gpu)
    load = cache(partial(load_encoder, backbone, device, precision))
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    name = name_of(root)
    folder = where.features / backbone_folder(backbone) / name
    dtype = save_dtype or (not overwrite and stored_dtype(folder)) or "float16"
    settings = Settings(*(backbone, precision, dtype, batch, PART_ROWS, workers), True, overwrite)
    stored = index_photos(root, folder, settings, load, say)
    _encode_corpora(where, backbone, settings, load, say)
    features = _features_of(stored, backbone, name, folder)
    store = ImageStore(Dataset(last_part(root), root), image_below)
    return _open(features, where, store, load, open_photo(root).decode, device)


def _features_of(stored: Stored, backbone: str, name: str, folder: Path) -> Features:
    """The features of photographs: a task without queries."""
    task = Task(
        name=name,
        gallery=Images([photo.path for photo in stored.photos]),
        queries=QueryTable([], [], []),
        sets=RowSets.of([]),
        pool=whole_gallery(0),
        views={"all": View(None)},
        columns=(),
    )
    files = {"image": MappedRows(folder / "database_image.npy")}
    return Features(backbone, name, task, {}, files, folder / "manifest.json", stored.manifest)


def _encode_corpora(
    where: Where,
    backbone: str,
    settings: Settings,
    load: Callable[[], Encoder],
    say: Callable[[str], None],
) -> None:
    """Encode the text corpora that methods read, where they are there and not encoded yet."""
    corpora, features = where.corpora_of(backbone), where.features / backbone_folder(backbone)
    names = sorted(path.stem for path in corpora.glob("*.csv"))
    if all((features / "corpus" / f"{name}.json").is_file() for name in names):
        return
    say(f"encoding the text corpora of {corpora}: {', '.join(names)}")
    job = read_corpora(corpora, features).plan(settings, load())
    if job.stages:
        run_job(job, load(), settings)


def open_dataset(dataset: str, backbone: str = "clip", where: Where | None = None) -> Searcher:
    """Open a data set's features for search: its whole gallery, and its queries to choose from.

    dataset: its name or folder. Raises UserError where it has no features.
    """
    from benchmarks import NoDataset, find_dataset, find_images

    where = where or Where()
    device = select_device(where.gpu)
    try:
        name = find_dataset(dataset, where.data).name
    except NoDataset:  # it need not be here: its features are enough
        name = last_part(dataset)
    features = load_features(where.features, backbone, name)
    precision = (features.manifest or {}).get("precision", "fp32")
    load = cache(partial(load_encoder, backbone, device, precision))
    own_mode = features.task.gallery.own_mode
    decode = partial(decode_image, own_mode=own_mode, viewed=features.viewed)
    return _open(features, where, find_images(dataset, where.data), load, decode, device)


def _open(
    features: Features,
    where: Where,
    images: ImageStore,
    load: Callable[[], Encoder],
    decode: Callable,
    device: torch.device,
) -> Searcher:
    words: ContextWords | UserError
    try:
        words = read_context_words(where.corpora_of(features.backbone))
        _check_words(words, features)
    except UserError as error:
        words = error
    most = where.candidates
    return Searcher(features, where.places, images, load, decode, words, device, most)


def _check_words(words: ContextWords, features: Features) -> None:
    """Raise UserError if a data set's texts were contextualised by other words than these."""
    made = ((features.manifest or {}).get("sources") or {}).get(words.path.name, words.sha256)
    if made != words.sha256:
        raise UserError(
            f"{words.path} is not the file whose words the texts of {features.source} were "
            "contextualised with; name its folder with --corpora_dir"
        )
