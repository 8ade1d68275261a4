"""Assets beside a data set's features: text corpora, image means, normalisation features."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils import UserError
from utils_backbones import (
    BACKBONES,
    Backbone,
    Places,
    backbone_entry,
    backbone_folder,
    own_data,
)
from utils_evaluation import unit_features
from utils_pickles import (
    load_pickle,
    one_line,
    read_archive,
    read_array,
    read_rows,
    two_dimensional,
)
from utils_records import check_manifest, read_manifest
from utils_retrieval import Assets, Needs
from utils_storage import Features, features_folder, read_csv_columns
from utils_texts import open_texts

if TYPE_CHECKING:
    import torch

    from utils_runs import Run


# ---------------------------------------------------------------------------------------------
# Their files
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StoredAsset:
    """Features beside a data set's own: arrays by name, float32 (rows, D), and their origin."""

    arrays: dict[str, np.ndarray]
    source: Path
    manifest: dict | None


def _short_name(backbone: str) -> str:
    return backbone_folder(backbone).removesuffix("_features")


def mean_path(data_dir: str | Path, backbone: str) -> Path:
    """Where the image mean of a backbone is written and looked for."""
    folder = Path(data_dir) / backbone_entry(backbone).mean_dir
    return folder / f"mean_{_short_name(backbone)}.npz"


def synthetic_path(synthetic_dir: str | Path | None, backbone: str) -> Path:
    """Where the normalisation features of a backbone are written and looked for."""
    folder = Path(synthetic_dir or backbone_entry(backbone).synthetic_dir)
    return folder / f"synthetic_{_short_name(backbone)}.npz"


def load_corpus(features_dir: str | Path, backbone: str, corpus: str) -> StoredAsset:
    """The features of a text corpus, array "feats" (rows, D).

    Raises UserError if there are none; the line names the corpora there are.
    """
    folder = features_folder(features_dir, backbone, "corpus")
    native, reference = folder / f"{corpus}.npy", folder / f"{corpus}.pkl"
    manifest = folder / f"{corpus}.json"
    if native.exists() and manifest.exists():
        return StoredAsset({"feats": read_array(native)}, manifest, read_manifest(manifest))
    if reference.exists():
        return StoredAsset(
            {"feats": read_rows(load_pickle(reference), "feats", reference)}, reference, None
        )
    known = {path.stem for path in folder.glob("*.pkl")} | {p.stem for p in folder.glob("*.json")}
    texts = own_data(Path(backbone_entry(backbone).corpora_dir)) / f"{corpus}.csv"
    raise UserError(
        f"no features of the corpus {corpus!r} in {folder} (there: "
        f"{', '.join(sorted(known)) or 'none'}); "
        f"{'' if texts.is_file() else f'write {texts} and '}run: "
        f"python3 create_features.py --dataset corpus --backbone {backbone}"
    )


def read_prompts(corpus: StoredAsset) -> list[str]:
    """The texts of a corpus, row by row.

    Raises UserError if they are absent, or are not as many as its features.
    """
    native = corpus.manifest is not None
    path = corpus.source.with_suffix(".csv") if native else corpus.source
    if native:
        prompts = read_csv_columns(path, ("prompt",))["prompt"]
    else:
        prompts = [str(prompt) for prompt in load_pickle(path).get("prompts", ())]
    features = len(corpus.arrays["feats"])
    if len(prompts) != features:
        raise UserError(
            f"{path} has {len(prompts)} prompts for {features} features; encode the corpus again"
        )
    return prompts


def load_mean(data_dir: str | Path, backbone: str) -> StoredAsset:
    """The image mean of a backbone, array "mean" (1, D). Raises UserError if there is none."""
    native = mean_path(data_dir, backbone)
    reference = Path(data_dir) / "laion_mean" / f"laion_1m_mean_{_short_name(backbone)}.pkl"
    native, reference = own_data(native), own_data(reference)
    if native.exists():
        return _load_npz(native, ["mean"])
    if reference.exists():
        mean = read_rows(load_pickle(reference), "laion_1m_mean", reference)
        return StoredAsset({"mean": mean}, reference, None)
    raise UserError(
        f"no image mean for {backbone}: neither {native} nor {reference}; "
        f"{_fetch(backbone, 'laion_mean')}make one of your own images: "
        f"python3 create_features.py --dataset mean --backbone {backbone} --images PATH"
    )


def load_synthetic(synthetic_dir: str | Path | None, backbone: str) -> StoredAsset:
    """Normalisation features, arrays "image_features" and "text_features" (rows, D).

    Raises UserError if there are none for this backbone.
    """
    native = synthetic_path(synthetic_dir, backbone)
    reference = native.with_name(f"dataset_1_sd_{_short_name(backbone)}.pkl.npy")
    native, reference = own_data(native), own_data(reference)
    names = ["image_features", "text_features"]
    if native.exists():
        return _load_npz(native, names)
    if reference.exists():
        content = load_pickle(reference)
        return StoredAsset({n: read_rows(content, n, reference) for n in names}, reference, None)
    raise UserError(
        f"no normalisation features for {backbone}: neither {native} nor {reference}; "
        f"{_fetch(backbone, 'synthetic_data')}make your own: python3 "
        f"create_features.py --dataset synthetic --backbone {backbone} --images DIR --captions FILE"
    )


def _fetch(backbone: str, target: str) -> str:
    """What to do for assets of the published backbones, which alone can be fetched."""
    if not BACKBONES.get(backbone, Backbone("")).is_published:
        return ""
    return f"fetch it with python3 data/download.py {target}, or "


def _load_npz(path: Path, names: list[str]) -> StoredAsset:
    try:
        arrays = read_archive(path, [*names, "manifest"])
        manifest = json.loads(str(arrays.pop("manifest")))
    except Exception as error:  # a hostile or cut file may raise anything
        raise UserError(f"{path} cannot be read ({one_line(error)}); make it again") from None
    if not isinstance(manifest, dict):
        raise UserError(f"{path}: its manifest is no JSON object; make it again")
    arrays = {
        name: two_dimensional(np.atleast_2d(array), f"{path}, {name}")
        for name, array in arrays.items()
    }
    return StoredAsset(arrays, path, check_manifest(manifest, path))


def _model_of(manifest: dict | None) -> dict:
    """What a manifest says of the model, {} if nothing."""
    model = (manifest or {}).get("model")
    return model if isinstance(model, dict) else {"model": model} if model else {}


def check_same_model(features: Features, assets: list[StoredAsset]) -> None:
    """Raise UserError if an asset was made by another model than the features, naming both.

    Models are compared by their manifests; files without one (the reference's) by dimension only.
    """
    model = _model_of(features.manifest)
    for asset in assets:
        for array in asset.arrays.values():
            if array.shape[1] != features.dim:
                raise UserError(
                    f"{asset.source} has {array.shape[1]} dimensions but {features.source} has "
                    f"{features.dim}: they come from different models; extract one of them again"
                )
        other = _model_of(asset.manifest)
        if model and other and model != other:
            key = next(k for k in {**model, **other} if model.get(k) != other.get(k))
            raise UserError(
                f"{asset.source} and {features.source} come from different models: {key} is "
                f"{other.get(key)!r} and {model.get(key)!r}; extract one of them again"
            )


# ---------------------------------------------------------------------------------------------
# What the runs of a command need
# ---------------------------------------------------------------------------------------------


def load_assets(
    places: Places, features: Features, runs: Sequence[Run], device: torch.device
) -> Assets:
    """Corpora, image mean and normalisation features, as far as the runs use them, on the device.

    Raises UserError if one is missing, holds a row that cannot be used, or was made by another
    model than the features.
    """
    import torch

    needs = [run.method.needs([run.parameters]) for run in runs]
    rows = {name: 0 for need in needs for name in need.corpora}
    for name in rows:
        rows[name] = max(need.corpora.get(name, 0) for need in needs)
    corpora, mean, synthetic = _load_stored(places, features.backbone, needs)
    check_same_model(features, [a for a in (*corpora.values(), mean, synthetic) if a])
    for name, fewest in rows.items():
        found = len(corpora[name].arrays["feats"])
        if found < fewest:
            raise UserError(
                f"{corpora[name].source} has {found} of the {fewest} prompts that are needed"
            )
    if mean:
        _check_mean(mean)

    def unit(asset: StoredAsset, name: str) -> torch.Tensor:
        return unit_features(asset.arrays[name], device, f"{asset.source}, {name}")

    encode = None
    if any(need.texts for need in needs):
        encode = partial(open_texts(places.features, features, device).encode, device=device)
    return Assets(
        corpora={name: unit(asset, "feats") for name, asset in corpora.items()},
        image_mean=mean and torch.from_numpy(mean.arrays["mean"]).to(device)[0],
        synthetic_images=synthetic and unit(synthetic, "image_features"),
        synthetic_texts=synthetic and unit(synthetic, "text_features"),
        prompts={name: read_prompts(corpora[name]) for need in needs for name in need.prompts},
        encode_texts=encode,
    )


def _check_mean(mean: StoredAsset) -> None:
    """Raise UserError unless the mean is one row, of finite length in float32."""
    values = mean.arrays["mean"]
    if len(values) != 1:
        raise UserError(f"{mean.source}: {len(values)} rows, where a mean is one; make it again")
    with np.errstate(over="ignore"):
        length = np.sqrt(np.square(values).sum())
    if not np.isfinite(length):
        raise UserError(f"{mean.source}: the mean is not finite; make it again")


def _load_stored(
    places: Places, backbone: str, needs: Sequence[Needs]
) -> tuple[dict[str, StoredAsset], StoredAsset | None, StoredAsset | None]:
    """The corpora by name, the image mean and the normalisation features that are needed.

    Raises UserError, a line on all that are missing.
    """
    problems: list[str] = []

    def load(read: Callable[..., StoredAsset], *given: object) -> StoredAsset | None:
        try:
            return read(*given)
        except UserError as error:
            problems.append(str(error))
            return None

    names = sorted({name for need in needs for name in need.corpora})
    corpora = {name: load(load_corpus, places.features, backbone, name) for name in names}
    mean = synthetic = None
    if any(need.image_mean for need in needs):
        mean = load(load_mean, places.data, backbone)
    if any(need.synthetic for need in needs):
        synthetic = load(load_synthetic, places.synthetic, backbone)
    if problems:
        raise UserError("; ".join(problems))
    return corpora, mean, synthetic


def missing_asset(places: Places, features: Features, run: Run) -> str | None:
    """Why assets that a run needs cannot be had, None where all can."""
    try:
        _load_stored(places, features.backbone, [run.method.needs([run.parameters])])
    except UserError as error:
        return str(error)
    return None
