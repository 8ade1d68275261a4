"""The flags of create_features.py as a table. Imports nothing large."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import list_benchmarks
from methods import list_inputs
from utils import not_negative, positive
from utils_backbones import PIXELS, PRECISIONS, PREPROCESSES
from utils_ranks import TIMEOUT

# What --dataset stands for; any other value is a data set, by name or path.
KINDS = ("corpus", "mean", "synthetic")


@dataclass(frozen=True)
class Flag:
    """A flag: its meaning, and where it has an effect.

    kinds: of --dataset ("dataset": of any data set), "from_pkl", "from_embeddings", "inputs" with
    those flags, "system" with a --backbone of composed/.
    default: what it is where it is not given; options: what else argparse is told of it.
    """

    text: str
    kinds: tuple[str, ...]
    default: object = None
    options: Mapping = field(default_factory=dict)


def flag(text: str, kinds: str, default: object = None, **options) -> Flag:
    """A flag that has an effect on some kinds, blanks between their names."""
    return Flag(text, tuple(kinds.split()), default, options)


IMAGES = "dataset mean synthetic"
ENCODE = f"{IMAGES} corpus"
ALL = f"{ENCODE} from_pkl from_embeddings"

# What argparse is told of a number of things, of seconds, of a folder.
COUNT = {"type": positive, "metavar": "N"}
SECONDS = {"type": positive, "metavar": "S"}
FOLDER = {"type": Path, "metavar": "DIR"}


def list_flags() -> dict[str, dict[str, Flag]]:
    """The flags by group and name."""
    return {
        "what to encode": _what(),
        "what further methods read": _inputs(),
        "systems with networks of their own": _systems(),
        "how": _how(),
        "where things are": _where(),
    }


def _what() -> dict[str, Flag]:
    return {
        "dataset": flag(
            f"{', '.join(list_benchmarks())}; a folder of your own; corpus: every text corpus; "
            "mean: the mean of --images; synthetic: normalisation features of --images and "
            "--captions",
            ALL,
        ),
        "icir_source": flag(
            "images from folders or from tar shards (default: folder)",
            "dataset",
            choices=("folder", "wds"),
        ),
        "backbone": flag(
            "clip, siglip, tiny or any open_clip model; or a system with a network of its own, as "
            "magiclens:FILE (default: clip)",
            ALL,
            "clip",
        ),
        "preprocess": flag(
            "the model's own, or TargetPad before it: images wider or taller than 1.25 are "
            "padded with zeros to that ratio (SEARLE, CIReVL, CVSI); its features are those of "
            "another backbone, BACKBONE+targetpad (default: model)",
            ENCODE,
            choices=PREPROCESSES,
        ),
        "list_backbones": flag("print the backbones and stop", ALL, action="store_true"),
        "limit": flag(
            "only the first N rows of each split, as the data set NAME_firstN",
            "dataset",
            **COUNT,
        ),
        "images": flag(
            "mean, synthetic: a folder tree, or tar shards", "mean synthetic", type=Path
        ),
        "captions": flag(
            "synthetic: a CSV of rows image_path,caption, paths relative to --images; inputs: "
            "the folder of caption files",
            "synthetic inputs",
            type=Path,
        ),
        "from_pkl": flag(
            "turn the reference's feature files under DIR into native ones; encodes nothing",
            "from_pkl",
            **FOLDER,
        ),
        "from_embeddings": flag(
            "take the embeddings under DIR, .npy files or clip-retrieval folders, as the features "
            "of the data set; encodes nothing",
            "from_embeddings",
            **FOLDER,
        ),
    }


def _inputs() -> dict[str, Flag]:
    return {
        "inputs": flag(
            "features that a method reads beside those of images and texts, which are made "
            "before if they are not there",
            "dataset",
            choices=sorted(list_inputs()),
        ),
        "phi": flag("checkpoint of an image-to-word network", "inputs", type=Path, metavar="FILE"),
        "prompt": flag(
            "in place of the published form of texts, e.g. 'a $ {caption}'",
            "inputs system",
            metavar="TEXT",
        ),
    }


def _systems() -> dict[str, Flag]:
    return {
        "gallery_weights": flag(
            "covr, covr2: the checkpoint that encodes the gallery",
            "system",
            type=Path,
            metavar="FILE",
        ),
        "tokens": flag(
            "covr2: keep the vectors of every token too, for --method composed_tokens",
            "system",
            action="store_true",
        ),
        "seeds": flag(
            "compodiff: seeds of its draws, one query array each (default: 0)",
            "system",
            type=not_negative,
            nargs="+",
            metavar="N",
        ),
        "query_prompt": flag("st: the instruction of queries", "system", metavar="TEXT"),
        "gallery_prompt": flag("st: the instruction of gallery images", "system", metavar="TEXT"),
        "trust_remote_code": flag(
            "st: run the code that lies beside the model (default: refuse it)",
            "system",
            action="store_true",
        ),
    }


def _how() -> dict[str, Flag]:
    return {
        "batch": flag("images or texts encoded at once (default: 512)", ENCODE, 512, **COUNT),
        "part_rows": flag(
            "images or texts between two savings of progress; of shards, it is a batch "
            "(default: 4096)",
            ENCODE,
            4096,
            **COUNT,
        ),
        "gpu": flag("CUDA device, -1 for the CPU (default: 0)", ALL, 0, type=int),
        "workers": flag(
            "processes that read and decode images (default: as many as there are cores)",
            IMAGES,
            type=not_negative,
            metavar="N",
        ),
        "precision": flag("arithmetic (default: fp32)", ENCODE, "fp32", choices=tuple(PRECISIONS)),
        "save_dtype": flag(
            "type of the database features on disk (default: float32)",
            "dataset from_embeddings",
            "float32",
            choices=("float32", "float16"),
        ),
        "format": flag(
            "pkl: write the reference's pickles beside the native files (default: npy)",
            "dataset corpus",
            "npy",
            choices=("npy", "pkl"),
        ),
        "pixels": flag(
            "images as a viewer shows them (turned as EXIF says, transparency over white, colour "
            "profiles, 16 bits and more), or plain, as CLIP's usual pipelines take them (default: "
            "plain for published data sets, viewed for a folder of your own, mean and synthetic)",
            IMAGES,
            choices=PIXELS,
        ),
        "on_bad_image": flag(
            "stop at an image that cannot be read, or leave its rows out (default: fail)",
            IMAGES,
            "fail",
            choices=("fail", "skip"),
        ),
        "on_missing_image": flag(
            "published data sets: stop, before anything is encoded, if image files are missing, "
            "or leave out their rows, which tables then say (default: fail, but with "
            "--on_bad_image skip)",
            "dataset",
            choices=("fail", "skip"),
        ),
        "overwrite": flag(
            "start afresh, every time it is given: leave it to continue",
            ALL,
            False,
            action="store_true",
        ),
        "rank_timeout": flag(
            "seconds that a rank waits for the others, more than any part or shard takes (default: "
            "1800)",
            ENCODE,
            TIMEOUT,
            **SECONDS,
        ),
        "worker_timeout": flag(
            "seconds without an image after which the workers count as stuck (default: 600)",
            IMAGES,
            600,
            **SECONDS,
        ),
    }


def _where() -> dict[str, Flag]:
    return {
        "data_dir": flag(
            "data sets and image means (default: data)",
            "dataset mean from_embeddings",
            Path("data"),
            **FOLDER,
        ),
        "features_dir": flag(
            "where features go (default: features)",
            "dataset corpus from_pkl from_embeddings",
            Path("features"),
            **FOLDER,
        ),
        "corpora_dir": flag(
            "text corpora, one column, no header (default: the backbone's, corpora)",
            "dataset corpus",
            **FOLDER,
        ),
        "path_to_synthetic_data": flag(
            "where normalisation features go (default: the backbone's)", "synthetic", **FOLDER
        ),
    }
