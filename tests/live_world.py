"""Photographs with awkward names, what methods read beside them, and the server in a process."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from extraction_world import draw_image, encode_jpeg, environment, write_rows

from methods import list_methods
from utils import write_csv, write_json
from utils_assets import mean_path, synthetic_path
from utils_storage import features_folder
from utils_task import Images, QueryTable, RowSets, Task, View, save_task, whole_gallery

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = 30
HOSTILE = (
    "<img src=x onerror=window.hacked=1>.jpg",
    "a b&c#d?e%2e%2e%2f;'\"`.jpg",
    "=cmd|calc,\u202egnp.jpg",
    "line\nbreak.png",
    "..hidden..jpg",
)
BROKEN = "broken.jpg"
DIM = 48  # of the small CLIP
SUBJECTS, STYLES = 60, 40  # texts of the corpora: enough for a projection that keeps something


def make_photos(root: Path) -> Path:
    """A folder of PHOTOS photographs, some with names that are markup or look like paths."""
    (root / "trip" / "day 1").mkdir(parents=True)
    names = [f"trip/day 1/{number:02d}.jpg" for number in range(PHOTOS - len(HOSTILE) + 1)]
    names += [f"trip/{name}" for name in HOSTILE if not name.startswith(".")]
    for seed, name in enumerate(names):
        (root / name).write_bytes(encode_jpeg(draw_image(seed)))
    (root / BROKEN).write_bytes(b"no image")
    (root / "phone.heic").write_bytes(b"of another kind")
    (root / ".thumbnails").mkdir()
    (root / ".thumbnails" / "00.jpg").write_bytes(encode_jpeg(draw_image(0)))
    return root


@dataclass(frozen=True)
class World:
    """folder holds photos, features, corpora, data, synthetic; clip: of the small CLIP."""

    folder: Path
    clip: Path

    @property
    def photos(self) -> Path:
        return self.folder / "photos"

    @property
    def backbone(self) -> str:
        return f"local-dir:{self.clip}"

    @property
    def where(self):
        from live.opening import Where

        at = self.folder
        return Where(at / "features", at / "data", at / "synthetic", at / "corpora", -1)

    def flags(self) -> list[str]:
        """The flags of search.py that point it at this world."""
        names = {
            "features_dir": "features",
            "data_dir": "data",
            "corpora_dir": "corpora",
            "path_to_synthetic_data": "synthetic",
        }
        places = [word for n, at in names.items() for word in (f"--{n}", str(self.folder / at))]
        return [*places, "--backbone", self.backbone, "--gpu", "-1", "--no-open"]


def make_world(folder: Path, clip: Path) -> World:
    """Photographs, corpora, an image mean and normalisation features of random numbers."""
    world, draw = World(folder, clip), np.random.default_rng(5)
    make_photos(world.photos)
    for name, count in (
        ("generic_subjects", SUBJECTS),
        ("generic_styles", STYLES),
        ("open_image_v7_class_names", 50),
    ):
        rows = [(f"{name[8]} thing {number}",) for number in range(count)]
        write_rows(folder / "corpora" / f"{name}.csv", rows)
    mean = mean_path(folder / "data", world.backbone)
    synthetic = synthetic_path(folder / "synthetic", world.backbone)
    arrays = {name: draw.normal(size=(64, DIM)) for name in ("image_features", "text_features")}
    for path, content in ((mean, {"mean": draw.normal(size=DIM) / 20}), (synthetic, arrays)):
        path.parent.mkdir(parents=True)
        floats = {name: array.astype(np.float32) for name, array in content.items()}
        np.savez(path, manifest=json.dumps({}), **floats)
    return world


def add_dataset(
    world: World,
    name: str,
    queries: int = 3,
    rows: int = 120,
    in_gallery: bool = False,
    again: int = 0,
) -> None:
    """The features of a data set, all inputs of methods among them: random numbers.

    in_gallery: the queries' images are the first of the gallery, and have no features of their own.
    again: so many of the last rows show the first images once more.
    """
    draw = np.random.default_rng(11)
    folder = features_folder(world.folder / "features", world.backbone, name)
    folder.mkdir(parents=True)
    near = draw.normal(size=(1, DIM))

    def features(count: int) -> np.ndarray:
        return (near + draw.normal(size=(count, DIM))).astype(np.float32)

    texts = [f"in a place like {number}" for number in range(queries)]
    asked = "shown" if in_gallery else "asked"
    images = [(f"{asked}/{number}.jpg",) for number in range(queries)]
    shown = [*range(rows - again), *range(again)]
    task = Task(
        name=name,
        gallery=Images([f"shown/{number}.jpg" for number in shown]),
        queries=QueryTable([str(number) for number in range(queries)], images, texts),
        sets=RowSets.of([]),
        pool=whole_gallery(queries),
        views={"all": View(None)},
        columns=(),
    )
    save_task(task, folder)
    methods = list_methods().values()
    arrays = {"context_text", *(n for method in methods for n in method.reads)}
    for array in sorted(arrays - ({"image"} if in_gallery else set())):
        np.save(folder / f"query_{array}.npy", features(queries))
    for array in sorted({name for method in methods for name in method.gallery_reads}):
        np.save(folder / f"database_{array}.npy", features(rows)[shown])
    numbers = range(queries)
    write_csv(folder / "query.csv", ["key", "image_row", "text_row"], ([n, n, n] for n in numbers))
    counts = {"query": queries, "database": rows}
    write_json(folder / "manifest.json", {"model": {}, "counts": counts, "sources": {}})


def add_pictures(world: World, name: str, queries: int = 3) -> None:
    """The images of the data set's queries and of some of its gallery."""
    root = world.folder / "data" / name
    for split, count in (("asked", queries), ("shown", 40)):
        (root / split).mkdir(parents=True)
        for number in range(count):
            (root / split / f"{number}.jpg").write_bytes(encode_jpeg(draw_image(number)))
    (root / "queries.jsonl").write_text('{"image": "asked/0.jpg", "text": "x", "positives": []}\n')


# ---------------------------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A search.py at work. address: of the page, with its token; said: its lines so far."""

    process: subprocess.Popen
    address: str
    said: list[str]

    @property
    def port(self) -> int:
        return int(re.search(r":(\d+)/", self.address)[1])

    @property
    def token(self) -> str:
        return self.address.rpartition("=")[2]

    @property
    def cookie(self) -> str:
        return f"live_{self.port}={self.token}"

    def ask(
        self, path: str, method: str = "GET", body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case) and body of a request as the page makes it.

        headers: over those of the page; one of "" is left out. Host, Cookie: as they are named.
        """
        usual = {"Host": f"127.0.0.1:{self.port}", "Cookie": self.cookie}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in {**usual, **named}.items():
                if value:
                    connection.putheader(name, value)
            if body is not None and "Content-Length" not in named:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            reply = connection.getresponse()
            found = {name.lower(): value for name, value in reply.getheaders()}
            return reply.status, found, reply.read()
        finally:
            connection.close()

    def json(self, path: str, method: str = "GET", body: bytes | None = None) -> dict:
        """The JSON of an answer."""
        status, _, content = self.ask(path, method, body)
        assert status == 200, content
        return json.loads(content)


@contextlib.contextmanager
def serving(cwd: Path, *flags: str) -> Iterator[Server]:
    """search.py with these flags, until the block ends."""
    command = [sys.executable, str(ROOT / "search.py"), *map(str, flags)]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said: list[str] = []
    try:
        address = ""
        for line in process.stdout:
            said.append(line)
            if line.startswith("the page: "):
                address = line.split()[-1]
                break
        assert address, "".join(said)
        threading.Thread(target=lambda: said.extend(process.stdout), daemon=True).start()
        yield Server(process, address, said)
    finally:
        process.terminate()
        process.wait(20)
