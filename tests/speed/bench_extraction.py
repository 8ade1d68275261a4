"""Extraction against a plain loop, its peak memory, and its precisions on a GPU. Run by hand:

    python3 tests/speed/bench_extraction.py [--images 2000] [--model ViT-B-32] [--runs 3]

The plain loop is what a first implementation does: a DataLoader of 8 workers on folders and of 1
on shards, float32 pixels from the workers, everything kept in memory until one file at the end.
Both encode the same generated JPEGs of about 500 x 400 pixels with the same random weights, in
turn. CPU seconds, workers included, are given beside the wall clock: they say more on a machine
that is shared.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SHARD_SAMPLES = 250
MEMORY_IMAGES = (2000, 8000)

# A model so small that reading images, not encoding them, is what takes the time.
LIGHT = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 64, "head_width": 32, "layers": 2},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def draw_jpeg(seed: int) -> bytes:
    """A JPEG of about 500 x 400 pixels with the detail of a photograph (about 50 KB)."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    size = (int(rng.integers(460, 540)), int(rng.integers(360, 440)))
    coarse = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    fine = Image.fromarray(rng.integers(0, 256, (100, 125, 3), dtype=np.uint8))
    layers = (layer.resize(size, Image.Resampling.BICUBIC) for layer in (coarse, fine))
    file = io.BytesIO()
    Image.blend(*layers, 0.25).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_images(folder: Path, count: int) -> None:
    """Write the data set `bench` in folders and shards: `count` database images, two queries."""
    root = folder / "data" / "bench"
    for split, number in (("query", 2), ("database", count)):
        (root / split).mkdir(parents=True)
        shards = root / "webdataset" / split
        shards.mkdir(parents=True)
        names = [f"{split}/{i:06d}.jpg" for i in range(number)]
        rows = "".join(f"{name},text,it\n" for name in names)
        for place in (root, root / "annotations"):
            place.mkdir(exist_ok=True)
            (place / f"{split}_files.csv").write_text(rows)
        for start in range(0, number, SHARD_SAMPLES):
            with tarfile.open(shards / f"{split}-{start // SHARD_SAMPLES:06d}.tar", "w") as tar:
                for i in range(start, min(start + SHARD_SAMPLES, number)):
                    data = draw_jpeg(i)
                    (root / names[i]).write_bytes(data)
                    label = {"img_path": names[i], "text": "text", "instance": "it"}
                    _add(tar, f"{i:06d}.jpg", data)
                    _add(tar, f"{i:06d}.json", json.dumps(label).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def model_config(name: str) -> dict:
    import open_clip

    return LIGHT if name == "light" else open_clip.get_model_config(name)


# ---------------------------------------------------------------------------------------------
# The two ways
# ---------------------------------------------------------------------------------------------


class PlainImages:
    """A folder's images as float32 pixels, one item an image."""

    def __init__(self, paths: list[Path], transform: Callable):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        from PIL import Image

        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def plain_loop(world: Path, source: str, spec: str, batch: int, device: str) -> np.ndarray:
    """Encode the database as a first implementation does; returns its features."""
    import open_clip
    import torch
    from torch.utils.data import DataLoader

    model, transform = open_clip.create_model_from_pretrained(spec)
    model.eval().to(device)
    root = world / "data" / "bench"
    if source == "folder":
        lines = (root / "database_files.csv").read_text().splitlines()
        images = PlainImages([root / line.split(",")[0] for line in lines], transform)
        loader = DataLoader(images, batch_size=batch, num_workers=8, pin_memory=device != "cpu")
    else:
        import webdataset

        shards = sorted(str(path) for path in (root / "webdataset" / "database").glob("*.tar"))
        images = webdataset.WebDataset(shards, shardshuffle=False).decode("pil")
        images = images.to_tuple("jpg").map_tuple(transform).batched(batch)
        loader = DataLoader(images, batch_size=None, num_workers=1)
    features = []
    with torch.no_grad():
        for item in loader:
            pixels = item[0] if isinstance(item, (list, tuple)) else item
            features.append(model.encode_image(pixels.to(device)).cpu().numpy())
    features = np.concatenate(features)
    np.save(world / "plain.npy", features)
    return features


def toolkit(world: Path, source: str, spec: str, batch: int, precision: str = "fp32") -> np.ndarray:
    """Encode the data set with create_features; returns the database's features."""
    import create_features
    from utils_backbones import backbone_folder

    flags = ["--dataset", "bench", "--icir_source", source, "--backbone", spec]
    flags += ["--batch", str(batch), "--precision", precision, "--overwrite"]
    flags += ["--data_dir", str(world / "data"), "--features_dir", str(world / "features")]
    flags += ["--corpora_dir", str(world / "corpora"), "--gpu", "0" if has_gpu() else "-1"]
    create_features.main(flags)
    return np.load(world / "features" / backbone_folder(spec) / "bench" / "database_image.npy")


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def time_run(function: Callable, *arguments: object) -> tuple[float, float, np.ndarray]:
    """Seconds by the wall clock and of the processors, and the features."""
    start, before = time.perf_counter(), sum(os.times()[:4])
    features = function(*arguments)
    gc.collect()  # ends the workers, whose processor time counts from then on
    return time.perf_counter() - start, sum(os.times()[:4]) - before, features


def compare(world: Path, spec: str, args: argparse.Namespace) -> None:
    """Images/s of both ways, in turn, and the median of the ratios. Model loading counts."""
    device = "cuda" if has_gpu() else "cpu"
    for source in ("folder", "wds"):
        plain, own = [], []
        for _ in range(args.runs):
            plain.append(time_run(plain_loop, world, source, spec, args.batch, device))
            own.append(time_run(toolkit, world, source, spec, args.batch))
        difference = np.abs(plain[-1][2] - own[-1][2]).max()
        for measure, name in enumerate(("wall clock", "CPU")):
            seconds = [[run[measure] for run in runs] for runs in (plain, own)]
            speeds = [args.images / statistics.median(runs) for runs in seconds]
            ratio = statistics.median(p / o for p, o in zip(*seconds, strict=True))
            print(
                f"{source}, {name}: plain {speeds[0]:.1f} images/s, toolkit {speeds[1]:.1f} "
                f"images/s, ratio {ratio:.2f} (median of {args.runs})",
                flush=True,
            )
        print(f"{source}: largest difference of a feature {difference:.1e}")


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------


def peak_memory(world: Path, spec: str, images: int, batch: int) -> float:
    """The largest resident size (MB) of any process of one extraction of `images` images.

    The images are those of the data set under several names, as links.
    """
    root, source = world / "memory" / f"n{images}", world / "data" / "bench" / "database"
    (root / "database").mkdir(parents=True)
    files = sorted(source.iterdir())
    names = [f"database/{i}.jpg" for i in range(images)]
    for i, name in enumerate(names):
        os.link(files[i % len(files)], root / name)
    (root / "database_files.csv").write_text("".join(f"{name},,it\n" for name in names))
    (root / "query_files.csv").write_text(f"{names[0]},text,it\n")
    flags = ["--dataset", str(root), "--backbone", spec, "--gpu", "-1", "--batch", str(batch)]
    flags += ["--features_dir", str(world / "memory"), "--corpora_dir", str(world / "corpora")]
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
        "stdout=2, stderr=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, sys.executable, str(ROOT / "create_features.py"), *flags]
    kilobytes = int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return kilobytes / (1 if sys.platform != "darwin" else 1024) / 1024


# ---------------------------------------------------------------------------------------------
# GPU
# ---------------------------------------------------------------------------------------------


def matrix_rate(dtype: str) -> float:
    """The GPU's measured rate (FLOP/s) on a large matrix product."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=getattr(torch, dtype)) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - start)


def encoder_rate(
    spec: str, precision: str, batch: int, seconds: float = 5.0
) -> tuple[float, float]:
    """Images/s of the encoder alone on uint8 batches, and the FLOP of one image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from utils_features import load_encoder

    encoder = load_encoder(spec, torch.device("cuda", 0), precision)
    shape = (batch, 3, *encoder.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8).pin_memory()
    encoder.encode_images(pixels)
    torch.backends.mha.set_fastpath_enabled(False)  # its attention is not counted
    with FlopCounterMode(display=False) as counter:
        encoder.encode_images(pixels)
    torch.backends.mha.set_fastpath_enabled(True)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        encoder.encode_images(pixels)
        count += batch
    return count / (time.perf_counter() - start), counter.get_total_flops() / batch


def gpu_section(world: Path, batch: int) -> None:
    """ViT-L-14 at each precision: speed, share of the matrix rate, lowest cosine to fp32."""
    from conftest import save_clip

    folder = save_clip(world / "vit_l_14", model_config("ViT-L-14"))
    spec, reference = f"local-dir:{folder}", None
    types = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    for precision, dtype in types.items():
        start = time.perf_counter()
        features = toolkit(world, "folder", spec, batch, precision)
        whole = len(features) / (time.perf_counter() - start)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        reference = features if reference is None else reference
        cosine = (features * reference).sum(axis=1).min()
        rate, flop = encoder_rate(spec, precision, batch)
        share = rate * flop / matrix_rate(dtype)
        print(
            f"ViT-L-14 {precision}: {whole:.1f} images/s end to end, {rate:.1f} by the encoder "
            f"alone ({share:.0%} of the measured matrix rate), lowest cosine to fp32 {cosine:.6f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip architecture, or light")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], choices=("speed", "memory", "gpu"))
    args = parser.parse_args()
    os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")  # as create_features sets it, for both
    from conftest import save_clip

    print(f"{platform.machine()}, {os.cpu_count()} cores, {args.images} images, {args.model}")
    with tempfile.TemporaryDirectory() as name:
        world = Path(name)
        make_images(world, args.images)
        (world / "corpora").mkdir()
        (world / "corpora" / "generic_subjects.csv").write_text("mug\n")
        spec = f"local-dir:{save_clip(world / 'model', model_config(args.model))}"
        if "speed" not in args.skip:
            compare(world, spec, args)
        if "memory" not in args.skip:
            light = f"local-dir:{save_clip(world / 'light', LIGHT)}"
            for images in MEMORY_IMAGES:
                peak = peak_memory(world, light, images, args.batch)
                print(f"{images} images: largest process {peak:.0f} MB")
        if "gpu" not in args.skip:
            if has_gpu():
                gpu_section(world, args.batch)
            else:
                print("no CUDA device: the GPU section is skipped")


if __name__ == "__main__":
    main()
