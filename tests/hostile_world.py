"""A world of every file that the commands read, and what reads each: see hostile_files.py."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import domain_world
import numpy as np
import semantic_files
import torch
from extraction_world import draw_image, encode_jpeg, write_rows
from hostile_files import Case
from native import world_arguments, write_native_world
from safetensors.numpy import save_file
from semantic_world import save_features
from test_inversion import Phi

import run_retrieval
from benchmarks import list_benchmarks, read_task
from benchmarks.annotations import load_json
from data.domain_lists import read_listing
from data.transfer import read_record
from extraction.assets import read_captions, read_images
from extraction.dataset import read_dataset
from extraction.manifest import is_finished
from extraction.words import read_corpus
from methods.words import PHI, read_network
from utils import read_json, sha256_file, write_json
from utils_captions import read_described, read_rewritten
from utils_storage import load_features
from utils_submissions import check_file, format_submission
from utils_summary import read_published
from utils_texts import open_texts

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


def run(folder: Path, *flags: str) -> Callable[[], object]:
    """What runs run_retrieval.py in this process."""
    return partial(run_retrieval.main, [*world_arguments(folder), *map(str, flags)])


def features_cases(folder: Path) -> dict[str, Case]:
    """Features in i-CIR's form, their assets, and results."""
    write_native_world(folder)
    basic = run(
        folder,
        *("--method", "basic", "--use_preset"),
        *("--path_to_synthetic_data", folder / "synthetic_data"),
    )
    data = folder / "features/clip_features"
    files = {
        **{f"features: {path.name}": path for path in sorted((data / "icir").iterdir())},
        **{f"corpora: {path.name}": path for path in sorted((data / "corpus").iterdir())},
        "mean": folder / "data/laion_mean/mean_clip.npz",
        "synthetic": folder / "synthetic_data/synthetic_clip.npz",
    }
    cases = {name: Case(path, basic) for name, path in files.items()}
    for method in ("image", "text"):
        run(folder, "--method", method)()
    results = folder / "results/icir"
    compare = partial(
        run_retrieval.main, ["--compare", str(results / "image"), str(results / "text")]
    )
    table = partial(run_retrieval.main, ["--table", "--results_dir", str(results.parent)])
    cases |= {
        f"compared: {n}": Case(results / "text" / n, compare) for n in ("APs.csv", "APs.json")
    }
    cases["gathered: mAP_table.csv"] = Case(results / "text/mAP_table.csv", table)
    cases["added to: mAP_table.csv"] = Case(
        results / "image/mAP_table.csv", run(folder, "--method", "image")
    )
    published = shutil.copy(ROOT / "data/published.csv", folder / "published.csv")
    cases["published.csv"] = Case(Path(published), partial(read_published, Path(published)))
    finished = partial(is_finished, data / "icir/manifest.json", {}, False, True)
    cases["finished: manifest.json"] = Case(data / "icir/manifest.json", finished)
    return cases


def write_own(root: Path) -> Path:
    """A benchmark of one's own that says everything that can be said."""
    (root / "img").mkdir(parents=True)
    names = [f"img/{number}.jpg" for number in range(12)]
    for number, name in enumerate(names):
        (root / name).write_bytes(encode_jpeg(draw_image(number, (40, 32))))
    lines = [
        {
            "id": f"q{number}",
            **({"image": names[number]} if number % 2 else {"images": names[number : number + 2]}),
            "text": f"text {number}",
            "positives": [names[number + 3]],
            "excluded": [names[number]],
            "related": [names[11]],
            "gallery": "near" if number % 3 else names[:10],
            "tags": {"kind": f"k{number % 2}", "all": ["a", "b"][: number % 3]},
        }
        for number in range(6)
    ]
    (root / "queries.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    write_rows(root / "gallery.csv", [(name,) for name in names])
    write_rows(root / "near.csv", [(name,) for name in names[:10]])
    settings = {
        "name": "own",
        "columns": ["mAP = AP-T", "R@1 = Hit@1", "P@5"],
        "groups": {"mAP": [{"tag": "kind", "how": "min", "digits": 2}], "R@1": "all"},
        "lists": {"near": "near.csv", "far": names[:3]},
    }
    write_json(root / "benchmark.json", settings)
    return root


def own_cases(folder: Path) -> dict[str, Case]:
    """A benchmark without code; its features, with a method's input and kept texts."""
    root = write_own(folder / "data/own")
    read = partial(read_task, str(root), folder)
    names = ("queries.jsonl", "gallery.csv", "near.csv", "benchmark.json")
    cases = {f"own: {name}": Case(root / name, read) for name in names}
    task = read()
    data = folder / "features/clip_features"
    rng = np.random.default_rng(0)
    save_features(data / "own", task, *(rng.normal(size=(n, 8)) for n in (len(task.gallery), 6, 6)))
    np.save(data / "own/query_searle.npy", rng.normal(size=(6, 8)).astype(np.float32))
    digest = sha256_file(data / "own/manifest.json")
    made = {"kind": "input", "arrays": {"query_searle": {"unit": True}}}
    write_json(data / "own/searle.json", made | {"sources": {"features": digest}})
    flags = ("--dataset", "own", "--top_k", "3", "--metrics", "AP-S")
    searle = run(folder, *flags, "--method", "searle")
    searle()
    cases |= {f"of a task: {path.name}": Case(path, searle) for path in (data / "own").iterdir()}
    features = load_features(folder / "features", "clip", "own")
    store = open_texts(folder / "features", features, CPU)
    store.keep(["a", "b"], rng.normal(size=(2, 8)).astype(np.float32), {"model": "golden"})

    def texts() -> None:
        open_texts(folder / "features", features, CPU).missing(["a"])

    cases |= {f"texts: {p.name}": Case(p, texts) for p in store.folder.iterdir() if p.suffix}
    return cases


def publishers_cases(folder: Path) -> dict[str, Case]:
    """Annotations of benchmarks, lists of domains, files for servers, listings, records."""
    cases = {}
    for name in ("cirr", "circo", "fashioniq", "genecis"):
        root = semantic_files.write(folder / "data" / name, getattr(semantic_files, name)())
        readers = {n: b.tasks[n] for n, b in list_benchmarks().items() if n.startswith(name)}

        def read_all(readers=readers, root=root) -> None:
            for read in readers.values():
                read(root)

        for path in sorted(root.rglob("*.json")):
            cases[f"{name}: {path.name}"] = Case(path, read_all)
    task = list_benchmarks()["cirr_test"].tasks["cirr_test"](folder / "data/cirr")
    layouts, submission = list_benchmarks()["cirr_test"].submissions, task.submissions[-1]
    view = task.views[submission.view]
    listed = [
        [
            row
            for row in task.rows_of(view.candidates, q)
            if row not in task.rows_of(view.excluded, q)
        ]
        for q in range(len(task.queries))
    ]
    rows = np.array(listed)[:, : submission.k]
    text = format_submission(task, submission, layouts[submission.layout], rows)
    path = folder / "submission.json"
    path.write_text(text)
    check_file(task, path)
    cases["submission"] = Case(path, partial(check_file, task, path))
    for name in ("imagenet_r", "nico"):
        root = shutil.copytree(domain_world.DATA / name, folder / "data" / name)
        read = partial(list_benchmarks()[name].tasks[name], root)
        lists = [p for p in sorted(root.rglob("*")) if p.suffix in (".csv", ".txt", ".json")]
        cases |= {f"{name}: {path.name}": Case(path, read) for path in lists}
    listing = folder / "listing.json"
    tree = [{"path": "data/nico/a.csv", "type": "blob", "sha": "0" * 40}]
    write_json(listing, {"truncated": False, "tree": tree})
    cases["listing"] = Case(listing, lambda: read_listing(read_json(listing), ["nico/a.csv"]))
    record = folder / "data/download_hf.json"
    words = dict.fromkeys(("source", "origin", "revision", "commit"), "x")
    write_json(record, words | {"files": {"a": "0" * 64}})
    cases["record"] = Case(record, partial(read_record, folder / "data", "hf"))
    any_json = folder / "any.json"
    write_json(any_json, {"a": [1]})
    cases["any annotation"] = Case(any_json, partial(load_json, any_json))
    return cases


def external_cases(folder: Path) -> dict[str, Case]:
    """Results of other systems, in every form."""
    write_native_world(folder)
    features = load_features(folder / "features", "clip", "icir")
    database = features.database("image")
    gallery, query = database.read(slice(0, database.shape[0])), features.query("image").values
    brought = folder / "brought"
    brought.mkdir()
    np.save(brought / "g.npy", gallery)
    np.save(brought / "q.npy", query)
    np.savez(brought / "q.npz", embeddings=query)
    torch.save({"embs": torch.from_numpy(query)}, brought / "q.pt")
    save_file({"embs": np.ascontiguousarray(query)}, str(brought / "q.safetensors"))
    paths = list(features.task.gallery.path)
    labels = features.task.queries.labels()
    keys = [f"{i}\t{t}" for i, t in zip(labels["Image Query"], labels["Text Query"], strict=True)]
    np.save(brought / "scores.npy", query @ gallery.T)
    write_rows(brought / "q_ids.csv", [("id",), *((key,) for key in keys)])
    judge = partial(run, folder, "--external", "them")
    vectors = partial(judge, "--normalise", "--gallery_embeddings", brought / "g.npy")
    cases = {
        f"embeddings: {name}": Case(
            brought / name,
            vectors("--query_embeddings", brought / (name if name[0] == "q" else "q.npy")),
        )
        for name in ("g.npy", "q.npy", "q.npz", "q.pt", "q.safetensors")
    }
    ids = vectors("--query_embeddings", brought / "q.npy", "--query_ids", brought / "q_ids.csv")
    cases["query ids"] = Case(brought / "q_ids.csv", ids)
    cases["scores"] = Case(brought / "scores.npy", judge("--scores", brought / "scores.npy"))
    distinct = dict.fromkeys(paths)
    names = [name for name in distinct if paths.count(name) == 1][:6]
    lists = {key: {name: 1.0 / (n + 1) for n, name in enumerate(names)} for key in keys}
    write_json(brought / "scored.json", lists)
    write_json(brought / "listed.json", {key: list(own) for key, own in lists.items()})
    rows = [(key, name, score) for key, own in lists.items() for name, score in own.items()]
    write_rows(brought / "run.csv", [("query_id", "gallery_id", "score"), *rows])
    trec = [
        f"query_{n:06d} Q0 {name} {rank} {score} them"
        for n, own in enumerate(lists.values())
        for rank, (name, score) in enumerate(own.items())
    ]
    (brought / "run.trec").write_text("".join(f"{line}\n" for line in trec))
    for name in ("scored.json", "listed.json", "run.csv", "run.trec"):
        cases[f"rankings: {name}"] = Case(brought / name, judge("--rankings", brought / name))
    return cases


class Widths:
    """What a method's producer asks of an encoder."""

    dim = 6
    token_dim = 4


def captions_cases(folder: Path) -> dict[str, Case]:
    """Captions, ours and the field's, and networks of pseudo words."""
    from test_caption_files import small_task

    task = small_task()
    folder.mkdir(parents=True, exist_ok=True)
    ours, theirs = folder / "ours", folder / "theirs"
    ours.mkdir()
    images = [{"image": f"{name}.jpg", "captions": ["a", "b"]} for name in "abc"]
    images[1]["box"] = []
    (ours / "images.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in images))
    said = [{"query": f"k{n}", "captions": ["x"], "added": "y"} for n in (1, 2, 3)]
    (ours / "rewritten.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in said))
    theirs.mkdir()
    mods = {"modified_captions": ["x", ["y"], ["z", "w"]], "added_content": ["", "a", "b"]}
    mods |= {"instruction": list(task.queries.text)}
    write_json(theirs / "small_val_mods_p.json", mods)
    targets = {"target_captions": [["a"], ["b"], ["c"], ["b"]]}
    (theirs / "small_val_target_captions.pkl").write_bytes(pickle.dumps(targets))
    cases = {}
    for own in (ours, theirs):

        def read_both(own=own) -> None:
            read_described(own, task)
            read_rewritten(own, task)

        read_both()
        cases |= {f"{own.name}: {path.name}": Case(path, read_both) for path in own.iterdir()}
    torch.manual_seed(0)
    torch.save({"Phi": Phi().state_dict()}, folder / "phi.pt")
    cases["phi"] = Case(
        folder / "phi.pt",
        lambda: read_network(folder / "phi.pt", PHI, Widths.dim, Widths.token_dim),
    )
    return cases


def extraction_cases(folder: Path) -> dict[str, Case]:
    """What create_features.py reads beside images: annotations, corpora, captions, shards."""
    from extraction_world import make_world

    make_world(folder)
    root, corpora = folder / "data/shop", folder / "corpora"
    read = {
        source: partial(
            read_dataset, str(root), folder / "data", source, corpora, None, folder / "features"
        )
        for source in ("folder", "wds")
    }
    cases = {}
    for split in ("query", "database"):
        cases[f"annotations: {split}"] = Case(root / f"{split}_files.csv", read["folder"])
        cases[f"beside shards: {split}"] = Case(
            root / f"annotations/{split}_files.csv", read["wds"]
        )
    cases["context words"] = Case(corpora / "generic_subjects.csv", read["folder"])
    cases["corpus"] = Case(
        corpora / "generic_styles.csv", partial(read_corpus, corpora / "generic_styles.csv")
    )
    captions = folder / "captions.csv"
    write_rows(captions, [("image_path", "caption"), ("a.jpg", "x"), ("b.jpg", "y, z")])
    cases["captions"] = Case(captions, partial(read_captions, captions))
    tree = folder / "tree"
    tree.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tree / name).write_bytes(encode_jpeg(draw_image(1)))
    cases["tree"] = Case(tree / "a.jpg", partial(read_images, tree, "viewed"))
    return cases


WORLDS = {
    "features": features_cases,
    "own": own_cases,
    "publishers": publishers_cases,
    "external": external_cases,
    "captions": captions_cases,
    "extraction": extraction_cases,
}
