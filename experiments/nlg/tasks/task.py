"""A data set as a task: its records, its scores, and a floor that needs no model."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int32

from experiments.nlg.config import DecodedInputs, E2EData, Texts
from lora_jax.data.sets.e2e import Group, Record, Split
from lora_jax.metrics import Measured, intervals

Value = TypeVar("Value")
Load = Callable[[Texts, Split], Sequence[Record]]
Measure = Callable[[Sequence[Sequence[str]], Sequence[Sequence[str]]], list[Measured]]
Parts = Mapping[str, Collection[str]]


def no_parts(texts: Texts, split: Split) -> Parts:
  del texts, split
  return {}


def no_extras(
  texts: Sequence[str], groups: Sequence[Group], decoding: DecodedInputs
) -> Mapping[str, Any]:
  del texts, groups, decoding
  return {}


class Task(NamedTuple):
  """One data set.

  Attributes:
    title: the name of results on it.
    load: returns the records of a split, from the config's section `data`.
    measure: from the texts of several systems and each input's references to the systems'
      statistics; None for a task that is measured by its validation loss only.
    metrics: the columns of tables, the most important one first. A metric of a part of the inputs
      is named METRIC_PART.
    floor: returns texts for contexts without a model, given the training set.
    floor_label: what these texts are.
    parts: returns the contexts of each part of a split that is scored separately, too.
    extras: returns further fields of `result.json`, from a system's texts, the inputs and the
      config's section `decoding`.
    in_file_order: whether decoded inputs are the first of the file, as in stored runs of E2E;
      otherwise they are the first of a fixed random order, since files are sorted by topic.
    permutation: returns the ids that replace a tokenizer's, given the config's section `data`,
      their number and those that never move.
  """

  title: str
  load: Load
  measure: Measure | None
  metrics: tuple[str, ...]
  floor: Callable[[Sequence[str], Sequence[Record]], list[str]] | None = None
  floor_label: str = ""
  parts: Callable[[Texts, Split], Parts] = no_parts
  extras: Callable[[Sequence[str], Sequence[Group], DecodedInputs], Mapping[str, Any]] = no_extras
  in_file_order: bool = False
  permutation: Callable[[E2EData, int, Collection[int]], Int32[np.ndarray, " ids"]] | None = None


def from_files(load: Callable[..., Sequence[Record]], **splits: str) -> Load:
  """Returns the `load` of a task whose files are in the folder `data.source`.

  Args:
    load: of a data set's TFDS builder.
    splits: the builder's name of a split, where it is another one.
  """

  def read(texts: Texts, split: Split) -> Sequence[Record]:
    return load(splits.get(split, split), texts.source, any_size=texts.any_size)

  return read


def by_part(measured: Measured, groups: Sequence[Group], parts: Parts) -> dict[str, Measured]:
  """Returns the statistics of all inputs as part "", and of each part that has an input."""
  result = {"": measured}
  for part, contexts in parts.items():
    members = np.array([group.context in contexts for group in groups])
    if members.any():
      statistics = {
        name: dataclasses.replace(columns, rows=columns.rows[members])
        for name, columns in measured.statistics.items()
      }
      result[part] = Measured(statistics, measured.missing)
  return result


def by_name(values: Mapping[str, Mapping[str, Value]]) -> dict[str, Value]:
  """Returns the values of each part by the names of columns, METRIC_PART.

  >>> by_name({"": {"bleu": 1.0}, "seen": {"bleu": 2.0}})
  {'bleu': 1.0, 'bleu_seen': 2.0}
  """
  return {
    f"{name}_{part}" if part else name: value
    for part, by_metric in values.items()
    for name, value in by_metric.items()
  }


def scores_and_intervals(measured: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
  """Returns the fields `scores` and `intervals` of `result.json`; None where one is missing."""
  scores, ends = {}, {}
  for part, of_part in measured.items():
    values = {name: columns.score() for name, columns in of_part.statistics.items()}
    scores[part] = {**values, **dict.fromkeys(of_part.missing)}
    known = intervals(of_part) if of_part.statistics else dict.fromkeys(of_part.missing)
    ends[part] = {n: None if x is None else [x.low, x.high] for n, x in known.items()}
  return {
    "scores": by_name(scores) | {"missing": measured[""].missing},
    "intervals": by_name(ends),
  }
