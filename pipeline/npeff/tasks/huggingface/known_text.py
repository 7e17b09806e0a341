"""How much of the texts a tokenizer knows.

A single text, in emoji or in another script, may be unknown. If more than half of a whole data set is unknown, the
results would describe the unknown token, or the few words that are left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from npeff.tasks.errors import TaskError
from npeff.tasks.huggingface.options import PretrainedOptions

_SPACES = " \t\n▁ĠĊĉ"
"""Characters of tokens that stand for spaces only: those of texts, of SentencePiece and of byte-level tokenizers."""


class KnownText:
    """Numbers of known and of unknown tokens. A word, or part of a word, that was dropped is an unknown token.

    The tokens that the tokenizer puts around every text do not count, nor do tokens of spaces: SentencePiece puts one
    in front of every unknown word.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._unknown_id = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id
        vocabulary = tokenizer.get_vocab()
        self._is_space = np.zeros(max(vocabulary.values(), default=0) + 1, np.bool_)
        self._is_space[[number for piece, number in vocabulary.items() if not piece.strip(_SPACES)]] = True
        self._drops = _drops_characters(tokenizer, vocabulary)
        self._n_known = self._n_unknown = 0

    def add(self, encoded: Any, texts: Sequence[Sequence[Any]]) -> None:
        """Count some texts.

        Args:
            encoded: What the tokenizer returned for the texts, with ``special_tokens_mask``.
            texts: One or two sequences of texts, or one sequence of lists of words.
        """
        columns = zip(encoded["input_ids"], encoded["special_tokens_mask"], zip(*texts, strict=True), strict=True)
        for number, (row, special, parts) in enumerate(columns):
            own = np.asarray(row, np.int64)[np.asarray(special) == 0]
            unknown = own == self._unknown_id
            self._n_unknown += int(unknown.sum())
            self._n_known += len(own) - int((unknown | self._is_space[own]).sum())
            if self._drops:
                self._n_unknown += _dropped(encoded.encodings[number], parts)
            elif not len(own):
                self._n_unknown += any(map(_holds_text, parts))

    def check(self, options: PretrainedOptions) -> None:
        """Raise TaskError if more than half of the tokens are unknown."""
        if self._n_unknown > self._n_known:
            raise TaskError(
                f"{options.data}: the tokenizer of {options.processor or options.model!r} does not know "
                f"{self._n_unknown} of the {self._n_known + self._n_unknown} tokens of the texts: set processor to the "
                "tokenizer of the model, or choose other columns"
            )


def _drops_characters(tokenizer: Any, vocabulary: Mapping[str, int]) -> bool:
    """Return whether the tokenizer leaves out characters that it does not know: BPE without bytes and unknown token."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    return isinstance(model, BPE) and model.unk_token is None and not vocabulary.keys() >= _BYTES


_BYTES = set(ByteLevel.alphabet())


def _holds_text(part: Any) -> bool:
    """Return whether a text, or a list of words, is not blank."""
    return bool(part.strip() if isinstance(part, str) else part)


def _dropped(encoding: Any, parts: Sequence[Any]) -> int:
    """Return the number of words, or parts of words, of a text, pair of texts or list of words that have no token."""
    words = not isinstance(parts[0], str)
    pieces: Sequence[str] = parts[0] if words else parts
    starts = list(accumulate((len(piece) + 1 for piece in pieces), initial=0))
    spans = [
        (starts[owner] + start, starts[owner] + stop, owner)
        for (start, stop), owner in zip(
            encoding.offsets, encoding.word_ids if words else encoding.sequence_ids, strict=True
        )
        if owner is not None
    ]
    text, is_cut = "\n".join(pieces), bool(encoding.overflowing)
    end, before, n_dropped = 0, None if is_cut else 0, 0
    for start, stop, owner in sorted(spans):
        if start > end and (owner == before or not is_cut):  # a truncated text can lack tokens at its ends
            n_dropped += len(text[end:start].split())
        end, before = max(end, stop), owner
    return n_dropped if is_cut else n_dropped + len(text[end:].split())
