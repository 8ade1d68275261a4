"""Pictures in every mode and bit depth, each with the 8-bit RGB that a viewer shows.

Files are written, and colours computed, without Pillow wherever it could be wrong both times.
"""

from __future__ import annotations

import colorsys
import io
import struct
import zlib

import numpy as np
import PIL
from extraction_world import draw_image
from PIL import Image, ImageCms

PILLOW = int(PIL.__version__.split(".")[0])

RGB = np.asarray(draw_image(3, (48, 40)))
GREY = np.asarray(draw_image(5, (48, 40)).convert("L"))
ALPHA = np.asarray(draw_image(8, (48, 40)).convert("L"))
RED_PRIMARIES = ((0.515, 0.241, -0.001), (0.292, 0.692, 0.042), (0.157, 0.067, 0.784))  # Display P3


def grey_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, -1)


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.rint(colours * share + 255 * (1 - share)).astype(np.uint8)


def save(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------
# PNG
# ---------------------------------------------------------------------------------------------


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: np.ndarray, depth: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of samples (H, W) or (H, W, C) of `depth` bits; colour: its colour type."""
    height, width = values.shape[:2]
    rows = values.reshape(height, -1)
    if depth == 16:
        rows = rows.astype(">u2").view(np.uint8)
    elif depth < 8:
        bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(height, -1), axis=1)
    lines = b"".join(b"\0" + row.astype(np.uint8).tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in body)


def png_cases() -> dict[str, tuple[bytes, np.ndarray]]:
    cases = {}
    for depth in (1, 2, 4, 8, 16):
        most = 2**depth - 1
        steps = np.rint(GREY / 255 * most).astype(np.uint16)
        shown = grey_rgb(np.rint(steps / most * 255).astype(np.uint8))
        cases[f"PNG grey {depth}"] = png(steps, depth, 0), shown
        key = int(np.bincount(steps.ravel()).argmax())
        clear = np.where(steps == key, 0, 255)
        if depth == 16:  # a smooth picture has hardly two equal values
            steps = np.where(GREY > 128, 40_000, steps).astype(np.uint16)
            key, clear = 40_000, np.where(GREY > 128, 0, 255)
        chunk = (b"tRNS", struct.pack(">H", key))
        cases[f"PNG grey {depth} with a clear value"] = (
            png(steps, depth, 0, chunk),
            over_white(shown, clear),
        )
    for depth in (1, 2, 4, 8):
        count = 2**depth
        palette = np.random.default_rng(depth).integers(0, 256, (count, 3), dtype=np.uint8)
        alphas = np.linspace(0, 255, count).astype(np.uint8)
        index = (GREY.astype(int) * count // 256).astype(np.uint8)
        chunks = [(b"PLTE", palette.tobytes()), (b"tRNS", alphas.tobytes())]
        cases[f"PNG palette {depth}"] = png(index, depth, 3, chunks[0]), palette[index]
        shown = over_white(palette[index], alphas[index])
        cases[f"PNG palette {depth} with transparency"] = png(index, depth, 3, *chunks), shown
    wide = RGB.astype(np.uint16) * 257
    clear = RGB[..., 0] > 128
    keyed = np.where(clear[..., None], np.array([300, 257 * 7, 9]), wide)
    key = (b"tRNS", struct.pack(">HHH", 300, 257 * 7, 9))
    for depth, scale in ((8, 1), (16, 257)):
        la = np.stack([GREY, ALPHA], -1).astype(np.uint16) * scale
        rgba = np.dstack([RGB, ALPHA]).astype(np.uint16) * scale
        cases[f"PNG RGB {depth}"] = png(RGB.astype(np.uint16) * scale, depth, 2), RGB
        cases[f"PNG LA {depth}"] = png(la, depth, 4), over_white(grey_rgb(GREY), ALPHA)
        cases[f"PNG RGBA {depth}"] = png(rgba, depth, 6), over_white(RGB, ALPHA)
    cases["PNG RGB 16 with a clear value"] = (
        png(keyed, 16, 2, key),
        over_white(RGB, np.where(clear, 0, 255)),
    )
    return cases


# ---------------------------------------------------------------------------------------------
# TIFF
# ---------------------------------------------------------------------------------------------


def tiff(values: np.ndarray, bits: int, order: str = "<", photometric: int = 1, kind: int = 1):
    """A TIFF of one strip. values (H, W), (H, W, C), or bytes that are packed already."""
    height, width = values.shape[:2]
    channels = values.shape[2] if values.ndim == 3 else 1
    data = values.tobytes() if bits != 12 else _pack_twelve(values)
    entries = [
        *((256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric)),
        *((273, 4, 8), (277, 3, channels), (278, 4, height), (279, 4, len(data)), (339, 3, kind)),
    ]
    table = struct.pack(f"{order}H", len(entries))
    extra, place = b"", 8 + len(data) + 2 + 12 * len(entries) + 4
    for tag, form, value in entries:
        if channels > 1 and tag in (258, 339):
            where = place + len(extra)
            table += struct.pack(f"{order}HHII", tag, form, channels, where)
            extra += struct.pack(f"{order}{channels}H", *[value] * channels)
        else:
            own = f"{order}HHIH2x" if form == 3 else f"{order}HHII"
            table += struct.pack(own, tag, form, 1, value)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", 8 + len(data)) + data + table + b"\0\0\0\0" + extra


def _pack_twelve(values: np.ndarray) -> bytes:
    bits = np.unpackbits(values.astype(">u2")[..., None].view(np.uint8), axis=-1)[..., 4:]
    return np.packbits(bits.reshape(len(values), -1), axis=1).tobytes()


def stretched(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return grey_rgb(np.rint((values - low) / (high - low) * 255).astype(np.uint8))


def tiff_cases() -> dict[str, tuple[bytes, np.ndarray]]:
    wide, shown = GREY.astype(np.uint16) * 257, grey_rgb(GREY)
    twelve = np.rint(GREY / 255 * 4095).astype(np.uint16)
    signed = GREY.astype(np.int16) * 100 - 9000
    large = GREY.astype(np.uint32) * 16_000_000 + 5
    share = (GREY / 255).astype(np.float32)
    holes = share * 900 - 80
    holes[0, :2] = np.nan, np.inf
    cases = {
        "TIFF 12 bits": (tiff(twelve, 12), shown),
        "TIFF 16 bits": (tiff(wide, 16), shown),
        "TIFF 16 bits, big-endian": (tiff(wide.astype(">u2"), 16, ">"), shown),
        "TIFF 16 bits, white is zero": (tiff(wide, 16, photometric=0), grey_rgb(255 - GREY)),
        "TIFF 16 bits with a sign": (tiff(signed, 16, kind=2), stretched(signed.astype(float))),
        "TIFF 32 bits": (tiff(large, 32), stretched(large.astype(float))),
        "TIFF 32 bits with a sign": (
            tiff(large.astype(np.int64).__sub__(2**31).astype(np.int32), 32, kind=2),
            stretched(large.astype(float)),
        ),
        "TIFF floats from 0 to 1": (tiff(share * 0.5, 32, kind=3), grey_rgb(GREY // 2)),
        "TIFF floats": (tiff(holes, 32, kind=3), stretched((share * 900).astype(float))),
    }
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"):
        if mode == "YCbCr" and PILLOW < 13:
            continue  # it does not read those that it writes
        image, shown = in_mode(mode)
        cases[f"TIFF {mode}"] = save(image, "TIFF"), shown
    return cases


# ---------------------------------------------------------------------------------------------
# Modes
# ---------------------------------------------------------------------------------------------


def in_mode(mode: str) -> tuple[Image.Image, np.ndarray]:
    """A picture in a mode of Pillow's, and what it shows."""
    one, many = grey_rgb(GREY), RGB
    black_white = np.where(GREY > 127, 255, 0).astype(np.uint8)
    palette = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    indexed = Image.fromarray(GREY).convert("L")
    indexed.putpalette(palette.tobytes())
    alpha = Image.fromarray(ALPHA)
    made = {
        "1": lambda: (Image.fromarray(black_white).convert("1"), grey_rgb(black_white)),
        "L": lambda: (Image.fromarray(GREY), one),
        "P": lambda: (indexed, palette[GREY]),
        "RGB": lambda: (Image.fromarray(RGB), many),
        "RGBX": lambda: (Image.fromarray(RGB).convert("RGBX"), many),
        "RGBA": lambda: (_with_alpha(Image.fromarray(RGB), alpha), over_white(RGB, ALPHA)),
        "LA": lambda: (_with_alpha(Image.fromarray(GREY), alpha), over_white(one, ALPHA)),
        "PA": lambda: (_with_alpha(indexed, alpha), over_white(palette[GREY], ALPHA)),
        "CMYK": _cmyk,
        "YCbCr": _ycbcr,
        "HSV": _hsv,
        "LAB": _lab,
        "F": lambda: (Image.fromarray((GREY / 255).astype(np.float32)), one),
        "I": lambda: (Image.fromarray(GREY.astype(np.int32) * 1000), stretched(GREY.astype(float))),
        "I;16": lambda: (Image.fromarray(GREY.astype(np.uint16) * 257), one),
    }
    for like in ("I;16B", "I;16L", "I;16N"):
        order = ">" if like == "I;16B" else "<"
        data = (GREY.astype(f"{order}u2") * 257).astype(f"{order}u2").tobytes()
        size = GREY.shape[::-1]
        made[like] = lambda like=like, data=data, size=size: (
            Image.frombytes(like, size, data),
            one,
        )
    made["RGBa"] = lambda: (in_mode("RGBA")[0].convert("RGBa"), over_white(RGB, ALPHA))
    made["La"] = lambda: (in_mode("LA")[0].convert("La"), over_white(one, ALPHA))
    return made[mode]()


def _with_alpha(image: Image.Image, alpha: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(alpha)
    return image


def _cmyk() -> tuple[Image.Image, np.ndarray]:
    black = 255 - RGB.max(-1).astype(int)
    ink = np.dstack([255 - RGB.astype(int) - black[..., None], black])
    rest = (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
    image = Image.frombytes("CMYK", RGB.shape[1::-1], ink.astype(np.uint8).tobytes())
    return image, np.rint(rest).astype(np.uint8)


def _ycbcr() -> tuple[Image.Image, np.ndarray]:
    weights = [(0.299, 0.587, 0.114), (-0.1687, -0.3313, 0.5), (0.5, -0.4187, -0.0813)]
    values = np.clip(np.rint(RGB @ np.array(weights).T + (0, 128, 128)), 0, 255).astype(np.uint8)
    return Image.frombytes("YCbCr", RGB.shape[1::-1], values.tobytes()), RGB


def _hsv() -> tuple[Image.Image, np.ndarray]:
    values = [colorsys.rgb_to_hsv(*pixel) for pixel in (RGB.reshape(-1, 3) / 255).tolist()]
    values = np.rint(np.array(values) * 255).astype(np.uint8)
    return Image.frombytes("HSV", RGB.shape[1::-1], values.tobytes()), RGB


def linear(values: np.ndarray) -> np.ndarray:
    """sRGB values 0..1 to light."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def encoded(light: np.ndarray) -> np.ndarray:
    """Light to 8-bit sRGB."""
    light = np.clip(light, 0, 1)
    values = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(255 * values).astype(np.uint8)


SRGB_TO_XYZ = np.array(  # D50, as profiles have it
    [
        *((0.4360747, 0.3850649, 0.1430804), (0.2225045, 0.7168786, 0.0606169)),
        (0.0139322, 0.0971045, 0.7141733),
    ]
)
D50 = np.array([0.9642, 1.0, 0.8249])


def _lab() -> tuple[Image.Image, np.ndarray]:
    xyz = linear(RGB / 255) @ SRGB_TO_XYZ.T / D50
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    lab = np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1])], -1)
    lab = np.dstack([lab, 200 * (f[..., 1] - f[..., 2])])
    values = np.rint(lab * (2.55, 1, 1)).astype(np.int16).astype(np.uint8)  # a, b with a sign
    return Image.frombytes("LAB", RGB.shape[1::-1], values.tobytes()), RGB


# ---------------------------------------------------------------------------------------------
# Colour profiles
# ---------------------------------------------------------------------------------------------


def profile(space: bytes, pcs: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile, version 2."""
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(79), **tags}
    place, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data
    size = place + len(body)
    header = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02100000, kind, space, pcs)
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += struct.pack(">3i", *(int(65536 * v) for v in D50))
    return header + bytes(128 - len(header)) + struct.pack(">I", len(tags)) + table + body


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * value) for value in values))


def _gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * value))


def wide_profile() -> bytes:
    """The primaries of Display P3 with a gamma of 1.8."""
    tags = {b"wtpt": _xyz(D50)}
    for name, primary in zip((b"r", b"g", b"b"), RED_PRIMARIES, strict=True):
        tags |= {name + b"XYZ": _xyz(primary), name + b"TRC": _gamma(1.8)}
    return profile(b"RGB ", b"XYZ ", b"mntr", tags)


def wide_shown() -> np.ndarray:
    xyz = (RGB / 255) ** 1.8 @ np.array(RED_PRIMARIES)
    return encoded(xyz @ np.linalg.inv(SRGB_TO_XYZ).T)


def grey_profile() -> bytes:
    return profile(b"GRAY", b"XYZ ", b"mntr", {b"wtpt": _xyz(D50), b"kTRC": _gamma(1.0)})


def ink_profile() -> bytes:
    """CMYK whose inks swap: cyan is printed as yellow. A table of two steps an ink, to Lab."""
    corners = np.array(np.meshgrid(*[[0, 1]] * 4, indexing="ij")).reshape(4, -1).T
    light = (1 - corners[:, 2::-1]) * (1 - corners[:, 3:])  # yellow, magenta, cyan: R, G, B
    xyz = light @ SRGB_TO_XYZ.T / D50
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    lab = [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])]
    table = np.stack([lab[0] * 2.55, lab[1] + 128, lab[2] + 128], -1)
    table = np.clip(np.rint(table), 0, 255).astype(np.uint8).tobytes()
    straight = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).ravel().tolist())
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + straight * 4 + table + straight * 3
    return profile(b"CMYK", b"Lab ", b"prtr", {b"wtpt": _xyz(D50), b"A2B0": lut})


def profile_cases() -> dict[str, tuple[bytes, np.ndarray]]:
    flat = np.full((40, 48, 4), (0, 0, 255, 0), np.uint8)  # one corner of the table: yellow
    flat[:20] = (255, 0, 0, 0)  # cyan
    inks = Image.frombytes("CMYK", (48, 40), flat.tobytes())
    swapped = np.full((40, 48, 3), (0, 255, 255), np.uint8)
    swapped[:20] = (255, 255, 0)
    picture, wide = Image.fromarray(RGB), wide_profile()
    grey = encoded(GREY / 255)
    clear = _with_alpha(picture, Image.fromarray(ALPHA))
    return {
        "PNG with a profile": (save(picture, "PNG", icc_profile=wide), wide_shown()),
        "JPEG with a profile": (
            save(picture, "JPEG", icc_profile=wide, quality=97, subsampling=0),
            wide_shown(),
        ),
        "WebP with a profile": (
            save(picture, "WEBP", icc_profile=wide, lossless=True),
            wide_shown(),
        ),
        "PNG with a profile and alpha": (
            save(clear, "PNG", icc_profile=wide),
            over_white(wide_shown(), ALPHA),
        ),
        "grey with a profile": (
            save(Image.fromarray(GREY), "PNG", icc_profile=grey_profile()),
            grey_rgb(grey),
        ),
        "16-bit grey with a profile": (
            save(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG", icc_profile=grey_profile()),
            grey_rgb(grey),
        ),
        "CMYK with a profile": (save(inks, "TIFF", icc_profile=ink_profile()), swapped),
    }


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


# ---------------------------------------------------------------------------------------------
# The rest
# ---------------------------------------------------------------------------------------------

# How the rows and columns of a picture have to be put so that an orientation shows it upright.
STORED = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[::-1],
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
}


def turned_cases() -> dict[str, tuple[bytes, np.ndarray]]:
    cases = {}
    for orientation, store in STORED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = Image.fromarray(np.ascontiguousarray(store(RGB)))
        for form, options in (
            ("JPEG", {"quality": 97, "subsampling": 0}),
            ("PNG", {}),
            ("WEBP", {"lossless": True}),
            ("TIFF", {}),
        ):
            name = f"{form} turned by {orientation}"
            cases[name] = save(stored, form, exif=exif, **options), RGB
    return cases


def other_cases() -> dict[str, tuple[bytes, np.ndarray]]:
    picture = Image.fromarray(RGB)
    frames = {"save_all": True, "append_images": [picture.rotate(180)], "duration": 100}
    still = {**frames, "default_image": True, "append_images": [picture, picture.rotate(90)]}
    many, most = Image.fromarray(GREY), int(np.bincount(GREY.ravel()).argmax())
    cases = {
        "animated GIF": (save(many, "GIF", **frames), grey_rgb(GREY)),
        "animated WebP": (save(picture, "WEBP", lossless=True, **frames), RGB),
        "animated PNG": (save(picture, "PNG", **frames), RGB),
        "animated PNG with a still": (save(picture.rotate(180), "PNG", **still), RGB),
        "TIFF of two pages": (save(picture, "TIFF", **frames), RGB),
        "GIF with a clear colour": (
            save(many, "GIF", transparency=most),
            over_white(grey_rgb(GREY), np.where(most == GREY, 0, 255)),
        ),
        "JPEG CMYK": (save(in_mode("CMYK")[0], "JPEG", quality=97), in_mode("CMYK")[1]),
        "JPEG grey": (save(many, "JPEG", quality=97), grey_rgb(GREY)),
        "PPM of 16 bits": (
            b"P5 48 40 65535\n" + (GREY.astype(">u2") * 257).astype(">u2").tobytes(),
            grey_rgb(GREY),
        ),
        "BMP": (save(picture, "BMP"), RGB),
        "WebP with alpha": (save(in_mode("RGBA")[0], "WEBP", lossless=True), in_mode("RGBA")[1]),
    }
    return cases


def all_cases() -> dict[str, tuple[bytes, np.ndarray]]:
    """Name -> (the encoded picture, the 8-bit RGB (H, W, 3) that a viewer shows)."""
    groups = (png_cases, tiff_cases, profile_cases, turned_cases, other_cases)
    return {name: case for group in groups for name, case in group().items()}
