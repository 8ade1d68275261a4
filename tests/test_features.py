"""Backbones, decoding, preprocessing and encoding, against open_clip's own plain calls."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from architectures import ARCHITECTURES
from conftest import ROOT, SMALL_CLIP
from PIL import Image

import utils_features
from utils import UserError
from utils_backbones import BACKBONES, backbone_folder
from utils_features import (
    Encoder,
    find_backbone,
    list_backbones,
    load_encoder,
    make_preprocess,
)
from utils_pixels import BadImage, decode_image
from utils_text_tower import find_causal_tower

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder(small_clip: Path) -> Encoder:
    return load_encoder(f"local-dir:{small_clip}", CPU)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PATH": "", "HOME": "/nonexistent", **environment},
        capture_output=True,
        text=True,
    )


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


# ---------------------------------------------------------------------------------------------
# Backbones
# ---------------------------------------------------------------------------------------------


def test_importing_loads_no_deep_learning():
    heavy = "{'torch', 'open_clip', 'webdataset', 'torchvision'}"
    code = f"import sys, utils_features, utils_datasets; print({heavy} & set(sys.modules))"
    assert run_python(code).stdout == "set()\n"


def test_clip_is_built_with_quickgelu_as_its_weights_were_trained():
    spec = BACKBONES["clip"]
    with torch.device("meta"):  # the architecture alone, without memory for its weights
        asked = open_clip.create_model(spec.model, device="meta")
        plain = open_clip.create_model("ViT-L-14", device="meta")
    assert utils_features._find_activation(asked) == "QuickGELU"
    assert utils_features._find_activation(plain) == "GELU"
    assert open_clip.get_pretrained_cfg(spec.model, spec.pretrained)["quick_gelu"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ViT-B-32", r"names no weights; open_clip has .*ViT-B-32/laion2b_s34b_b79k"),
        ("ViT-B-32", r"ViT-B-32-quickgelu/openai"),
        ("ViT-B/32", r"names no weights"),
        ("ViT-B-32/nothing", r"there are no weights 'nothing'; open_clip has .*laion2b_s34b_b79k"),
        ("vit-b32/openai", r"no such model; the closest names are .*ViT-B-32"),
        ("clipp", r"no such model; the closest names are clip"),
        ("", r"no such model"),
        ("ViT-L-14/openai", r"trained with QuickGELU .* use ViT-L-14-quickgelu/openai"),
        ("ViT-L/14/openai", r"use ViT-L-14-quickgelu/openai"),
    ],
)
def test_a_wrong_spec_says_what_there_is(spec, message):
    with pytest.raises(UserError, match=message):
        find_backbone(spec)


def test_specs_are_resolved():
    assert find_backbone("clip") is BACKBONES["clip"]
    for spec, expected in [
        ("ViT-B-32/laion2b_s34b_b79k", ("ViT-B-32", "laion2b_s34b_b79k")),
        ("ViT-B/32/laion2b-s34b-b79k", ("ViT-B-32", "laion2b-s34b-b79k")),
        ("hf-hub:org/name", ("hf-hub:org/name", None)),
        ("local-dir:some/where", ("local-dir:some/where", None)),
    ]:
        backbone = find_backbone(spec)
        assert (backbone.model, backbone.pretrained) == expected


def test_every_listed_backbone_resolves():
    names = list_backbones()
    assert names[: len(BACKBONES)] == list(BACKBONES)
    assert "ViT-B-32/laion2b_s34b_b79k" in names
    assert "ViT-L-14-quickgelu/openai" in names
    assert "ViT-L-14/openai" not in names
    for name in names:
        find_backbone(name)


def test_feature_folders_are_safe_names():
    assert backbone_folder("clip") == "clip_features"
    assert backbone_folder("ViT-B-32/openai") == "ViT-B-32-openai_features"
    assert backbone_folder("local-dir:../my models/é") == "local-dir-..-my-models_features"


def test_offline_the_missing_files_are_named_in_one_line(tmp_path):
    code = (
        "import torch, utils, utils_features\n"
        "for spec in ('clip', 'hf-hub:nobody/nothing'):\n"
        "    try: utils_features.load_encoder(spec, torch.device('cpu'))\n"
        "    except utils.UserError as error: print(error)"
    )
    run = run_python(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    clip, other = run.stdout.splitlines()
    assert "hf-hub:timm/vit_large_patch14_clip_224.openai" in clip
    assert "hf-hub:nobody/nothing" in other
    assert "HF_HOME" in clip
    assert "HF_HOME" in other
    assert run.stderr == ""


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "open_clip_config.json").unlink(), r"open_clip_config\.json"),
        (lambda folder: (folder / "open_clip_model.safetensors").unlink(), r"no weights in"),
        (lambda folder: (folder / "open_clip_config.json").write_text("{"), r"not valid JSON"),
        (
            lambda folder: (folder / "open_clip_model.safetensors").write_bytes(b"\0" * 64),
            r"not be loaded",
        ),
    ],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path, small_clip, spoil, message):
    for path in small_clip.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        load_encoder(f"local-dir:{tmp_path}", CPU)


def test_a_missing_package_is_named(make_clip, monkeypatch):
    text = {**SMALL_CLIP["text_cfg"], "hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}
    config = {**SMALL_CLIP, "text_cfg": text}
    folder = make_clip("hub tokenizer", config)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"transformers.*pip install transformers"):
        load_encoder(f"local-dir:{folder}", CPU)


def test_an_unknown_precision_is_refused(small_clip):
    with pytest.raises(UserError, match="fp32, bf16, fp16"):
        load_encoder(f"local-dir:{small_clip}", CPU, "int8")


# ---------------------------------------------------------------------------------------------
# Identity
# ---------------------------------------------------------------------------------------------


def test_the_identity_describes_the_model(encoder):
    assert json.loads(json.dumps(encoder.identity)) == encoder.identity
    expected = {
        "model": "local-dir",
        "pretrained": None,
        "activation": "QuickGELU",
        "embed_dim": 48,
        "context_length": 77,
        "tokenizer": "SimpleTokenizer",
        "image_size": 32,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    assert {key: encoder.identity[key] for key in expected} == expected
    assert (encoder.dim, encoder.context_length, encoder.image_size) == (48, 77, (32, 32))


def test_a_copied_folder_is_the_same_model_and_any_change_is_another(encoder, make_clip):
    def identify(name, config=SMALL_CLIP, **changes):
        folder = make_clip(name, config, **changes)
        return load_encoder(f"local-dir:{folder}", CPU).identity

    assert identify("copy") == encoder.identity
    changed = {
        "weights_sha256": identify("other seed", seed=8),
        "activation": identify("gelu", {**SMALL_CLIP, "quick_gelu": False}),
        "mean": identify("mean", preprocess={"mean": [0.5, 0.5, 0.5]}),
        "resize_mode": identify("squash", preprocess={"resize_mode": "squash"}),
    }
    for key, identity in changed.items():
        assert identity[key] != encoder.identity[key], key


# ---------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------


def gradient(width: int = 60, height: int = 40) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 4, y * 6, (x * y) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_exif_orientation() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    return encode(gradient(), "jpeg", exif=exif)


def grey_16_bit() -> Image.Image:
    return Image.fromarray(np.linspace(0, 65535, 2400).reshape(40, 60).astype(np.uint16))


def transparent() -> Image.Image:
    image = gradient().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


FRAMES = {"save_all": True, "append_images": [gradient().rotate(90), gradient().rotate(180)]}

AWKWARD_IMAGES = {
    "rgba png": encode(transparent(), "png"),
    "rgba webp": encode(transparent(), "webp", lossless=True),
    "palette png": encode(gradient().convert("P"), "png"),
    "palette with transparency": encode(gradient().convert("P"), "png", transparency=3),
    "grey jpeg": encode(gradient().convert("L"), "jpeg"),
    "grey with alpha": encode(transparent().convert("LA"), "png"),
    "one bit": encode(gradient().convert("1"), "png"),
    "cmyk jpeg": encode(gradient().convert("CMYK"), "jpeg"),
    "16-bit grey": encode(grey_16_bit(), "png"),
    "animated gif": encode(gradient(), "gif", **FRAMES),
    "animated webp": encode(gradient(), "webp", lossless=True, **FRAMES),
    "rotated by exif": with_exif_orientation(),
    "progressive jpeg": encode(gradient(), "jpeg", progressive=True),
}


@pytest.mark.parametrize("kind", AWKWARD_IMAGES)
def test_images_in_the_wild_decode_as_the_usual_pipeline_does(tmp_path, kind):
    path = tmp_path / "with a space é.jpg"
    path.write_bytes(AWKWARD_IMAGES[kind])
    image = decode_image(path)
    assert (image.mode, image.size) == ("RGB", (60, 40))
    assert image.tobytes() == Image.open(path).convert("RGB").tobytes()
    assert decode_image(path.read_bytes()).tobytes() == image.tobytes()


def test_an_animation_gives_its_first_frame():
    for kind in ("animated gif", "animated webp"):
        image = np.asarray(decode_image(AWKWARD_IMAGES[kind]), int)
        near, far = (abs(image - np.asarray(gradient().rotate(a))).mean() for a in (0, 90))
        assert near < far / 4, kind  # a GIF has 256 colours, so not the same


def test_16_bit_grey_is_clipped_as_pillow_converts_it():
    values = np.asarray(decode_image(AWKWARD_IMAGES["16-bit grey"]))
    assert (values == np.minimum(np.asarray(grey_16_bit()), 255)[..., None]).all()


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "not an image in JPEG, PNG, WebP, GIF, BMP, TIFF, MPO or PPM"),
        (b"just a text\n", "not an image in JPEG, PNG, WebP, GIF, BMP, TIFF, MPO or PPM"),
        (encode(gradient(), "jpeg")[:900], "truncated"),
        (encode(gradient(), "png")[:300], "truncated|Truncated"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "could not create decoder"),
    ],
    ids=["empty", "text", "truncated jpeg", "truncated png", "broken webp"],
)
def test_a_bad_image_has_a_cause_that_is_the_same_for_files_and_bytes(tmp_path, content, cause):
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(BadImage, match=cause) as from_bytes:
        decode_image(content)
    with pytest.raises(BadImage, match=cause) as from_file:
        decode_image(path)
    assert from_bytes.value.cause == from_file.value.cause
    assert pickle.loads(pickle.dumps(from_file.value)).cause == from_file.value.cause


def test_a_missing_file_is_a_bad_image(tmp_path):
    with pytest.raises(BadImage, match="No such file"):
        decode_image(tmp_path / "absent.jpg")


def test_decompression_bombs_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # of the 2400; refused from twice that on
    with pytest.raises(BadImage, match="DecompressionBomb"):
        decode_image(encode(gradient(), "png"))


# ---------------------------------------------------------------------------------------------
# Preprocessing
# ---------------------------------------------------------------------------------------------

RESIZE_MODES = ["shortest", "squash", "longest"]


@pytest.mark.parametrize("resize_mode", RESIZE_MODES)
@pytest.mark.parametrize("size", [(60, 40), (31, 90), (32, 32), (7, 5)])
def test_uint8_pixels_normalised_later_are_the_models_own_bit_for_bit(make_clip, resize_mode, size):
    folder = make_clip(
        resize_mode, SMALL_CLIP, {"resize_mode": resize_mode, "mean": [0.1, 0.5, 0.7]}
    )
    encoder = load_encoder(f"local-dir:{folder}", CPU)
    _, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    image = gradient(*size)
    pixels = encoder.preprocess(image)
    assert pixels.dtype == torch.uint8
    normalised = encoder._normalise(pixels[None], torch.empty(1, *pixels.shape))
    assert torch.equal(normalised[0], transform(image))


def test_all_byte_values_are_normalised_bit_for_bit(encoder, small_clip):
    _, transform = open_clip.create_model_from_pretrained(f"local-dir:{small_clip}")
    ramp = np.resize(np.arange(256, dtype=np.uint8), (32, 32, 3))
    pixels = torch.from_numpy(ramp).permute(2, 0, 1)
    normalised = encoder._normalise(pixels[None], torch.empty(1, *pixels.shape))
    assert torch.equal(normalised[0], transform(Image.fromarray(ramp)))


def test_batches_of_any_size_follow_each_other(encoder):
    """Their pixels lie in memory that the batch before has used, a few images at a time."""
    batch = torch.stack([encoder.preprocess(gradient(60, 40 + i)) for i in range(11)])
    plain = encoder._normalise(batch, torch.empty(batch.shape))
    for start, stop in ((0, 5), (0, 11), (3, 10), (10, 11)):
        with torch.inference_mode():
            expected = encoder.model.encode_image(plain[start:stop], normalize=False)
        features = encoder.encode_images(batch[start:stop])
        assert torch.allclose(features, expected, atol=1e-6)


def test_a_transform_of_another_form_is_kept_whole(encoder):
    def transform(image: Image.Image) -> torch.Tensor:
        return torch.full((3, 32, 32), image.width / 100)

    preprocess = make_preprocess(transform)
    pixels = preprocess(gradient())
    assert preprocess.mean is None
    assert torch.equal(pixels, transform(gradient()))
    plain = encoder.model.encode_image(pixels[None])
    assert torch.allclose(encoder.encode_images(pixels[None]), plain, atol=1e-6)


def test_preprocessing_goes_to_worker_processes(encoder):
    copy = pickle.loads(pickle.dumps(encoder.preprocess))
    assert torch.equal(copy(gradient()), encoder.preprocess(gradient()))


# ---------------------------------------------------------------------------------------------
# Image features
# ---------------------------------------------------------------------------------------------


def some_images() -> list[Image.Image]:
    return [gradient().rotate(angle) for angle in range(0, 90, 15)]


def test_image_features_are_the_models_own(encoder, small_clip):
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{small_clip}")
    with torch.inference_mode():
        plain = model.eval().encode_image(torch.stack([transform(im) for im in some_images()]))
    features = encoder.encode_images(torch.stack([encoder.preprocess(im) for im in some_images()]))
    assert features.dtype == torch.float32
    assert features.device == CPU
    assert torch.allclose(features, plain, atol=1e-6)
    assert not torch.allclose(features.norm(dim=1), torch.ones(len(features)), atol=0.1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_gives_float32_close_to_fp32(encoder, small_clip, precision):
    low = load_encoder(f"local-dir:{small_clip}", CPU, precision)
    batch = torch.stack([encoder.preprocess(im) for im in some_images()])
    texts = ["at night", "a cat in the rain"]
    for full, half in [
        (encoder.encode_images(batch).numpy(), low.encode_images(batch).numpy()),
        (encoder.encode_texts(texts, 2), low.encode_texts(texts, 2)),
    ]:
        assert half.dtype == np.float32
        assert (unit(full) * unit(half)).sum(axis=1).min() > 0.999
        assert np.abs(full - half).max() > 1e-6  # else autocast was not on


# ---------------------------------------------------------------------------------------------
# Text features
# ---------------------------------------------------------------------------------------------

TEXTS = [
    "a cat",
    "at night, in the rain",
    "",
    "a cat",
    "東京 é — “quoted”",
    "with a <end_of_text> in the middle of it",
    "word " * 200,
    "as a pencil drawing",
    "0 ! 1",
]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request, make_clip) -> tuple[Encoder, bool]:
    config, may_cut = ARCHITECTURES[request.param]
    folder = make_clip(request.param, config)
    return load_encoder(f"local-dir:{folder}", CPU), may_cut


def encode_plainly(encoder: Encoder, texts: list[str]) -> np.ndarray:
    with torch.inference_mode():
        return encoder.model.encode_text(encoder.tokenizer(texts), normalize=False).numpy()


def test_text_features_are_the_models_own(architecture):
    encoder, may_cut = architecture
    assert (find_causal_tower(encoder.model) is not None) == may_cut
    plain = encode_plainly(encoder, TEXTS)
    for batch_size in (1, 3, 100):
        features = encoder.encode_texts(TEXTS, batch_size)
        assert features.dtype == np.float32
        assert features.shape == (len(TEXTS), encoder.dim)
        assert np.abs(features - plain).max() < 1e-5


def test_image_features_of_every_architecture(architecture):
    encoder, _ = architecture
    batch = torch.stack([encoder.preprocess(im) for im in some_images()])
    with torch.inference_mode():
        pixels = encoder._normalise(batch, torch.empty(batch.shape))
        plain = encoder.model.encode_image(pixels, normalize=False)
    assert torch.allclose(encoder.encode_images(batch), plain, atol=1e-5)
    assert plain.shape[1] == encoder.dim


def spy_on_tokens(encoder: Encoder, monkeypatch) -> list[int]:
    """Record how many tokens reach the embedding of an encoder's text tower, call by call."""
    seen = []
    embedding = getattr(encoder.model, "text", encoder.model).token_embedding
    forward = embedding.forward

    def record(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens.numel())
        return forward(tokens)

    monkeypatch.setattr(embedding, "forward", record)
    return seen


def test_only_the_tokens_that_matter_are_encoded(architecture, monkeypatch):
    encoder, may_cut = architecture
    seen = spy_on_tokens(encoder, monkeypatch)
    encoder.encode_texts(["a cat", "word " * 200, "a cat", "dog", "a cat here"], 3)
    full = encoder.context_length
    # start, a, cat, end, here, end; start, dog, end | the long text, whose end is cut off too
    assert seen == ([8, full] if may_cut else [3 * full, full])


def test_a_row_does_not_depend_on_its_batch(encoder):
    together = encoder.encode_texts(TEXTS, 100)
    alone = np.concatenate([encoder.encode_texts([text], 100) for text in TEXTS])
    assert np.abs(together - alone).max() < 2e-6


def test_encoding_again_gives_the_same_bits(encoder, monkeypatch):
    monkeypatch.setattr(utils_features, "TEXTS_AT_ONCE", 3)
    first, second = (encoder.encode_texts(TEXTS, 2) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert np.abs(first - encode_plainly(encoder, TEXTS)).max() < 1e-5


def test_no_texts_give_no_rows(encoder):
    assert encoder.encode_texts([], 8).shape == (0, 48)
    assert encoder.encode_contextual_texts([], ["dog"], 8).shape == (0, 48)


def test_progress_adds_up_to_the_rows(encoder):
    told = []
    encoder.encode_texts(TEXTS, 2, told.append)
    assert sum(told) == len(TEXTS)
    assert len(told) > 1
    told.clear()
    encoder.encode_contextual_texts(TEXTS, ["dog", "red bus"], 3, told.append)
    assert sum(told) == len(TEXTS)


# ---------------------------------------------------------------------------------------------
# Contextual texts
# ---------------------------------------------------------------------------------------------

WORDS = ["dog", "traffic light", "at night", "a cat"]


def contextualise_plainly(encoder: Encoder, texts: list[str], words: list[str]) -> np.ndarray:
    """The definition: the mean of the unit features of "c t" and "t c" over the words c."""
    rows = []
    for text in texts:
        prompts = [f"{word} {text}" for word in words] + [f"{text} {word}" for word in words]
        rows.append(unit(encode_plainly(encoder, prompts)).mean(axis=0))
    return np.stack(rows)


CONTEXT_TEXTS = ["at night", "in the rain", "at night", "dog", "as a drawing, é", "in the rain"]


def test_contextual_features_follow_the_definition(architecture):
    encoder, _ = architecture
    features = encoder.encode_contextual_texts(CONTEXT_TEXTS, WORDS, 5)
    plain = contextualise_plainly(encoder, CONTEXT_TEXTS, WORDS)
    assert features.dtype == np.float32
    assert np.abs(features - plain).max() < 1e-6


def test_contextual_features_do_not_depend_on_the_block_of_texts(encoder, monkeypatch):
    whole = encoder.encode_contextual_texts(CONTEXT_TEXTS, WORDS, 5)
    monkeypatch.setattr(utils_features, "CONTEXTS_AT_ONCE", 2)
    monkeypatch.setattr(utils_features, "TEXTS_AT_ONCE", 7)
    parts = encoder.encode_contextual_texts(CONTEXT_TEXTS, WORDS, 5)
    assert np.abs(whole - parts).max() < 1e-6


def test_each_distinct_prompt_is_encoded_once(encoder):
    tokenised = []

    def tokenizer(texts: list[str]) -> torch.Tensor:
        tokenised.extend(texts)
        return encoder.tokenizer(texts)

    spied = dataclasses.replace(encoder, tokenizer=tokenizer)
    spied.encode_contextual_texts(CONTEXT_TEXTS, WORDS, 5)
    prompts = {f"{w} {t}" for w in WORDS for t in CONTEXT_TEXTS}
    prompts |= {f"{t} {w}" for w in WORDS for t in CONTEXT_TEXTS}
    assert sorted(tokenised) == sorted(prompts)
    assert len(prompts) < 2 * len(WORDS) * len(set(CONTEXT_TEXTS))  # "dog at night" comes twice


def test_a_word_that_recurs_weighs_as_often(encoder):
    words = ["dog", "dog", "bus"]
    features = encoder.encode_contextual_texts(["at night"], words, 5)
    assert np.abs(features - contextualise_plainly(encoder, ["at night"], words)).max() < 1e-6


def test_weights_are_hashed_before_they_go_to_the_device(small_clip, encoder):
    """Another device's tensors have no bytes here: the meta device stands for a GPU."""
    elsewhere = load_encoder(f"local-dir:{small_clip}", torch.device("meta"))
    assert elsewhere.identity == encoder.identity
