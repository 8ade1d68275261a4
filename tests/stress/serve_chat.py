"""create_captions.py against transformers' own server with a tiny random chat model.

    pip install "transformers[serving]" accelerate
    python3 tests/stress/serve_chat.py

By hand: the server needs packages that the toolkit does not. It shows that requests are understood
by a server of other authors; what a random model answers is of no use, and every query falls back.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from extraction_world import make_rows, make_world  # noqa: E402

TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
PATIENCE = 180  # seconds for the server to come up


def save_chat_model(folder: Path) -> None:
    """A Llama of random weights over bytes, with a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url: str, server: subprocess.Popen) -> None:
    """Wait until the server answers at all."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            if server.poll() is not None:
                raise SystemExit("the server ended; is transformers[serving] there?") from None
            time.sleep(0.5)
    raise SystemExit(f"no answer of {url} within {PATIENCE} s")


def write_captions(out: Path) -> None:
    out.mkdir(parents=True)
    images = dict.fromkeys(row[0] for row in make_rows()["query"])
    lines = [json.dumps({"image": image, "captions": [f"a mug {image}"]}) for image in images]
    (out / "images.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def rewrite(folder: Path, model: Path, port: int, style: str) -> list[dict]:
    out = folder / style
    write_captions(out)
    command = [sys.executable, str(TESTS.parent / "create_captions.py"), "--out", str(out)]
    command += ["--dataset", str(folder / "data" / "shop"), "--style", style, "--max_tokens", "8"]
    command += ["--llm", str(model), "--llm_url", f"http://127.0.0.1:{port}/v1"]
    subprocess.run(command, check=True)
    lines = (out / "rewritten.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def main() -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder, model = make_world(Path(name) / "world"), Path(name) / "model"
        save_chat_model(model)
        port = free_port()
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
        command += [str(model), "--host", "127.0.0.1", "--port", str(port)]
        server = subprocess.Popen(command, env=environment)
        try:
            wait_for(f"http://127.0.0.1:{port}/v1/models", server)
            for style in ("cirevl", "cvsi"):
                entries = rewrite(folder, model, port, style)
                print(style, entries[0])
                assert len(entries) == len(make_rows()["query"])
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
