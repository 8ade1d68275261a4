"""Encoded images to RGB pixels: as CLIP's usual pipelines take them, or as a viewer shows them.

The two differ for few images: what these have in common is named (FACTS), so that it can be said.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageCms, UnidentifiedImageError

from utils import open_regular
from utils_datasets import IMAGE_FORMAT_NAMES, IMAGE_FORMATS

ORIENTATION = 0x0112  # EXIF
BITS, WHITE_IS_ZERO, SAMPLE_FORMAT, UNSIGNED = 258, 262, 339, 1  # TIFF
TURNS = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT,),
    3: (Image.Transpose.ROTATE_180,),
    4: (Image.Transpose.FLIP_TOP_BOTTOM,),
    5: (Image.Transpose.TRANSPOSE,),
    6: (Image.Transpose.ROTATE_270,),
    7: (Image.Transpose.TRANSVERSE,),
    8: (Image.Transpose.ROTATE_90,),
}
STRAIGHT = {"RGBa": "RGBA", "PA": "RGBA", "La": "LA"}  # modes with alpha, as one to take apart
SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # of a profile that fits a mode
SAME_COLOUR = 2  # of 255: what a profile may change and still count as that of sRGB
GREY_OF_BITS = {"L;2": 85, "L;4": 17}  # 8-bit grey for each step of a PNG's
SEVERAL_FRAMES = ("GIF", "PNG", "TIFF", "WEBP")  # formats whose further frames are other pictures


class BadImage(Exception):
    """An image that cannot be decoded; `cause` says why, without the file's name."""

    def __init__(self, cause: str):
        super().__init__(cause)
        self.cause = cause


def decode_image(
    source: bytes | str | Path,
    box: Sequence[int] | None = None,
    own_mode: bool = False,
    viewed: bool = False,
    least: int = 0,
) -> Image.Image:
    """The pixels of read_pixels alone."""
    return read_pixels(source, box, own_mode, viewed, least)[0]


def read_pixels(
    source: bytes | str | Path,
    box: Sequence[int] | None = None,
    own_mode: bool = False,
    viewed: bool = False,
    least: int = 0,
) -> tuple[Image.Image, tuple[str, ...]]:
    """Decode an encoded image, bytes or a file, to RGB; and the FACTS that set it apart.

    Plain, it is what Pillow's convert("RGB") makes: the first frame of an animation, transparency
    dropped, 16-bit grey clipped to 8 bits, colour profiles ignored, the EXIF orientation not
    applied. All of this is what CLIP's usual pipelines do, and features depend on it. viewed: as a
    viewer shows it, see Look. Pillow's limit on huge images (decompression bombs) stays on. box:
    what to show of it, see crop_box. own_mode: a plain image stays in its file's mode, and is made
    RGB where the model's preprocessing does that, after the crop. least: a JPEG may be decoded
    smaller, but to no fewer pixels a side than these; 0: at its size. The formats are
    IMAGE_FORMATS, whatever the name says. Raises BadImage with the cause.
    """
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else open_regular(source)
        with file, Image.open(file, formats=IMAGE_FORMATS) as opened:
            step = GREY_OF_BITS.get(_raw_mode(opened), 1)
            if viewed and getattr(opened, "default_image", False):
                opened.seek(1)  # an animated PNG's own still is for viewers that do not know them
            if least:
                opened.draft(None, (least, least))
            opened.load()
            look = Look.at(opened, step)
            if viewed:
                image = look.show(opened)
            else:
                image = opened.copy() if own_mode else opened.convert("RGB")
            facts = (*look.facts, *_count_frames(opened))
        return image if box is None else crop_box(image, box), facts
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise BadImage(_describe_image_error(error)) from error


def crop_box(image: Image.Image, box: Sequence[int]) -> Image.Image:
    """A box (left, upper, right, lower; pixels) of an image, cut to it, centred on a black square.

    A box of zeros is the whole image, as it is. Raises ValueError for one without an area.
    """
    if not any(box):
        return image
    left, upper = max(0, box[0]), max(0, box[1])
    right, lower = min(image.width, box[2]), min(image.height, box[3])
    if left >= right or upper >= lower:
        raise ValueError(f"the box {tuple(map(int, box))} shows nothing of it")
    part = image.crop((left, upper, right, lower))
    side = max(part.size)
    square = Image.new(image.mode, (side, side))
    square.paste(part, ((side - part.width) // 2, (side - part.height) // 2))
    return square


def _describe_image_error(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image in {IMAGE_FORMAT_NAMES}"  # its own text holds a memory address
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the path, which differs between folder and shards
    return f"{type(error).__name__}: {error}"


# ---------------------------------------------------------------------------------------------
# As a viewer shows it
# ---------------------------------------------------------------------------------------------

TURNED, DEEP, TRANSPARENT, PROFILE, LAB, FRAMES = FACTS = (
    "an EXIF orientation",
    "16-bit grey, integers or floats",
    "transparency",
    "a colour profile that is not sRGB",
    "LAB colours",
    "several frames",
)


@dataclass(frozen=True)
class Look:
    """What sets a loaded image apart from one that every program shows alike.

    orientation: EXIF's, 1: none; alpha: L, None where nothing shines through; deep: more than 8
    bits a value; profile: to sRGB, None where that changes nothing; lab: in LAB.
    """

    orientation: int = 1
    alpha: Image.Image | None = None
    deep: bool = False
    profile: ImageCms.ImageCmsTransform | None = None
    lab: bool = False

    @classmethod
    def at(cls, image: Image.Image, step: int = 1) -> Look:
        """Look at an image. step: 8-bit grey for each step of its transparent value."""
        lab = image.mode == "LAB"
        return cls(
            orientation=_find_orientation(image),
            alpha=_find_alpha(image, step),
            deep=image.mode == "F" or image.mode.startswith("I"),
            profile=lab_to_srgb() if lab else _find_profile(image),
            lab=lab,
        )

    @property
    def facts(self) -> tuple[str, ...]:
        """Those of FACTS that hold."""
        holds = {
            TURNED: self.orientation != 1,
            DEEP: self.deep,
            TRANSPARENT: self.alpha is not None,
            PROFILE: self.profile is not None and not self.lab,
            LAB: self.lab,
        }
        return tuple(fact for fact, held in holds.items() if held)

    def show(self, image: Image.Image) -> Image.Image:
        """The image (RGB) as a viewer shows it.

        16-bit values from black to white over their whole range, other integers and floats over the
        image's own (floats from 0 to 1 as they are); colours brought to sRGB by the profile;
        transparency over white; turned as EXIF says.
        """
        colours = scale_deep(image) if self.deep else _without_alpha(image)
        if self.profile is None:
            colours = colours.convert("RGB")
        else:
            colours = ImageCms.applyTransform(_profiled(colours), self.profile)
        if self.alpha is not None:
            white = Image.new("RGB", colours.size, "white")
            colours = Image.composite(colours, white, self.alpha)
        for turn in TURNS.get(self.orientation, ()):
            colours = colours.transpose(turn)
        return colours


def _raw_mode(opened: Image.Image) -> object:
    """How a file that is opened and not yet loaded stores its values."""
    tile = getattr(opened, "tile", None)
    return tile[0][3] if tile else None


def _count_frames(opened: Image.Image) -> tuple[str, ...]:
    """The fact that a file holds further pictures. May move to another frame of it."""
    with contextlib.suppress(Exception):  # a damaged second frame is no matter
        if opened.format in SEVERAL_FRAMES and opened.is_animated:
            return (FRAMES,)
    return ()


def _find_orientation(image: Image.Image) -> int:
    """The orientation of EXIF; 1 where it is damaged or no number from 2 to 8, as viewers do."""
    with contextlib.suppress(Exception):
        value = image.getexif().get(ORIENTATION, 1)
        return value if value in TURNS else 1
    return 1


def _find_alpha(image: Image.Image, step: int) -> Image.Image | None:
    """The alpha channel of an image, None if it has none or all of it is opaque."""
    key = image.info.get("transparency")
    if image.getbands()[-1] in "Aa":
        alpha = image.getchannel(len(image.getbands()) - 1)
    elif key is None:
        return None
    elif image.mode == "P":
        alpha = image.convert("RGBA").getchannel("A")
    else:
        alpha = _key_alpha(image, key, step)
    return alpha if alpha is not None and alpha.getextrema()[0] < 255 else None


def _key_alpha(image: Image.Image, key: object, step: int) -> Image.Image | None:
    """The alpha channel of an image of which one value is transparent, as a PNG stores it.

    Pillow leaves that value in the file's bits, where it brings the pixels to eight.
    """
    values = np.asarray(image.convert("L") if image.mode == "1" else image)
    if isinstance(key, tuple):
        key = [value >> 8 for value in key] if max(key) > 255 else key
        same = (values == np.array(key)).all(-1) if len(key) == values.shape[-1] else None
    else:
        same = values == key * step if isinstance(key, int) and values.ndim == 2 else None
    return None if same is None else Image.fromarray(np.where(same, 0, 255).astype(np.uint8))


def _without_alpha(image: Image.Image) -> Image.Image:
    image = image.convert(STRAIGHT[image.mode]) if image.mode in STRAIGHT else image
    if image.mode == "LA":
        return image.getchannel("L")
    if image.mode == "RGBA":
        return Image.merge("RGB", image.split()[:3])
    return image


def scale_deep(image: Image.Image) -> Image.Image:
    """8-bit grey of an image of modes I;16, I and F."""
    values, (low, high) = _deep_values(image)
    share = np.zeros(values.shape) if high == low else (values - low) / (high - low)
    grey = Image.fromarray(np.rint(255 * np.clip(np.nan_to_num(share), 0, 1)).astype(np.uint8))
    return ImageChops.invert(grey) if _tag(image, WHITE_IS_ZERO) == 0 else grey


def _deep_values(image: Image.Image) -> tuple[np.ndarray, tuple[float, float]]:
    """The values (H, W) float64, and those that are black and white."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        return values.astype(np.float64), (0, 2 ** (_tag(image, BITS) or 16) - 1)
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return values.astype(np.float64), (0, 2**16 - 1)
    if _tag(image, SAMPLE_FORMAT) == UNSIGNED:
        values = values.view(np.uint32)
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0, 0)
    if image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0, 1
    return values, (low, high)


def _tag(image: Image.Image, number: int) -> int | None:
    """The value of a TIFF's tag, the first of several."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) and value else value


# ---------------------------------------------------------------------------------------------
# Colour profiles
# ---------------------------------------------------------------------------------------------


def _profiled(image: Image.Image) -> Image.Image:
    """An image without transparency, in the mode that a profile for it is of."""
    if image.mode in ("L", "CMYK", "RGB", "LAB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _find_profile(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """What brings an image to sRGB by its profile, None where there is nothing to do."""
    profile = image.info.get("icc_profile")
    if not profile:
        return None
    grey = image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
    return _transform(profile, "L" if grey else "CMYK" if image.mode == "CMYK" else "RGB")


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None for a profile of another kind of colours, a damaged one, and one of sRGB's colours."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != SPACES[mode]:
            return None
        found = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    return found if mode == "CMYK" or _changes(found, mode) else None


@lru_cache(maxsize=1)
def lab_to_srgb() -> ImageCms.ImageCmsTransform:
    """What brings 8-bit LAB to sRGB."""
    lab, srgb = (ImageCms.createProfile(name) for name in ("LAB", "sRGB"))
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")


def _changes(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform shows colours otherwise than they would be without it."""
    steps = np.arange(0, 256, 17, dtype=np.uint8)
    if mode == "RGB":
        steps = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, len(steps), 3)
    else:
        steps = steps[None]
    colours = Image.fromarray(steps)
    shown = np.asarray(ImageCms.applyTransform(colours, transform), int)
    return np.abs(shown - np.asarray(colours.convert("RGB"), int)).max() > SAME_COLOUR
