"""Files that would run code, start programs, or be taken for something else."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
from architectures import ARCHITECTURES
from conftest import SMALL_CLIP
from extraction_world import add_member, draw_image, encode_jpeg
from PIL import Image

from extraction.parts import Unit
from extraction.reading import Chunk, read_samples
from utils import UserError
from utils_features import load_encoder
from utils_model_files import check_config
from utils_pixels import BadImage, decode_image

CPU = torch.device("cpu")

# ---------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
Path(__file__).with_name("created").touch()
from transformers import PreTrainedTokenizerFast
class Evil(PreTrainedTokenizerFast):
    pass
"""


def write_config(folder: Path, content: dict) -> Path:
    path = folder / "open_clip_config.json"
    path.write_text(json.dumps(content))
    return path


def with_value(place: str, value: object) -> dict:
    """The small model's configuration with one more key."""
    config = json.loads(json.dumps({"model_cfg": SMALL_CLIP, "preprocess_cfg": {}}))
    *sections, key = place.split(".")
    section = config
    for name in sections:
        section = section.setdefault(name, {})
    section[key] = value
    return config


@pytest.fixture
def hostile(small_clip, tmp_path) -> Path:
    """A copy of the small model with a tokenizer that brings code of its own."""
    folder = tmp_path / "model"
    shutil.copytree(small_clip, folder)
    (folder / "evil.py").write_text(CODE)
    auto = {"AutoTokenizer": [None, "evil.Evil"], "AutoConfig": "evil.Evil"}
    tokenizer = {"tokenizer_class": "Evil", "auto_map": auto}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    return folder


@pytest.mark.parametrize("kwargs", [{"trust_remote_code": True}, {}, {"clean": "lower"}])
def test_a_tokenizer_of_the_folder_runs_nothing(hostile, kwargs, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to "do you wish to run the code?"
    config = with_value("model_cfg.text_cfg.hf_tokenizer_name", "some/tokenizer")
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = kwargs
    write_config(hostile, config)
    with pytest.raises(UserError, match="--backbone") as caught:
        load_encoder(f"local-dir:{hostile}", CPU)
    assert "\n" not in str(caught.value)
    if "trust_remote_code" in kwargs:
        assert "'model_cfg.text_cfg.tokenizer_kwargs.trust_remote_code'" in str(caught.value)
    assert not (hostile / "created").exists()


def test_a_hub_model_is_checked_too(hostile, monkeypatch):
    place = "model_cfg.text_cfg.tokenizer_kwargs"
    path = write_config(hostile, with_value(place, {"trust_remote_code": True}))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(path))
    monkeypatch.setattr(
        "open_clip.create_model_from_pretrained", lambda *_, **__: pytest.fail("open_clip saw it")
    )
    with pytest.raises(UserError, match=r"trust_remote_code' is not among"):
        load_encoder("hf-hub:some/model", CPU)


class Touch:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("suffix", [".bin", ".pth"])
def test_weights_run_nothing(small_clip, tmp_path, suffix):
    shutil.copytree(small_clip, tmp_path / "model")
    (tmp_path / "model/open_clip_model.safetensors").unlink()
    weights = tmp_path / f"model/open_clip_pytorch_model{suffix}"
    for save in (
        lambda it: torch.save(it, weights),
        lambda it: weights.write_bytes(pickle.dumps(it)),
    ):
        save({"state_dict": Touch(tmp_path / "created")})
        with pytest.raises(UserError, match="could not be loaded") as caught:
            load_encoder(f"local-dir:{tmp_path / 'model'}", CPU)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "created").exists()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("model_cfg.text_cfg.tokenizer_kwargs.pretrained_model_name_or_path", "x"),
        ("model_cfg.text_cfg.hf_tokenizer_name", "../../elsewhere"),
        ("model_cfg.text_cfg.hf_tokenizer_name", "/tmp/elsewhere"),
        ("model_cfg.text_cfg.hf_model_name", "a/b/c"),
        ("model_cfg.vision_cfg.timm_model_name", "hf-hub:some/model"),
        ("model_cfg.vision_cfg.timm_model_name", "local-dir:model"),
        ("model_cfg.vision_cfg.timm_pool", {"a": 1}),
        ("model_cfg.vision_cfg.act_kwargs", {"inplace": True}),
        ("model_cfg.vision_cfg.width", "64"),
        ("model_cfg.quick_gelu", "yes"),
        ("model_cfg.cast_dtype", "float16"),
        ("preprocess_cfg.mode", "RGBA"),
        ("preprocess_cfg.std", [1] * 17),
        ("tokenizer", {}),
    ],
)
def test_a_configuration_holds_what_is_allowed(tmp_path, place, value):
    path = write_config(tmp_path, with_value(place, value))
    with pytest.raises(UserError, match=rf"open_clip_config\.json: '{place}") as caught:
        check_config(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{}", '{"model_cfg": 3}', "[" * 10**5, "{", "\0"])
def test_a_configuration_that_is_none(tmp_path, content):
    path = tmp_path / "open_clip_config.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"open_clip_config\.json"):
        check_config(path)


def test_every_configuration_of_open_clip_is_allowed(tmp_path):
    configs = [open_clip.get_model_config(name) for name in open_clip.list_models()]
    assert len(configs) > 100
    for config in [*configs, *(config for config, _ in ARCHITECTURES.values())]:
        check_config(write_config(tmp_path, {"model_cfg": config}))
    pixels = {"size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    pixels |= {"resize_mode": "squash", "fill_color": 0, "mode": "RGB"}
    check_config(write_config(tmp_path, {"model_cfg": SMALL_CLIP, "preprocess_cfg": pixels}))


# ---------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["pipe:touch created", "gs:bucket", "s3:bucket", "http:", "file:x", "a::b", "-", "x?y#z"],
)
def test_a_folder_is_no_url(tmp_path, monkeypatch, name):
    """Shards are opened by their paths, whatever those look like."""
    monkeypatch.chdir(tmp_path)
    shard = Path(name) / "query-000000.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as tar:
        add_member(tar, "0.jpg", encode_jpeg(draw_image(1)))
    assert [sample.name for sample in read_samples([shard], False)] == ["query-000000.tar:0.jpg"]
    assert sorted(os.listdir()) == [name]


@pytest.mark.parametrize("kind", ["missing", "fifo", "folder"])
def test_a_shard_that_is_no_file(tmp_path, kind):
    path = tmp_path / "query-000000.tar"
    if kind != "missing":
        {"fifo": os.mkfifo, "folder": os.mkdir}[kind](path)
    with pytest.raises(UserError, match=r"query-000000\.tar cannot be read"):
        list(read_samples([path], False))


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def encode(form: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    draw_image(3).convert(mode).save(file, form)
    return file.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "PPM"])
def test_formats_that_are_read(tmp_path, form):
    """Whatever they are called."""
    (tmp_path / "image.jpg").write_bytes(encode(form))
    for source in (encode(form), tmp_path / "image.jpg"):
        assert decode_image(source).size == draw_image(3).size


@pytest.mark.parametrize("form", ["EPS", "ICO", "TGA", "PCX", "ICNS", "SGI", "IM", "PDF", "DDS"])
def test_formats_that_are_not_read(tmp_path, form, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    (tmp_path / "image.jpg").write_bytes(EPS if form == "EPS" else encode(form))
    with pytest.raises(BadImage) as caught:
        decode_image(tmp_path / "image.jpg")
    assert caught.value.cause == "not an image in JPEG, PNG, WebP, GIF, BMP, TIFF, MPO or PPM"


def test_an_image_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for path in (tmp_path / "fifo.jpg", tmp_path / "folder.jpg", Path("/dev/zero")):
        with pytest.raises(BadImage, match="not a file"):
            decode_image(path)


def test_warnings_name_the_image(capsys):
    def read() -> tuple[Image.Image, tuple[str, ...]]:
        warnings.warn("odd\npalette", stacklevel=1)
        return draw_image(1), ()

    chunk = Chunk(Unit("0"))
    chunk.add(0, "a\nb.png", read, lambda image: torch.zeros(3, *image.size))
    assert capsys.readouterr().err == "a\\nb.png: odd palette\n"
    assert chunk.ids == [0]
