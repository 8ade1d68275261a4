"""create_captions.py: images to captions, these to rewritten ones; real models, real servers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree, rmtree

import pytest
import torch
from captioners import save_blip, save_blip2, save_encoder_decoder, save_llava, save_qwen2_vl
from chat_server import ChatServer, reply, serving
from conftest import ROOT
from extraction_world import draw_image, environment, make_rows, make_world

import create_captions
from captioning.captioner import CHAT_PROMPT, Sampling, load_captioner
from captioning.chat import Answer, Chat, Pace, Question, check_url
from captioning.journal import Journal
from captioning.rewriting import STYLES, Subject, find_edited_line
from utils import UserError
from utils_captions import read_image_captions

ROWS = make_rows()
QUERY_IMAGES = list(dict.fromkeys(row[0] for row in ROWS["query"]))
GALLERY_IMAGES = list(dict.fromkeys(row[0] for row in ROWS["database"]))
SECRET = "sk-a-very-secret-key"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> Path:
    return save_blip(tmp_path_factory.mktemp("blip"))


def create(world: Path, out: Path, *flags: str) -> None:
    shop = str(world / "data" / "shop")
    create_captions.main(["--dataset", shop, "--out", str(out), *flags])


def describe(world: Path, out: Path, blip: Path, *flags: str) -> None:
    fixed = ("--captioner", str(blip), "--gpu", "-1", "--workers", "0", "--max_new_tokens", "6")
    create(world, out, *fixed, *flags)


def write_captions(out: Path) -> list[str]:
    """Captions of the query images, written by hand; returns them."""
    out.mkdir(parents=True, exist_ok=True)
    captions = [f"a mug number {number}" for number in range(len(QUERY_IMAGES))]
    lines = zip(QUERY_IMAGES, captions, strict=True)
    entries = [{"image": image, "captions": [c, f"{c}, again"]} for image, c in lines]
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (out / "images.jsonl").write_text(text, encoding="utf-8")
    return captions


def rewrite(world: Path, out: Path, server: ChatServer, *flags: str) -> list[dict]:
    fixed = ("--llm", "m", "--llm_url", server.url, "--first_wait", "0.01", "--attempts", "4")
    create(world, out, *fixed, *flags)
    return read_lines(out / "rewritten.jsonl")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------------------
# Images -> captions
# ---------------------------------------------------------------------------------------------


def plain(count: int, prompt: str | None = None, **changes) -> Sampling:
    usual = {"sample": False, "top_p": 0.9, "temperature": 1.0, "beams": count}
    usual |= {"min_tokens": 1, "max_tokens": 6, "seed": 0}
    return Sampling(count, prompt=prompt, **{**usual, **changes})


@pytest.mark.parametrize(
    "save", [save_blip, save_encoder_decoder, save_blip2, save_llava, save_qwen2_vl]
)
def test_models_of_every_family_describe_images(tmp_path, save):
    captioner = load_captioner(str(save(tmp_path)), torch.device("cpu"), "fp32")
    images = [draw_image(seed) for seed in range(5)]
    captions = captioner.caption(images, plain(2), 0)
    assert [len(own) for own in captions] == [2] * 5
    assert all(isinstance(text, str) for own in captions for text in own)
    alone = [captioner.caption([image], plain(2), 0)[0] for image in images]
    assert captions == alone
    drawn = [captioner.caption(images, plain(3, sample=True, beams=1), n) for n in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_captioner_says_other_things_of_other_images_and_prompts(blip):
    captioner = load_captioner(str(blip), torch.device("cpu"), "fp32")
    images = [draw_image(seed) for seed in range(5)]
    said = captioner.caption(images, plain(1), 0)
    assert len(set(said)) > 1
    told = captioner.caption(images, plain(1, prompt="a red"), 0)
    assert told != said
    assert not any(text.startswith("a red") for (text,) in told)


def test_a_model_without_prompts_refuses_one(tmp_path):
    model = save_encoder_decoder(tmp_path)
    captioner = load_captioner(str(model), torch.device("cpu"), "fp32")
    with pytest.raises(UserError, match=r"--captioner_prompt: this captioner takes images alone"):
        captioner.caption([draw_image(1)], plain(1, prompt="a"), 0)


def test_a_model_that_chats_is_told_what_to_do_and_only_its_answer_is_kept(tmp_path):
    captioner = load_captioner(str(save_llava(tmp_path)), torch.device("cpu"), "fp32")
    images = [draw_image(seed) for seed in range(5)]
    said = captioner.caption(images, plain(1), 0)
    assert said == captioner.caption(images, plain(1, prompt=CHAT_PROMPT), 0)
    told = captioner.caption(images, plain(1, prompt="a red mug"), 0)
    assert len({*said, *told}) > 2
    assert not any("user" in text[:5] or "<image>" in text for (text,) in told)


def test_a_model_that_cannot_do_as_it_is_asked_says_why(world, tmp_path):
    model = save_llava(tmp_path / "llava", template=None)
    with pytest.raises(UserError, match=r"cannot describe images .* in --captioner_prompt$"):
        describe(world, tmp_path, model)
    with pytest.raises(UserError, match=r"cannot describe images .*tokens.* in --captioner_prompt"):
        describe(world, tmp_path, model, "--captioner_prompt", "a red mug")
    assert not (tmp_path / "images.jsonl").exists()
    captioner = load_captioner(str(model), torch.device("cpu"), "fp32")
    assert captioner.caption([draw_image(1)], plain(1, prompt="user : <image> a assistant :"), 0)


def test_queries_are_described_and_the_gallery_follows(world, blip, tmp_path, capsys):
    describe(world, tmp_path, blip, "--batch", "3")
    assert "5 images described" in capsys.readouterr().out
    first = read_image_captions(tmp_path / "images.jsonl")
    assert [path for path, _ in first] == QUERY_IMAGES
    describe(world, tmp_path, blip, "--batch", "3", "--gallery")
    both = read_image_captions(tmp_path / "images.jsonl")
    assert [path for path, _ in both] == [*QUERY_IMAGES, *GALLERY_IMAGES]
    assert {picture: both[picture] for picture in first} == first
    assert json.loads((tmp_path / "images.json").read_text())["images"] == 95
    assert not (tmp_path / "images.progress.jsonl").exists()


def test_other_settings_do_not_mix(world, blip, tmp_path):
    describe(world, tmp_path, blip)
    before = (tmp_path / "images.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"another sampling .*; name another --out, or replace"):
        describe(world, tmp_path, blip, "--sample", "--captions_per_image", "3")
    assert (tmp_path / "images.jsonl").read_bytes() == before
    describe(world, tmp_path, blip, "--sample", "--captions_per_image", "3", "--overwrite")
    assert {len(own) for own in read_image_captions(tmp_path / "images.jsonl").values()} == {3}


def test_a_killed_run_continues_to_the_same_file(world, blip, tmp_path):
    flags = ("--gallery", "--sample", "--captions_per_image", "2", "--batch", "4")
    describe(world, tmp_path / "whole", blip, *flags)
    command = [sys.executable, str(ROOT / "create_captions.py"), "--dataset"]
    command += [str(world / "data" / "shop"), "--captioner", str(blip), "--gpu", "-1"]
    command += ["--max_new_tokens", "6", "--workers", "0", *flags]
    command += ["--out", str(tmp_path / "killed")]
    progress = tmp_path / "killed" / "images.progress.jsonl"
    process = subprocess.Popen(command, cwd=world, env=environment(), stderr=subprocess.PIPE)
    while process.poll() is None and not (progress.exists() and progress.stat().st_size > 400):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = len(progress.read_text().splitlines())
    assert 0 < done < 95
    with open(progress, "ab") as file:  # a line that was being written
        file.write(b'{"image": "query/q 1.jp')
    describe(world, tmp_path / "killed", blip, *flags)
    files = [(tmp_path / name / "images.jsonl").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]


def test_an_image_that_cannot_be_read_stops_or_is_left_out(world, blip, tmp_path, capsys):
    own = copytree(world, tmp_path / "world")
    (own / "data" / "shop" / QUERY_IMAGES[2]).write_bytes(b"no image")
    (own / "data" / "shop" / QUERY_IMAGES[3]).unlink()
    rmtree(own / "data" / "shop" / "webdataset")
    with pytest.raises(UserError, match=rf"{QUERY_IMAGES[2]}: not an image .* --on_bad_image skip"):
        describe(own, tmp_path / "out", blip, "--batch", "2")
    describe(own, tmp_path / "out", blip, "--batch", "2", "--on_bad_image", "skip")
    assert f"3 images described, 2 left out, the first {QUERY_IMAGES[2]}" in capsys.readouterr().out


def test_what_is_there_is_kept_where_it_cannot_be_replaced(world, tmp_path):
    """By a captioner that is none, by answers about images that nobody described."""
    write_captions(tmp_path)
    before = (tmp_path / "images.jsonl").read_bytes()
    with pytest.raises(UserError, match="could not be loaded"):
        describe(world, tmp_path, tmp_path / "absent", "--overwrite")
    assert (tmp_path / "images.jsonl").read_bytes() == before
    with serving(lambda question, number: reply("Edited Description: a")) as server:
        entries = rewrite(world, tmp_path, server)
        (tmp_path / "images.jsonl").unlink()
        with pytest.raises(UserError, match="describe the images first"):
            rewrite(world, tmp_path, server, "--overwrite")
    assert read_lines(tmp_path / "rewritten.jsonl") == entries
    assert (tmp_path / "answers.jsonl").stat().st_size


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (500, "fails after 4 attempts"),
        (404, "no such address"),
        (400, "has no answer to the first 3 questions .refused: .*; what is there is kept"),
    ],
)
def test_answers_are_kept_until_there_are_others(world, tmp_path, status, said):
    """Whatever the server does instead; one that answers is asked each question once."""
    write_captions(tmp_path)
    with serving(lambda question, number: reply("Edited Description: a")) as server:
        entries, count = rewrite(world, tmp_path, server), len(server.asked)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with (
        serving(lambda question, number: {"status": status, "body": "{}"}) as server,
        pytest.raises(UserError, match=said),
    ):
        rewrite(world, tmp_path, server, "--overwrite")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    refused = {"status": 400, "body": "{}"}
    with serving(lambda question, n: reply("Edited Description: b") if n else refused) as server:
        others = rewrite(world, tmp_path, server, "--overwrite")
    assert len(server.asked) == count
    assert {entry["captions"][0] for entry in entries} == {"a"}
    bad = [entry for entry in others if "problem" in entry]
    assert bad
    assert all(entry["captions"] == ["b"] for entry in others if entry not in bad)


def test_a_captioner_that_is_none_is_named(world, tmp_path):
    with pytest.raises(UserError, match=r"--captioner \S+ could not be loaded"):
        describe(world, tmp_path, tmp_path / "nothing")
    assert not (tmp_path / "images.jsonl").exists()


# ---------------------------------------------------------------------------------------------
# Captions -> rewritten captions
# ---------------------------------------------------------------------------------------------


def test_questions_and_answers_as_cirevl_has_them(world, tmp_path):
    captions = write_captions(tmp_path)

    def answer(question: str, number: int) -> dict:
        told = question.rsplit("Image Content: ", 1)[1]
        return reply(f"Sure.\nEdited Description: new {told.splitlines()[0]}: more\nbye")

    with serving(answer) as server:
        entries = rewrite(world, tmp_path, server)
    assert [entry["query"] for entry in entries] == [str(row) for row in range(1, 13)]
    of_row = [captions[QUERY_IMAGES.index(row[0])] for row in ROWS["query"]]
    assert [entry["captions"] for entry in entries] == [[f"new {caption}"] for caption in of_row]
    assert all(set(entry) == {"query", "captions"} for entry in entries)
    asked = server.asked[0]
    assert asked["path"] == "/v1/chat/completions"
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("m", 0.0, 700)
    assert asked["stop"] == ["\n\n", "<|endoftext|>"]
    texts = {row[1] for row in ROWS["query"]}
    contents = [question["messages"][0]["content"] for question in server.asked]
    assert {content.rsplit("Instruction: ", 1)[1] for content in contents} == texts


def test_questions_and_answers_as_cvsi_has_them(world, tmp_path):
    captions = write_captions(tmp_path)

    def answer(question: str, number: int) -> dict:
        added = question.endswith("\nObjects most likely added:")
        return reply(" a hat \n" if added else " Edited Description: whole\nanswer ")

    with serving(answer) as server:
        entries = rewrite(world, tmp_path, server, "--style", "cvsi")
    for entry in entries:
        assert entry["captions"] == ["Edited Description: whole\nanswer"]
        assert entry["added"] == "a hat"
    contents = {q["messages"][0]["content"].rsplit("Image Content: ", 1)[1] for q in server.asked}
    assert any(
        c.startswith(f"{captions[0]}, {captions[0]}, again\nInstruction: ") for c in contents
    )
    distinct = len({(row[0], row[1]) for row in ROWS["query"]})
    assert len(server.asked) == 2 * distinct


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ("Edited Description: a cat", "a cat"),
        ("First.\n  Edited Description: a cat: with a hat\nEdited Description: no", "a cat"),
        ("Edited Description:", ""),
        ("Edited description: a cat", ""),
        ("a cat", ""),
        ("", ""),
    ],
)
def test_the_edited_line_is_found_as_cirevl_finds_it(answer, line):
    assert find_edited_line(answer) == line


def test_unusable_answers_fall_back_and_are_counted(world, tmp_path, capsys):
    captions = write_captions(tmp_path)
    answers = {
        "text 0": reply("I cannot help with that."),
        'at "night", é1': reply(None),
        'at "night", é2': {"status": 400, "body": '{"error": "content filter"}'},
        'at "night", é3': reply("Edited Description: a cut", finish="length"),
    }

    def answer(question: str, number: int) -> dict:
        text = question.rsplit("Instruction: ", 1)[1].split("\n")[0]
        return answers.get(text, reply("Edited Description: good"))

    with serving(answer) as server:
        entries = rewrite(world, tmp_path, server)
    by_text = {row[1]: entry for row, entry in zip(ROWS["query"], entries, strict=True)}
    assert by_text["text 0"]["captions"] == ["text 0"]
    assert by_text['at "night", é1']["captions"] == ['at "night", é1']
    assert by_text['at "night", é2']["captions"] == ['at "night", é2']
    assert by_text['at "night", é3']["captions"] == ["a cut"]
    problems = [entry["query"] for entry in entries if "problem" in entry]
    out = capsys.readouterr().out
    assert f"{len(problems)} of 12 queries have an answer that was cut or of no use" in out
    assert "no line 'Edited Description:' with a text" in out
    assert json.loads((tmp_path / "rewritten.json").read_text())["problems"] == problems
    assert "cut at 700 tokens" in by_text['at "night", é3']["problem"]
    with serving(answer) as server:
        entries = rewrite(world, tmp_path, server, "--style", "cvsi", "--overwrite")
    refused = next(e for r, e in zip(ROWS["query"], entries, strict=True) if r[1].endswith("é2"))
    number = QUERY_IMAGES.index(ROWS["query"][int(refused["query"]) - 1][0])
    assert refused["captions"] == [captions[number], f"{captions[number]}, again"]
    assert refused["added"] == ""


BAD = {
    "429": {"status": 429, "body": "{}"},
    "429 with a wait": {"status": 429, "body": "{}", "headers": {"Retry-After": "0.02"}},
    "500": {"status": 500, "body": "oh no"},
    "503": {"status": 503, "body": "<html>busy</html>"},
    "garbage": {"status": 200, "body": "<html>not JSON"},
    "an empty body": {"status": 200, "body": ""},
    "JSON of another kind": {"status": 200, "body": '{"choices": []}'},
    "half an answer": {**reply("Edited Description: half"), "cut": 40},
    "nothing": {"status": None},
}


@pytest.mark.parametrize("bad", BAD)
def test_a_server_that_fails_is_asked_again(world, tmp_path, bad):
    write_captions(tmp_path)
    failed: set[str] = set()

    def answer(question: str, number: int) -> dict:
        if question in failed:
            return reply("Edited Description: at last")
        failed.add(question)
        return BAD[bad]

    with serving(answer) as server:
        entries = rewrite(world, tmp_path, server)
    assert all(entry["captions"] == ["at last"] for entry in entries)
    assert len(server.asked) == 2 * len(failed)


ASKED = Question("a question", 9, ())


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The seconds that are waited for, in order; nobody waits."""
    found = []
    monkeypatch.setattr(Pace, "sleep", lambda pace, seconds: seconds > 0 and found.append(seconds))
    return found


def ask_failing(answer: dict, attempts: int, first_wait: float = 1.0) -> Pace:
    """Ask a server that always fails so; its pace afterwards."""
    with serving(lambda question, number: answer) as server:
        chat = Chat("m", server.url, None, Pace(None), attempts=attempts, first_wait=first_wait)
        with pytest.raises(UserError, match=f"fails after {attempts} attempts"):
            chat.ask(ASKED)
        assert len(server.asked) == attempts
    return chat.pace


def test_waits_double_up_to_a_minute(waits):
    ask_failing(BAD["500"], 9, first_wait=0.75)
    assert len(waits) == 8  # none behind the last attempt
    for wait, longest in zip(waits, [0.75, 1.5, 3, 6, 12, 24, 48, 60], strict=True):
        assert 0.5 * longest <= wait <= longest
    assert len({wait / longest for wait, longest in zip(waits, [0.75, 1.5, 3], strict=False)}) == 3


@pytest.mark.parametrize(
    ("asked", "low", "high"), [("7", 5, 7), ("2.5", 1, 2.5), ("99999", 58, 60), ("soon", 0.5, 1)]
)
def test_what_a_server_asks_for_is_waited_for(waits, asked, low, high):
    """By everybody: whoever asks next waits too, and nobody longer than a minute."""
    pace = ask_failing({**BAD["429"], "headers": {"Retry-After": asked}}, 2)
    assert len(waits) == 1
    assert low < waits[0] <= high
    pace.wait()
    assert len(waits) == (1 if asked == "soon" else 2)


def test_who_waits_is_woken_where_all_is_stopped():
    failing = {**BAD["429"], "headers": {"Retry-After": "60"}}
    asked = threading.Event()

    def answer(question: str, number: int) -> dict:
        asked.set()
        return failing

    with (
        serving(answer) as server,
        Chat("m", server.url, None, Pace(None)) as chat,
        ThreadPoolExecutor(1) as thread,
    ):
        waiting = thread.submit(chat.ask, ASKED)
        assert asked.wait(20)
        chat.pace.stop()
        with pytest.raises(UserError, match="stopped"):
            waiting.result(20)
    assert len(server.asked) == 1


def test_a_dead_server_is_named_and_what_it_answered_is_kept(world, tmp_path):
    write_captions(tmp_path)

    def failing(question: str, number: int) -> dict:
        return reply("Edited Description: early") if number < 3 else {"status": 500, "body": ""}

    with (
        serving(failing) as server,
        pytest.raises(UserError, match=r"--llm_url http://\S+ fails after 4 attempts \(.*500"),
    ):
        rewrite(world, tmp_path, server, "--parallel", "1")
    assert len(read_lines(tmp_path / "answers.jsonl")) == 3
    assert not (tmp_path / "rewritten.jsonl").exists()
    with pytest.raises(UserError, match=r"fails after 4 attempts"):
        rewrite(world, tmp_path, server)  # it is gone altogether
    with serving(lambda question, number: reply("Edited Description: late")) as server:
        entries = rewrite(world, tmp_path, server)
    said = [entry["captions"][0] for entry in entries]
    assert set(said) == {"early", "late"}
    asked = {question["messages"][0]["content"] for question in server.asked}
    distinct = len({(row[0], row[1]) for row in ROWS["query"]})
    assert len(server.asked) == len(asked) == distinct - 3


@pytest.mark.parametrize(("status", "cause"), [(401, "the key is refused"), (404, "no such")])
def test_a_hopeless_server_is_not_asked_again(world, tmp_path, status, cause):
    write_captions(tmp_path)
    with (
        serving(lambda question, number: {"status": status, "body": "{}"}) as server,
        pytest.raises(UserError, match=cause),
    ):
        rewrite(world, tmp_path, server, "--parallel", "1")
    assert len(server.asked) == 1


def test_answers_are_asked_for_once(world, tmp_path):
    write_captions(tmp_path)
    with serving(lambda question, number: reply("Edited Description: a")) as server:
        entries = rewrite(world, tmp_path, server)
        count = len(server.asked)
        assert rewrite(world, tmp_path, server) == entries
        assert len(server.asked) == count
        with pytest.raises(UserError, match=r"another max_tokens \(700, now 9\)"):
            rewrite(world, tmp_path, server, "--max_tokens", "9")
        rewrite(world, tmp_path, server, "--max_tokens", "9", "--overwrite")
    assert len(server.asked) == 2 * count


def test_the_key_is_sent_and_written_nowhere(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_hub")
    write_captions(tmp_path)

    def answer(question: str, number: int) -> dict:
        if number == 0:
            return {"status": 400, "body": json.dumps({"error": f"bad key {SECRET}"})}
        return reply("Edited Description: a")

    with serving(answer) as server:
        rewrite(world, tmp_path, server, "--llm_key_env", "MY_KEY")
        assert {question["key"] for question in server.asked} == {f"Bearer {SECRET}"}
        rewrite(world, tmp_path, server, "--overwrite", "--llm_key_env", "NO_SUCH_KEY")
        assert server.asked[-1]["key"] == "Bearer no-key"  # not the Hub's token
    written = [path.read_text() for path in tmp_path.iterdir()]
    output = capsys.readouterr()
    for text in (*written, output.out, output.err):
        assert SECRET not in text
        assert "hf_of_the_hub" not in text


def test_requests_are_spaced(world, tmp_path):
    write_captions(tmp_path)
    start = time.monotonic()
    with serving(lambda question, number: reply("Edited Description: a")) as server:
        rewrite(world, tmp_path, server, "--requests_per_minute", "1200", "--parallel", "8")
    assert time.monotonic() - start > 0.05 * (len(server.asked) - 1)


def test_a_wait_asked_for_is_kept_by_all():
    pace = Pace(None)
    pace.hold(0.1)
    start = time.monotonic()
    pace.wait()
    assert 0.08 < time.monotonic() - start < 5


def test_a_killed_rewriting_continues_to_the_same_file(world, tmp_path):
    def answer(question: str, number: int) -> dict:
        time.sleep(0.05)
        return reply(f"Edited Description: {len(question)} {question[-20:]!r}")

    for name in ("whole", "killed"):
        write_captions(tmp_path / name)
    with serving(answer) as server:
        rewrite(world, tmp_path / "whole", server)
        command = [sys.executable, str(ROOT / "create_captions.py"), "--dataset"]
        command += [str(world / "data" / "shop"), "--out", str(tmp_path / "killed"), "--llm", "m"]
        command += ["--llm_url", server.url, "--parallel", "1"]
        answers = tmp_path / "killed" / "answers.jsonl"
        process = subprocess.Popen(command, cwd=world, env=environment(), stderr=subprocess.PIPE)
        while process.poll() is None and not (answers.exists() and answers.stat().st_size):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        done = len(answers.read_text().splitlines())
        before = len(server.asked)
        rewrite(world, tmp_path / "killed", server, "--parallel", "3")
        distinct = len({(row[0], row[1]) for row in ROWS["query"]})
        assert 0 < done < distinct
        assert len(server.asked) - before == distinct - done
    whole, continued = (
        (tmp_path / name / "rewritten.jsonl").read_bytes() for name in ("whole", "killed")
    )
    assert continued == whole


def test_prompts_of_ones_own(world, tmp_path):
    write_captions(tmp_path)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Mach es neu.\n", encoding="utf-8")
    with serving(lambda question, number: reply("Edited Description: a")) as server:
        rewrite(world, tmp_path, server, "--prompt", str(prompt), "--no-stop")
    assert server.asked[0]["messages"][0]["content"].startswith("Mach es neu.\nImage Content: ")
    assert "stop" not in server.asked[0]
    for content in (b"", b"\xff"):
        prompt.write_bytes(content)
        with pytest.raises(UserError, match=r"prompt\.txt (is empty|cannot be read)"):
            rewrite(world, tmp_path, server, "--prompt", str(prompt))


def test_images_without_captions_are_named(world, tmp_path):
    with serving(lambda question, number: reply("a")) as server:
        with pytest.raises(UserError, match=r"images\.jsonl does not exist: describe the images"):
            rewrite(world, tmp_path, server)
        write_captions(tmp_path)
        lines = (tmp_path / "images.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "images.jsonl").write_text("".join(lines[:-1]))
        with pytest.raises(UserError, match=rf"no captions of '{QUERY_IMAGES[-1]}', the image of"):
            rewrite(world, tmp_path, server)
    assert server.asked == []


# ---------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------


def test_a_journal_drops_the_line_that_was_cut(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append([{"a": "é\n"}, {"b": 2}])
    path.write_bytes(path.read_bytes() + b'{"c": ')
    with Journal(path) as journal:
        assert journal.entries == [{"a": "é\n"}, {"b": 2}]
        journal.append([{"d": 4}])
    with Journal(path) as journal:
        assert journal.entries == [{"a": "é\n"}, {"b": 2}, {"d": 4}]
    path.write_bytes(b'{"a": \n{"b": 2}\n')
    with pytest.raises(UserError, match=r"journal\.jsonl, line 1 is damaged"):
        Journal(path)


def test_a_subject_is_put_as_each_style_puts_it():
    subject = Subject("7", ("a cat", "the cat"), "with a hat")
    told = {name: style.put("P", subject, style.ends) for name, style in STYLES.items()}
    assert told["cirevl"] == "P\nImage Content: a cat\nInstruction: with a hat"
    joined = "P\nImage Content: a cat, the cat\nInstruction: with a hat\nEdited Description:"
    assert told["cvsi"] == joined


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "give an address such as"),
        ("ftp://host/v1", "give an address such as"),
        (f"http://user:{SECRET}@host/v1", "leave keys out of the address"),
        (f"http://host/v1?key={SECRET}", "leave keys out of the address"),
    ],
)
def test_an_address_that_is_none_or_holds_a_key_is_refused(url, message):
    with pytest.raises(UserError, match=message) as caught:
        check_url(url)
    assert SECRET not in str(caught.value)


def test_an_answer_of_half_a_surrogate_pair_is_text():
    body = reply("Edited Description: a \\ud83d cat")["body"].replace("\\\\ud83d", "\\ud83d")
    with serving(lambda question, number: {"status": 200, "body": body}) as server:
        chat = Chat("m", server.url, None, Pace(None))
        answer = chat.ask(Question("q", 5, ()))
    assert answer == Answer("Edited Description: a ? cat")


CAPTIONER = ("--dataset", "x", "--captioner", "m")
LLM = ("--dataset", "x", "--llm", "m")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--dataset is missing"),
        (("--dataset", "x"), "give --captioner MODEL, or --llm MODEL"),
        (("--dataset", "x", "--llm", "m"), "--llm needs --llm_url"),
        ((*LLM, "--gallery"), "--gallery has no effect without --captioner"),
        ((*CAPTIONER, "--style", "cvsi"), "--style has no effect without --llm"),
        ((*CAPTIONER, "--top_p", "0.5"), "--top_p has no effect without --sample"),
        ((*CAPTIONER, "--captions_per_image", "2"), "takes as many --num_beams"),
        ((*CAPTIONER, "--top_p", "1.5"), "not above 0 and at most 1"),
        (
            (*LLM, "--llm_url", "u", "--added_prompt", "f"),
            "--added_prompt has no effect without --style cvsi",
        ),
        (("--dataset", "nothing", "--captioner", "m"), "no data set 'nothing'"),
    ],
)
def test_a_wrong_command_line_is_one_line(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        create_captions.main(list(flags))
    assert list(tmp_path.iterdir()) == []


def test_help_loads_nothing_large():
    code = "import sys, create_captions\n"
    code += "try: create_captions.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'transformers', 'pandas', 'PIL'} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    assert run.stdout.endswith("\n[]\n")


def test_shards_are_described_as_folders_are(world, blip, tmp_path):
    own = copytree(world, tmp_path / "world") / "data" / "shop"
    for split in ("query", "database"):
        (own / f"{split}_files.csv").unlink()
        rmtree(own / split)
    describe(world, tmp_path / "folder", blip)
    describe(own.parent.parent, tmp_path / "shards", blip)
    files = [(tmp_path / name / "images.jsonl").read_bytes() for name in ("folder", "shards")]
    assert files[0] == files[1]
