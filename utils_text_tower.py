"""Text towers of open_clip models: prefix trees for causal ones, and a vector in a token's place.

torch is imported inside the functions that need it: see utils_features.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from utils import UserError

if TYPE_CHECKING:
    import torch

# Tokens encoded together by a causal text tower; attention costs their square.
TREE_TOKENS = 512


# ---------------------------------------------------------------------------------------------
# Causal towers: texts that begin alike share that work
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrefixTree:
    """Token sequences laid out so that a beginning they share stands there once.

    tokens[n], depths[n], parents[n]: the token of node n, its position in the sequence, and the
    node of the token before it (-1 at the start). ends[i] is the last node of sequence rows[i].
    """

    tokens: list[int]
    depths: list[int]
    parents: list[int]
    rows: list[int]
    ends: list[int]

    def ancestors(self) -> np.ndarray:
        """What each node comes after, itself included: (nodes, nodes) bool."""
        seen = np.eye(len(self.tokens), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


def grow_trees(
    sequences: Sequence[tuple[int, ...]], max_rows: int, max_tokens: int = TREE_TOKENS
) -> Iterator[PrefixTree]:
    """Lay sequences out as prefix trees of at most max_rows sequences and max_tokens nodes each.

    In sorted order a sequence shares its longest beginning with the one before it.
    """
    tree = PrefixTree([], [], [], [], [])
    path: list[int] = []  # the nodes of the sequence before
    for row in sorted(range(len(sequences)), key=sequences.__getitem__):
        sequence = sequences[row]
        if len(tree.rows) == max_rows or len(tree.tokens) + len(sequence) > max_tokens:
            if tree.rows:
                yield tree
            tree, path = PrefixTree([], [], [], [], []), []
        shared = 0
        while shared < min(len(path), len(sequence)) and (
            tree.tokens[path[shared]] == sequence[shared]
        ):
            shared += 1
        del path[shared:]
        for depth, token in enumerate(sequence[shared:], shared):
            tree.parents.append(path[-1] if path else -1)
            path.append(len(tree.tokens))
            tree.tokens.append(token)
            tree.depths.append(depth)
        tree.rows.append(row)
        tree.ends.append(path[-1])
    if tree.rows:
        yield tree


@dataclass(frozen=True)
class CausalTextTower:
    """A text transformer whose feature of a text depends on its tokens up to the end token alone.

    Attention is causal and the feature is read at the end token, which never sees the padding
    after it; and what a token becomes depends on those before it, so texts that begin alike (the
    prompts of one word or one text) share that work. Both savings are exact.
    """

    module: torch.nn.Module
    pool_type: str  # "argmax": the end token has the highest id; "eos": its id is eos_id
    eos_id: int | None

    def sequences(
        self, tokens: torch.Tensor, placed: PlacedVectors | None = None
    ) -> list[tuple[int, ...]]:
        """The rows of tokens (n, L), each cut after its end token.

        A token in whose place vector v stands is V + v, V being the size of the vocabulary.
        """
        ends = ((tokens == self.eos_id).int() if self.pool_type == "eos" else tokens).argmax(dim=-1)
        if placed is not None:
            tokens = placed.number_tokens(tokens, self.module.token_embedding.num_embeddings)
        rows = zip(tokens.tolist(), ends.tolist(), strict=True)
        return [tuple(row[: end + 1]) for row, end in rows]

    def encode(
        self, tree: PrefixTree, device: torch.device, vectors: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Features (n, D) of a tree's n sequences; vectors (v, W): of the tokens V and above."""
        import torch

        tower = self.module
        tokens, depths, ends = (
            torch.tensor(numbers, device=device)
            for numbers in (tree.tokens, tree.depths, tree.ends)
        )
        unseen = torch.from_numpy(~tree.ancestors()).to(device)
        mask = torch.zeros(unseen.shape, device=device).masked_fill_(unseen, float("-inf"))
        x = self._embed(tokens, vectors) + tower.positional_embedding[depths]  # (nodes, W)
        x = tower.transformer(x[None], attn_mask=mask)[0]
        x = tower.ln_final(x[ends])  # (n, W)
        if tower.text_projection is None:
            return x
        projection = tower.text_projection
        return projection(x) if callable(projection) else x @ projection

    def _embed(self, tokens: torch.Tensor, vectors: torch.Tensor | None) -> torch.Tensor:
        """The embeddings (nodes, W) of tokens, those V and above being vectors."""
        embedding = self.module.token_embedding
        if vectors is None:
            return embedding(tokens)
        last = embedding.num_embeddings - 1
        x = embedding(tokens.clamp(max=last))
        given = tokens > last
        x[given] = vectors[tokens[given] - last - 1].to(x.dtype)
        return x


def find_causal_tower(model: torch.nn.Module) -> CausalTextTower | None:
    """The model's text tower if it is causal and pooled at the end token, else None."""
    tower = getattr(model, "text", model)
    prefix = "" if tower is not model else "text_"  # CLIP holds its text tower unpacked
    pool_type = getattr(tower, f"{prefix}pool_type", None)
    causal = getattr(tower, "attn_mask", None) is not None
    if (
        not causal
        or pool_type not in ("argmax", "eos")
        or getattr(tower, "cls_emb", None) is not None
    ):
        return None
    return CausalTextTower(tower, pool_type, getattr(tower, f"{prefix}eos_id", None))


# ---------------------------------------------------------------------------------------------
# Pseudo words: a vector in the place of a token's embedding
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Replacement:
    """Vectors that stand in texts where a mark does, in place of its token's embedding.

    mark: a text of one token, such as "$". vectors: float32 (v, W), W being the width of the token
    embeddings. which: int64 (n,), the vector of each of the n texts. everywhere: wherever the mark
    stands in a text, not only where it stands first. The position embedding is added as to any
    token (Pic2Word, section 3.1; SEARLE, section 3.1).
    """

    mark: str
    vectors: np.ndarray
    which: np.ndarray
    everywhere: bool = False

    def of(self, rows: Sequence[int]) -> Replacement:
        """The replacement in some of the texts."""
        return Replacement(self.mark, self.vectors, self.which[rows], self.everywhere)


@dataclass(frozen=True, eq=False)
class PlacedVectors:
    """Where vectors stand in tokens (n, L): vectors[which[i]] at row[i], column[i]; int64 (k,)."""

    row: torch.Tensor
    column: torch.Tensor
    which: torch.Tensor
    vectors: torch.Tensor

    def number_tokens(self, tokens: torch.Tensor, known: int) -> torch.Tensor:
        """A copy of tokens (n, L) in which vector v is the token known + v."""
        tokens = tokens.clone()
        tokens[self.row, self.column] = known + self.which
        return tokens

    def among(self, first: int, stop: int) -> PlacedVectors:
        """The places in the rows first to stop - 1, numbered from 0."""
        mine = (self.row >= first) & (self.row < stop)
        return PlacedVectors(
            self.row[mine] - first, self.column[mine], self.which[mine], self.vectors
        )


def find_token_embedding(model: torch.nn.Module) -> torch.nn.Embedding:
    """The module that a model's text tower looks its tokens' embeddings up in."""
    tower = getattr(model, "text", model)
    if hasattr(tower, "token_embedding"):
        return tower.token_embedding
    return tower.transformer.get_input_embeddings()  # a tower of transformers'


def find_mark(tokenizer: Callable[..., torch.Tensor], mark: str) -> int:
    """The token that a mark is.

    Raises UserError if the tokenizer makes none of it, as those that drop punctuation, or several.
    """
    own = set(tokenizer([mark])[0].tolist()) - set(tokenizer([""])[0].tolist())
    if len(own) != 1:
        problem = f"{len(own)} tokens" if own else "no token"
        raise UserError(
            f"the mark {mark!r} is {problem} for this backbone's tokenizer, but a pseudo word "
            "takes the place of one: use a backbone with CLIP's tokenizer"
        )
    return own.pop()


def place_vectors(
    texts: Sequence[str], tokens: torch.Tensor, mark: int, replace: Replacement
) -> PlacedVectors:
    """Where the vectors stand in the tokens (n, L) of n texts; mark: the token of the mark.

    Raises UserError for a text in which it is no token, naming it.
    """
    import torch

    places = tokens == mark
    without = (~places.any(1)).nonzero()[:, 0]
    if len(without):
        raise UserError(
            f"{texts[int(without[0])]!r}: {replace.mark!r} is not among its first "
            f"{tokens.shape[1]} tokens (it has to stand alone, between blanks); "
            f"{len(without)} of {len(texts)} texts are without it"
        )
    if not replace.everywhere:
        places &= places.cumsum(1) == 1
    row, column = places.nonzero(as_tuple=True)
    which = torch.from_numpy(np.asarray(replace.which, np.int64))[row]
    return PlacedVectors(row, column, which, torch.from_numpy(replace.vectors))


@contextlib.contextmanager
def vectors_placed(embedding: torch.nn.Embedding, placed: PlacedVectors | None) -> Iterator[None]:
    """Inside, the embedding gives the vectors in their places; None: nothing changes."""
    if placed is None:
        yield
        return

    def put(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        vectors = placed.vectors[placed.which].to(device=output.device, dtype=output.dtype)
        output[placed.row, placed.column] = vectors
        return output

    handle = embedding.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()
