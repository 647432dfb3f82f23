"""The E2E NLG Challenge: batches, inputs to decode, generated texts and their scores."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from experiments.harness.workdir import examples_digest
from experiments.nlg.config import E2EConfig
from experiments.nlg.gpt2 import Base, cached_model
from lora_jax.data import text
from lora_jax.data.batches import Batches, packed_batches, padded_batches
from lora_jax.data.sets import e2e, e2e_tfds
from lora_jax.decoding import BeamConfig, beam_search
from lora_jax.metrics import intervals, measure


class Data(NamedTuple):
  """All batches of a run."""

  train: Batches
  valid: Batches
  num_train_records: int
  digest: str  # of the examples


def load_data(config: E2EConfig, base: Base) -> Data:
  """Returns the batches of training and validation.

  Raises:
    ValueError: if there are fewer examples than the config says, or fewer inputs to decode.
  """
  inputs_of(config)  # so that an error comes before training
  data, limit = config.data, min(512, base.config.num_positions)

  def examples(split: e2e.Split, count: int) -> list[text.Example]:
    records = _random_part(e2e_tfds.load(split, data.form, data.source), split, count)
    return text.encode(base.tokenizer, records, base.end_of_text, limit, truncate=True)

  train = examples("train", data.num_train_records)
  valid = examples("valid", data.num_valid_records)

  def batches(examples: list[text.Example], seed: int | None, epochs: int) -> Batches:
    shape: dict[str, Any] = {
      "batch_size": data.batch_size,
      "loss_length": data.loss_length,
      "seed": seed,
      "num_epochs": epochs,
      "shard_index": jax.process_index(),
      "shard_count": jax.process_count(),
    }
    if data.packing:
      return packed_batches(examples, row_length=data.row_length, **shape)
    return padded_batches(examples, row_lengths=[data.row_length], **shape)

  in_epochs, once = batches(train, config.seed, data.num_epochs), batches(valid, None, 1)
  return Data(in_epochs, once, len(train), examples_digest(train, valid))


def _random_part(records: e2e_tfds.Records, split: str, count: int) -> list[e2e.Record]:
  """Returns `count` records, the same ones for every seed; 0 is all."""
  if count > len(records):
    raise ValueError(
      f"data.num_{split}_records={count} must be at most the {len(records)} records of the {split} "
      "split, or 0, which is all"
    )
  order = np.random.default_rng(0).permutation(len(records)) if count else range(len(records))
  return records.take(order[: count or None])


def decoded_inputs(form: e2e.Form, source: str, split: e2e.Split, count: int) -> list[e2e.Group]:
  """Returns the first distinct inputs of a split, with their references.

  Raises:
    ValueError: if there are fewer.
  """
  groups = e2e.grouped(e2e_tfds.load(split, form, source))
  if count > len(groups):
    raise ValueError(
      f"decoding.num_inputs={count} must be at most the {len(groups)} distinct inputs of the "
      f"{split} split"
    )
  return groups[:count]


def inputs_of(config: E2EConfig) -> list[e2e.Group]:
  """Returns the inputs that a run decodes."""
  data, decoding = config.data, config.decoding
  return decoded_inputs(data.form, data.source, decoding.split, decoding.num_inputs)


def decode_and_score(config: E2EConfig, base: Base, params: PyTree, mesh: Mesh) -> dict[str, Any]:
  """Decodes the inputs of a run with some params; returns its fields of `result.json`."""
  groups = inputs_of(config)
  start = time.perf_counter()
  print(f"decoding {len(groups)} inputs, beam {config.decoding.num_beams} ...", flush=True)
  texts = generate(config, base, params, [group.context for group in groups], mesh)
  seconds = time.perf_counter() - start
  return {**score(texts, groups, Path(config.workdir)), "decode_seconds": seconds}


def end_ids(base: Base) -> tuple[int, ...]:
  """Returns the tokens that end a text: the end of text, and a blank line if it is one token."""
  newlines = base.tokenizer.encode("\n\n", add_special_tokens=False).ids
  return (base.end_of_text, *(newlines if len(newlines) == 1 else ()))


def generate(
  config: E2EConfig, base: Base, params: PyTree, contexts: Sequence[str], mesh: Mesh
) -> list[str]:
  """Returns one text for each context, in one line, by beam search."""
  decoding = config.decoding
  search = BeamConfig(
    eos_ids=end_ids(base),
    num_beams=decoding.num_beams,
    length_penalty=decoding.length_penalty,
    no_repeat_ngram_size=decoding.no_repeat_ngram_size,
    max_new_tokens=decoding.max_new_tokens,
    pad_id=base.end_of_text,
    scoring=decoding.scoring,
  )
  room = min(448, base.config.num_positions - decoding.max_new_tokens)
  prompts = text.encode_context(base.tokenizer, contexts, base.end_of_text)
  hypotheses = beam_search(
    cached_model(base.config),
    params,
    [ids[-room:] for ids in prompts],
    search,
    batch_size=decoding.batch_size,
    mesh=mesh,
  )
  texts = (base.tokenizer.decode(ids).split("\n\n")[0] for ids in hypotheses.best())
  return [" ".join(text.splitlines()).strip() for text in texts]


def score(texts: Sequence[str], groups: Sequence[e2e.Group], folder: Path) -> dict[str, Any]:
  """Writes predictions.txt and returns the scores' fields of `result.json`.

  Args:
    texts: one for each input.
    groups: the inputs with their references.
    folder: the run's folder.
  """
  (folder / "predictions.txt").write_text("".join(f"{line}\n" for line in texts), "utf-8")
  print("scoring ...", flush=True)
  start = time.perf_counter()
  measured = measure([texts], [group.references for group in groups])[0]
  return {
    "num_inputs": len(groups),
    "scores": dataclasses.asdict(measured.scores()),
    "intervals": {
      name: None if interval is None else [interval.low, interval.high]
      for name, interval in intervals(measured).items()
    },
    "score_seconds": time.perf_counter() - start,
  }
