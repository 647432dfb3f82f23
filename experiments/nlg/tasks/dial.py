"""A dial for the distance of a task from pretraining: Wikipedia with a permuted vocabulary.

Records are pieces of articles without an input, so that every token of a piece is supervised. The
permutation replaces the tokens after they are encoded; end tokens stay. A run is measured by its
validation loss: a text in permuted tokens has no reference, so nothing is decoded.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from experiments.nlg.config import E2EData, Texts
from experiments.nlg.tasks.task import Task
from lora_jax.data import corpus
from lora_jax.data.sets import permuted
from lora_jax.data.sets.e2e import Record, Split

WORDS = 80  # of a piece: about 120 tokens of SmolLM2's, and 160 of the embedded base model's
HELD_OUT_EVERY = 10  # articles
SEED = 0  # of the permutation, the same for every run


def _load(texts: Texts, split: Split) -> Sequence[Record]:
  """Returns pieces of the articles in a folder of text files, or of the 39 embedded ones.

  Every tenth article is held out, for validation.
  """
  train, held_out = corpus.split(corpus.documents(_files(texts.source)), HELD_OUT_EVERY)
  return [
    Record("", piece)
    for text in (train if split == "train" else held_out)
    for piece in _pieces(text)
  ]


def _files(source: str) -> list[Path]:
  if source == "embedded":
    return [Path(str(resources.files("lora_jax") / "assets" / "wikipedia" / "held_out.txt.xz"))]
  return corpus.find_files(source)


def _pieces(text: str) -> Iterator[str]:
  """Yields a text in pieces of at most `WORDS` words, with their line breaks."""
  words = re.findall(r"\S+\s*", text)
  for start in range(0, len(words), WORDS):
    yield "".join(words[start : start + WORDS]).rstrip()


def _permutation(
  data: E2EData, vocab_size: int, kept: Collection[int]
) -> Int32[np.ndarray, " ids"]:
  return permuted.permutation(vocab_size, data.percent, SEED, kept)


DIAL = Task("Wikipedia, permuted vocabulary", _load, None, (), permutation=_permutation)
