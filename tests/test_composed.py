"""Systems with networks of their own: against the original programs' outputs, and as features."""

import csv
import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import drawn
import numpy as np
import PIL
import pytest
import torch
from extraction_world import environment, make_world
from torch import nn
from torch.nn import functional

import composed
import create_features
from composed import blip, compodiff, covr, covr2, find_system, load_composed, magiclens
from composed.system import CLIP_MEAN, CLIP_STD, Options
from composed.tensors import load_tensors
from composed.texts import form_of, query_texts
from methods.composed import token_scores
from utils import UserError
from utils_backbones import backbone_folder, name_backbone
from utils_retrieval import Gallery, Queries, Rows

ROOT = Path(__file__).parents[1]
AGREEMENT = 1e-5  # of the largest number
# The golden outputs are of Pillow 13, which shrinks the height of a tall image, the second, first;
# those before it begin with the width.
SAME = [0, 1, 2] if int(PIL.__version__.split(".")[0]) >= 13 else [0, 2]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The small systems in the official formats."""
    folder = tmp_path_factory.mktemp("systems")
    return {
        "magiclens": drawn.write_magiclens(folder / "magic_lens_clip_small.pkl"),
        "covr": drawn.write_checkpoint(folder, "covr"),
        "covr2": drawn.write_checkpoint(folder, "covr2"),
        "compodiff": drawn.write_prior(folder / "prior"),
    }


def load(name: str, files: dict[str, Path]):
    module = {"magiclens": magiclens, "covr": covr, "covr2": covr2}[name]
    options = Options(gallery_weights=files["covr2"], tokens=True) if name == "covr2" else Options()
    composer = module.load(str(files[name]), options)
    composer.network.eval()
    return composer, module.SYSTEM


@torch.inference_mode()
def outputs(name: str, files: dict[str, Path]) -> dict[str, np.ndarray]:
    """What our network gives where the original program gave its golden outputs."""
    if name == "compodiff":
        return prior_outputs(files["compodiff"])
    composer, system = load(name, files)
    images = torch.stack([composer.preprocess(image) for image in drawn.draw_images()])
    texts = [system.clean(text) for text in drawn.TEXTS]
    found = {
        "query": composer.queries(images, texts, range(3)),
        "gallery": composer.gallery(images),
    }
    if name == "covr2":
        found = {key: rows[:, 16:].unflatten(1, (-1, 16)) for key, rows in found.items()}
        found["patches"] = composer.network[0].patches(images)
    return {key: value.numpy() for key, value in found.items()}


def prior_outputs(folder: Path) -> dict[str, np.ndarray]:
    prior = compodiff.read_prior(folder / "pytorch_model.bin")
    shapes = {"image condition": (3, 1, 64), "noisy": (3, 1, 64)}
    shapes |= dict.fromkeys(("text states", "negative states"), (3, 77, 1280))
    given = {name: torch.from_numpy(drawn.draw(name, shape)) for name, shape in shapes.items()}
    image, text = given["image condition"], given["text states"]
    times = torch.tensor([99, 499, 899])
    conditions = (image, text, given["negative states"])
    return {
        "net": prior(given["noisy"], image, text, times).numpy(),
        "seed0": compodiff.sample(prior, *conditions, 0).numpy(),
        "seed7": compodiff.sample(prior, *conditions, 7).numpy(),
        "previous": prior.schedule["previous"].numpy(),
    }


def departure(found: dict[str, np.ndarray], name: str) -> float:
    """How far outputs are from the golden ones, of the largest golden number."""
    golden = drawn.golden_outputs(name)
    of_images = SAME if name.startswith("covr") else slice(None)
    return max(
        float(np.abs(value - golden[key])[of_images].max() / np.abs(golden[key]).max())
        for key, value in found.items()
    )


SYSTEMS = ("magiclens", "covr", "covr2", "compodiff")


@pytest.mark.parametrize("name", SYSTEMS)
def test_networks_agree_with_the_original_programs(name, files):
    assert departure(outputs(name, files), name) <= AGREEMENT


def test_the_file_is_byte_for_byte_what_flax_writes():
    data = drawn.to_flax(drawn.system_weights("magiclens"))
    expected = drawn.read_facts("magiclens")["msgpack_sha256"]
    assert hashlib.sha256(data).hexdigest() == expected


# --- traps: the golden outputs tell each wrong turn apart ---------------------------------------


def bilinear(**changes):
    def resize(pixels, size, **options):
        return functional.interpolate(pixels, size, **{**options, **changes})

    return resize


def own_maximum_not(monkeypatch):
    def wrong(self, image):
        pixels = torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1)[None] / 255
        pixels = functional.interpolate(pixels, (64, 64), mode="bilinear", antialias=True)[0]
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        return (pixels - mean) / std

    monkeypatch.setattr(magiclens.OwnMaximum, "__call__", wrong)


def no_antialias(monkeypatch):
    wrong = SimpleNamespace(**vars(functional))
    wrong.interpolate = bilinear(antialias=False)
    monkeypatch.setattr(magiclens, "functional", wrong)


def scale_alone(monkeypatch):
    def forward(self, x):
        return functional.layer_norm(x, x.shape[-1:], self.scale, self.bias, magiclens.NORM_EPS)

    monkeypatch.setattr(magiclens.Norm, "forward", forward)


def no_cap(monkeypatch):
    monkeypatch.setattr(magiclens, "LOGIT_CAP", 1e6)


def eight_heads(monkeypatch):
    right = covr.bert_sizes
    eight = {"num_attention_heads": 8}
    monkeypatch.setattr(covr, "bert_sizes", lambda *given: {**right(*given), **eight})


def usual_eps(monkeypatch):
    monkeypatch.setattr(blip, "VISION_EPS", 1e-5)


def eps_of_the_layers(monkeypatch):
    monkeypatch.setattr(covr2, "LN_VISION_EPS", 1e-6)


def biased_keys(monkeypatch):
    def join(state):
        joined = covr2_join(state)
        for name in joined:
            if name.endswith("qkv.bias"):
                third = len(joined[name]) // 3
                joined[name][third : 2 * third] = joined[name][:third]
                joined[name][2 * third :] = 0
        return joined

    covr2_join = covr2._join_biases
    monkeypatch.setattr(covr2, "_join_biases", join)


def no_maximum(monkeypatch):
    """As if the last states were not divided by their maximum, which eps notices."""
    right = compodiff.Prior._norm

    def norm(self, x, gain):
        return right(self, x / 50 if gain == "transformer.norm.g" else x, gain)

    monkeypatch.setattr(compodiff.Prior, "_norm", norm)


def alphas_of_the_time(monkeypatch):
    right = compodiff.cosine_schedule

    def schedule():
        found = right()
        return {**found, "previous": found["reciprocal"] ** -2}

    monkeypatch.setattr(compodiff, "cosine_schedule", schedule)


def no_rotation(monkeypatch):
    monkeypatch.setattr(compodiff, "rotate", lambda x, freqs: x)


TRAPS = [
    ("magiclens", own_maximum_not),
    ("magiclens", no_antialias),
    ("magiclens", scale_alone),
    ("magiclens", no_cap),
    ("covr", eight_heads),
    ("covr", usual_eps),
    ("covr2", usual_eps),
    ("covr2", eps_of_the_layers),
    ("covr2", biased_keys),
    ("compodiff", no_maximum),
    ("compodiff", alphas_of_the_time),
    ("compodiff", no_rotation),
]


@pytest.mark.parametrize(
    ("name", "step"), TRAPS, ids=lambda value: getattr(value, "__name__", value)
)
def test_golden_outputs_tell_a_wrong_turn(name, step, files, monkeypatch):
    step(monkeypatch)
    assert departure(outputs(name, files), name) > 3 * AGREEMENT


def test_text_heads_are_twelve_of_the_published_width():
    state = {
        "text_encoder.embeddings.word_embeddings.weight": torch.empty(30524, 768, device="meta"),
        "text_encoder.embeddings.position_embeddings.weight": torch.empty(512, 768, device="meta"),
        "text_encoder.encoder.layer.0.intermediate.dense.weight": torch.empty(
            3072, 768, device="meta"
        ),
    }
    assert blip.bert_sizes(state, "text_encoder", Path("x"), 1024)["num_attention_heads"] == 12


# --- hostile and other files --------------------------------------------------------------------


class Runs:
    """What writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "run"))


@pytest.mark.parametrize("name", ["magiclens", "covr", "covr2", "compodiff"])
def test_a_hostile_file_runs_nothing(name, tmp_path):
    trace, place = tmp_path / "trace", tmp_path / "file.ckpt"
    content = {"model": Runs(trace)}
    if name == "magiclens":
        place.write_bytes(pickle.dumps(Runs(trace)))
    elif name == "compodiff":
        torch.save(content, tmp_path / "pytorch_model.bin")
        place = tmp_path
    else:
        torch.save(content, place)
    system, _ = find_system(f"{name}:{place}")
    with pytest.raises(UserError, match="is refused") as refused:
        system.load(str(place), Options(gallery_weights=place))
    assert "\n" not in str(refused.value)
    assert not trace.exists()


DAMAGED = {
    "cut": lambda data: data[:-7],
    "longer": lambda data: data + b"\x00",
    "an unknown byte": lambda data: b"\xc1" + data,
    "a deep nest": lambda data: b"\x81\xa1a" * 40 + b"\xc0",
    "another extension": lambda data: b"\x81\xa1a\xd4\x05\x00",
    "no array": lambda data: b"\x81\xa1a\x01",
    "an array of objects": lambda data: b"\x81\xa1a" + ext(((1,), "object", b"\x00" * 8)),
    "fewer bytes": lambda data: b"\x81\xa1a" + ext(((9,), "float32", b"\x00" * 8)),
    "no map": lambda data: b"\x01",
}


def ext(content: tuple) -> bytes:
    data = drawn._pack(content)
    return b"\xc7" + bytes([len(data)]) + b"\x01" + data


@pytest.mark.parametrize("damage", list(DAMAGED))
def test_a_damaged_file_is_one_line(damage, tmp_path):
    good = drawn.to_flax({"params/a": np.arange(3, dtype=np.float32)})
    path = tmp_path / "m.pkl"
    path.write_bytes(pickle.dumps(good))
    assert magiclens.read_flax(path)["params/a"].tolist() == [0, 1, 2]
    path.write_bytes(pickle.dumps(DAMAGED[damage](good)))
    with pytest.raises(UserError, match="is refused: no pickled flax arrays") as refused:
        magiclens.read_flax(path)
    assert "\n" not in str(refused.value)


def test_files_of_other_networks_are_refused(files, tmp_path):
    with pytest.raises(UserError, match="another network"):
        covr.load(str(files["covr2"]), Options())
    path = tmp_path / "m.pkl"
    path.write_bytes(pickle.dumps(drawn.to_flax({"a": np.zeros(2, np.float32)})))
    with pytest.raises(UserError, match="holds another network"):
        magiclens.load(str(path), Options())
    with pytest.raises(UserError, match="is no file"):
        covr.load(str(tmp_path / "none.ckpt"), Options())
    with pytest.raises(UserError, match="covr2 needs --gallery_weights"):
        covr2.load(str(files["covr2"]), Options())
    with pytest.raises(UserError, match="CompoDiff's prior is expected"):
        compodiff.load(str(tmp_path), Options())
    shutil.copy(files["covr"], tmp_path / "covr.ckpt")
    (tmp_path / "vocab.txt").write_text("\n".join(drawn.WORDS[:-2]))
    with pytest.raises(UserError, match=r"put the vocab\.txt"):
        covr.load(str(tmp_path / "covr.ckpt"), Options())


def test_the_gallery_of_covr_is_that_of_blip_where_both_are_given(files, tmp_path):
    covr.load(str(files["covr"]), Options(gallery_weights=files["covr"]))
    state = load_tensors(files["covr"], "model")
    state["vision_proj.bias"] = state["vision_proj.bias"] + 1
    torch.save({"model": state}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"its 'vision_proj.bias' is another"):
        covr.load(str(files["covr"]), Options(gallery_weights=tmp_path / "other.ckpt"))


# --- texts --------------------------------------------------------------------------------------


KNOWN = {
    "caption": ["a (red) dog!"],
    "concept": ["a dog"],
    "first_as_is": ["is Red."],
    "second_as_is": ["has dots"],
}


@pytest.mark.parametrize(
    ("name", "prompts", "text"),
    [
        ("magiclens", "", "a (red) dog!"),
        ("magiclens", "circo", "find a dog but a (red) dog!"),
        ("magiclens", "fashioniq", "is Red. and has dots"),
        ("magiclens", "domains", "find this object in a (red) dog!"),
        ("covr", "cirr", "a red dog"),
        ("covr2", "fashioniq", "is red and has dots"),
        ("compodiff", "circo", "a (red) dog!"),
    ],
)
def test_texts_are_in_the_published_form(name, prompts, text):
    system, _ = find_system(f"{name}:x")
    assert query_texts(system, form_of(system, prompts, None), KNOWN) == [text]
    assert query_texts(system, form_of(system, prompts, "{concept}"), KNOWN) == ["a dog"]


def test_texts_of_blip_are_cleaned_as_published():
    assert blip.clean_text("Is  RED, (not) blue; ~1 \n") == "is red, not blue 1"
    assert len(blip.clean_text("a " * 50).split()) == 30


def test_names():
    assert {"bge-vl", "compodiff", "covr", "covr2", "magiclens", "st"} == set(
        composed.list_systems()
    )
    assert backbone_folder("magiclens:/a/magic_lens_clip_base.pkl") == (
        "magiclens_magic_lens_clip_base_features"
    )
    assert backbone_folder("st:Qwen/Qwen3-VL-Embedding-2B") == "st_Qwen3-VL-Embedding-2B_features"
    assert name_backbone("local-dir:x", "targetpad") == "local-dir:x+targetpad"
    for wrong in ("magic:x", "magiclens:", "magiclens:x+targetpad"):
        with pytest.raises(UserError):
            find_system(wrong)


@pytest.mark.parametrize("name", ["st", "covr"])
def test_a_package_that_lacks_is_named(name, files, monkeypatch, tmp_path):
    module = {"st": "sentence_transformers", "covr": "transformers"}[name]
    monkeypatch.setitem(sys.modules, module, None)
    place = files.get(name, tmp_path)
    with pytest.raises(UserError, match=r"pip install -r requirements-models.txt"):
        load_composed(f"{name}:{place}", Options(), torch.device("cpu"), "fp32")


# --- features -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory, files) -> Path:
    folder = make_world(tmp_path_factory.mktemp("composed"))
    shutil.copy(files["magiclens"], folder / "lens.pkl")
    return folder


def command(world: Path, name: str, *flags: object) -> subprocess.CompletedProcess:
    words = [sys.executable, str(ROOT / f"{name}.py"), "--dataset", "shop", "--gpu", "-1"]
    words += [str(flag) for flag in flags]
    return subprocess.run(words, cwd=world, env=environment(), capture_output=True, text=True)


def extract(world: Path, *flags: object, backbone: str = "magiclens:lens.pkl"):
    flags = ("--backbone", backbone, "--batch", "8", "--workers", "1", *flags)
    return command(world, "create_features", *flags)


@pytest.fixture(scope="module")
def extracted(world) -> Path:
    """The features of the small MagicLens, made after a run that stopped at a bad image."""
    bad = world / "data/shop/database/d50.jpg"
    good = bad.read_bytes()
    bad.write_bytes(b"no image")
    done = extract(world, "--part_rows", "16")
    assert done.returncode == 2
    assert "d50.jpg" in done.stderr
    folder = world / "features/magiclens_lens_features/shop"
    assert any((folder / ".parts").rglob("*.npz"))
    bad.write_bytes(good)
    done = extract(world, "--part_rows", "16")
    assert done.returncode == 0, done.stderr
    return folder


def test_features_are_the_encoder_s_rows_and_made_once(world, extracted, files):
    done = extract(world)
    assert "already finished" in done.stdout
    query, gallery = (np.load(extracted / f"{n}.npy") for n in ("query_composed", "database_image"))
    assert query.shape == (12, 32)
    assert gallery.shape == (100, 32)
    composer, _ = load("magiclens", files)
    with open(extracted / "query.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    from PIL import Image

    images = [Image.open(world / "data/shop" / row["image_path"]) for row in rows]
    with torch.inference_mode():
        pixels = torch.stack([composer.preprocess(image) for image in images])
        expected = composer.queries(pixels, [row["text"] for row in rows], range(12)).numpy()
    assert np.abs(query - expected).max() < 1e-5
    manifest = json.loads((extracted / "manifest.json").read_text())
    assert manifest["composed"]["text"] == "{caption}"
    assert manifest["model"]["model"] == "magiclens"


def test_shards_and_folders_give_the_same_rows(world, extracted):
    done = extract(world, "--icir_source", "wds", "--features_dir", "sharded")
    assert done.returncode == 0, done.stderr
    for name in ("query_composed", "database_image"):
        other = np.load(world / f"sharded/magiclens_lens_features/shop/{name}.npy")
        assert np.allclose(other, np.load(extracted / f"{name}.npy"), atol=1e-6)


def test_two_ranks_give_the_same_rows(world, extracted):
    flags = ("--dataset", "shop", "--gpu", "-1", "--backbone", "magiclens:lens.pkl")
    flags += ("--batch", "8", "--part_rows", "16", "--workers", "0", "--features_dir", "ranked")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = [*launcher, "--nproc_per_node", "2", str(ROOT / "create_features.py"), *flags]
    done = subprocess.run(words, cwd=world, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("query_composed", "database_image"):
        other = np.load(world / f"ranked/magiclens_lens_features/shop/{name}.npy")
        assert np.array_equal(other, np.load(extracted / f"{name}.npy"))


def test_the_method_ranks_by_the_dot_product(world, extracted):
    done = command(
        world, "run_retrieval", "--backbone", "magiclens:lens.pkl", "--method", "composed"
    )
    assert done.returncode == 0, done.stderr
    files = [extracted / f"{name}.npy" for name in ("query_composed", "database_image")]
    flags = ("--query_embeddings", files[0], "--gallery_embeddings", files[1], "--no-normalise")
    flags = ("--backbone", "magiclens:lens.pkl", "--external", "same", *flags)
    done = command(world, "run_retrieval", *flags)
    assert done.returncode == 0, done.stderr
    own, same = (
        (world / "results/shop" / name / "APs.csv").read_text()
        for name in ("composed_magiclens_lens", "external_same")
    )
    assert own == same


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--inputs", "searle"), "--inputs has no effect"),
        (("--preprocess", "targetpad"), "--preprocess has no effect"),
        (("--tokens",), "--tokens has no effect"),
        (("--seeds", "1", "2"), "--seeds has no effect"),
        (("--prompt", "{nothing}"), "{nothing} is unknown"),
        (("--prompt", "{caption} now"), "with other rows"),
    ],
)
def test_flags_without_effect_or_sense_are_refused(world, extracted, flags, message):
    places = [f"--backbone=magiclens:{world / 'lens.pkl'}", f"--data_dir={world / 'data'}"]
    places += [f"--features_dir={world / 'features'}", "--dataset=shop", "--gpu=-1"]
    with pytest.raises(UserError) as refused:
        create_features.main([*places, *flags])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_methods_of_images_and_texts_refuse_composed_features(world, extracted):
    done = command(world, "run_retrieval", "--backbone", "magiclens:lens.pkl", "--method", "sum")
    assert done.returncode == 2
    assert "--method composed reads them" in done.stderr


# --- tokens, draws ------------------------------------------------------------------------------


def test_tokens_are_compared_by_their_best_pair(files):
    composer, _ = load("covr2", files)
    assert composer.query_columns == {"query_composed": 16, "query_tokens": 64}
    assert composer.gallery_columns == {"database_image": 16, "database_tokens": 64}
    query, rows = (torch.from_numpy(drawn.draw(name, (5, 64))) for name in ("q", "g"))
    queries = Queries({"composed": query[:, :16], "tokens": query})
    gallery = Gallery({"image": Rows.of(rows[:, :16]), "tokens": Rows.of(rows)})
    [scores] = token_scores([None], queries, gallery)
    for q in range(5):
        for n in range(5):
            pairs = query[q].view(4, 16) @ rows[n].view(4, 16).T
            assert scores[q, n] == pytest.approx(float(pairs.max()), rel=1e-5)


def test_means_of_tokens_stay_as_they_are(files):
    composer, _ = load("covr2", files)
    assert composer.unit is False
    golden = drawn.golden_outputs("covr2")
    with torch.inference_mode():
        pixels = torch.stack([composer.preprocess(image) for image in drawn.draw_images()])
        mean = composer.gallery(pixels)[:, :16].numpy()
    assert np.allclose(mean[SAME], golden["gallery"].mean(1)[SAME], atol=1e-5)
    assert np.linalg.norm(mean, axis=1).max() < 0.999


@pytest.fixture(scope="module")
def draws_folder(tmp_path_factory, make_clip) -> Path:
    """CompoDiff with a prior of the small kind and towers of random weights."""
    folder = drawn.write_prior(tmp_path_factory.mktemp("compodiff") / "small", text_dim=32)
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "head_width": 32, "layers": 1}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    config = {"embed_dim": 64, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    clip = make_clip("draws", config)
    for name in ("image", "text"):
        (folder / name).symlink_to(clip)
    return folder


def test_draws_depend_on_seed_and_query_alone(draws_folder):
    composer = compodiff.load(str(draws_folder), Options(seeds=(3, 5)))
    composer.network.eval()
    images = [composer.query_preprocess(image) for image in drawn.draw_images()]
    with torch.inference_mode():
        together = composer.queries(torch.stack(images), drawn.TEXTS, range(3))
        alone = composer.queries(torch.stack(images[1:2]), drawn.TEXTS[1:2], [1])
    assert list(composer.query_columns) == ["query_composed", "query_composed_draw2"]
    assert torch.allclose(together[1:2], alone, atol=1e-5)
    assert not torch.allclose(together[:, :64], together[:, 64:], atol=1e-2)


def test_text_states_mask_padding_as_transformers_does(draws_folder):
    """The same tower as transformers has it, of the same weights, with the mask of the tokens."""
    from transformers import CLIPTextConfig, CLIPTextModel

    composer = compodiff.load(str(draws_folder), Options())
    clip = composer.states.clip
    config = CLIPTextConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        vocab_size=49408,
        hidden_act="quick_gelu",
    )
    model = CLIPTextModel(config).eval()
    theirs = getattr(model, "text_model", model)
    own = clip.state_dict()
    theirs.embeddings.token_embedding.weight.data = own["token_embedding.weight"]
    theirs.embeddings.position_embedding.weight.data = own["positional_embedding"]
    theirs.final_layer_norm.load_state_dict(clip.ln_final.state_dict())
    for layer, block in zip(theirs.encoder.layers, clip.transformer.resblocks, strict=True):
        weights, biases = block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)
        for name, weight, bias in zip(("q", "k", "v"), weights, biases, strict=True):
            linear = getattr(layer.self_attn, f"{name}_proj")
            linear.weight.data, linear.bias.data = weight, bias
        layer.self_attn.out_proj.load_state_dict(block.attn.out_proj.state_dict())
        layer.layer_norm1.load_state_dict(block.ln_1.state_dict())
        layer.layer_norm2.load_state_dict(block.ln_2.state_dict())
        layer.mlp.fc1.load_state_dict(block.mlp.c_fc.state_dict())
        layer.mlp.fc2.load_state_dict(block.mlp.c_proj.state_dict())
    tokens, lengths = composer._tokens(list(drawn.TEXTS))
    mask = (torch.arange(77)[None] < lengths[:, None]).long()
    with torch.inference_mode():
        expected = model(input_ids=tokens, attention_mask=mask).last_hidden_state
        found = composer.states(tokens, lengths)
        without = composer.states(tokens, torch.full((3,), 77))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(without, expected, atol=1e-3)


def test_several_seeds_are_averaged_and_their_spread_is_told(world, draws_folder):
    backbone = f"compodiff:{draws_folder}"
    done = extract(world, "--seeds", "0", "1", "--limit", "30", backbone=backbone)
    assert done.returncode == 0, done.stderr
    flags = ("--backbone", backbone, "--method", "composed")
    words = [sys.executable, str(ROOT / "run_retrieval.py"), "--dataset", "shop_first30", *flags]
    done = subprocess.run(
        [*words, "--gpu", "-1"], cwd=world, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "mean of 2 draws: mAP +- " in done.stderr
    folder = world / "results/shop_first30/composed_compodiff_small"
    with open(folder / "mAP_table.csv", newline="") as file:
        [row] = csv.DictReader(file)
    assert "mean of 2 draws" in row["notes"]


# --- BGE-VL -------------------------------------------------------------------------------------


def test_bge_vl_adds_the_features_of_transformers_clip(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    sides = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sides |= {"num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**sides, "eos_token_id": 49407, "bos_token_id": 49406},
        vision_config={**sides, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "bge")
    settings = json.loads((tmp_path / "bge/config.json").read_text())
    settings["auto_map"] = {"AutoModel": "modeling.Model"}
    (tmp_path / "bge/config.json").write_text(json.dumps(settings))
    (tmp_path / "bge/modeling.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')")
    encoder = load_composed(f"bge-vl:{tmp_path / 'bge'}", Options(), torch.device("cpu"), "fp32")
    pixels = torch.stack([encoder.preprocess(image) for image in drawn.draw_images()])
    query = encoder.encode_queries(pixels, drawn.TEXTS, range(3))
    tokens = encoder.composer.tokenizer(list(drawn.TEXTS))
    with torch.inference_mode():
        image = model.get_image_features(pixel_values=pixels)
        text = model.get_text_features(input_ids=tokens)
        image, text = (getattr(part, "pooler_output", part) for part in (image, text))
    assert torch.allclose(query, functional.normalize(image + text, dim=-1), atol=1e-5)
    gallery = encoder.encode_images(pixels)
    assert torch.allclose(gallery, functional.normalize(image, dim=-1), atol=1e-5)
    assert not (tmp_path / "trace").exists()
    assert isinstance(encoder.composer.network, nn.Module)
    assert replace(encoder, precision="bf16").encode_images(pixels).dtype == torch.float32
