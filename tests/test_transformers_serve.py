"""create_captions.py against `transformers serve`, a real server of OpenAI's protocol.

Skipped where transformers' serving extra is not there: pip install "transformers[serving]".
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from captioners import CHAT_WORDS, save_chat_model
from extraction_world import make_world
from test_create_captions import create, read_lines, write_captions

from captioning.chat import Chat, Pace, Question

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("fastapi", "uvicorn", "openai"))),
    reason="transformers[serving] is not installed",
)
TOKENS, STARTED_WITHIN = 8, 120


@pytest.fixture
def server(tmp_path):
    """The address of a server, and the folder of the tiny model it serves."""
    model = save_chat_model(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(tmp_path / "server.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, tmp_path / "server.log")
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + STARTED_WITHIN
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(log.read_text()[-2000:])


def say(model: Path, question: str) -> str:
    """What the model answers when it is asked directly."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    told = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        found = AutoModelForCausalLM.from_pretrained(model).generate(
            **told, do_sample=False, max_new_tokens=TOKENS
        )
    return tokenizer.decode(found[0, told["input_ids"].shape[1] :], skip_special_tokens=True)


def test_answers_are_those_of_the_model(server, tmp_path):
    url, model = server
    chat = Chat(str(model), url, None, Pace(None))
    for text in ("a red mug", "the dog 3", "a cat in 7"):
        answer = chat.ask(Question(text, TOKENS, ()))
        assert answer.text.split() == say(model, text).split()
    world, out = make_world(tmp_path / "world"), tmp_path / "captions"
    write_captions(out)
    flags = ("--llm", str(model), "--llm_url", url, "--style", "cvsi", "--no-stop")
    create(world, out, *flags, "--max_tokens", str(TOKENS))
    entries = read_lines(out / "rewritten.jsonl")
    assert [entry["query"] for entry in entries] == [str(row) for row in range(1, 13)]
    assert len({entry["captions"][0] for entry in entries}) > 1
    assert all(
        set(" ".join((*e["captions"], e["added"])).split()) <= {*CHAT_WORDS} for e in entries
    )
