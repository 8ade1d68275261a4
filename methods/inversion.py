"""Pseudo words: Pic2Word (CVPR 2023), SEARLE (ICCV 2023) and LinCIR (CVPR 2024).

A small network turns the feature of the query image into a vector that takes the place of a mark's
token embedding in a prompt; the text feature of the prompt is the query:

    v = network(E_I(image))      E_I projected, as the model gives it, not of unit length
    q = E_T(prompt with v in the place of its mark)      score = q X'

The networks are read from the official checkpoints as they are. Pic2Word's table also has what its
prompt ranks without the word, "text", and the mixture of that with the image:

    q = E_T(prompt, its mark as it stands)      q = unit(unit(E_I(image)) + unit(q))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from methods.words import IM2TEXT, PHI, Inversion, fill_prompts, make_words, texts_of
from utils import sha256_file
from utils_inputs import Input, InputArray, Options, Produced, Widths
from utils_retrieval import Gallery, Method, NoParameters, Queries, similarity_scores

if TYPE_CHECKING:
    from torch import Tensor

    from utils_task import Task

# FashionIQ: both orders of the captions, stripped of ".?, " at both ends.
BOTH_ORDERS = ("a photo of $ that {first} and {second}", "a photo of $ that {second} and {first}")
SEARLE_PROMPTS = {"": ("a photo of $ that {caption}",), "fashioniq": BOTH_ORDERS}
PIC2WORD_PROMPTS = {
    "": ("a photo of * , {caption}",),
    "fashioniq": ("a photo of * , {second_as_is} and {first_as_is}",),
    "domains": ("a {caption} of *",),
}
# The published program encodes the captions of CIRR alone, of FashionIQ in the prompt, "*" and all.
PLAIN_PROMPTS = {"": ("{caption}",), "fashioniq": PIC2WORD_PROMPTS["fashioniq"]}
INVERSIONS = {
    "pic2word": Inversion(IM2TEXT, "*", PIC2WORD_PROMPTS),
    "searle": Inversion(PHI, "$", SEARLE_PROMPTS),
    "lincir": Inversion(PHI, "$", SEARLE_PROMPTS, everywhere=True),
}


def produce(task: Task, encoder: Widths, options: Options, name: str) -> Produced:
    """The features of the prompts of one of the INVERSIONS."""
    inversion = INVERSIONS[name]
    texts = texts_of(inversion, task, options.prompt)
    words = make_words(options.phi, inversion, encoder)
    chosen = inversion.prompts.get(task.prompts, inversion.prompts[""])
    facts = {
        "phi_sha256": sha256_file(options.phi),
        "prompt": list(chosen) if options.prompt is None else [options.prompt],
        "mark": inversion.mark,
    }
    return Produced([InputArray(f"query_{name}", texts, words)], facts)


def produce_text(task: Task, encoder: Widths, options: Options) -> Produced:
    """The features of Pic2Word's prompts without a pseudo word."""
    chosen = PLAIN_PROMPTS.get(task.prompts, PLAIN_PROMPTS[""])
    prompts = chosen if options.prompt is None else (options.prompt,)
    texts = fill_prompts(prompts, "", task, {})
    return Produced([InputArray("query_pic2word_text", texts)], {"prompt": list(prompts)})


def mixture_scores(
    points: Sequence[NoParameters], queries: Queries, gallery: Gallery
) -> Iterator[Tensor]:
    """unit(I + T) X' for every point: yields (Q, N)."""
    from torch.nn.functional import normalize

    similarity = gallery.similarity(normalize(queries.image + queries["pic2word_text"]))
    for _ in points:
        yield similarity


SUMMARIES = {
    "pic2word": "the query image as a pseudo word in a prompt, by Pic2Word's network",
    "searle": "the query image as a pseudo word in a prompt, by SEARLE's network",
    "lincir": "the query image as a pseudo word in a prompt, by LinCIR's network",
}
TEXT_INPUT = {"pic2word_text": Input(produce_text, takes=("prompt",))}
METHODS = (
    *(
        Method(
            name,
            NoParameters,
            partial(similarity_scores, name=name),
            SUMMARIES[name],
            reads=(name,),
            inputs={name: Input(partial(produce, name=name), needs=("phi",), takes=("prompt",))},
        )
        for name in INVERSIONS
    ),
    Method(
        "pic2word_text",
        NoParameters,
        partial(similarity_scores, name="pic2word_text"),
        "Pic2Word's prompt without the word: the text row of its table",
        reads=("pic2word_text",),
        inputs=TEXT_INPUT,
    ),
    Method(
        "pic2word_mixture",
        NoParameters,
        mixture_scores,
        "that and the query image, mixed: the mixture row of its table",
        reads=("image", "pic2word_text"),
        inputs=TEXT_INPUT,
    ),
)
