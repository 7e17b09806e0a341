"""Embeddings of texts by a sentence-embedding model in a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer

from npeff.errors import as_one_line
from npeff.tasks.errors import TaskError

_LONGEST = 512
"""Tokens of the longest text that is not cut. Sentence-embedding models are trained on shorter ones."""


class TextEmbedder:
    """A model of the class ``AutoModel`` with its tokenizer. Its hidden states are averaged over the tokens of a text.

    This is the form of most models of the package sentence-transformers (Reimers and Gurevych, 2019,
    https://arxiv.org/abs/1908.10084, section 3). Nothing is downloaded, and no code of the folder runs.

    Args:
        folder: Folder with the model and the tokenizer.

    Raises:
        TaskError: The folder has no model and tokenizer of this form.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise TaskError(f"{folder} is not a folder: give a local folder with a sentence-embedding model")
        options = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
            self._model = AutoModel.from_pretrained(str(folder), **options).eval()
        except Exception as error:  # the library and its parsers raise any exception
            raise TaskError(f"cannot load a sentence-embedding model from {folder}: {as_one_line(error)}") from None
        if self._tokenizer.pad_token_id is None:
            raise TaskError(f"the tokenizer in {folder} has no padding token: use a model for sentence embeddings")
        positions = getattr(self._model.config, "max_position_embeddings", None) or _LONGEST + 2
        # models of the family of RoBERTa number positions from 2
        self._longest = max(1, min(_LONGEST, self._tokenizer.model_max_length, positions - 2))
        self._folder = folder

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch_size: int = 32) -> NDArray[np.float32]:
        """Return the embeddings of texts, (n, d), rows of unit length.

        Raises:
            TaskError: The model has no hidden states of tokens, or they are not finite.
        """
        found = [self._embed(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
        return np.concatenate(found) if found else np.zeros((0, 1), np.float32)

    def _embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        # an empty text has no tokens in some tokenizers, and therefore no mean
        given = [text if text.strip() else "." for text in texts]
        batch = self._tokenizer(given, padding=True, truncation=True, max_length=self._longest, return_tensors="pt")
        hidden_BTd = getattr(self._model(**batch), "last_hidden_state", None)
        if hidden_BTd is None:
            raise TaskError(f"the model in {self._folder} has no hidden states of tokens: use an encoder")
        mask_BT1 = batch["attention_mask"].unsqueeze(-1).float()
        mean_Bd = (hidden_BTd.float() * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
        unit_Bd = torch.nn.functional.normalize(mean_Bd, dim=-1)
        if not bool(torch.isfinite(unit_Bd).all()):
            raise TaskError(f"the embeddings of the model in {self._folder} are not finite: use another model")
        result: NDArray[np.float32] = unit_Bd.numpy()
        return result
