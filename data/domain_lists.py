"""Domain conversion's files at FREEDOM's repository, and where the images of its data sets are.

The repository is the publisher of the lists; its listing at one commit gives their git blob ids.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Run from a script, Python looks for modules in data/; the shared ones lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import find_folder, list_benchmarks, missing_images
from utils import UserError, printable

REPOSITORY = "NikosEfth/freedom"
COMMIT = "5df4bca6f53b365ee2bc06da7b070bcdfdf2b516"
LISTING_URL = f"https://api.github.com/repos/{REPOSITORY}/git/trees/{COMMIT}?recursive=1"
FILES_URL = f"https://raw.githubusercontent.com/{REPOSITORY}/{COMMIT}"

# Target of the download -> the files that it brings, below the folder of data sets.
LISTS = {
    "imagenet_r": ("imgnet_targets.txt", "imgnet_real_query.txt", "label_names.csv"),
    "nico": ("query_files.csv", "database_files.csv"),
    "minidn": ("query_files.csv", "database_files.csv"),
    "ltll": ("full_files.csv",),
}
WORDS = "open_image_v7_class_names.csv"  # FREEDOM's words: a corpus
WORDS_TARGET = "words"
TARGETS = (*LISTS, WORDS_TARGET)

IMAGES = {
    "imagenet_r": """\
Images of ImageNet-R, to be unpacked in {root}:
  https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar
    tar -xf {root}/imagenet-r.tar -C {root}
  ILSVRC2012_img_val.tar of https://image-net.org (with an account), of which 10,000 images are used
    mkdir -p {root}/imagenet_val
    tar -xf {root}/ILSVRC2012_img_val.tar -C {root}/imagenet_val
    cut -d' ' -f1 {root}/imgnet_real_query.txt | while read -r path; do
      to={root}/"${{path#*/}}"; mkdir -p "${{to%/*}}"; cp {root}/imagenet_val/"${{to##*/}}" "$to"
    done
They then lie at {root}/imagenet-r/CLASS/ and {root}/real/CLASS/.""",
    "nico": """\
Images of NICO++: DG_Benchmark.zip, to be unpacked in {root}, from
https://www.dropbox.com/scl/fo/ix8u21atdwrstmgjkz2rx/AP5fheclFPjfbBMbeHoqPow\
?dl=0&rlkey=kcbecly7tetqu57v4tsmo095m
Blanks in folder names become _ :
    unzip {root}/DG_Benchmark.zip -d {root} && unzip {root}/NICO_DG_Benchmark.zip -d {root}
    mv {root}/NICO_DG/* {root}/
    find {root} -depth -type d -name '* *' -execdir bash -c 'mv "$1" "${{1// /_}}"' _ {{}} \\;
They then lie at {root}/DOMAIN/CLASS/.""",
    "minidn": """\
Images of MiniDomainNet: four archives of DomainNet, to be unpacked in {root}:
  https://csr.bu.edu/ftp/visda/2019/multi-source/groundtruth/clipart.zip
  https://csr.bu.edu/ftp/visda/2019/multi-source/groundtruth/painting.zip
  https://csr.bu.edu/ftp/visda/2019/multi-source/real.zip
  https://csr.bu.edu/ftp/visda/2019/multi-source/sketch.zip
    for domain in clipart painting real sketch; do unzip {root}/$domain.zip -d {root}; done
They then lie at {root}/DOMAIN/CLASS/.""",
    "ltll": """\
Images of LTLL: https://users.cecs.anu.edu.au/~basura/beeldcanon/LTLL.zip, to be unpacked in {root};
folder names lose their blanks, in file names they become _ :
    unzip {root}/LTLL.zip -d {root}
    find {root} -depth -type d -name '* *' -execdir bash -c 'mv "$1" "${{1// /}}"' _ {{}} \\;
    find {root} -type f -name '* *' -execdir bash -c 'mv "$1" "${{1// /_}}"' _ {{}} \\;
They then lie at {root}/New/ and {root}/Old/.""",
}


def place_lists(targets: Sequence[str], data_dir: Path, corpora_dir: Path) -> dict[str, Path]:
    """The files that some targets bring: name below the repository's data/ -> path here."""
    placed = {
        f"{name}/{file}": find_folder(data_dir, name) / file
        for name in targets
        for file in LISTS.get(name, ())
    }
    return placed | ({WORDS: corpora_dir / WORDS} if WORDS_TARGET in targets else {})


def read_listing(listing: Mapping, names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """What GitHub's listing of a tree says of some files below data/: name -> path, git blob id.

    ImageNet-R's folder is imagenet-r in some places and imagenet_r in others. A name that is not
    listed is left out. Raises UserError if this is no whole listing.
    """
    try:
        if listing["truncated"]:
            raise UserError(f"{LISTING_URL}: the listing is cut; use a mirror (--listing_url)")
        blobs = {e["path"]: e["sha"] for e in listing["tree"] if e["type"] == "blob"}
    except (KeyError, TypeError):
        raise UserError(
            "what --listing_url names is no listing of a tree as GitHub gives it"
        ) from None
    found = {}
    for name in names:
        spellings = (f"data/{name}", f"data/{name.replace('imagenet_r/', 'imagenet-r/')}")
        paths = [path for path in spellings if path in blobs]
        if paths:
            found[name] = paths[0], blobs[paths[0]]
    return found


def describe_images(name: str, root: Path) -> str:
    """Where the images of a data set come from, and how many of those its lists name are there."""
    benchmark = list_benchmarks()[name]
    task = benchmark.tasks[name](root)
    missing = missing_images(benchmark, task, root)
    images = len({*task.gallery.path, *(path for own in task.queries.images for path in own)})
    if not missing:
        return f"{root}: all {images} images of {name} are there"
    return (
        f"{root}: {len(missing)} of {images} images of {name} are missing, the first is "
        f"{printable(missing[0])}\n{IMAGES[name].format(root=root)}"
    )
