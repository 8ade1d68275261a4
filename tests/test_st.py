"""--backbone st:PATH: models of sentence-transformers, offline, on one of random weights."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import drawn
import numpy as np
import pytest
import torch
from extraction_world import ROOT, environment, make_world
from PIL import Image

from composed import load_composed
from composed.system import Options
from utils import UserError
from utils_storage import read_csv_columns

pytest.importorskip("sentence_transformers")

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
PADS = ("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
)


def save_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2]
    )
    fast.add_special_tokens({"additional_special_tokens": [*SPECIAL, *PADS]})
    return fast


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Qwen2-VL of two narrow layers, pooled at its last token, of unit length."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
    from transformers.models.qwen2_vl import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    place = tmp_path_factory.mktemp("st")
    tokenizer = save_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in (*SPECIAL, *PADS)}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(place / "parts")
    Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=84 * 84),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    ).save_pretrained(place / "parts")
    transformer = Transformer(str(place / "parts"))
    width = transformer.get_embedding_dimension()
    modules = [transformer, Pooling(width, pooling_mode="lasttoken"), Normalize()]
    SentenceTransformer(modules=modules).save(str(place / "model"))
    return place / "model"


def load(folder: Path, **options):
    return load_composed(f"st:{folder}", Options(**options), torch.device("cpu"), "fp32")


def test_images_texts_and_both_at_any_batch_size(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    encoder = load(folder, query_prompt="Find it: ")
    images = [encoder.preprocess(image) for image in drawn.draw_images()]
    query = encoder.encode_queries(images, drawn.TEXTS, range(3))
    gallery = encoder.encode_images(images)
    assert query.shape == gallery.shape == (3, encoder.dim)
    assert torch.allclose(query.norm(dim=1), torch.ones(3), atol=1e-5)
    for number in range(3):
        one = slice(number, number + 1)
        alone = encoder.encode_queries(images[one], drawn.TEXTS[one], [number])
        assert torch.allclose(alone, query[one], atol=1e-5)
        assert torch.allclose(encoder.encode_images(images[one]), gallery[one], atol=1e-5)
    other = encoder.encode_queries(images, drawn.TEXTS[::-1], range(3))
    assert not torch.allclose(other[0], query[0], atol=1e-3)
    model = encoder.composer.network
    pairs = [{"image": i, "text": t} for i, t in zip(images, drawn.TEXTS, strict=True)]
    assert torch.allclose(
        model.encode(pairs, prompt="Find it: ", convert_to_tensor=True), query, atol=1e-5
    )
    assert model.encode(["a text"], convert_to_tensor=True).shape == (1, encoder.dim)
    bare = load(folder).encode_queries(images, drawn.TEXTS, range(3))
    assert not torch.allclose(bare, query, atol=1e-3)


@pytest.mark.parametrize("where", ["modules", "activation", "auto_map"])
def test_remote_code_is_refused(folder, tmp_path, where):
    place = tmp_path / "hostile"
    shutil.copytree(folder, place)
    (place / "own.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
    modules = json.loads((place / "modules.json").read_text())
    if where == "modules":
        modules.append({"idx": 3, "name": "3", "path": "", "type": "own.Module"})
    elif where == "activation":
        dense = {"in_features": 32, "out_features": 8, "activation_function": "own.Run"}
        (place / "3_Dense").mkdir()
        (place / "3_Dense/config.json").write_text(json.dumps(dense))
        name = "sentence_transformers.models.Dense"
        modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": name})
    else:
        config = json.loads((place / "config.json").read_text())
        config["auto_map"] = {"AutoModel": "own.Model"}
        (place / "config.json").write_text(json.dumps(config))
    (place / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="--trust_remote_code") as refused:
        load(place)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "trace").exists()


def test_what_is_no_model_is_one_line(tmp_path):
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError) as refused:
            load(place)
        assert "\n" not in str(refused.value)


def test_features_of_a_data_set(folder, tmp_path):
    """Images go to the model as they are, of any size, from worker processes."""
    world = make_world(tmp_path)
    command = [sys.executable, str(ROOT / "create_features.py"), "--dataset", "shop", "--gpu", "-1"]
    command += ["--backbone", f"st:{folder}", "--batch", "8", "--workers", "1", "--limit", "12"]
    done = subprocess.run(command, cwd=world, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    place = world / "features/st_model_features/shop_first12"
    rows = read_csv_columns(place / "database.csv", ("image_path", "text", "instance"))
    encoder = load(folder)
    paths = [world / "data/shop" / path for path in rows["image_path"]]
    expected = encoder.encode_images([encoder.preprocess(Image.open(path)) for path in paths])
    found = torch.from_numpy(np.load(place / "database_image.npy"))
    assert torch.allclose(found, expected, atol=1e-5)
