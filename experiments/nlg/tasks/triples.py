"""WebNLG and DART: triples to text, by BLEU, METEOR and TER."""

from collections.abc import Sequence

from experiments.nlg.config import Texts
from experiments.nlg.tasks.task import Parts, Task, from_files
from lora_jax.data.sets import dart, dart_tfds, webnlg, webnlg_tfds
from lora_jax.data.sets.e2e import Record, Split
from lora_jax.metrics import data_to_text

COPY = "the triples as words"


def copied(contexts: Sequence[str], train: Sequence[Record]) -> list[str]:
  """Returns the words of each context's triples in their order: the floor of copying.

  >>> copied(["Alan_Bean : occupation : Test_pilot | Alan_Bean : status : Retired"], [])
  ['Alan Bean occupation Test pilot . Alan Bean status Retired .']
  """
  del train
  return [
    f"{context.replace(' : ', ' ').replace('_', ' ').replace(' | ', ' . ')} ."
    for context in contexts
  ]


def _parts(texts: Texts, split: Split) -> Parts:
  """Returns the contexts of WebNLG's test set by whether the training set has their category."""
  if split != "test":
    return {}
  return {
    part: {
      record.context
      for record in webnlg.read(f"test_{part}", texts.source, any_size=texts.any_size)
    }
    for part in ("seen", "unseen")
  }


def _load_dart(texts: Texts, split: Split) -> Sequence[Record]:
  try:
    return dart_tfds.load(split, texts.source, any_size=texts.any_size)
  except FileNotFoundError as error:
    if split != "train":
      raise
    raise FileNotFoundError(
      f"{error}; or choose data.name=dart_dev, which trains on a part of the development set"
    ) from error


WEBNLG = Task(
  webnlg.TITLE,
  from_files(webnlg_tfds.load),
  data_to_text.measure,
  tuple(f"{m}{part}" for m in ("bleu", "meteor", "mean_ter") for part in ("", "_seen", "_unseen")),
  floor=copied,
  floor_label=COPY,
  parts=_parts,
)
DART = Task(
  dart.TITLE,
  _load_dart,
  data_to_text.measure,
  data_to_text.METRICS,
  floor=copied,
  floor_label=COPY,
)
DART_DEV = DART._replace(
  title="DART-dev", load=from_files(dart_tfds.load, train="dev_train", valid="dev_valid")
)
"""Trained and validated on parts of the development set, where the training set is missing."""
