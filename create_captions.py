#!/usr/bin/env python3
"""Describe images in words, and rewrite the words as queries ask: images -> captions/.

The usual runs:
    python3 create_captions.py --dataset circo --captioner Salesforce/blip2-flan-t5-xl
    python3 create_captions.py --dataset circo --llm MODEL --llm_url http://localhost:8000/v1
    python3 create_features.py --dataset circo --inputs cirevl --captions captions/circo

A run that was killed continues when the same command is given again.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from utils import (
    Parser,
    UserError,
    add_flag,
    positive,
    positive_share,
    require_writable,
    run_command,
    say,
)
from utils_backbones import PRECISIONS

if TYPE_CHECKING:
    from captioning.source import Reader
    from utils_task import Task

# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def flag(text: str, default: object = None, **options) -> tuple[object, dict]:
    """A flag's default, which its help says, and what argparse is told of it."""
    if isinstance(default, bool):
        options |= {"action": argparse.BooleanOptionalAction, "default": None}
        text += f" (default: {'on' if default else 'off'})"
    elif default is not None:
        text += f" (default: {f'{default:g}' if isinstance(default, (int, float)) else default})"
    return default, {"help": text, **options}


def above_zero(text: str) -> float:
    """A number above 0, for argparse."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


# What argparse is told of a number of things, of seconds, of a file.
COUNT = {"type": positive, "metavar": "N"}
SECONDS = {"type": above_zero, "metavar": "S"}
FILE = {"type": Path, "metavar": "FILE"}

# Title and flags of each group, by the flag without which the others of it have no effect.
GROUPS = {
    "": (
        "",
        {
            "dataset": flag("name or folder of the data set"),
            "data_dir": flag("data sets", Path("data"), type=Path, metavar="DIR"),
            "out": flag(
                "where captions go and are looked for (default: captions/DATASET)",
                type=Path,
                metavar="DIR",
            ),
            "overwrite": flag("start afresh: leave it to continue", False),
        },
    ),
    "captioner": (
        "images -> captions (images.jsonl)",
        {
            "captioner": flag("image-to-text model of transformers: a folder or a name"),
            "gallery": flag("describe the gallery's images too, as CVSI needs", False),
            "captioner_prompt": flag("what it is told (default: nothing)", metavar="TEXT"),
            "sample": flag("draw captions (nucleus sampling) instead of searching the best", False),
            "captions_per_image": flag("captions an image; CVSI has 15", 1, **COUNT),
            "top_p": flag("nucleus of the sampling", 0.9, type=positive_share, metavar="P"),
            "temperature": flag("of the sampling", 1.0, type=above_zero, metavar="T"),
            "num_beams": flag("beams", 1, **COUNT),
            "min_new_tokens": flag("fewest tokens of a caption", 1, **COUNT),
            "max_new_tokens": flag("most tokens of a caption", 50, **COUNT),
            "seed": flag("of the sampling", 0, type=int, metavar="N"),
            "batch": flag("images at once; sampled captions depend on it", 16, **COUNT),
            "workers": flag("processes that read images", 2, type=int, metavar="N"),
            "gpu": flag("CUDA device, -1 for the CPU", 0, type=int, metavar="N"),
            "precision": flag("arithmetic", "fp32", choices=tuple(PRECISIONS)),
            "on_bad_image": flag("stop, or leave the image out", "fail", choices=("fail", "skip")),
        },
    ),
    "llm": (
        "captions -> rewritten captions (rewritten.jsonl)",
        {
            "llm": flag("language model, by the server's name for it", metavar="MODEL"),
            "llm_url": flag("server that speaks OpenAI's protocol (.../v1)", metavar="URL"),
            "style": flag(
                "whose way of asking and reading: cvsi also asks what is added",
                "cirevl",
                choices=("cirevl", "cvsi"),
            ),
            "prompt": flag("a text that stands before each question (default: our own)", **FILE),
            "added_prompt": flag("cvsi: the same for what is added (default: our own)", **FILE),
            "llm_key_env": flag(
                "variable of the environment that holds the server's key",
                "OPENAI_API_KEY",
                metavar="NAME",
            ),
            "max_tokens": flag("most tokens of an answer", 700, **COUNT),
            "parallel": flag("questions at once", 4, **COUNT),
            "attempts": flag("times a question is asked while the server fails", 8, **COUNT),
            "first_wait": flag(
                "seconds before the second, twice as many each time", 1.0, **SECONDS
            ),
            "timeout": flag("seconds to wait for an answer", 120.0, **SECONDS),
            "requests_per_minute": flag(
                "at most so many (default: no limit)", type=above_zero, metavar="N"
            ),
            "stop": flag("an answer ends at a blank line, as in the published programs", True),
        },
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser. A flag that was not given has the value None, see GROUPS."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for title, flags in GROUPS.values():
        group = parser.add_argument_group(title) if title else parser
        for name, (_, options) in flags.items():
            add_flag(group, name, **options)
    return parser


def read_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse and check the command line; flags that were not given get their defaults.

    Raises UserError for a flag that would have no effect.
    """
    args = build_parser().parse_args(argv)
    if not args.dataset:
        raise UserError("--dataset is missing: a benchmark's name, or a folder")
    if args.captioner is None and args.llm is None:
        raise UserError("give --captioner MODEL, or --llm MODEL with --llm_url URL, or all three")
    for first in ("captioner", "llm"):
        _, flags = GROUPS[first]
        idle = [name for name in flags if getattr(args, name) is not None]
        if getattr(args, first) is None and idle:
            raise UserError(f"--{idle[0]} has no effect without --{first}: add it, or leave it")
    if args.llm is not None and args.llm_url is None:
        raise UserError("--llm needs --llm_url URL, such as http://localhost:8000/v1")
    for name, needed in {"top_p": "sample", "temperature": "sample", "seed": "sample"}.items():
        if getattr(args, name) is not None and not getattr(args, needed):
            raise UserError(f"--{name} has no effect without --{needed}: add it, or leave it")
    if args.added_prompt and args.style != "cvsi":
        raise UserError("--added_prompt has no effect without --style cvsi: add it, or leave it")
    for _, flags in GROUPS.values():
        for name, (default, _) in flags.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
    if args.captions_per_image > args.num_beams and not args.sample:
        raise UserError(
            f"--captions_per_image {args.captions_per_image}: without --sample that takes as many "
            "--num_beams"
        )
    return args


def main(argv: list[str]) -> None:
    """Run the command. Raises UserError, with nothing half-written, for a user's mistake."""
    args = read_arguments(argv)
    from captioning.source import open_task

    task, read = open_task(args.dataset, args.data_dir)
    out = args.out or Path("captions") / task.name
    require_writable(out, "--out")
    if args.captioner:
        describe_images(args, task, read, out)
    if args.llm:
        rewrite_captions(args, task, out)


# ---------------------------------------------------------------------------------------------
# What the flags ask for
# ---------------------------------------------------------------------------------------------


def describe_images(args: argparse.Namespace, task: Task, read: Reader, out: Path) -> None:
    """Write images.jsonl, and say what was made."""
    from captioning.captioner import Sampling
    from captioning.describing import Describing, describe_task

    settings = Describing(
        captioner=args.captioner,
        sampling=Sampling(
            count=args.captions_per_image,
            sample=args.sample,
            top_p=args.top_p,
            temperature=args.temperature,
            beams=args.num_beams,
            min_tokens=args.min_new_tokens,
            max_tokens=args.max_new_tokens,
            seed=args.seed,
            prompt=args.captioner_prompt,
        ),
        batch=args.batch,
        precision=args.precision,
        workers=args.workers,
        skip_bad=args.on_bad_image == "skip",
        gallery=args.gallery,
    )
    say(describe_task(task, read, out, settings, args.gpu, args.overwrite))


def rewrite_captions(args: argparse.Namespace, task: Task, out: Path) -> None:
    """Write rewritten.jsonl, and say what was made."""
    from captioning.chat import Chat, Pace, check_url
    from captioning.rewriting import STYLES, Asking, read_prompt, rewrite_task

    asking = Asking(
        style=STYLES[args.style],
        prompt=read_prompt(args.prompt, "rewrite"),
        added_prompt=read_prompt(args.added_prompt, "added"),
        max_tokens=args.max_tokens,
        stop=args.stop,
    )
    chat = Chat(
        model=args.llm,
        url=check_url(args.llm_url),
        key=os.environ.get(args.llm_key_env) or None,
        pace=Pace(args.requests_per_minute),
        timeout=args.timeout,
        attempts=args.attempts,
        first_wait=args.first_wait,
    )
    print(rewrite_task(task, out, asking, chat, args.style, args.parallel, args.overwrite))


if __name__ == "__main__":
    run_command(main)
