"""create_features.py --inputs: from files and shards, killed and continued, refused where wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from domain_world import DATA, WORDS
from extraction_world import arguments, environment, make_rows, make_world, output_folder, run
from PIL import Image
from test_extraction import KILLED_RUN
from test_inversion import Phi

import create_features
import run_retrieval
from utils import UserError
from utils_backbones import backbone_folder
from utils_features import load_encoder
from utils_storage import load_features
from utils_text_tower import Replacement

DIM, WIDTH = 48, 32  # of the small CLIP
ROWS = make_rows()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The data set `shop` with a phi, captions of all images, and rewritten ones."""
    world = make_world(tmp_path_factory.mktemp("world"))
    torch.manual_seed(2)
    phi = Phi(DIM, WIDTH, 4 * DIM)
    torch.save({"Phi": phi.state_dict()}, world / "phi.pt")
    torch.save({"Phi": Phi(DIM + 1, WIDTH, 9).state_dict()}, world / "other.pt")
    write_captions(world / "captions")
    return world


def write_captions(folder: Path) -> None:
    folder.mkdir()
    images = dict.fromkeys(row[0] for split in ROWS.values() for row in split)
    described = [
        {"image": image, "captions": [f"a thing {n % 7}", f"thing {n}"][: 1 + n % 2]}
        for n, image in enumerate(images)
    ]
    rewritten = [
        {"query": str(n), "captions": [f"the thing {row[1]}"] * (1 + n % 3), "added": f"hat {n}"}
        for n, row in enumerate(ROWS["query"], 1)
    ]
    for name, lines in (("images", described), ("rewritten", rewritten)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture(autouse=True)
def in_the_world(world, monkeypatch):
    monkeypatch.chdir(world)


def extract(clip: Path, features: str, *flags: str, dataset: str = "shop") -> Path:
    command = arguments(clip, "--workers", "0", "--features_dir", features, *flags, dataset=dataset)
    create_features.main(command[1:])
    return output_folder(Path.cwd(), clip, features, dataset)


SEARLE = ("--inputs", "searle", "--phi", "phi.pt")
CVSI = ("--inputs", "cvsi", "--phi", "phi.pt", "--captions", "captions")
CIREVL = ("--inputs", "cirevl", "--captions", "captions")


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


# ---------------------------------------------------------------------------------------------
# What is made
# ---------------------------------------------------------------------------------------------


def test_searle_on_ones_own_data_is_its_definition(world, small_clip):
    folder = extract(small_clip, "own", *SEARLE)
    images = np.load(folder / "query_image.npy")
    phi = Phi(DIM, WIDTH, 4 * DIM).eval()
    phi.load_state_dict(torch.load("phi.pt", weights_only=True)["Phi"])
    with torch.no_grad():
        words = phi(torch.from_numpy(images)).numpy()
    encoder = load_encoder(f"local-dir:{small_clip}", torch.device("cpu"))
    texts = [f"a photo of $ that {row[1]}" for row in ROWS["query"]]
    replace = Replacement("$", words, np.arange(len(texts)))
    plain = unit(encoder.encode_texts(texts, 64, replace=replace))
    assert np.abs(np.load(folder / "query_searle.npy") - plain).max() < 1e-6
    manifest = json.loads((folder / "searle.json").read_text())
    assert manifest["sources"]["prompt"] == ["a photo of $ that {caption}"]
    assert len(manifest["sources"]["phi_sha256"]) == 64


def test_files_and_shards_give_the_same(world, small_clip):
    folders = [
        extract(small_clip, f"from_{source}", "--icir_source", source, *CVSI)
        for source in ("folder", "wds")
    ]
    for name in ("query_cvsi_text", "query_cvsi_word", "database_cvsi_caption"):
        one, other = (np.load(folder / f"{name}.npy") for folder in folders)
        assert np.array_equal(one, other)
        assert len(np.unique(one, axis=0)) > 1
    assert not list(folders[0].glob("*half_pixels*"))


def test_the_words_of_cvsi_are_made_of_rounded_pixels(world, small_clip):
    folder = extract(small_clip, "from_folder", *CVSI)
    encoder = load_encoder(f"local-dir:{small_clip}", torch.device("cpu"))
    phi = Phi(DIM, WIDTH, 4 * DIM).eval()
    phi.load_state_dict(torch.load("phi.pt", weights_only=True)["Phi"])
    images = [Image.open(Path("data/shop") / row[0]).convert("RGB") for row in ROWS["query"]]
    batch = torch.stack([encoder.preprocess(image) for image in images])
    texts = [
        f"a photo of $ that {row[1]}. And the photo should have hat {n}."
        for n, row in enumerate(ROWS["query"], 1)
    ]
    found = {}
    for rounded in (True, False):
        pixels = encoder._normalise(batch, torch.empty(batch.shape))
        pixels = pixels.half().float() if rounded else pixels
        with torch.no_grad():
            words = phi(encoder.model.encode_image(pixels, normalize=False)).numpy()
        replace = Replacement("$", words, np.arange(len(texts)), everywhere=True)
        plain = unit(encoder.encode_texts(texts, 64, replace=replace))
        found[rounded] = np.abs(np.load(folder / "query_cvsi_word.npy") - plain).max()
    assert found[True] < 1e-6 < found[False]


def test_the_rows_of_cvsi_are_means_of_unit_features(world, small_clip):
    folder = extract(small_clip, "from_folder", *CVSI)
    encoder = load_encoder(f"local-dir:{small_clip}", torch.device("cpu"))
    lines = [json.loads(line) for line in Path("captions/images.jsonl").read_text().splitlines()]
    captions = {line["image"]: line["captions"] for line in lines}
    found = np.load(folder / "database_cvsi_caption.npy")
    for row, (path, _, _) in enumerate(ROWS["database"][:9]):
        plain = unit(encoder.encode_texts(captions[path], 9)).mean(0)
        assert np.abs(found[row] - plain).max() < 1e-6
    lengths = np.linalg.norm(found, axis=1)
    assert lengths.min() < 0.999  # not at unit length
    features = load_features("from_folder", f"local-dir:{small_clip}", "shop")
    assert not features.query("cvsi_text").is_unit
    assert features.query("cvsi_word").is_unit


def test_a_killed_run_continues_to_the_same_bytes(world, small_clip):
    # All by the command itself: it says which instructions MKL may use, this process does not.
    flags = ("--workers", "0", "--part_rows", "4")
    whole, killed = ((*flags, "--features_dir", name) for name in ("whole", "killed"))
    assert run(world, small_clip, *whole, *CVSI).returncode == 0
    assert run(world, small_clip, *killed).returncode == 0
    died = subprocess.run(
        [sys.executable, str(KILLED_RUN), *arguments(small_clip, *killed, *CVSI)[1:]],
        env=environment(KILLED_AT="7"),
        capture_output=True,
    )
    assert died.returncode == -9, died.stderr
    folder = output_folder(world, small_clip, "killed")
    assert not (folder / "cvsi.json").exists()
    assert len(list((folder / ".parts_cvsi").rglob("*.npz"))) == 6
    assert run(world, small_clip, *killed, *CVSI).returncode == 0
    for name in ("query_cvsi_text", "query_cvsi_word", "database_cvsi_caption"):
        expected = output_folder(world, small_clip, "whole") / f"{name}.npy"
        assert (folder / f"{name}.npy").read_bytes() == expected.read_bytes()
    assert not (folder / ".parts_cvsi").exists()


def test_a_finished_input_is_not_made_again_and_another_is_refused(world, small_clip, capsys):
    folder = extract(small_clip, "own", *SEARLE)
    before = (folder / "query_searle.npy").read_bytes()
    capsys.readouterr()
    extract(small_clip, "own", *SEARLE)
    assert "searle.json: already finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"searle\.json belongs to finished features with another"):
        extract(small_clip, "own", *SEARLE, "--prompt", "$ {caption}")
    assert (folder / "query_searle.npy").read_bytes() == before
    extract(small_clip, "own", *SEARLE, "--prompt", "$ {caption}", "--overwrite")
    assert (folder / "query_searle.npy").read_bytes() != before
    extract(small_clip, "own", *SEARLE, "--overwrite")
    assert (folder / "query_searle.npy").read_bytes() == before


def test_inputs_of_other_features_are_refused(world, small_clip):
    extract(small_clip, "stale", *SEARLE, "--save_dtype", "float16")
    extract(small_clip, "stale", "--overwrite")
    command = ["--dataset", "shop", "--backbone", f"local-dir:{small_clip}", "--gpu", "-1"]
    command += ["--features_dir", "stale", "--results_dir", "results_stale", "--method"]
    with pytest.raises(UserError, match=r"query_searle\.npy was made for other features"):
        run_retrieval.main([*command, "searle"])
    run_retrieval.main([*command, "image"])
    extract(small_clip, "stale", *SEARLE, "--overwrite")
    run_retrieval.main([*command, "searle"])


def test_a_missing_input_is_named_with_what_makes_it(world, small_clip):
    extract(small_clip, "bare")
    command = ["--dataset", "shop", "--backbone", f"local-dir:{small_clip}", "--gpu", "-1"]
    command += ["--features_dir", "bare", "--results_dir", "results_bare", "--method"]
    wanted = {
        "searle": r"query_searle\.npy in .* --inputs searle --phi \.\.\.$",
        "cvsi": r"query_cvsi_word\.npy, database_.* --inputs cvsi --captions \.\.\. --phi \.\.\.$",
        "pic2word_mixture": r"query_pic2word_text\.npy in .* --inputs pic2word_text$",
    }
    for method, message in wanted.items():
        with pytest.raises(UserError, match=message):
            run_retrieval.main([*command, method])


@pytest.mark.parametrize("method", ["searle", "pic2word"])
def test_words_on_domain_conversion(world, small_clip, method):
    """Its queries are many more than their images and texts."""
    from test_inversion import Im2Text

    own = {"searle": ("Phi", Phi), "pic2word": ("state_dict_img2text", Im2Text)}[method]
    torch.save({own[0]: own[1](DIM, WIDTH, 9).state_dict()}, "network.pt")
    flags = ("--inputs", method, "--phi", "network.pt", "--data_dir", str(DATA))
    folder = extract(small_clip, "domains", *flags, dataset="ltll")
    features = load_features("domains", f"local-dir:{small_clip}", "ltll")
    rows = np.load(folder / f"query_{method}.npy")
    assert len(rows) == len(features.task.queries)
    texts = list(zip(features.task.queries.images, features.task.queries.text, strict=True))
    assert len(set(texts)) - 2 <= len(np.unique(rows, axis=0)) <= len(set(texts))  # some are copies
    manifest = json.loads((folder / f"{method}.json").read_text())
    wanted = {"searle": "a photo of $ that {caption}", "pic2word": "a {caption} of *"}[method]
    assert manifest["sources"]["prompt"] == [wanted]
    command = ["--dataset", "ltll", "--backbone", f"local-dir:{small_clip}", "--gpu", "-1"]
    command += ["--features_dir", "domains", "--results_dir", "results_domains"]
    run_retrieval.main([*command, "--method", method])


# ---------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--inputs", "searle"), "--inputs searle needs --phi FILE"),
        (("--inputs", "cirevl"), "--inputs cirevl needs --captions DIR"),
        (("--inputs", "cvsi", "--captions", "captions"), "--inputs cvsi needs --phi FILE"),
        (("--phi", "phi.pt"), "--phi has no effect"),
        ((*CIREVL, "--phi", "phi.pt"), "--phi has no effect with --inputs cirevl"),
        ((*CIREVL, "--prompt", "x"), "--prompt has no effect with --inputs cirevl"),
        (("--inputs", "nothing"), "invalid choice: 'nothing'"),
        (("--inputs", "searle", "--phi", "none.pt"), r"--phi none\.pt does not exist"),
        (("--inputs", "searle", "--phi", "other.pt"), "features of 49 dimensions .* has 48 and 32"),
        (("--inputs", "pic2word", "--phi", "phi.pt"), "has no 'state_dict_img2text'"),
        ((*SEARLE, "--prompt", "a photo"), r"the mark '\$', where the word goes, is missing"),
        ((*SEARLE, "--prompt", "$$ {caption}"), r"'\$' is not among its first 77 tokens"),
        (("--inputs", "cirevl", "--captions", "nowhere"), "there is neither rewritten.jsonl nor"),
    ],
)
def test_what_is_wrong_is_one_line(world, small_clip, flags, message):
    extract(small_clip, "refused")
    with pytest.raises(UserError, match=message) as caught:
        extract(small_clip, "refused", *flags)
    assert "\n" not in str(caught.value)


def test_features_of_another_model_are_refused(world, small_clip, make_clip):
    from conftest import SMALL_CLIP

    folder = extract(small_clip, "moved")
    other = make_clip("another seed", SMALL_CLIP, seed=9)
    target = Path("moved") / backbone_folder(f"local-dir:{other}")
    folder.parent.rename(target)
    with pytest.raises(UserError, match="another model"):
        extract(other, "moved", *SEARLE)


# ---------------------------------------------------------------------------------------------
# Texts that a method asks for
# ---------------------------------------------------------------------------------------------


def freedom(clip: Path, features: str, *flags: str) -> list[str]:
    """The flags of commands on a domain benchmark with a list of words, encoded."""
    corpora = Path(f"corpora_{features}")
    corpora.mkdir()
    shutil.copy(DATA / f"{WORDS}.csv", corpora)
    (corpora / "generic_subjects.csv").write_text("mug\n")
    where = ("--features_dir", features, "--backbone", f"local-dir:{clip}", "--gpu", "-1")
    create_features.main(["--dataset", "corpus", *where, "--corpora_dir", str(corpora)])
    base = ["--dataset", "ltll", *where, "--data_dir", str(DATA)]
    own = ("--corpora_dir", str(corpora), "--workers", "0", *flags)
    create_features.main([*base, *own])
    return base


def test_texts_of_freedom_are_kept_beforehand(world, small_clip, capsys):
    retrieve = ("--method", "freedom", "--use_preset", "--results_dir")
    bare = freedom(small_clip, "freedom_bare")
    run_retrieval.main([*bare, *retrieve, "results_bare_freedom"])
    assert "encoding " in capsys.readouterr().err
    prepared = freedom(small_clip, "freedom_prepared", "--inputs", "freedom", "--part_rows", "8")
    capsys.readouterr()
    run_retrieval.main([*prepared, *retrieve, "results_prepared_freedom"])
    assert "encoding " not in capsys.readouterr().err
    stores = [next(Path(f"freedom_{n}").glob("*/texts")) for n in ("bare", "prepared")]
    texts = [sorted((store / "texts.csv").read_text().splitlines()) for store in stores]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 20
    assert not list(stores[1].glob(".parts*"))
    tables = [next(Path(f"results_{n}_freedom").rglob("APs.csv")) for n in ("bare", "prepared")]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    again = [*prepared, "--corpora_dir", "corpora_freedom_prepared", "--inputs", "freedom"]
    create_features.main(again)
    assert "every text is there already" in capsys.readouterr().out
    with pytest.raises(UserError, match="--overwrite has no effect with --inputs freedom"):
        create_features.main([*again, "--overwrite"])


def test_several_processes_are_refused(world, small_clip, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--inputs searle is the work of one process"):
        extract(small_clip, "several", *SEARLE)
