"""Sentences as pools of classes."""

from __future__ import annotations

import json

import pytest
import torch

from fastmeta.tasks import EpisodeSampler
from fastmeta.tasks.sentences import Trim, read_sentences, sentence_pool

ROWS = [
    {"text": "what time is it", "intent": "time", "split": "train"},
    {"text": "play a song", "intent": "music", "split": "train"},
    {"text": "tell me the time", "intent": "time", "split": "test"},
    {"text": "sing", "intent": "music", "split": "train"},
    {"text": "the time now please", "intent": "time", "split": "train"},
]


@pytest.fixture
def file(tmp_path):
    place = tmp_path / "sentences.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return place


def encode(text: str) -> list[int]:
    return [sum(word.encode()) for word in text.split()]


def test_reads_a_split_or_all(file) -> None:
    assert read_sentences(file)[0] == [row["text"] for row in ROWS]
    assert read_sentences(file, "test") == (["tell me the time"], ["time"])


def test_rows_are_padded_and_grouped(file) -> None:
    texts, labels = read_sentences(file, "train")
    pool = sentence_pool(texts, labels, encode, padding=7)
    assert list(pool.classes) == ["music", "time"]
    assert pool.counts.tolist() == [2, 2]
    assert pool.samples.shape == (4, 4)
    assert pool.samples[2].tolist() == [sum(b"sing"), 7, 7, 7]
    assert sentence_pool(texts, labels, encode, longest=2).samples.shape == (4, 2)


def test_episodes_hold_no_column_of_padding_alone(file) -> None:
    texts, labels = read_sentences(file, "train")
    pool = sentence_pool([*texts, "a b c d e f g h i"], [*labels, "letters"], encode)
    drawn = EpisodeSampler(pool.select([1, 2]), ways=2, shots=1, queries=1, tasks=3, prepare=Trim(multiple=2)).sample()
    assert drawn.support[0].shape == (3, 2, 4)
    assert drawn.support[0].dtype == torch.int64
    assert Trim(7, 4)(torch.tensor([[1, 7, 7, 7, 7, 7], [1, 7, 2, 7, 7, 7]])).tolist() == [[1, 7, 7, 7], [1, 7, 2, 7]]
    assert Trim(7, 4)(torch.tensor([[1, 2, 1, 2, 3, 7]])).shape == (1, 6)  # no more than there is


def test_bad_input_is_named(file, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="must be a file"):
        read_sentences(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"split must be one of \['test', 'train'\].*got val"):
        read_sentences(file, "val")
    for line in ("{", "[1]", "3", '{"text": "a"}', '{"text": 1, "intent": "b"}', "\x00"):
        bad = tmp_path / "bad.jsonl"
        bad.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"line 2|strings"):
            read_sentences(bad)
    with pytest.raises(ValueError, match=r"give tokens that are not 0, got \[\] of 'b'"):
        sentence_pool(["a", "b"], ["x", "y"], lambda text: [1] if text == "a" else [])
    with pytest.raises(ValueError, match="give tokens that are not 0"):
        sentence_pool(["a"], ["x"], lambda text: [1, 0])
    with pytest.raises(ValueError, match="multiple"):
        Trim(0, 0)
