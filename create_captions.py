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

from utils import Parser, UserError, add_flag, positive, require_writable, run_command, say

if TYPE_CHECKING:
    from captioning.source import Reader
    from utils_task import Task

KEY_ENV = "OPENAI_API_KEY"
DEFAULTS = {
    "data_dir": Path("data"),
    "captions_per_image": 1,
    "gallery": False,
    "sample": False,
    "top_p": 0.9,
    "temperature": 1.0,
    "num_beams": 1,
    "min_new_tokens": 1,
    "max_new_tokens": 50,
    "seed": 0,
    "batch": 16,
    "workers": 2,
    "gpu": 0,
    "precision": "fp32",
    "on_bad_image": "fail",
    "style": "cirevl",
    "max_tokens": 700,
    "stop": True,
    "llm_key_env": KEY_ENV,
    "parallel": 4,
    "attempts": 8,
    "first_wait": 1.0,
    "timeout": 120.0,
    "overwrite": False,
}
# Flags without effect unless the flag that begins the group is there.
CAPTIONING = (
    "captions_per_image",
    "gallery",
    "captioner_prompt",
    "sample",
    "top_p",
    "temperature",
    "num_beams",
    "min_new_tokens",
    "max_new_tokens",
    "seed",
    "batch",
    "workers",
    "gpu",
    "precision",
    "on_bad_image",
)
REWRITING = (
    "llm_url",
    "style",
    "prompt",
    "added_prompt",
    "max_tokens",
    "stop",
    "llm_key_env",
    "requests_per_minute",
    "parallel",
    "attempts",
    "first_wait",
    "timeout",
)


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The parser. A flag that was not given has the value None, see DEFAULTS."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flag(parser, "dataset", help="name or folder of the data set")
    add_flag(parser, "data_dir", type=Path, metavar="DIR", help="data sets (default: data)")
    add_flag(
        parser,
        "out",
        type=Path,
        metavar="DIR",
        help="where captions go and are looked for (default: captions/DATASET)",
    )
    _switch(parser, "overwrite", "start afresh: leave it to continue")
    images = parser.add_argument_group("images -> captions (images.jsonl)")
    add_flag(images, "captioner", help="image-to-text model of transformers: a folder or a name")
    _switch(images, "gallery", "describe the gallery's images too, as CVSI needs")
    add_flag(images, "captioner_prompt", metavar="TEXT", help="what it is told (default: nothing)")
    _switch(images, "sample", "draw captions (nucleus sampling) instead of searching the best")
    _numbers(
        images,
        {
            "captions_per_image": (positive, "N", "captions an image; CVSI has 15"),
            "top_p": (share, "P", "nucleus of the sampling"),
            "temperature": (above_zero, "T", "of the sampling"),
            "num_beams": (positive, "N", "beams"),
            "min_new_tokens": (positive, "N", "fewest tokens of a caption"),
            "max_new_tokens": (positive, "N", "most tokens of a caption"),
            "seed": (int, "N", "of the sampling"),
            "batch": (positive, "N", "images at once; sampled captions depend on it"),
            "workers": (int, "N", "processes that read images"),
            "gpu": (int, "N", "CUDA device, -1 for the CPU"),
        },
    )
    _choice(images, "precision", ("fp32", "bf16", "fp16"), "arithmetic")
    _choice(images, "on_bad_image", ("fail", "skip"), "stop, or leave the image out")
    _add_rewriting(parser.add_argument_group("captions -> rewritten captions (rewritten.jsonl)"))
    return parser


def _add_rewriting(group: argparse._ArgumentGroup) -> None:
    add_flag(group, "llm", metavar="MODEL", help="language model, by the server's name for it")
    add_flag(group, "llm_url", metavar="URL", help="server that speaks OpenAI's protocol (.../v1)")
    _choice(
        group,
        "style",
        ("cirevl", "cvsi"),
        "whose way of asking and reading: cvsi also asks what is added",
    )
    for name, text in {
        "prompt": "a text that stands before each question (default: our own)",
        "added_prompt": "cvsi: the same for what is added (default: our own)",
    }.items():
        add_flag(group, name, type=Path, metavar="FILE", help=text)
    add_flag(
        group,
        "llm_key_env",
        metavar="NAME",
        help=f"variable of the environment that holds the server's key (default: {KEY_ENV})",
    )
    _numbers(
        group,
        {
            "max_tokens": (positive, "N", "most tokens of an answer"),
            "parallel": (positive, "N", "questions at once"),
            "attempts": (positive, "N", "times a question is asked while the server fails"),
            "first_wait": (above_zero, "S", "seconds before the second, twice as many each time"),
            "timeout": (above_zero, "S", "seconds to wait for an answer"),
        },
    )
    add_flag(
        group,
        "requests_per_minute",
        type=above_zero,
        metavar="N",
        help="at most so many (default: no limit)",
    )
    _switch(group, "stop", "an answer ends at a blank line, as in the published programs")


def _numbers(group: argparse._ArgumentGroup, flags: dict[str, tuple]) -> None:
    for name, (kind, metavar, text) in flags.items():
        shown = f"{text} (default: {DEFAULTS[name]:g})"
        add_flag(group, name, type=kind, metavar=metavar, help=shown)


def _choice(group: argparse._ArgumentGroup, name: str, choices: tuple, text: str) -> None:
    add_flag(group, name, choices=choices, help=f"{text} (default: {DEFAULTS[name]})")


def _switch(group: argparse._ActionsContainer, name: str, text: str) -> None:
    shown = f"{text} (default: {'on' if DEFAULTS[name] else 'off'})"
    add_flag(group, name, action=argparse.BooleanOptionalAction, default=None, help=shown)


def above_zero(text: str) -> float:
    """A number above 0, for argparse."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def share(text: str) -> float:
    """A number above 0 and at most 1, for argparse."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return float(text)


def read_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse and check the command line; flags that were not given get their defaults.

    Raises UserError for a flag that would have no effect.
    """
    args = build_parser().parse_args(argv)
    if not args.dataset:
        raise UserError("--dataset is missing: a benchmark's name, or a folder")
    if args.captioner is None and args.llm is None:
        raise UserError("give --captioner MODEL, or --llm MODEL with --llm_url URL, or all three")
    for first, names in (("captioner", CAPTIONING), ("llm", REWRITING)):
        idle = [name for name in names if getattr(args, name) is not None]
        if getattr(args, first) is None and idle:
            raise UserError(f"--{idle[0]} has no effect without --{first}: add it, or leave it")
    if args.llm is not None and args.llm_url is None:
        raise UserError("--llm needs --llm_url URL, such as http://localhost:8000/v1")
    for name, needed in {"top_p": "sample", "temperature": "sample", "seed": "sample"}.items():
        if getattr(args, name) is not None and not getattr(args, needed):
            raise UserError(f"--{name} has no effect without --{needed}: add it, or leave it")
    if args.added_prompt and args.style != "cvsi":
        raise UserError("--added_prompt has no effect without --style cvsi: add it, or leave it")
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
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
