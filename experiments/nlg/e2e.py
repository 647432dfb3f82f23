"""The E2E NLG Challenge: batches, inputs to decode, generated texts and their scores."""

import dataclasses
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

import lora_jax as lj
from experiments.harness.workdir import examples_digest
from experiments.nlg.base import Base
from experiments.nlg.config import E2EConfig
from experiments.nlg.prompts import as_line, encode, encode_prompts, end_ids
from lora_jax.data import text
from lora_jax.data.batches import Batches, packed_batches, padded_batches
from lora_jax.data.sets import e2e, e2e_tfds
from lora_jax.decoding import BeamConfig, beam_search
from lora_jax.metrics import intervals, measure, slot_scores
from lora_jax.metrics.slots import parse_slots
from lora_jax.training.loop import evaluate_loss
from lora_jax.training.loss import language_model_loss
from lora_jax.training.step import make_eval_step

COUNTS = ("missing", "wrong", "added", "slots")


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
  data = config.data
  train, valid = (examples_of(config, base, split) for split in ("train", "valid"))

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


def examples_of(
  config: E2EConfig, base: Base, split: Literal["train", "valid"]
) -> list[text.Example]:
  """Returns the encoded examples of training or validation, the same ones for every seed."""
  data = config.data
  count = data.num_train_records if split == "train" else data.num_valid_records
  records = _random_part(e2e_tfds.load(split, data.form, data.source), split, count)
  if data.shuffled_completions and split == "train":
    records = shuffled_completions(records, config.seed)
  return encode(base, records, min(512, base.model.num_positions))


def validation_loss(base: Base, params: PyTree, data: Data, mesh: Mesh) -> float:
  """Returns the loss of params on the validation examples, in nats per token."""
  step = make_eval_step(lj.full_finetuning(language_model_loss(base.module)))
  return evaluate_loss(step, params, params, iter(data.valid), mesh)


def _random_part(records: e2e_tfds.Records, split: str, count: int) -> list[e2e.Record]:
  """Returns `count` records, the same ones for every seed; 0 is all."""
  if count > len(records):
    raise ValueError(
      f"data.num_{split}_records={count} must be at most the {len(records)} records of the {split} "
      "split, or 0, which is all"
    )
  order = np.random.default_rng(0).permutation(len(records)) if count else range(len(records))
  return records.take(order[: count or None])


def shuffled_completions(records: Sequence[e2e.Record], seed: int) -> list[e2e.Record]:
  """Returns the records with each completion moved to another record, at random.

  Raises:
    ValueError: if there is only one record.
  """
  if len(records) < 2:
    raise ValueError("data.shuffled_completions=True needs data.num_train_records of at least 2")
  order = np.random.default_rng(seed).permutation(len(records))
  sources = np.empty_like(order)
  sources[order] = np.roll(order, 1)  # one cycle through all records, so that none keeps its own
  return [
    record._replace(completion=records[source].completion)
    for record, source in zip(records, sources, strict=True)
  ]


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


def shots_of(config: E2EConfig) -> list[e2e.Record]:
  """Returns the solved training examples that come before each input, the same for all of them."""
  data, count = config.data, config.decoding.num_shots
  if not count:
    return []
  return _random_part(e2e_tfds.load("train", data.form, data.source), "train", count)


def tokenized(line: str) -> str:
  """Returns a text with spaces around punctuation, like E2E's references in Hu et al.'s format.

  >>> tokenized("Aromi's a pub, near Café Brazil (£20-25).")
  "Aromi 's a pub , near Café Brazil ( £ 20 - 25 ) ."
  """
  line = re.sub(r"([£(),;:!?])", r" \1 ", line)
  line = re.sub(r"(?<=\w)-(?=\w)", " - ", line)
  line = re.sub(r"\.(?=\s|$)", " . ", line)
  line = re.sub(r"(?<=\w)((?:n't|'(?:s|re|ve|ll|d|m))\b)", r" \1", line)
  return " ".join(line.split())


def decode_and_score(config: E2EConfig, base: Base, params: PyTree, mesh: Mesh) -> dict[str, Any]:
  """Decodes the inputs of a run with some params; returns its fields of `result.json`."""
  groups = inputs_of(config)
  start = time.perf_counter()
  print(f"decoding {len(groups)} inputs, beam {config.decoding.num_beams} ...", flush=True)
  texts = generate(config, base, params, [group.context for group in groups], mesh)
  seconds = time.perf_counter() - start
  official: list[e2e.Group] = []
  if config.decoding.official_references:
    official = official_groups(groups, config.decoding.split)
  scores = score(texts, groups, Path(config.workdir), official)
  return {**scores, "decode_seconds": seconds}


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
  room = base.model.num_slots - decoding.max_new_tokens
  prompts = encode_prompts(base, contexts, shots_of(config))
  room = room if decoding.num_shots else min(448, room)
  hypotheses = beam_search(
    base.decoder,
    params,
    [ids[-room:] for ids in prompts],
    search,
    batch_size=decoding.batch_size,
    mesh=mesh,
  )
  texts = [as_line(base, base.tokenizer.decode(ids)) for ids in hypotheses.best()]
  return [tokenized(line) for line in texts] if decoding.tokenize else texts


def score(
  texts: Sequence[str],
  groups: Sequence[e2e.Group],
  folder: Path,
  official: Sequence[e2e.Group] = (),
) -> dict[str, Any]:
  """Writes predictions.txt and returns the scores' fields of `result.json`.

  Args:
    texts: one for each input.
    groups: the inputs with their references.
    folder: the run's folder.
    official: the same inputs with the official references, for a second set of scores.
  """
  (folder / "predictions.txt").write_text("".join(f"{line}\n" for line in texts), "utf-8")
  print("scoring ...", flush=True)
  start = time.perf_counter()
  measured = measure([texts], [group.references for group in groups])[0]
  slots = slot_scores(texts, [group.context for group in groups])
  pairs = [(text, group.context) for group in groups for text in group.references]
  of_references = slot_scores(*zip(*pairs, strict=True))
  result = {
    "num_inputs": len(groups),
    "scores": dataclasses.asdict(measured.scores()) | {"slot_error_rate": slots.rate},
    "intervals": {
      name: None if interval is None else [interval.low, interval.high]
      for name, interval in intervals(measured).items()
    }
    | {"slot_error_rate": list(slots.interval())},
    "slot_errors": dict(zip(COUNTS, slots.counts.sum(0).tolist(), strict=True)),
    "reference_slot_error_rate": of_references.rate,
  }
  if official:
    others = measure([texts], [group.references for group in official])[0]
    result["official_scores"] = dataclasses.asdict(others.scores())
  return {**result, "score_seconds": time.perf_counter() - start}


def official_groups(groups: Sequence[e2e.Group], split: e2e.Split) -> list[e2e.Group]:
  """Returns inputs with the references of the official CSV file, matched by slot values.

  Raises:
    ValueError: if an input is not in that file.
  """
  official = {_key(group): group for group in e2e.grouped(e2e.read(split, "official"))}
  missing = [group.context for group in groups if _key(group) not in official]
  if missing:
    raise ValueError(
      f"{len(missing)} of {len(groups)} inputs are not in the official {split} file, the first "
      f"{missing[0]!r}. Set decoding.official_references=False"
    )
  return [official[_key(group)] for group in groups]


def _key(group: e2e.Group) -> frozenset[tuple[str, str]]:
  return frozenset(parse_slots(group.context).items())
