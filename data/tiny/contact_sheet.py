"""Draw a contact sheet of the tiny split: `python3 data/tiny/contact_sheet.py [--out FILE]`.

A row is one composed query: its image, its text, then images of its database by kind.
"""

from __future__ import annotations

import argparse
import csv
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
TILE, GAP, TEXT_WIDTH, HEAD = 96, 4, 150, 26  # pixels
# Kind of a database image, which its file name begins with: how many, and what it is.
COLUMNS = {
    "positive": (3, "positives"),
    "visual": (2, "same thing, other style"),
    "textual": (2, "other thing, right style"),
    "composed": (2, "look-alike, right style"),
    "random": (1, "random"),
}
INK, PAPER, GOOD = (30, 30, 34), (255, 255, 255), (40, 140, 70)


def _read(root: Path, split: str) -> list[list[str]]:
    path = root / f"{split}_files.csv"
    if not path.is_file():
        sys.exit(f"error: {path} does not exist; run python3 data/tiny/make_split.py")
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def draw_sheet(root: Path, rows: int) -> Image.Image:
    """A sheet of one query of each of the first `rows` instances, RGB."""
    queries, database = _read(root, "query"), _read(root, "database")
    instances = list(dict.fromkeys(row[2] for row in queries))[:rows]
    tiles = sum(count for count, _ in COLUMNS.values())
    width = TILE + TEXT_WIDTH + tiles * (TILE + GAP) + (len(COLUMNS) + 2) * 2 * GAP
    sheet = Image.new("RGB", (width, HEAD + len(instances) * (TILE + GAP)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    draw.text((GAP, 6), "query image", INK, font)
    draw.text((TILE + 4 * GAP, 6), "+ query text", INK, font)

    def paste(path: str, x: int, y: int, frame: tuple[int, int, int] | None = None) -> None:
        with Image.open(root / path) as image:
            sheet.paste(image.resize((TILE, TILE), Image.Resampling.NEAREST), (x, y))
        if frame:
            draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), outline=frame, width=3)

    for line, instance in enumerate(instances):
        y = HEAD + line * (TILE + GAP)
        own = [row for row in queries if row[2] == instance]
        path, text, _ = own[line % len(own)]
        paste(path, 0, y)
        draw.multiline_text(
            (TILE + 4 * GAP, y + TILE // 3), textwrap.fill(f"+ {text}", 19), INK, font
        )
        rows_here = [row for row in database if row[2] == instance]
        block = next(row[0] for row in rows_here if row[1] == text).rsplit("_", 1)[1][0]
        x = TILE + TEXT_WIDTH + 4 * GAP
        for kind, (count, title) in COLUMNS.items():
            if line == 0:
                draw.text((x, 6), title, INK, font)
            named = sorted(row[0] for row in rows_here if Path(row[0]).name.startswith(kind))
            if kind in ("positive", "textual", "composed"):  # those of this query's text
                named = [name for name in named if name.rsplit("_", 1)[1][0] == block]
            for name in named[:count]:
                paste(name, x, y, GOOD if kind == "positive" else None)
                x += TILE + GAP
            x += 2 * GAP
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=HERE, help="folder of the split")
    parser.add_argument("--out", type=Path, default=Path("results/tiny/contact_sheet.png"))
    parser.add_argument("--rows", type=int, default=12, help="instances shown")
    args = parser.parse_args()
    sheet = draw_sheet(args.root, args.rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.out, quality=82)
    print(f"contact sheet: {args.out}")


if __name__ == "__main__":
    main()
