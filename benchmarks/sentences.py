"""Few-shot intents of CLINC150 for all-MiniLM-L6-v2: the same sentences in every run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmeta.learner.encoders import MissingEncoder, SentenceClassifier, load_classifier, load_tokenizer
from fastmeta.tasks.sentences import read_sentences


class MissingSentences(RuntimeError):
    """The encoder or the sentences are not on this machine; the message says what to do."""


def classifier(ways: int) -> SentenceClassifier:
    """The pretrained encoder under a head that is drawn anew.

    Raises:
        MissingSentences: a package is not installed.
    """
    try:
        return load_classifier(ways)
    except MissingEncoder as error:
        raise MissingSentences(str(error)) from error


def episodes(
    file: Path, seed: int, tasks: int, ways: int, shots: int, queries: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Support and query sets of ``tasks`` tasks: tokens ``[T, N, L]`` of int64, zero behind a sentence, and labels.

    Raises:
        MissingSentences: the file or a package is not there.
    """
    try:
        encode = load_tokenizer()
    except MissingEncoder as error:
        raise MissingSentences(str(error)) from error
    if not file.is_file():
        raise MissingSentences(f"{file.name} was not found (FASTMETA_DATA names its folder)")
    by_intent: dict[str, list[str]] = {}
    for text, intent in zip(*read_sentences(file, "train"), strict=True):
        by_intent.setdefault(intent, []).append(text)

    rng = np.random.default_rng(seed)
    intents = sorted(by_intent)
    drawn: list[list[list[list[int]]]] = []  # [task][way][sentence]
    for _ in range(tasks):
        chosen = [by_intent[intents[i]] for i in rng.choice(len(intents), ways, replace=False)]
        of_task = [[texts[i] for i in rng.choice(len(texts), shots + queries, replace=False)] for texts in chosen]
        drawn.append([[encode(text) for text in texts] for texts in of_task])
    longest = max(len(ids) for task in drawn for way in task for ids in way)

    def batch(part: slice) -> tuple[Tensor, Tensor]:
        padded = [[ids + [0] * (longest - len(ids)) for way in task for ids in way[part]] for task in drawn]
        each = len(range(shots + queries)[part])
        return torch.tensor(padded), torch.arange(ways).repeat_interleave(each).expand(tasks, -1).contiguous()

    return batch(slice(shots)), batch(slice(shots, None))
