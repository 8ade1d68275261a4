"""Write the tiny world's corpora and what its mean and normalisation features are made of.

`python3 data/tiny/make_assets.py --out DIR` renders images of the training world into DIR/images,
writes a caption of each to DIR/captions.csv (rows image_path,caption) and the two text corpora to
data/tiny/corpora. The README beside this file says which commands eat them.
"""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path

import numpy as np
from captions import caption, write_corpora
from PIL import Image
from train import draw_sample, render_samples

HERE = Path(__file__).resolve().parent
IMAGES = 1000


def write_images(out: Path, count: int, workers: int) -> None:
    """Render the first images of the training world with a caption each."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(0), []
    for number, pixels in enumerate(render_samples(count, held_out=False, workers=workers)):
        name = f"{number:05d}.png"
        Image.fromarray(pixels).save(out / "images" / name)
        rows.append((name, caption(*draw_sample(number, held_out=False), rng)[0]))
    with open(out / "captions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for images and captions")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="that render")
    args = parser.parse_args()
    if args.workers < 1:
        parser.error("--workers: at least one renders")
    write_images(args.out, args.images, args.workers)
    write_corpora(HERE / "corpora")
    print(f"{args.out}: {args.images} images and captions; {HERE / 'corpora'}: the corpora")


if __name__ == "__main__":
    main()
