"""The engine: killed and continued, one rank or two, folders or shards, the same bytes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from extraction_world import (
    DATABASE_ROWS,
    add_member,
    arguments,
    draw_image,
    encode_jpeg,
    environment,
    make_world,
    native_bytes,
    output_folder,
    run,
    write_rows,
)
from PIL import Image
from rank_processes import SLURM, end_stopped, ended, start, start_ranks

import create_features
from extraction.encoding import Settings
from extraction.job import Job, run_job
from extraction.parts import Part, Parts, cut_ranges, write_array
from extraction.reading import FileImages, index_samples
from extraction.stage import FileStage, Rows, Stage
from utils import UserError, held, locked
from utils_features import Preprocess, load_encoder
from utils_pixels import decode_image

SMALL_PARTS = ("--part_rows", "8")
KILLED_RUN = Path(__file__).with_name("killed_run.py")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def uninterrupted(world: Path, small_clip: Path) -> dict[str, dict[str, bytes]]:
    """The finished files of runs that nothing disturbed, by source."""
    found = {}
    for source in ("folder", "wds"):
        flags = (*SMALL_PARTS, "--icir_source", source, "--features_dir", f"whole_{source}")
        # Two threads, where ranks have one: no bit may depend on it.
        threads = "2" if source == "folder" else "1"
        done = run(
            world,
            small_clip,
            *flags,
            "--workers",
            "0",
            OMP_NUM_THREADS=threads,
            OMP_WAIT_POLICY="PASSIVE",
        )
        assert done.returncode == 0, done.stderr
        folder = output_folder(world, small_clip, f"whole_{source}")
        assert not (folder / ".parts").exists()
        found[source] = native_bytes(folder)
    return found


def main(*flags: str, clip: Path, dataset: str = "shop") -> None:
    """Run the command in this process."""
    create_features.main(arguments(clip, *flags, dataset=dataset)[1:])


def count_parts(folder: Path) -> int:
    return len(list(folder.glob(".parts/*/[!.]*.npz")))


# ---------------------------------------------------------------------------------------------
# Killed and continued
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "workers"), [("folder", "2"), ("wds", "2")])
def test_killed_and_continued(world, small_clip, uninterrupted, source, workers):
    features = f"killed_{source}"
    flags = (*SMALL_PARTS, "--icir_source", source, "--features_dir", features)
    _, *options = arguments(small_clip, *flags, "--workers", workers)
    folder = output_folder(world, small_clip, features)
    safe = {}
    for count in (3, 12):
        ((status, _),) = ended([start([str(KILLED_RUN), *options], world, KILLED_AT=str(count))])
        assert status == -signal.SIGKILL
        assert not (folder / "manifest.json").exists()
        parts = {p: p.stat().st_mtime_ns for p in folder.glob(".parts/*/[!.]*.npz")}
        assert len(parts) == len(safe) + count - 1
        assert safe.items() <= parts.items()  # what was done is not done again
        safe = parts
    done = run(world, small_clip, *flags, "--workers", workers)
    assert done.returncode == 0, done.stderr
    assert native_bytes(folder) == uninterrupted[source]
    assert sorted(os.listdir(folder)) == sorted(native_bytes(folder))


def test_killed_while_putting_together(world, small_clip, uninterrupted, monkeypatch):
    monkeypatch.chdir(world)
    flags = (*SMALL_PARTS, "--features_dir", "late", "--workers", "0")
    folder = output_folder(world, small_clip, "late")
    with monkeypatch.context() as patch:
        patch.setattr("extraction.labelled.write_csv", _stop)
        with pytest.raises(KeyboardInterrupt):
            main(*flags, clip=small_clip)
    assert sorted(os.listdir(folder)) == [".parts"]
    main(*flags, clip=small_clip)
    for name, content in native_bytes(folder).items():
        if name.endswith(".npy"):  # this process has another number of threads
            a, b = (np.load(_file(data)) for data in (content, uninterrupted["folder"][name]))
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
        elif name.endswith(".csv"):
            assert content == uninterrupted["folder"][name]
    assert not (folder / ".parts").exists()


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_folder_and_shards_agree(uninterrupted):
    for name, content in uninterrupted["folder"].items():
        other = uninterrupted["wds"][name]
        if name.endswith(".npy"):
            a, b = (np.load(_file(data)) for data in (content, other))
            scale = np.linalg.norm(a, axis=1, keepdims=True)
            assert np.abs((a - b) / scale).max() < 1e-6
        elif name == "manifest.json":  # shards say nothing of the files of single images
            of_folder = json.loads(content)
            assert of_folder.pop("image_bytes") > 0
            assert of_folder == json.loads(other)
        else:
            assert content == other


def _file(data: bytes):
    import io

    return io.BytesIO(data)


# ---------------------------------------------------------------------------------------------
# Several ranks
# ---------------------------------------------------------------------------------------------


def test_a_rank_that_dies_is_started_again(world, small_clip, uninterrupted, tmp_path):
    """By torchrun, of shards that workers read; the first rank waits for the second to die."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    flags = (*SMALL_PARTS, "--icir_source", "wds", "--features_dir", "ranks", "--workers", "2")
    _, *options = arguments(small_clip, *flags)
    command = [*launcher, "--max-restarts", "1", str(KILLED_RUN), *options]
    lost = tmp_path / "lost"
    ((status, said),) = ended([start(command, world, KILLED_AT="2", LOST=str(lost))])
    assert status == 0, said
    assert lost.exists()
    assert native_bytes(output_folder(world, small_clip, "ranks")) == uninterrupted["wds"]


def test_a_rank_that_is_stopped(world, small_clip, uninterrupted, tmp_path):
    """As srun starts them; one process continues what the two began."""
    flags = (*SMALL_PARTS, "--features_dir", "step", "--workers", "0", "--rank_timeout", "10")
    command, *options = arguments(small_clip, *flags)
    fate = {"KILLED_AT": "2", "LOST": str(tmp_path / "lost"), "SIGNAL": "SIGSTOP"}
    first, second = start_ranks([str(KILLED_RUN), *options], 2, world, SLURM, **fate)
    ((status, said),) = ended([first])
    end_stopped(second)
    assert status == 2
    assert "error: rank 1 did not come within 10 s (see --rank_timeout)" in said
    assert "Traceback" not in said
    folder = output_folder(world, small_clip, "step")
    assert sorted(os.listdir(folder)) == [".parts"]
    assert count_parts(folder) > 2  # those of the other rank
    ((status, said),) = ended([start([command, *options], world)])
    assert status == 0, said
    assert native_bytes(folder) == uninterrupted["folder"]


# ---------------------------------------------------------------------------------------------
# Bad images and bad features
# ---------------------------------------------------------------------------------------------


def write_awkward_images(folder: Path) -> list[str]:
    """Images of every kind that is readable, one file each; returns their names."""
    folder.mkdir(parents=True)
    base = draw_image(1, (90, 70))
    grey16 = Image.fromarray((np.arange(6300).reshape(70, 90) * 10).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    images = {
        "rgba.png": (base.convert("RGBA"), {}),
        "palette.png": (base.convert("P"), {}),
        "cmyk.jpg": (base.convert("CMYK"), {}),
        "grey 16.png": (grey16, {}),
        "moving.gif": (base, {"save_all": True, "append_images": [draw_image(2, (90, 70))]}),
        "moving.webp": (base, {"save_all": True, "append_images": [draw_image(2, (90, 70))]}),
        "turned.jpg": (base, {"exif": exif}),
        "näme with späces.jpg": (base, {}),
        "large.png": (base.resize((3000, 2000)), {}),
        "narrow.png": (base.resize((900, 1)), {}),
    }
    for name, (image, options) in images.items():
        image.save(folder / name, **options)
    return list(images)


def write_bad_images(folder: Path) -> list[str]:
    data = encode_jpeg(draw_image(3, (200, 200)))
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no image")
    return ["cut.jpg", "empty.jpg", "text.jpg", "absent.jpg"]


@pytest.fixture
def wild(tmp_path) -> tuple[Path, list[str], list[str]]:
    """A data set whose database is awkward images and, among them, bad ones."""
    make_world(tmp_path)
    root = tmp_path / "data" / "wild"
    good = write_awkward_images(root / "database")
    bad = write_bad_images(root / "database")
    write_rows(root / "query_files.csv", [("database/cmyk.jpg", "old", "it")])
    names = [name for pair in zip(good, bad, strict=False) for name in pair] + good[len(bad) :]
    write_rows(root / "database_files.csv", [(f"database/{name}", "", "it") for name in names])
    return tmp_path, good, bad


@pytest.mark.parametrize(("workers", "pixels"), [("0", "plain"), ("2", "viewed")])
def test_bad_images_are_left_out(wild, small_clip, monkeypatch, capsys, workers, pixels):
    world, good, bad = wild
    monkeypatch.chdir(world)
    flags = ("--workers", workers, "--on_bad_image", "skip", "--part_rows", "4")
    flags += ("--pixels", "plain") if pixels == "plain" else ()  # of one's own, viewed is usual
    main(*flags, clip=small_clip, dataset="wild")
    folder = output_folder(world, small_clip, "features", "wild")
    manifest = json.loads((folder / "manifest.json").read_text())
    skipped = manifest["skipped"]
    assert [entry["image_path"] for entry in skipped] == [f"database/{name}" for name in bad]
    assert [entry["row"] for entry in skipped] == [2, 4, 6, 8]
    assert {entry["split"] for entry in skipped} == {"database"}
    assert manifest["counts"] == {"query": 1, "database": len(good)}
    table = (folder / "database.csv").read_text(encoding="utf-8").splitlines()
    assert table == [
        "image_path,text,instance",
        *(f"database/{name},,it" for name in good),
    ]
    features = np.load(folder / "database_image.npy")
    assert features.shape == (len(good), 48)
    encoder = load_encoder(f"local-dir:{small_clip}", torch.device("cpu"))
    for name, row in zip(good, features, strict=True):
        path = world / "data" / "wild" / "database" / name
        image = decode_image(path, viewed=True) if pixels == "viewed" else Image.open(path)
        tensor = encoder.preprocess(image.convert("RGB"))
        expected = encoder.encode_images(tensor[None]).numpy()[0]
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)
    printed = capsys.readouterr().out
    for entry in skipped:
        assert f"{entry['image_path']}: {entry['cause']}" in printed
    assert manifest["pixels"] == pixels
    odd = {entry["fact"]: (entry["images"], entry["first"]) for entry in manifest["odd_images"]}
    assert odd == {
        "16-bit grey, integers or floats": (1, "database/grey 16.png"),
        "an EXIF orientation": (1, "database/turned.jpg"),
        "several frames": (2, "database/moving.gif"),
    }
    ways = {
        "viewed": "'database/turned.jpg'; encoded as a viewer shows it",
        "plain": "'database/turned.jpg'; encoded as usual, which is not what a viewer shows",
    }
    assert f"database_image: 1 image with an EXIF orientation, the first {ways[pixels]}" in printed
    assert "2 images with several frames, the first 'database/moving.gif'; the first" in printed
    assert "an EXIF orientation" in manifest["encoded"]


def test_bad_image_stops_and_continues(wild, small_clip, monkeypatch):
    world, good, _ = wild
    monkeypatch.chdir(world)
    flags = ("--workers", "0", "--part_rows", "1")
    with pytest.raises(UserError, match=r"database/cut\.jpg .*row 2\): .*truncated"):
        main(*flags, clip=small_clip, dataset="wild")
    folder = output_folder(world, small_clip, "features", "wild")
    assert (folder / ".parts" / "database_image" / "000000.npz").exists()
    assert not (folder / "manifest.json").exists()
    main(*flags, "--on_bad_image", "skip", clip=small_clip, dataset="wild")
    assert len(np.load(folder / "database_image.npy")) == len(good)


def test_bad_images_skipped_once_are_not_overlooked(wild, small_clip, monkeypatch):
    world, _, _ = wild
    monkeypatch.chdir(world)
    flags = ("--workers", "0")
    with monkeypatch.context() as patch:
        patch.setattr("extraction.labelled.write_csv", _stop)
        with pytest.raises(KeyboardInterrupt):
            main(*flags, "--on_bad_image", "skip", clip=small_clip, dataset="wild")
    with pytest.raises(UserError, match=r"cut\.jpg .*row 2"):
        main(*flags, clip=small_clip, dataset="wild")


class FakeEncoder:
    """Features that are the mean colour, and for one colour not finite."""

    dim, device = 3, torch.device("cpu")

    def __init__(self, limit: float = 1.0):
        from torchvision.transforms import ToTensor

        self.preprocess = Preprocess(ToTensor())
        self.limit = limit

    def encode_images(self, batch: torch.Tensor, half_pixels: bool = False) -> torch.Tensor:
        means = batch.mean(dim=(2, 3))
        return torch.where(means.sum(1, keepdim=True) > 3 * self.limit - 0.1, torch.nan, means)


def make_job(folder: Path, paths: list[Path], part_rows: int, finish=lambda _: None) -> Job:
    table, lines = Path("database_files.csv"), range(1, len(paths) + 1)
    rows = Rows.of(map(str, paths), table, lines)
    stage = FileStage(
        name="database_image",
        rows=rows,
        units=cut_ranges(rows.count, part_rows),
        fingerprint={},
        images=FileImages(Path),
    )
    return Job("test", Parts(folder), [stage], {}, [], finish)


SETTINGS = Settings(
    backbone="fake",
    precision="fp32",
    save_dtype="float32",
    batch=2,
    part_rows=4,
    workers=0,
    skip_bad=False,
    overwrite=False,
)


def test_features_that_are_not_finite(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        Image.new("RGB", (8, 8), (255, 255, 255) if i == 5 else (i, 0, 0)).save(path)
    job = make_job(tmp_path / "parts", paths, part_rows=4)
    with pytest.raises(UserError, match=r"5\.png' \(database_files\.csv, row 6\) are not finite"):
        run_job(job, FakeEncoder(), SETTINGS)
    assert job.parts.names(job.stages[0]) == {"000000"}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "x.npz"), "x.npz: No space left on device; what"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal"), "a worker process died"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), "smaller --batch"),
    ],
)
def test_a_machine_at_its_limits(tmp_path, monkeypatch, error, words):
    paths = [tmp_path / "0.png"]
    Image.new("RGB", (8, 8)).save(paths[0])

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(FakeEncoder, "encode_images", fail)
    with pytest.raises(UserError, match=words):
        run_job(make_job(tmp_path / "parts", paths, 4), FakeEncoder(), SETTINGS)


def test_two_runs_at_once(tmp_path):
    """The second is refused while the first lives, and goes on at once when it is dead."""
    paths = [tmp_path / "0.png"]
    Image.new("RGB", (8, 8)).save(paths[0])
    job = make_job(tmp_path / "parts", paths, 4)
    hold = (
        "import sys, time; from pathlib import Path; from utils import held\n"
        "with held(Path(sys.argv[1]) / 'lock', ''): print('held', flush=True); time.sleep(100)"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "parts")]
    root = Path(create_features.__file__).parent
    with subprocess.Popen(command, cwd=root, env=environment(), stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another run is at work"):
            run_job(job, FakeEncoder(), SETTINGS)
        first.kill()
    run_job(job, FakeEncoder(), SETTINGS)


def test_a_lock_is_not_kept_by_what_outlives_its_process(tmp_path):
    """Worker processes that are forked while it is held live on; then the folder is free."""
    hold = (
        "import os, sys, time; from pathlib import Path; from utils import held\n"
        "with held(Path(sys.argv[1]) / 'lock', ''):\n"
        "    if os.fork(): time.sleep(100)\n"
        "    else: print(os.getpid(), flush=True); time.sleep(100)"
    )
    root = Path(create_features.__file__).parent
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, cwd=root, env=environment(), stdout=subprocess.PIPE) as first:
        child = int(first.stdout.readline())
        with pytest.raises(UserError, match="taken"), held(tmp_path / "lock", "taken"):
            pass
        first.kill()
        first.wait()
        os.kill(child, 0)  # it lives
        with held(tmp_path / "lock", "taken"):
            pass
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks(tmp_path, monkeypatch, error):
    """Nothing is held there, and no file stands for a lock that nobody would remove."""

    def refuse(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("fcntl.flock", refuse)
    with held(tmp_path / "lock", "taken"), held(tmp_path / "lock", "taken"), locked(tmp_path):
        pass


def test_each_image_is_encoded_once(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i % 3}.png" for i in range(9)]
    for i in range(3):
        Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(paths[i])
    seen = []
    encode = FakeEncoder.encode_images
    monkeypatch.setattr(
        FakeEncoder,
        "encode_images",
        lambda self, batch, *half: (seen.append(len(batch)), encode(self, batch))[1],
    )
    target = tmp_path / "all.npy"
    job = make_job(tmp_path / "parts", paths, 2)

    def finish(_: dict) -> None:
        write_array(target, job.stages[0], job.parts, 3, np.arange(9) != 4)

    run_job(make_job(tmp_path / "parts", paths, 2, finish), FakeEncoder(), SETTINGS)
    assert sum(seen) == 3
    expected = np.array([80 * (i % 3) / 255 for i in range(9) if i != 4])
    np.testing.assert_allclose(np.load(target)[:, 0], expected, rtol=1e-6)


def test_array_is_put_together_row_by_row(tmp_path):
    """Any order of parts and rows: compared with plain indexing."""
    rng = np.random.default_rng(3)
    item_of_row = np.concatenate([np.arange(20), rng.integers(0, 20, 30)])
    rng.shuffle(item_of_row)
    values = rng.normal(size=(20, 5)).astype(np.float16)
    stage = FileStage(
        name="images",
        rows=Rows([str(i) for i in range(20)], item_of_row, Path("t.csv"), range(1, 51)),
        units=cut_ranges(20, 6),
        fingerprint={},
        dtype="float16",
        images=FileImages(Path),
    )
    parts, order = Parts(tmp_path), rng.permutation(20)
    for unit in stage.units:
        ids = order[unit.start : unit.stop]
        parts.write(stage, unit.name, Part(ids, values[ids]))
    keep = rng.random(50) < 0.7
    write_array(tmp_path / "x.npy", stage, parts, 5, keep)
    written = np.load(tmp_path / "x.npy")
    assert written.dtype == np.float16
    np.testing.assert_array_equal(written, values[item_of_row[keep]])


# ---------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------


def test_sample_index():
    rows = [("a", "x", "1"), ("b", "", "1"), ("a", "x", "1"), ("a", "y", "1")]
    item_of_row = Rows.of((row[0] for row in rows), Path("t.csv"), range(1, 5)).item_of_row
    index = index_samples(rows, item_of_row, lambda path: path.removeprefix("shop/"))
    assert index.find("shop/a", "x", "1").tolist() == [0, 2]
    assert index.find("b", "", "1").tolist() == [1]
    assert index.find("b", "", "2").tolist() == []
    assert not index.by_path


def test_row_without_a_sample_and_sample_without_a_row(tmp_path, small_clip, monkeypatch, capsys):
    world = make_world(tmp_path)
    root = world / "data" / "shop"
    table = root / "annotations" / "database_files.csv"
    lines = table.read_text(encoding="utf-8").splitlines()
    table.write_text("\n".join(lines[1:]), encoding="utf-8")
    monkeypatch.chdir(world)
    flags = ("--icir_source", "wds", "--workers", "0")
    main(*flags, clip=small_clip)
    folder = output_folder(world, small_clip, "features")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counts"]["database"] == DATABASE_ROWS - 1
    assert manifest["without_row"] == {"query": 0, "database": 1}
    assert "database_image: 1 samples of the shards belong to no row" in capsys.readouterr().out

    table.write_text("\n".join([*lines, "database/d3.jpg,no such text,o0"]), encoding="utf-8")
    with pytest.raises(UserError, match=r"database_files\.csv, row 101: no sample .*d3\.jpg"):
        main(*flags, "--overwrite", clip=small_clip)
    assert not (folder / "manifest.json").exists()
    # The missing sample arrives in a new shard: the same command continues with it alone.
    before = {p: p.stat().st_mtime_ns for p in folder.glob(".parts/*/[!.]*.npz")}
    with tarfile.open(root / "webdataset" / "database" / "database-000004.tar", "w") as tar:
        add_member(tar, "x.jpg", (root / "database" / "d3.jpg").read_bytes())
        label = {"img_path": "database/d3.jpg", "text": "no such text", "instance": "o0"}
        add_member(tar, "x.json", json.dumps(label).encode())
    with monkeypatch.context() as patch:
        patch.setattr("extraction.job.drop_parts", lambda folder: None)
        main(*flags, clip=small_clip)
    assert before.items() <= {p: p.stat().st_mtime_ns for p in before}.items()
    assert len(np.load(folder / "database_image.npy")) == DATABASE_ROWS + 1


def test_damaged_shard_is_named(tmp_path, small_clip, monkeypatch):
    world = make_world(tmp_path)
    shard = world / "data" / "shop" / "webdataset" / "database" / "database-000002.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[: 512 + 200])  # cut inside the first image
    monkeypatch.chdir(world)
    for workers in ("0", "2"):
        with pytest.raises(UserError, match=r"database-000002\.tar cannot be read .*fetch it"):
            main("--icir_source", "wds", "--workers", workers, clip=small_clip)
    shard.write_bytes(data.replace(b'"img_path"', b'"img_pith"', 1))
    with pytest.raises(UserError, match=r"database-000002\.tar: the json member of the sample"):
        main("--icir_source", "wds", "--workers", "0", clip=small_clip)
    shard.write_bytes(data)  # fetched again, as told
    main("--icir_source", "wds", "--workers", "0", clip=small_clip)


def test_shard_that_changed_is_encoded_again(tmp_path, small_clip, monkeypatch, capsys):
    """Its own unit alone, also if that was finished."""
    world = make_world(tmp_path)
    monkeypatch.chdir(world)
    flags = ("--icir_source", "wds", "--workers", "0")
    with monkeypatch.context() as patch:
        patch.setattr("extraction.labelled.write_csv", _stop)
        with pytest.raises(KeyboardInterrupt):
            main(*flags, clip=small_clip)
    folder = output_folder(world, small_clip, "features")
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob(".parts/database_image/*.npz")}
    shard = world / "data" / "shop" / "webdataset" / "database" / "database-000001.tar"
    with tarfile.open(shard, "a") as tar:
        add_member(tar, "more.jpg", encode_jpeg(draw_image(1)))
        label = {"img_path": "database/none.jpg", "text": "", "instance": "o0"}
        add_member(tar, "more.json", json.dumps(label).encode())
    with monkeypatch.context() as patch:
        patch.setattr("extraction.job.drop_parts", lambda folder: None)
        main(*flags, clip=small_clip)
    assert "the shards of database-000001 have changed" in capsys.readouterr().out
    after = {p.name: p.stat().st_mtime_ns for p in folder.glob(".parts/database_image/*.npz")}
    again = {name for name in before if before[name] != after[name]}
    assert again
    assert all(name.startswith("database-000001") for name in again)


def test_samples_of_no_row_are_counted_once(tmp_path, small_clip, monkeypatch):
    """Continued or not, the manifest is the same."""
    world = make_world(tmp_path)
    table = world / "data" / "shop" / "annotations" / "database_files.csv"
    lines = table.read_text(encoding="utf-8").splitlines()
    table.write_text("\n".join(lines[:60]) + "\n", encoding="utf-8")
    monkeypatch.chdir(world)
    flags = ("--icir_source", "wds", "--workers", "0", "--batch", "4")
    main(*flags, "--features_dir", "whole", clip=small_clip)
    write, written = Parts.write, []

    def write_some(self: Parts, stage: Stage, name: str, part: Part) -> None:
        if stage.name == "database_image" and len(written) == 3:
            raise KeyboardInterrupt
        written.append(stage.name) if stage.name == "database_image" else None
        write(self, stage, name, part)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "write", write_some)
        with pytest.raises(KeyboardInterrupt):
            main(*flags, "--features_dir", "cut", clip=small_clip)
    main(*flags, "--features_dir", "cut", clip=small_clip)
    whole, cut = (output_folder(world, small_clip, name) for name in ("whole", "cut"))
    assert native_bytes(cut) == native_bytes(whole)
    assert json.loads((whole / "manifest.json").read_text())["without_row"]["database"] > 10


@pytest.mark.parametrize(
    ("extra", "what"), [("thumb.jpg", "2 images"), ("more.json", "2 json members")]
)
def test_sample_with_two_of_a_kind(tmp_path, small_clip, monkeypatch, extra, what):
    world = make_world(tmp_path)
    shard = world / "data" / "shop" / "webdataset" / "query" / "query-000000.tar"
    with tarfile.open(shard) as tar:
        last = tar.getnames()[-1].partition(".")[0]
    with tarfile.open(shard, "a") as tar:
        add_member(tar, f"{last}.{extra}", b"{}")
    monkeypatch.chdir(world)
    with pytest.raises(UserError, match=rf"query-000000\.tar: the sample {last} has {what}"):
        main("--icir_source", "wds", "--workers", "0", clip=small_clip)


def test_damaged_part_goes_with_its_unit(tmp_path, small_clip, monkeypatch):
    world = make_world(tmp_path)
    monkeypatch.chdir(world)
    flags = ("--icir_source", "wds", "--workers", "0")
    main(*flags, "--features_dir", "whole", clip=small_clip)
    with monkeypatch.context() as patch:
        patch.setattr("extraction.labelled.write_csv", _stop)
        with pytest.raises(KeyboardInterrupt):
            main(*flags, clip=small_clip)
    folder = output_folder(world, small_clip, "features")
    part = folder / ".parts" / "database_image" / "database-000001+000001.npz"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(UserError, match=r"database-000001\+000001\.npz is damaged"):
        main(*flags, clip=small_clip)
    main(*flags, clip=small_clip)
    assert native_bytes(folder) == native_bytes(output_folder(world, small_clip, "whole"))


@pytest.mark.parametrize("dataset", ["shop", "corpus"])
def test_an_overwrite_that_is_interrupted_leaves_nothing_finished(
    tmp_path, small_clip, monkeypatch, dataset
):
    """Whichever file it was about to drop, no manifest vouches for what is left."""
    world = make_world(tmp_path)
    monkeypatch.chdir(world)
    main(clip=small_clip, dataset=dataset)
    folder = output_folder(world, small_clip, "features", dataset)
    unlink, dropped = Path.unlink, []

    def unlink_one(path: Path, *arguments: bool, **options: bool) -> None:
        if dropped:
            raise KeyboardInterrupt
        if path.absolute().parent == folder:
            dropped.append(path.absolute())
        unlink(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink_one)
        with pytest.raises(KeyboardInterrupt):
            main("--overwrite", clip=small_clip, dataset=dataset)
    assert dropped[0].suffix == ".json"
    main(clip=small_clip, dataset=dataset)
    assert dropped[0].exists()


# ---------------------------------------------------------------------------------------------
# Changed between two runs
# ---------------------------------------------------------------------------------------------


def test_changes_are_refused(tmp_path, small_clip, make_clip, monkeypatch):
    from conftest import SMALL_CLIP

    world = make_world(tmp_path)
    monkeypatch.chdir(world)
    flags = ("--workers", "0", *SMALL_PARTS)
    shutil.copytree("data", "copy")  # the same annotations, perhaps other images
    with monkeypatch.context() as patch:
        patch.setattr("extraction.labelled.write_csv", _stop)
        with pytest.raises(KeyboardInterrupt):
            main(*flags, clip=small_clip)
    for extra, named in {
        ("--precision", "bf16"): "precision",
        ("--batch", "4"): "batch",
        ("--part_rows", "16"): "part_rows",
        ("--save_dtype", "float16"): "save_dtype",
        ("--icir_source", "wds"): "source",
        ("--data_dir", "copy"): "source",
    }.items():
        with pytest.raises(UserError, match=rf"unfinished run with another {named} .*--overwrite"):
            main(*flags, *extra, clip=small_clip)
    main(*flags, clip=small_clip)
    folder = output_folder(world, small_clip, "features")
    finished = native_bytes(folder)
    with pytest.raises(UserError, match=r"finished .* another precision .fp32, now bf16"):
        main(*flags, "--precision", "bf16", clip=small_clip)

    other = make_clip("other", SMALL_CLIP, seed=8)
    small_clip_again = tmp_path / "clip"
    small_clip_again.symlink_to(small_clip)
    main(*flags, "--features_dir", "linked", clip=Path("clip"))
    small_clip_again.unlink()
    small_clip_again.symlink_to(other)
    with pytest.raises(UserError, match=r"another model \(weights_sha256"):
        main(*flags, "--features_dir", "linked", clip=Path("clip"))

    with open(world / "data" / "shop" / "query_files.csv", "a") as file:
        file.write("query/q 1.jpg,one more,o1\n")
    with pytest.raises(
        UserError, match=r"query_files.csv, row 13: the query text 'one more' has no feature"
    ):
        main(*flags, clip=small_clip)
    assert native_bytes(folder) == finished
    main(*flags, "--overwrite", clip=small_clip)
    assert len(np.load(folder / "query_text.npy")) == 13
