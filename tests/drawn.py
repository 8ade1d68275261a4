"""Weights, images and texts of the small systems, drawn from a seed: the same for whoever asks.

numpy promises never to change what RandomState gives, so that the outputs under golden_systems/,
which the original programs gave for these weights, need no weights beside them.
"""

import json
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

TEXTS = (
    "in winter, with snow",
    "is red and has 3 longer sleeves",
    'IN  Winter, "with" (snow)! ' + "a b c d " * 10,
)
SIZES = ((150, 100), (97, 203), (64, 64))


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers of a name, float32."""
    state = np.random.RandomState(zlib.crc32(name.encode()))
    return state.standard_normal(shape).astype(np.float32)


def draw_weights(shapes: dict[str, list[int]], ones: tuple[str, ...] = ()) -> dict:
    """A weight for every name: of matrices about 1 / sqrt(rows), else 0.2; `ones` about 1.

    ones: what the names end in of gains.
    """
    weights = {}
    for name, shape in shapes.items():
        scale = 1.5 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.2
        weights[name] = np.float32(scale) * draw(name, tuple(shape))
        if name.endswith(ones):
            weights[name] = weights[name] + np.float32(1)
    return weights


def draw_images() -> list[Image.Image]:
    """Three images of coarse and fine patterns, whose brightest pixel is not white."""
    images = []
    for number, (width, height) in enumerate(SIZES):
        coarse = 128 + 40 * draw(f"image {number}", (8, 8, 3))
        rough = np.kron(coarse, np.ones((height // 8 + 1, width // 8 + 1, 1)))[:height, :width]
        noise = 25 * draw(f"noise {number}", (height, width, 3))
        images.append(Image.fromarray(np.clip(rough + noise, 0, 200 + number).astype(np.uint8)))
    return images


# A vocabulary of BERT's kind, as its vocab.txt lists it: small texts in pieces.
WORDS = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *("in", "winter", "with", "snow", "is", "red", "and", "has", "##s", "sleeve", "longer"),
    *"abcdefghijklmnopqrstuvwxyz0123456789,.",
    *(f"##{letter}" for letter in "abcdefghijklmnopqrtuvwxyz0123456789"),
)


# ---------------------------------------------------------------------------------------------
# The small systems, in the official formats
# ---------------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden_systems"


def read_facts(name: str) -> dict:
    """Names and shapes of a system's weights, and which are drawn larger or smaller."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def golden_outputs(name: str) -> dict[str, np.ndarray]:
    """What the original program gave."""
    with np.load(GOLDEN / f"{name}.npz") as content:
        return dict(content)


def system_weights(name: str) -> dict[str, np.ndarray]:
    """The weights of a small system."""
    facts = read_facts(name)
    weights = draw_weights(facts["shapes"], tuple(facts["ones"]))
    for weight in weights:
        for ending, factor in facts["factors"].items():
            if weight.endswith(ending):
                weights[weight] = weights[weight] * np.float32(factor)
    return weights


def to_flax(arrays: dict[str, np.ndarray]) -> bytes:
    """msgpack of nested maps of arrays, "a/b" in "a", as flax's serialization writes it."""
    tree: dict = {}
    for name, array in arrays.items():
        *folders, leaf = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = array
    return _pack(tree)


def _head(count: int, fixed: tuple[int, int] | None, sized: tuple[tuple[int, str], ...]) -> bytes:
    if fixed and count < fixed[1]:
        return bytes([fixed[0] | count])
    for first, form in sized:
        if count < 1 << (8 * struct.calcsize(form)):
            return bytes([first]) + struct.pack(form, count)
    raise ValueError(count)


def _pack(value: object) -> bytes:
    if isinstance(value, dict):
        head = _head(len(value), (0x80, 16), ((0xDE, ">H"), (0xDF, ">I")))
        return head + b"".join(_pack(name) + _pack(own) for name, own in value.items())
    if isinstance(value, str):
        data = value.encode()
        return _head(len(data), (0xA0, 32), ((0xD9, ">B"), (0xDA, ">H"), (0xDB, ">I"))) + data
    if isinstance(value, bytes):
        return _head(len(value), None, ((0xC4, ">B"), (0xC5, ">H"), (0xC6, ">I"))) + value
    if isinstance(value, tuple):
        return _head(len(value), (0x90, 16), ((0xDC, ">H"),)) + b"".join(map(_pack, value))
    if isinstance(value, int):
        return _head(value, (0, 128), ((0xCC, ">B"), (0xCD, ">H"), (0xCE, ">I")))
    data = _pack((value.shape, value.dtype.name, value.tobytes()))
    sizes = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}
    sized = ((0xC7, ">B"), (0xC8, ">H"), (0xC9, ">I"))
    head = bytes([sizes[len(data)]]) if len(data) in sizes else _head(len(data), None, sized)
    return head + b"\x01" + data


def write_magiclens(path: Path) -> Path:
    """The small MagicLens as a pickle of flax's bytes."""
    path.write_bytes(pickle.dumps(to_flax(system_weights("magiclens")), protocol=4))
    return path


def write_checkpoint(folder: Path, name: str) -> Path:
    """The small CoVR or CoVR-2 in torch's format, its vocabulary beside it."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    state = {key: torch.from_numpy(np.array(own)) for key, own in system_weights(name).items()}
    torch.save({"model": state, "epoch": 3}, folder / f"{name}.ckpt")
    return folder / f"{name}.ckpt"


def write_prior(folder: Path, text_dim: int | None = None) -> Path:
    """The small CompoDiff's prior; text_dim: of another text tower than the original's 1280."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    facts, outputs = read_facts("compodiff"), golden_outputs("compodiff")
    weights = system_weights("compodiff")
    if text_dim:
        name = "model.net.to_text_embeds.0.weight"
        weights[name] = weights[name][:, :text_dim]
    weights |= dict.fromkeys(facts["rotary"], outputs["freqs"])
    weights |= {name: np.zeros(shape, np.float32) for name, shape in facts["buffers"].items()}
    state = {name: torch.from_numpy(np.array(own)) for name, own in weights.items()}
    torch.save(state, folder / "pytorch_model.bin")
    return folder
