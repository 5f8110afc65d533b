"""Labelled sentences as pools that few-shot episodes are drawn from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastmeta.core import checks
from fastmeta.tasks.pool import ClassPool
from fastmeta.tasks.sampler import count

Encode = Callable[[str], Sequence[int]]


def read_sentences(path: str | os.PathLike[str], split: str | None = None) -> tuple[list[str], list[str]]:
    """Texts and their labels from a JSON-lines file of objects with ``text``, ``intent`` and ``split``.

    ``clinc150.jsonl`` is such a file: 22 500 requests of 150 intents (S. Larson et al., EMNLP 2019).

    Args:
        path: the file.
        split: take lines of this ``split`` alone; ``None`` for all.

    Raises:
        FileNotFoundError: no file there.
        ValueError: a line that is not such an object, or no line of the split.
    """
    place = Path(path)
    if not place.is_file():
        raise FileNotFoundError(f"read_sentences: path must be a file, got {place}, which does not exist")
    texts, labels, splits = [], [], set()
    with place.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                text, label, part = row["text"], row["intent"], row.get("split")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"read_sentences: line {number} of {place} must be a JSON object with text and intent, "
                    f"got {error!r}"
                ) from error
            if not (isinstance(text, str) and isinstance(label, str)):
                raise ValueError(f"read_sentences: text and intent must be strings, got others in line {number}")
            splits.add(str(part))
            if split is None or part == split:
                texts.append(text)
                labels.append(label)
    if not texts:
        checks.fail(ValueError, "read_sentences", "split", f"one of {sorted(splits)} in {place}", split)
    return texts, labels


def sentence_pool(
    texts: Sequence[str], labels: Sequence[str], encode: Encode, *, padding: int = 0, longest: int | None = None
) -> ClassPool:
    """Sentences as rows of tokens, every label a class.

    Draw from it with ``EpisodeSampler(pool, ..., prepare=Trim(padding))``, which leaves out the columns of padding that
    no sentence of a batch needs.

    Args:
        texts: M sentences.
        labels: one each.
        encode: tokens of a sentence, at least one.
        padding: what fills the rest of a row; no token of a sentence.
        longest: cut sentences after so many tokens; ``None`` for none.

    Returns:
        A pool of int64 ``[M, L]``, L the length of the longest.

    Raises:
        ValueError: an empty sentence, or one that holds the padding.
    """
    if longest is not None:
        count("sentence_pool", "longest", longest)
    rows = [list(encode(text))[:longest] for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if not row or padding in row:
            checks.fail(
                ValueError, "sentence_pool", "encode", f"give tokens that are not {padding}", f"{row} of {text!r}"
            )
    width = max((len(row) for row in rows), default=0)
    filled = [row + [padding] * (width - len(row)) for row in rows]
    return ClassPool(torch.tensor(filled, dtype=torch.int64), list(labels))


class Trim:
    """For ``EpisodeSampler(prepare=)``: leaves out the last columns, where they hold nothing but padding.

    Args:
        padding: the token of the padding.
        multiple: the length that is left is a multiple of this one, so that batches have few lengths, for each of which
            a model is traced.
    """

    def __init__(self, padding: int = 0, multiple: int = 8) -> None:
        self.padding = padding
        self.multiple = count("Trim", "multiple", multiple)

    def __call__(self, samples: Tensor) -> Tensor:
        """``[n, L']`` of ``[n, L]``."""
        used = int((samples != self.padding).any(0).nonzero().max()) + 1
        return samples[:, : -(-used // self.multiple) * self.multiple]
