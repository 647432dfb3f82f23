"""Batches of a GLUE or SuperGLUE task."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.classification.config import GlueConfig
from experiments.classification.encoder import Base
from experiments.harness.methods import slots_of
from experiments.harness.workdir import examples_digest
from lora_jax.data.classification import Batches, Example, bucketed_batches, encode, with_slots
from lora_jax.data.sets.glue import Record
from lora_jax.data.sets.glue_tfds import load


class Data(NamedTuple):
  """All batches of a run, and the records that it is evaluated on."""

  train: Batches
  valid: Batches
  num_train_records: int
  valid_records: list[Record]
  num_matched: int  # records of MNLI's matched part, which come first; 0 for other tasks
  digest: str  # of the examples


def load_data(config: GlueConfig, base: Base) -> Data:
  """Returns the batches of training and evaluation.

  With `data.tuning` both are parts of the training set, and the dev set is not read.
  """
  data = config.data
  train, valid, num_matched = _records(config)
  if data.num_train_records:
    train = train[: data.num_train_records]

  train_examples, valid_examples = (
    encode_records(config, base, records) for records in (train, valid)
  )
  return Data(
    bucketed_batches(
      train_examples,
      batch_size=data.batch_size,
      row_lengths=data.row_lengths,
      local_rows=config.local_rows(data.batch_size, config.fit.accumulation_steps),
      seed=config.seed,
      num_epochs=config.fit.num_epochs,
      window=data.window,
    ),
    bucketed_batches(
      valid_examples,
      batch_size=data.eval_batch_size,
      row_lengths=data.row_lengths,
      local_rows=config.local_rows(data.eval_batch_size),
      seed=None,
    ),
    len(train),
    valid,
    num_matched,
    examples_digest(train_examples, valid_examples),
  )


def encode_records(config: GlueConfig, base: Base, records: Sequence[Record]) -> list[Example]:
  """Returns the records as tokens that fit a row, with the slots of the run's method.

  Raises:
    ValueError: if the slots leave no room for a record.
  """
  slots, longest = slots_of(config), max(config.data.row_lengths)
  if slots.count and slots.count + base.tokenizer.num_special_tokens_to_add(True) >= longest:
    raise ValueError(
      f"the {slots.count} slots of prefix.num_prefix and prefix.num_infix leave no room in "
      f"data.row_lengths[-1]={longest}. Lower them"
    )
  return with_slots(encode(base.tokenizer, records, longest - slots.count), slots)


def _records(config: GlueConfig) -> tuple[list[Record], list[Record], int]:
  """Returns the records of training and evaluation, and the number of MNLI's matched ones."""
  data = config.data

  def records(split: str) -> list[Record]:
    return load(
      data.task,
      split,
      data.source,
      suite=data.suite,
      data_dir=data.tfds_dir or None,
      skip_malformed=data.skip_malformed,
      any_size=data.any_size,
    )

  train = records("train")
  if data.tuning:
    return *hold_out(train, data.tuning_share), 0
  if data.task == "mnli":  # the paper's accuracy is over both parts
    matched, mismatched = records("validation_matched"), records("validation_mismatched")
    return train, [*matched, *mismatched], len(matched)
  return train, records("validation"), 0


def hold_out(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
  """Splits records, the same way for every seed; those of one question stay together."""
  by_question: dict[int, list[Record]] = defaultdict(list)
  for i, record in enumerate(records):
    by_question[i if record.group is None else record.group].append(record)
  groups = list(by_question.values())
  order = np.random.default_rng(0).permutation(len(groups)).tolist()
  count = round(share * len(groups))
  valid, train = (
    [record for i in part for record in groups[i]] for part in (order[:count], order[count:])
  )
  return train, valid
