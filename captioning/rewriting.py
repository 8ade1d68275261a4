"""Captions and instructions through a language model: rewritten captions, and what is added.

Two styles, as CIReVL (ICLR 2024, section 3) and CVSI ask and as they read what comes back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from captioning.chat import Answer, Chat, Question
from captioning.files import refuse_change, write_lines, write_manifest
from captioning.journal import Journal
from utils import UserError, read_bytes, sha256_file
from utils_captions import IMAGES, REWRITTEN, instructions, read_image_captions

if TYPE_CHECKING:
    from utils_task import Task

PROMPTS = Path(__file__).parent / "prompts"
STOP = ("\n\n", "<|endoftext|>")  # as both programs stop an answer
MARK = "Edited Description:"
MANIFEST = "rewritten.json"
ANSWERS = "answers.jsonl"  # all there have been, by their questions
ANSWER_FORM = dict.fromkeys(("key", "text", "problem"), str)
FIRST_ASKED = 3  # questions that a server may refuse before --overwrite gives up


@dataclass(frozen=True)
class Subject:
    """What is asked about: a query by its key, the captions of its image, and its text."""

    key: str
    captions: tuple[str, ...]
    text: str


# ---------------------------------------------------------------------------------------------
# Styles: how a question is put, and how its answer is read
# ---------------------------------------------------------------------------------------------


def find_edited_line(answer: str) -> str:
    """The text between the first and the second colon of the first line "Edited Description:".

    "" if there is no such line, or nothing in it.
    """
    lines = (line.strip() for line in answer.split("\n"))
    line = next((line for line in lines if line.startswith(MARK)), MARK)
    return line.split(":")[1].strip()


@dataclass(frozen=True)
class Style:
    """One program's way with a subject.

    one: only the first caption is told, else all, joined by commas. ends: behind the prompt.
    read: the caption in an answer, "" if there is none. fallback: the captions in its place.
    adds: what is added is asked for too.
    """

    one: bool
    ends: str
    read: Callable[[str], str]
    fallback: Callable[[Subject], tuple[str, ...]]
    adds: bool

    def put(self, prompt: str, subject: Subject, ends: str) -> str:
        """The question about a subject."""
        told = subject.captions[0] if self.one else ", ".join(subject.captions)
        return f"{prompt}\nImage Content: {told}\nInstruction: {subject.text}{ends}"


STYLES = {
    # Unusable answer: the instruction alone is searched.
    "cirevl": Style(True, "", find_edited_line, lambda subject: (subject.text,), adds=False),
    # The answer as it is; unusable: the captions as they were.
    "cvsi": Style(False, f"\n{MARK}", str.strip, lambda subject: subject.captions, adds=True),
}
ADDED_ENDS = "\nObjects most likely added:"


# ---------------------------------------------------------------------------------------------
# All subjects, each question once
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asking:
    """How subjects are asked about. prompt, added_prompt: what stands before each question."""

    style: Style
    prompt: str
    added_prompt: str
    max_tokens: int
    stop: bool = True

    def questions(self, subject: Subject) -> list[Question]:
        """The questions about a subject: the caption, and what is added where the style asks."""
        texts = [self.style.put(self.prompt, subject, self.style.ends)]
        if self.style.adds:
            texts.append(self.style.put(self.added_prompt, subject, ADDED_ENDS))
        stop = STOP if self.stop else ()
        return [Question(text, self.max_tokens, stop) for text in texts]

    def entry(self, subject: Subject, answers: Sequence[Answer]) -> dict:
        """The line of a subject in rewritten.jsonl; "problem" says why an answer was no use."""
        read = self.style.read(answers[0].text)
        captions = [read] if read else list(self.style.fallback(subject))
        entry: dict = {"query": subject.key, "captions": captions}
        reasons = [answer.problem for answer in answers if answer.problem]
        if not read and not answers[0].problem:
            reasons.append(f"no line {MARK!r} with a text")
        if self.style.adds:
            entry["added"] = answers[1].text.strip()
        return entry | ({"problem": "; ".join(reasons)} if reasons else {})


def question_key(model: str, question: Question) -> str:
    """What an answer is remembered by: SHA-256 of the model and all of the question."""
    content = json.dumps([model, asdict(question)], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "replace")).hexdigest()


def rewrite(
    subjects: Sequence[Subject],
    asking: Asking,
    chat: Chat,
    journal: Journal,
    parallel: int,
    progress: Callable[[int], None],
) -> list[dict]:
    """The lines of rewritten.jsonl, one a subject.

    Answers in the journal are not asked for again; new ones are added to it as they come. progress
    is told how many distinct questions are settled. Raises UserError as Chat.ask, all answers kept.
    """
    answers = {entry["key"]: Answer(entry["text"], entry["problem"]) for entry in journal.entries}
    asked = [[question_key(chat.model, q) for q in asking.questions(s)] for s in subjects]
    wanted: dict[str, tuple[Subject, int]] = {}
    for subject, keys in zip(subjects, asked, strict=True):
        for number, key in enumerate(keys):
            if key not in answers:
                wanted.setdefault(key, (subject, number))
    progress(len({key for keys in asked for key in keys}) - len(wanted))

    def ask(key: str) -> None:
        subject, number = wanted[key]
        answer = chat.ask(asking.questions(subject)[number])
        journal.append([_answer_entry(key, answer)])
        answers[key] = answer
        progress(1)

    with chat:
        _in_threads(ask, wanted, parallel)
    return [
        asking.entry(subject, [answers[key] for key in keys])
        for subject, keys in zip(subjects, asked, strict=True)
    ]


def _answer_entry(key: str, answer: Answer) -> dict:
    return {"key": key, "text": answer.text, "problem": answer.problem}


def start_afresh(subjects: Sequence[Subject], asking: Asking, chat: Chat, out: Path) -> None:
    """Remove what is there once the server has given an answer, which is kept.

    Raises UserError as Chat.ask, and if it refuses the first questions, with nothing removed.
    """
    entries = []
    every = dict.fromkeys(q for subject in subjects for q in asking.questions(subject))
    for question in islice(every, FIRST_ASKED):
        answer = chat.ask(question)
        entries.append(_answer_entry(question_key(chat.model, question), answer))
        if answer.text:
            break
    else:
        raise UserError(
            f"--llm_url {chat.url} has no answer to the first {len(entries)} questions "
            f"({answer.problem}); what is there is kept: remove {out / ANSWERS} to go on"
        )
    for name in (REWRITTEN, MANIFEST, ANSWERS):
        (out / name).unlink(missing_ok=True)
    with Journal(out / ANSWERS, ANSWER_FORM) as journal:
        journal.append(entries)


def _in_threads(work: Callable[[str], None], items: Iterable[str], parallel: int) -> None:
    """Do work for every item, so many at once; the first error ends it."""
    waiting, running = iter(items), set()
    pool = ThreadPoolExecutor(parallel)
    try:
        while True:
            running |= {
                pool.submit(work, item) for item in islice(waiting, parallel - len(running))
            }
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# ---------------------------------------------------------------------------------------------
# A task's captions
# ---------------------------------------------------------------------------------------------


def rewrite_task(
    task: Task, out: Path, asking: Asking, chat: Chat, style: str, parallel: int, overwrite: bool
) -> str:
    """Write rewritten.jsonl and rewritten.json below out; returns a line on what was made.

    Answers are kept in answers.jsonl by their questions. overwrite: see start_afresh. Raises
    UserError without images.jsonl, if rewritten captions are there that were made in another way
    and overwrite is not set, and as Chat.ask.
    """
    path, manifest = out / REWRITTEN, out / MANIFEST
    subjects = read_subjects(task, out / IMAGES)
    if overwrite:
        start_afresh(subjects, asking, chat, out)
    identity = {
        "llm": chat.model,
        "style": style,
        "prompt": asking.prompt,
        "added_prompt": asking.added_prompt if asking.style.adds else None,
        "max_tokens": asking.max_tokens,
        "stop": asking.stop,
        IMAGES: sha256_file(out / IMAGES),
    }
    refuse_change(manifest, identity)
    total = len({question for subject in subjects for question in asking.questions(subject)})
    with (
        Journal(out / ANSWERS, ANSWER_FORM) as journal,
        tqdm(total=total, desc="rewriting", unit="question", disable=None) as bar,
    ):
        entries = rewrite(subjects, asking, chat, journal, parallel, bar.update)
    write_lines(path, entries)
    problems = [entry["query"] for entry in entries if "problem" in entry]
    facts = {"llm_url": chat.url, "queries": len(entries), "problems": problems, "task": task.name}
    write_manifest(manifest, identity, facts)
    made = f"{len(entries)} queries rewritten: {path}"
    return f"{made}\n{describe_problems(entries)}" if problems else made


def read_subjects(task: Task, path: Path) -> list[Subject]:
    """What is asked about: each query with the captions of its images. Raises UserError without."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: describe the images first, with --captioner")
    captions = read_image_captions(path)
    subjects = []
    rows = zip(task.queries.key, task.queries.pictures(), instructions(task), strict=True)
    for key, pictures, text in rows:
        missing = [picture for picture in pictures if picture not in captions]
        if missing:
            raise UserError(
                f"{path} has no captions of {missing[0][0]!r}, the image of query {key!r}; "
                "complete it with --captioner"
            )
        own = tuple(caption for picture in pictures for caption in captions[picture])
        subjects.append(Subject(key, own, text))
    return subjects


def read_prompt(path: Path | None, default: str) -> str:
    """The text of a prompt file, or our own of that name. Raises UserError if it is no text."""
    path = path or PROMPTS / f"{default}.txt"
    try:
        text = read_bytes(path).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a text in UTF-8 ({error})") from None
    if not text:
        raise UserError(f"{path} is empty: a prompt is expected")
    return text


def describe_problems(entries: Sequence[Mapping]) -> str:
    """A sentence on the answers that were of no use or cut."""
    bad = [entry for entry in entries if "problem" in entry]
    return (
        f"{len(bad)} of {len(entries)} queries have an answer that was cut or of no use, the first "
        f"{bad[0]['query']!r}: {bad[0]['problem']}; where it was of no use, what the method falls "
        "back on stands in its place"
    )
