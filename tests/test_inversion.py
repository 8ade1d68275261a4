"""Pseudo words: networks, their checkpoints and prompts, against plain torch modules."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from semantic_world import GOLDEN, needs_golden
from test_caption_files import golden_task, small_task
from torch import nn

from methods.inversion import INVERSIONS
from methods.words import IM2TEXT, PHI, Network, apply_network, read_network, texts_of
from utils import UserError

DIM, WIDTH = 6, 4


class Phi(nn.Module):
    """SEARLE's network, as its checkpoints name the layers."""

    def __init__(self, dim: int = DIM, width: int = WIDTH, hidden: int = 9):
        super().__init__()
        between = (nn.GELU(), nn.Dropout(0.5))
        first, second = nn.Linear(dim, hidden), nn.Linear(hidden, hidden)
        self.layers = nn.Sequential(first, *between, second, *between, nn.Linear(hidden, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Im2Text(nn.Module):
    """Pic2Word's network, as its checkpoints name the layers."""

    def __init__(self, dim: int = DIM, width: int = WIDTH, hidden: int = 5):
        super().__init__()
        sizes = ((dim, hidden), (hidden, hidden))
        blocks = [nn.Sequential(nn.Linear(*size), nn.Dropout(0.1), nn.ReLU()) for size in sizes]
        self.layers = nn.Sequential(*blocks)
        self.fc_out = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc_out(self.layers(x))


PLAIN = {"Phi": (PHI, Phi), "state_dict_img2text": (IM2TEXT, Im2Text)}


@pytest.fixture(params=PLAIN)
def plain(request) -> tuple[Network, nn.Module]:
    torch.manual_seed(4)
    network, module = PLAIN[request.param]
    return network, module().eval()


def save(path: Path, network: Network, module: nn.Module, **more) -> Path:
    torch.save({network.key: module.state_dict(), **more}, path)
    return path


# ---------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------


def test_a_network_is_its_plain_module(plain, tmp_path):
    network, module = plain
    path = save(tmp_path / "a.pt", network, module, epoch=3, state_dict={"x": torch.ones(2)})
    weights = read_network(path, network, DIM, WIDTH)
    features = torch.randn(7, DIM) * 3
    with torch.no_grad():
        assert torch.equal(apply_network(network, weights, features), module(features))


@pytest.mark.parametrize("legacy", [False, True])
def test_other_forms_of_checkpoints_are_read(plain, tmp_path, legacy):
    network, module = plain
    state = {f"module.{name}": tensor.half() for name, tensor in module.state_dict().items()}
    path = tmp_path / "a.pt"
    torch.save({network.key: state}, path, _use_new_zipfile_serialization=not legacy)
    weights = read_network(path, network, DIM, WIDTH)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    features = torch.randn(7, DIM)
    with torch.no_grad():
        found = apply_network(network, weights, features)
        assert torch.allclose(found, module.half().float()(features), atol=1e-6)


class Hostile:
    def __reduce__(self):
        return (open, ("/tmp/never-made-either", "w"))


def test_a_checkpoint_that_holds_code_runs_nothing(plain, tmp_path):
    network, module = plain
    for number, content in enumerate(
        [
            {network.key: Hostile()},
            {network.key: module.state_dict(), "args": Hostile()},
            {network.key: module},
        ]
    ):
        path = tmp_path / f"{number}.pt"
        torch.save(content, path)
        with pytest.raises(UserError, match=r"is refused: only tensors are read") as caught:
            read_network(path, network, DIM, WIDTH)
        assert "weights_only" not in str(caught.value)  # to set it would run what is in there
    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match=r"is refused: .*\(Unsupported operand"):
        read_network(path, network, DIM, WIDTH)
    assert not Path("/tmp/never-made-either").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"--phi \S+a\.pt is refused") as caught:
        read_network(tmp_path / "a.pt", PHI, DIM, WIDTH)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"--phi \S+b\.pt does not exist"):
        read_network(tmp_path / "b.pt", PHI, DIM, WIDTH)


def changed(change) -> dict:
    state = dict(Phi().state_dict())
    change(state)
    return {"Phi": state}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"state_dict_img2text": Im2Text().state_dict()},
            "has no 'Phi' .it holds state_dict_",
        ),
        ({"Phi": 3}, "has no 'Phi'"),
        ([1], "has no 'Phi'"),
        (changed(lambda s: s.pop("layers.6.bias")), "'Phi' lacks 'layers.6.bias'"),
        (changed(lambda s: s.update(a=torch.ones(1))), "'Phi' has 'a' beside its layers"),
        (
            changed(lambda s: s.update({"layers.0.bias": 3})),
            "'layers.0.bias' is no tensor",
        ),
        (
            changed(lambda s: s.update({"layers.0.bias": torch.ones(9, dtype=torch.long)})),
            "'layers.0.bias' is no tensor of floating",
        ),
        (
            changed(lambda s: s["layers.3.weight"].fill_(float("nan"))),
            "that are not finite",
        ),
        (
            changed(lambda s: s.update({"layers.0.bias": torch.ones(9, device="meta")})),
            "'layers.0.bias' is sparse or without numbers",
        ),
        (
            changed(lambda s: s.update({"layers.0.bias": torch.ones(9).to_sparse()})),
            "'layers.0.bias' is sparse or without numbers",
        ),
        (
            changed(lambda s: s.update({"layers.0.bias": torch.ones(8).to(torch.float8_e5m2)})),
            "do not follow each other",
        ),
        (changed(lambda s: s.update({"layers.3.weight": torch.ones(9, 8)})), "do not follow each"),
        (changed(lambda s: s.update({"layers.3.bias": torch.ones(8)})), "do not follow each other"),
        ({"Phi": Phi(8).state_dict()}, "features of 8 dimensions .* but the backbone has 6 and 4"),
        ({"Phi": Phi(DIM, 5).state_dict()}, "words of 5, but the backbone has 6 and 4"),
    ],
)
def test_a_network_that_does_not_fit_is_one_line(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=message) as caught:
        read_network(tmp_path / "a.pt", PHI, DIM, WIDTH)
    assert "\n" not in str(caught.value)


@needs_golden
def test_one_network_in_two_forms():
    weights = [
        read_network(GOLDEN / "assets" / f"pic2word_{form}.pt", IM2TEXT, 128, 64)
        for form in ("module", "plain")
    ]
    features = torch.from_numpy(np.random.default_rng(1).normal(size=(5, 128)).astype(np.float32))
    words = [apply_network(IM2TEXT, own, features) for own in weights]
    assert torch.allclose(words[0], words[1], atol=5e-3)  # one of them is stored in half precision
    assert words[0].abs().max() > 0.1


# ---------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------

FASHION = {"first": ["is red.", "", "a? "], "second": [" is long, ", "b", "c"]}


def test_prompts_as_published():
    task = small_task("cirr")
    texts = {name: texts_of(inversion, task)[0] for name, inversion in INVERSIONS.items()}
    assert texts == {
        "pic2word": ("a photo of * , at night",),
        "searle": ("a photo of $ that at night",),
        "lincir": ("a photo of $ that at night",),
    }
    fashion = small_task("fashioniq", **FASHION)
    reversed_ = ("a photo of * ,  is long,  and is red.",)
    assert texts_of(INVERSIONS["pic2word"], fashion)[0] == reversed_
    both = ("a photo of $ that is red and is long", "a photo of $ that is long and is red")
    assert texts_of(INVERSIONS["searle"], fashion)[0] == both
    domains = small_task("domains")
    assert texts_of(INVERSIONS["pic2word"], domains)[2] == ("a in red of *",)


@needs_golden
@pytest.mark.parametrize("name", ["cirr", "cirr_test", "circo", "circo_test", "fashioniq"])
@pytest.mark.parametrize("row", ["searle", "pic2word.composed"])
def test_prompts_of_the_golden_worlds(name, row):
    task = golden_task(name)
    expected = []
    parts = [f"fashioniq_{c}" for c in ("dress", "shirt", "toptee")] if "fash" in name else [name]
    for part in parts:
        file = part if part.endswith("_test") else f"{part}_val"
        content = json.loads((GOLDEN / "expected" / f"{file}.json").read_text())
        if row not in content:
            pytest.skip("its program has no such data set")
        texts = [query["text"] for query in content[row]["queries"]]
        expected += [(text,) if isinstance(text, str) else tuple(text) for text in texts]
    assert texts_of(INVERSIONS[row.partition(".")[0]], task) == expected


def test_prompts_of_ones_own():
    task = small_task(concept=["dog", "cat", "cow"])
    found = texts_of(INVERSIONS["searle"], task, "{concept}: $ {{so}} {caption}")
    assert found[1] == ("cat: $ {so} with a hat",)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a photo of {caption}", r"the mark '\$', where the word goes, is missing"),
        ("a $ {concept}", r"\{concept\} is unknown; there are \{caption\}"),
        ("a $ {caption.__class__}", "is unknown"),
        ("a $ {caption!r}", r"write \{caption\} alone, as it takes no format"),
        ("a $ {caption:>9}", r"write \{caption\} alone"),
        ("a $ \udcff {caption}", "is not text in UTF-8"),
        ("a $ {}", "is unknown"),
        ("a $ {", "write {{ for a brace"),
    ],
)
def test_a_prompt_that_is_not_right_is_one_line(prompt, message):
    with pytest.raises(UserError, match=message) as caught:
        texts_of(INVERSIONS["searle"], small_task(), prompt)
    assert "\n" not in str(caught.value)
