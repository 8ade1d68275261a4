"""What is encoded of an image, and what a viewer shows of it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from extraction_world import write_rows, write_shards
from PIL import Image
from pixel_files import GREY, RGB, all_cases, grey_profile, in_mode, save, srgb_profile
from report_world import page_data

import run_retrieval
from create_features import main
from utils import UserError
from utils_features import load_encoder
from utils_pixels import FACTS, Look, decode_image, read_pixels

CASES = all_cases()
# Pictures of which the two ways make the same.
ALIKE = {
    *("PNG grey 1", "PNG grey 2", "PNG grey 4", "PNG grey 8", "PNG RGB 8", "PNG RGB 16"),
    *(f"PNG palette {depth}" for depth in (1, 2, 4, 8)),
    *(f"TIFF {mode}" for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr")),
    *(f"TIFF turned by {orientation}" for orientation in range(2, 9)),  # Pillow turns them
    *("JPEG CMYK", "JPEG grey", "BMP"),
}


@pytest.fixture(scope="module")
def features(small_clip):
    """A function that gives the unit features (n, D) of images."""
    encoder = load_encoder(f"local-dir:{small_clip}", torch.device("cpu"))

    def encode(images):
        found = encoder.encode_images(torch.stack([encoder.preprocess(i) for i in images])).numpy()
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    return encode


def saved_plainly(shown: np.ndarray) -> Image.Image:
    """A picture that was saved as 8-bit RGB and is read as every picture was before."""
    return Image.open(io.BytesIO(save(Image.fromarray(shown), "PNG"))).convert("RGB")


@pytest.mark.filterwarnings("ignore:Palette images")
def test_every_picture_is_encoded_as_a_viewer_shows_it(features):
    """With the cosine of what was encoded before, which is what the test would catch."""
    viewed = [decode_image(data, viewed=True) for data, _ in CASES.values()]
    for (name, (_, shown)), image in zip(CASES.items(), viewed, strict=True):
        assert image.mode == "RGB"
        assert image.size == shown.shape[1::-1], name
        far = np.abs(np.asarray(image, int) - shown).mean()
        assert far < 2.5, (name, far)
    plain = features([saved_plainly(shown) for _, shown in CASES.values()])
    cosines = (features(viewed) * plain).sum(1)
    assert cosines.min() > 0.999, sorted(zip(cosines, CASES, strict=True))[:5]


@pytest.mark.filterwarnings("ignore:Palette images")
def test_every_difference_is_named_and_nothing_else_is():
    for name, (data, _) in CASES.items():
        plain, facts = read_pixels(data)
        viewed, same = read_pixels(data, viewed=True)
        assert facts == same
        assert (facts == ()) == (name in ALIKE), (name, facts)
        assert set(facts) <= set(FACTS)
        if name in ALIKE:
            assert plain.tobytes() == viewed.tobytes(), name
        assert plain.tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.parametrize("mode", Image.MODES)
def test_every_mode_of_pillow(mode):
    image, shown = in_mode(mode)
    seen = Look.at(image).show(image)
    assert seen.mode == "RGB"
    assert np.abs(np.asarray(seen, int) - shown).mean() < 2.5


@pytest.mark.parametrize(
    "profile",
    [srgb_profile(), b"no profile", srgb_profile()[:300], grey_profile()],
    ids=["sRGB", "none", "cut", "of grey"],
)
def test_profiles_that_change_nothing(profile):
    data = save(Image.fromarray(RGB), "PNG", icc_profile=profile)
    image, facts = read_pixels(data, viewed=True)
    assert facts == ()
    assert (np.asarray(image) == RGB).all()


def test_a_damaged_orientation_is_none():
    for exif in (
        b"Exif\0\0MM\0*\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0",
    ):
        data = save(Image.fromarray(GREY), "JPEG", exif=exif)
        assert read_pixels(data, viewed=True)[1] == ()


def test_what_shines_through_nowhere_is_no_transparency():
    image = Image.fromarray(RGB).convert("RGBA")
    assert read_pixels(save(image, "PNG"))[1] == ()


# ---------------------------------------------------------------------------------------------
# Through the command
# ---------------------------------------------------------------------------------------------

TURNED = CASES["JPEG turned by 6"][0]
STRAIGHT = save(Image.fromarray(RGB), "JPEG", quality=97, subsampling=0)
FOUND = [{"stage": "images", "fact": "an EXIF orientation", "images": 1, "first": "t.jpg"}]


@pytest.fixture
def extract(tmp_path, small_clip, monkeypatch):
    """A function that runs create_features in a folder with a turned photograph, twice."""
    for folder in ("photos", "data/tiny"):
        (tmp_path / folder).mkdir(parents=True)
        for name, data in (("t.jpg", TURNED), ("s.jpg", STRAIGHT)):
            (tmp_path / folder / name).write_bytes(data)
        for split in ("query", "database"):
            (tmp_path / folder / f"{split}_files.csv").write_text("t.jpg,x,i\ns.jpg,x,i\n")
    (tmp_path / "captions.csv").write_text("t.jpg,one\ns.jpg,two\n")
    write_rows(tmp_path / "corpora/generic_subjects.csv", [("mug",)])
    write_shards(tmp_path / "photos", "query", [("t.jpg", "x", "i"), ("s.jpg", "x", "i")], SHARDED)
    monkeypatch.chdir(tmp_path)

    def run(*flags: str) -> dict:
        main(["--backbone", f"local-dir:{small_clip}", "--gpu", "-1", "--workers", "0", *flags])

    return run


def difference_shown(dataset: str, clip: Path) -> float:
    """How far the two pictures of the gallery are apart in the report, in steps of 255."""
    flags = ["--dataset", dataset, "--backbone", f"local-dir:{clip}", "--gpu", "-1"]
    run_retrieval.main([*flags, "--method", "image", "--report"])
    (page,) = Path("results").glob("*/image*/report/index.html")
    names = [item[2] for item in page_data(page)["rows"]]
    seen = [np.asarray(Image.open(page.parent / "thumbnails" / name), int) for name in names]
    same = seen[0].shape == seen[1].shape
    return float(np.abs(seen[0] - seen[1]).mean()) if same else 255.0


SHARDED = {"t.jpg": TURNED, "s.jpg": STRAIGHT}


def similarity(array: np.ndarray) -> float:
    first, second = array / np.linalg.norm(array, axis=1, keepdims=True)
    return float(first @ second)


@pytest.mark.parametrize(
    ("dataset", "pixels"), [("photos", "viewed"), ("tiny", "plain")], ids=["own", "published"]
)
def test_the_picture_as_viewed_is_encoded_of_ones_own(
    extract, tmp_path, small_clip, dataset, pixels
):
    """Of a published data set, what was encoded before; features of the two are not mixed."""
    extract("--dataset", dataset)
    (path,) = tmp_path.glob(f"features/*/{dataset}/manifest.json")
    manifest = json.loads(path.read_text())
    assert manifest["pixels"] == pixels
    stages = [(entry["stage"], entry["first"]) for entry in manifest["odd_images"]]
    assert stages == [("query_image", "t.jpg"), ("database_image", "t.jpg")]
    alike = similarity(np.load(path.parent / "database_image.npy")) > 0.999
    assert alike == (pixels == "viewed")
    assert alike == (difference_shown(dataset, small_clip) < 5)
    other = "plain" if pixels == "viewed" else "viewed"
    message = f"with another pixels \\({pixels}, now {other}\\); --pixels {pixels} keeps them"
    with pytest.raises(UserError, match=message):
        extract("--dataset", dataset, "--pixels", other)
    extract("--dataset", dataset, "--pixels", other, "--overwrite")
    assert json.loads(path.read_text())["pixels"] == other


def test_shards_of_ones_own(extract, tmp_path):
    """The query's images from shards, those of the database being the same."""
    shutil.copytree(tmp_path / "photos/webdataset/query", tmp_path / "photos/webdataset/database")
    (tmp_path / "photos/webdataset/database/query-000000.tar").rename(
        tmp_path / "photos/webdataset/database/database-000000.tar"
    )
    extract("--dataset", "photos", "--icir_source", "wds")
    (path,) = tmp_path.glob("features/*/photos/query_image.npy")
    assert similarity(np.load(path)) > 0.999
    manifest = json.loads((path.parent / "manifest.json").read_text())
    assert [entry["first"] for entry in manifest["odd_images"]] == ["photos/t.jpg"] * 2


@pytest.mark.parametrize("pixels", [None, "plain"])
def test_means_and_normalisation_features(extract, tmp_path, pixels):
    flags = ["--images", "photos", *(("--pixels", pixels) if pixels else ())]
    extract("--dataset", "synthetic", *flags, "--captions", "captions.csv")
    extract("--dataset", "mean", *flags)
    contents = [np.load(path) for path in tmp_path.rglob("*.npz")]
    assert len(contents) == 2
    for content in contents:
        manifest = json.loads(str(content["manifest"]))
        assert manifest["pixels"] == (pixels or "viewed")
        assert manifest["odd_images"] == FOUND
        if "image_features" in content:
            assert (similarity(content["image_features"]) > 0.999) == (pixels is None)


def test_features_that_do_not_say_are_plain(extract, tmp_path, capsys):
    """Those of a published data set that were made before are finished still."""
    extract("--dataset", "tiny")
    (path,) = tmp_path.glob("features/*/tiny/manifest.json")
    manifest = json.loads(path.read_text())
    for name in ("pixels", "odd_images", "encoded", "texts"):
        del manifest[name]
    path.write_text(json.dumps(manifest))
    extract("--dataset", "tiny")
    assert "already finished" in capsys.readouterr().out
