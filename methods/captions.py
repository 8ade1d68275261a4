"""CIReVL (ICLR 2024) and CVSI: what a language model makes of captions, searched as text.

CIReVL: the caption of the query image, rewritten as the query text asks; q = E_T(rewritten).

CVSI: three views of the query against two of a gallery image,

    t   mean of the unit features of the query's rewritten captions
    p   unit feature of "a photo of $ that {caption}. And the photo should have {added}.", in which
        the query image stands for $ as a pseudo word
    v   unit feature of the query image
    g   unit feature of the gallery image
    c   mean of the unit features of its captions; FashionIQ: at unit length

    score = (a_t t + a_p p + a_v v) . (b_g g + b_c c)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from methods.words import PHI, Inversion, fill_prompts, make_words
from utils import UserError, sha256_file
from utils_captions import Rewritten, read_described, read_rewritten
from utils_inputs import Input, InputArray, Options, Produced, Widths
from utils_retrieval import (
    Fusion,
    Gallery,
    Method,
    NoParameters,
    Parts,
    Queries,
    flag,
    similarity_scores,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from utils_task import Task

# GeneCIS: in this task CIReVL's query is the mean of the rewritten caption and the image.
WITH_IMAGE = "focus_attribute"

CVSI_PROMPT = "a photo of $ that {caption}. And the photo should have {added}."
CVSI_WORDS = Inversion(PHI, "$", {"": (CVSI_PROMPT,)}, everywhere=True)


# ---------------------------------------------------------------------------------------------
# CIReVL
# ---------------------------------------------------------------------------------------------


def produce_cirevl(task: Task, encoder: Widths, options: Options) -> Produced:
    """The features of the rewritten captions; GeneCIS' focus on an attribute adds the image."""
    rewritten = read_rewritten(options.captions, task)
    array = InputArray("query_cirevl", rewritten.captions, with_image=_with_image(task))
    return Produced([array], {"captions": dict(rewritten.sources)})


def _with_image(task: Task) -> np.ndarray | None:
    import numpy as np

    if task.prompts != "genecis":
        return None
    return np.array([label == WITH_IMAGE for label in task.queries.tags["task"]])


# ---------------------------------------------------------------------------------------------
# CVSI
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CvsiParameters:
    """Flags of cvsi: the weights of CIRR and CIRCO by default."""

    cvsi_text: float = flag(0.6, "cvsi: a_t, weight of the rewritten captions", word="text")
    cvsi_word: float = flag(0.4, "cvsi: a_p, weight of the prompt with the image", word="word")
    cvsi_image: float = flag(0.0, "cvsi: a_v, weight of the query image", word="image")
    cvsi_gallery: float = flag(0.8, "cvsi: b_g, weight of the gallery image", word="gallery")
    cvsi_caption: float = flag(0.2, "cvsi: b_c, weight of its captions", word="caption")
    cvsi_unit_caption: bool = flag(
        False, "cvsi: captions of a gallery image at unit length", word="unit_caption"
    )


FASHIONIQ = {
    "cvsi_text": 0.2,
    "cvsi_word": 0.6,
    "cvsi_image": 0.2,
    "cvsi_gallery": 0.9,
    "cvsi_caption": 0.1,
    "cvsi_unit_caption": True,
}


def produce_cvsi(task: Task, encoder: Widths, options: Options) -> Produced:
    """t and p of the queries, c of the gallery.

    The network sees pixels rounded to half precision, as published. Raises UserError if the files
    do not say what is added.
    """
    rewritten, described = (
        read(options.captions, task) for read in (read_rewritten, read_described)
    )
    added = _added(rewritten, options)
    prompt = options.prompt or CVSI_PROMPT
    texts = fill_prompts((prompt,), CVSI_WORDS.mark, task, {"added": added})
    words = make_words(options.phi, CVSI_WORDS, encoder, half_pixels=True)
    arrays = [
        InputArray("query_cvsi_text", rewritten.captions, unit=False),
        InputArray("query_cvsi_word", texts, words),
        InputArray("database_cvsi_caption", described.captions),
    ]
    facts = {
        "phi_sha256": sha256_file(options.phi),
        "prompt": [prompt],
        "mark": CVSI_WORDS.mark,
        "captions": {**rewritten.sources, **described.sources},
    }
    return Produced(arrays, facts)


def _added(rewritten: Rewritten, options: Options) -> Sequence[str]:
    if rewritten.added is None:
        raise UserError(
            f"--captions {options.captions}: {', '.join(rewritten.sources)} does not say what is "
            "added; make it with create_captions.py --style cvsi"
        )
    return rewritten.added


def cvsi_scores(
    points: Sequence[CvsiParameters], queries: Queries, gallery: Gallery
) -> Iterator[Tensor]:
    """(a_t t + a_p p + a_v v) . (b_g g + b_c c) of every point: yields (Q, N).

    Linear in the five: six products serve all points.
    """
    for p, (to_image, to_caption) in zip(points, _both(points, queries, gallery), strict=True):
        yield p.cvsi_gallery * to_image + p.cvsi_caption * to_caption


def cvsi_parts(p: CvsiParameters, queries: Queries, gallery: Gallery) -> Parts:
    """The query against gallery images, and against their captions, unweighted."""
    [(to_image, to_caption)] = _both([p], queries, gallery)
    both = {"gallery image": to_image, "its captions": to_caption}
    return Parts(both, Fusion(p.cvsi_gallery, p.cvsi_caption))


def _both(
    points: Sequence[CvsiParameters], queries: Queries, gallery: Gallery
) -> Iterator[tuple[Tensor, Tensor]]:
    """(a_t t + a_p p + a_v v) . g and the same with c of every point: yields (Q, N) twice."""
    query = ("cvsi_text", "cvsi_word", "image")
    image = queries.similarities(gallery, *query)
    caption = queries.similarities(gallery, *query, of="cvsi_caption")  # at unit length
    length = gallery.kinds["cvsi_caption"].length
    for p in points:
        weights = (p.cvsi_text, p.cvsi_word, p.cvsi_image)
        to_image, to_caption = (
            sum(weight * own for weight, own in zip(weights, found, strict=True))
            for found in (image, caption)
        )
        yield to_image, to_caption if p.cvsi_unit_caption else to_caption * length


METHODS = (
    Method(
        "cirevl",
        NoParameters,
        partial(similarity_scores, name="cirevl"),
        "the query image's caption, rewritten as the query text asks",
        reads=("cirevl",),
        inputs={"cirevl": Input(produce_cirevl, needs=("captions",))},
    ),
    Method(
        "cvsi",
        CvsiParameters,
        cvsi_scores,
        "rewritten captions, a pseudo word and captions of the gallery, together",
        presets=dict.fromkeys(("fashioniq", "fashioniq_small"), FASHIONIQ),
        reads=("image", "cvsi_text", "cvsi_word"),
        gallery_reads=("image", "cvsi_caption"),
        parts=cvsi_parts,
        inputs={"cvsi": Input(produce_cvsi, needs=("captions", "phi"), takes=("prompt",))},
    ),
)
