"""Text corpora as files, and the words that contextualise query texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from extraction.parts import cut_ranges
from extraction.stage import Rows, TextStage
from utils import UserError, read_csv, sha256_file
from utils_labels import CONTEXT_FILE

CONTEXT_WORDS = 100  # the first rows of CONTEXT_FILE contextualise texts


def read_corpus(path: Path) -> tuple[list[str], list[int]]:
    """The prompts of a text corpus and their lines: one column, no header.

    Raises UserError, naming the row, for a second column, and for an absent or empty file.
    """
    if not path.is_file():
        raise UserError(
            f"no {path}; a corpus is a CSV of one column (--corpora_dir names its folder)"
        )
    prompts, lines = [], []
    for line, row in read_csv(path):
        if len(row) > 1:
            raise UserError(
                f"{path}, row {line}: {len(row)} columns where one is expected; put double quotes "
                "around a prompt that holds a comma"
            )
        prompts += row
        lines.append(line)
    if not prompts:
        raise UserError(f"{path} is empty: a prompt a row is expected")
    return prompts, lines


@dataclass(frozen=True)
class ContextWords:
    """The words that contextualise query texts: the first rows of a corpus; its file and hash."""

    words: Sequence[str]
    path: Path
    sha256: str

    def stages(self, texts: Rows, fingerprint: dict, part_rows: int) -> tuple[TextStage, TextStage]:
        """The stages of query texts, plain and contextualised. fingerprint: see Stage."""
        plain = TextStage(
            name="query_text",
            rows=texts,
            units=cut_ranges(texts.count, part_rows),
            fingerprint=fingerprint,
        )
        contextual = TextStage(
            name="query_context_text",
            rows=texts,
            units=cut_ranges(texts.count, max(1, part_rows // max(1, 2 * len(self.words)))),
            fingerprint=fingerprint | {"words": self.sha256},
            words=self.words,
        )
        return plain, contextual


def read_context_words(corpora_dir: Path) -> ContextWords:
    """The words that contextualise query texts. Raises UserError as read_corpus does."""
    path = corpora_dir / CONTEXT_FILE
    prompts, _ = read_corpus(path)
    return ContextWords(tuple(prompts[:CONTEXT_WORDS]), path, sha256_file(path))
