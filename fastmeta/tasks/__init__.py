"""Task batches and where they come from: sine waves, few-shot episodes, Omniglot, handwritten digits, sentences."""

from __future__ import annotations

from fastmeta.tasks.batch import TaskBatch
from fastmeta.tasks.digits import Digits, load_digits_pools
from fastmeta.tasks.download import cache_folder, fetch
from fastmeta.tasks.episodes import EpisodeSampler, SquareSymmetries, to_unit
from fastmeta.tasks.omniglot import Omniglot, load_omniglot
from fastmeta.tasks.pool import ClassPool
from fastmeta.tasks.sampler import TaskSampler
from fastmeta.tasks.sentences import Trim, read_sentences, sentence_pool
from fastmeta.tasks.sinusoid import Sinusoid
from fastmeta.tasks.task_set import TaskSet

__all__ = [
    "ClassPool",
    "Digits",
    "EpisodeSampler",
    "Omniglot",
    "Sinusoid",
    "SquareSymmetries",
    "TaskBatch",
    "TaskSampler",
    "TaskSet",
    "Trim",
    "cache_folder",
    "fetch",
    "load_digits_pools",
    "load_omniglot",
    "read_sentences",
    "sentence_pool",
    "to_unit",
]
