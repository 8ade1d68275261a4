"""data/download.py {cirr,circo,fashioniq,genecis} against a local HTTP server."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from test_download import (  # noqa: F401 (fixtures)
    Page,
    Site,
    _no_way_out,
    assert_refused,
    run,
    site,
)

from data.annotation_files import REPOSITORIES, describe_images
from tests import semantic_files
from tests.semantic_world import ANNOTATIONS, needs_annotations


def serve(server: Site, target: str) -> list[str]:
    """A repository with the published files, what is not at hand made up; the flags to it."""
    for path in REPOSITORIES[target].files:
        file = ANNOTATIONS / target / f"{path}.gz"
        if file.is_file():
            content = gzip.decompress(file.read_bytes())
        else:
            content = json.dumps(semantic_files.genecis()[path]).encode()
        server.pages[f"/{path}"] = Page(content)
    return ["--files_url", server.url]


@needs_annotations
@pytest.mark.parametrize(
    ("target", "lines"),
    [
        (
            "cirr",
            [
                "cirr: 2297 images are missing: dev/dev-244-0-img0.png, dev/dev-1028-1-img1.png,",
                "cirr_test: 2315 images are missing: ",
                "NLVR2's",
            ],
        ),
        (
            "circo",
            ["circo: ", "image_info_unlabeled2017.json does not exist", "images.cocodataset.org"],
        ),
        ("fashioniq", ["fashioniq: 15415 images are missing: images/B0", "<ASIN>.jpg or .png"]),
        ("genecis", ["genecis: ", " images are missing: Visual_Genome/VG_All/", "Visual Genome"]),
    ],
)
def test_annotations_are_installed_and_missing_images_told(site, tmp_path, target, lines):  # noqa: F811
    result = run(tmp_path, target, *serve(site, target))
    assert result.returncode == 0, result.stderr
    for path in REPOSITORIES[target].files:
        installed = tmp_path / "data" / target / REPOSITORIES[target].inner / path
        assert installed.read_bytes() == site.pages[f"/{path}"].content
    for line in lines:
        assert line in result.stdout
    again = run(tmp_path, target, *serve(site, target))
    assert again.stdout.count("kept, already right") == len(REPOSITORIES[target].files)


@needs_annotations
def test_a_folder_written_in_capitals_is_used(site, tmp_path):  # noqa: F811
    (tmp_path / "data" / "CIRR").mkdir(parents=True)
    assert run(tmp_path, "cirr", *serve(site, "cirr")).returncode == 0
    assert (tmp_path / "data/CIRR/cirr/captions/cap.rc2.val.json").is_file()


@needs_annotations
@pytest.mark.parametrize(
    ("target", "path", "message"),
    [
        ("circo", "annotations/val.json", "annotations/val.json: wrong content"),
        ("genecis", "genecis/focus_attribute.json", "is not valid JSON"),
    ],
)
def test_wrong_content_is_not_installed(site, tmp_path, target, path, message):  # noqa: F811
    flags = serve(site, target)
    site.pages[f"/{path}"].content = site.pages[f"/{path}"].content[:-20]
    assert_refused(run(tmp_path, target, *flags), message)
    assert not (tmp_path / "data" / target / path).exists()


@pytest.mark.parametrize("ending", [".jpg", ".png"])
def test_images_that_are_there_are_found(tmp_path, ending):
    root = semantic_files.write(tmp_path / "fashioniq", semantic_files.fashioniq())
    for number in range(4):
        for name in ("COMMON", "DRESS", "SHIRT", "TOPTEE"):
            file = root / "images" / f"B0{name}{number if name != 'COMMON' else ''}{ending}"
            file.parent.mkdir(exist_ok=True)
            file.touch()
    assert describe_images("fashioniq", tmp_path)[0] == "fashioniq: all images are there"
    Path(root / "images" / f"B0SHIRT2{ending}").unlink()
    lines = describe_images("fashioniq", tmp_path)
    assert "fashioniq: 1 images are missing: images/B0SHIRT2.jpg" in lines
