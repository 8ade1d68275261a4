"""data/download.py {imagenet_r,nico,minidn,ltll,words} against a local HTTP server."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from test_download import (  # noqa: F401 (fixtures)
    Page,
    Site,
    _no_way_out,
    assert_refused,
    blob_id,
    closed_url,
    download,
    run,
    site,
    tree,
)

from data import domain_lists

WORLD = Path(__file__).parent / "golden_domains" / "data"
NAMES = [f"{name}/{file}" for name, files in domain_lists.LISTS.items() for file in files]
WORDS = domain_lists.WORDS


def serve(server: Site, without: str = "", folder: str = "imagenet_r") -> list[str]:
    """A repository with the golden world's lists; returns the flags that lead to it."""
    entries = [{"path": "data", "type": "tree", "sha": "0" * 40}]
    for name in (*NAMES, WORDS):
        path = f"data/{name.replace('imagenet_r/', folder + '/')}"
        content = (WORLD / name).read_bytes()
        server.pages[f"/files/{path}"] = Page(content)
        entries += [{"path": path, "type": "blob", "sha": blob_id(content)}] * (name != without)
    listing = {"sha": "1" * 40, "tree": entries, "truncated": False}
    server.pages["/tree"] = Page(json.dumps(listing).encode())
    return ["--listing_url", f"{server.url}/tree", "--files_url", f"{server.url}/files"]


@pytest.mark.parametrize("name", domain_lists.LISTS)
def test_lists_are_installed_and_missing_images_told(site, tmp_path, name):  # noqa: F811
    result = run(tmp_path, name, *serve(site))
    assert result.returncode == 0, result.stderr
    for file in domain_lists.LISTS[name]:
        installed = tmp_path / "data" / name / file
        assert installed.read_bytes() == (WORLD / name / file).read_bytes()
    images = len([path for path in (WORLD / name).rglob("*") if path.suffix.lower()[:3] == ".jp"])
    assert f"data/{name}: {images} of {images} images of {name} are missing" in result.stdout
    assert domain_lists.IMAGES[name].splitlines()[-1].format(root=f"data/{name}") in result.stdout


def test_images_that_are_there_are_found(site, tmp_path):  # noqa: F811
    shutil.copytree(WORLD / "ltll", tmp_path / "data" / "ltll")
    result = run(tmp_path, "ltll", *serve(site))
    assert result.returncode == 0, result.stderr
    assert "kept, already right: data/ltll/full_files.csv" in result.stdout
    assert "data/ltll: all 49 images of ltll are there" in result.stdout
    gone = next((tmp_path / "data" / "ltll").rglob("Q001-2007-03-02.JPG"))
    gone.unlink()
    told = domain_lists.describe_images("ltll", tmp_path / "data" / "ltll")
    assert "1 of 49 images of ltll are missing, the first is ltll/New/images/Q001/Q001-2007" in told


def test_words_are_a_corpus(site, tmp_path):  # noqa: F811
    assert run(tmp_path, "words", *serve(site)).returncode == 0
    assert (tmp_path / "corpora/reference" / WORDS).read_bytes() == (WORLD / WORDS).read_bytes()


def test_folder_of_imagenet_r_may_be_spelled_with_a_dash(site, tmp_path):  # noqa: F811
    assert run(tmp_path, "imagenet_r", *serve(site, folder="imagenet-r")).returncode == 0
    assert (tmp_path / "data/imagenet_r/label_names.csv").is_file()


def test_what_is_written_down_verifies_without_a_network(site, tmp_path, closed_url):  # noqa: F811
    assert run(tmp_path, "nico", *serve(site)).returncode == 0
    away = ["--listing_url", f"{closed_url}/tree", "--files_url", f"{closed_url}/files"]
    again = run(tmp_path, "nico", *away)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("kept, already right") == 2
    assert_refused(run(tmp_path, "ltll", *away), "data/ltll/full_files.csv is missing")
    (tmp_path / "data/nico/query_files.csv").write_text("nico/a.jpg dim cat\n")
    assert_refused(run(tmp_path, "nico", *away), "data/nico/query_files.csv", "--overwrite")


def test_a_list_that_the_repository_lacks_is_named(site, tmp_path):  # noqa: F811
    result = run(tmp_path, "minidn", *serve(site, without="minidn/database_files.csv"))
    assert_refused(result, "no data/minidn/database_files.csv", "data/minidn/database_files.csv")
    assert (tmp_path / "data/minidn/query_files.csv").is_file()


def test_wrong_content_is_not_installed(site, tmp_path):  # noqa: F811
    flags = serve(site)
    site.pages["/files/data/ltll/full_files.csv"].content += b"?"
    assert_refused(run(tmp_path, "ltll", *flags), "ltll/full_files.csv: wrong content")
    assert not any(name.startswith("data/ltll/") for name in tree(tmp_path))


@pytest.mark.parametrize("listing", [{"truncated": True, "tree": []}, {"message": "no"}])
def test_what_is_no_whole_listing_is_refused(site, tmp_path, listing):  # noqa: F811
    flags = serve(site)
    site.pages["/tree"] = Page(json.dumps(listing).encode())
    assert_refused(run(tmp_path, "nico", *flags), "listing")


def unpack_as_published(name: str, root: Path) -> None:
    """The golden world's images as the archives of ImageNet, NICO++ and LTLL leave them."""
    if name == "imagenet_r":
        (root / "imagenet_val").mkdir(parents=True)
        for path in (WORLD / name / "real").rglob("*.JPEG"):
            shutil.copy(path, root / "imagenet_val")
        shutil.copytree(WORLD / name / "imagenet-r", root / "imagenet-r")
        return
    for path in (WORLD / name).rglob("*"):
        if path.is_file() and path.suffix != ".csv":
            target = root / path.relative_to(WORLD / name)
            if name == "nico":
                target = target.parent.with_name(target.parent.name.replace("_", " ")) / target.name
            else:
                spaced = target.parent.name.replace("Tower", " Tower")
                target = target.parent.with_name(spaced) / target.name.replace("_", " ")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


@pytest.mark.parametrize("name", ["imagenet_r", "nico", "ltll"])
def test_the_commands_that_are_printed_put_images_in_their_places(tmp_path, name):
    root = tmp_path / name
    unpack_as_published(name, root)
    for file in domain_lists.LISTS[name]:
        shutil.copy(WORLD / name / file, root)
    told = domain_lists.describe_images(name, root)
    assert "are missing" in told
    lines = [
        line for line in told.splitlines() if line.startswith("    ") or line.strip() == "done"
    ]
    commands = "\n".join(li for li in lines if not li.strip().startswith(("tar", "unzip", "mv")))
    subprocess.run(["bash", "-e", "-c", commands], check=True)
    assert "are there" in domain_lists.describe_images(name, root)


def test_targets_of_the_command_are_those_of_the_benchmarks():
    assert set(domain_lists.LISTS) == set(domain_lists.IMAGES)
    assert not set(domain_lists.TARGETS) & set(download.TARGETS)
