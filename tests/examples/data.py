"""Small data of the kinds that examples read, made up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

VERBS = ["book", "cancel", "find", "play", "order", "change", "translate", "explain"]
THINGS = ["flight", "song", "pizza", "hotel", "alarm", "recipe", "word", "payment"]
SMALL_TALK = ["please", "you", "want", "now", "for", "my", "a", "the", "hey", "quickly"]


def write_sentences(path: Path, each: int = 12) -> Path:
    """64 intents of two words each, amid small talk, in the form of ``clinc150.jsonl``."""
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for verb in VERBS:
            for thing in THINGS:
                for _ in range(each):
                    a, b, c = rng.choice(SMALL_TALK, 3)
                    row = {"text": f"{a} {verb} {b} {thing} {c}", "intent": f"{verb}_{thing}", "split": "train"}
                    file.write(json.dumps(row) + "\n")
    return path


def write_characters(path: Path, classes: int = 160, each: int = 7) -> Path:
    """Random glyphs of thick strokes, drawn again and again with a shaky hand, in the form of ``omniglot28.npz``."""
    rng = np.random.default_rng(0)
    images = np.full((classes, each, 28, 28), 255, np.uint8)
    for c in range(classes):
        strokes = rng.uniform(4, 24, (3, 2, 2))
        for e in range(each):
            for start, end in strokes + rng.normal(0, 0.7, strokes.shape):
                for x, y in np.round(np.linspace(start, end, 24)).astype(int).clip(1, 26):
                    images[c, e, x : x + 2, y : y + 2] = 0
    names = np.array([f"character{c}" for c in range(classes)])
    part = np.array(["images_background"] * classes)
    np.savez(path, images=images, split=part, alphabet=names, character=names)
    return path
