"""A data set of texts: batches, inputs to decode, generated texts and their scores."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

import lora_jax as lj
from experiments.harness.methods import adapt, find_method, slots_of
from experiments.harness.workdir import examples_digest
from experiments.nlg.base import Base
from experiments.nlg.config import DecodedInputs, E2EConfig, Texts
from experiments.nlg.prompts import as_line, encode, encode_prompts, end_ids
from experiments.nlg.tasks.e2e import tokenized
from experiments.nlg.tasks.table import TASKS, title
from experiments.nlg.tasks.task import by_part, scores_and_intervals
from lora_jax.data import text
from lora_jax.data.batches import Batches, packed_batches, padded_batches
from lora_jax.data.sets import e2e, e2e_tfds
from lora_jax.decoding import BeamConfig, beam_search
from lora_jax.metrics import Measured
from lora_jax.training.loop import evaluate_loss
from lora_jax.training.loss import language_model_loss
from lora_jax.training.processes import from_first
from lora_jax.training.step import make_eval_step

LONGEST_TEXT = 64  # tokens of an example that Hu et al.'s code keeps for the text when it decodes


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

  def batches(
    examples: list[text.Example], seed: int | None, epochs: int, accumulation_steps: int = 1
  ) -> Batches:
    shape: dict[str, Any] = {
      "batch_size": data.batch_size,
      "loss_length": data.loss_length,
      "seed": seed,
      "num_epochs": epochs,
      "local_rows": config.local_rows(data.batch_size, accumulation_steps),
    }
    if data.packing:
      return packed_batches(examples, row_length=data.row_length, **shape)
    return padded_batches(examples, row_lengths=[data.row_length], **shape)

  in_epochs = batches(train, config.seed, data.num_epochs, config.fit.accumulation_steps)
  once = batches(valid, None, 1)
  return Data(in_epochs, once, len(train), examples_digest(train, valid))


def examples_of(
  config: E2EConfig, base: Base, split: Literal["train", "valid"]
) -> list[text.Example]:
  """Returns the encoded examples of training or validation, the same ones for every seed."""
  data, task = config.data, TASKS[config.data.name]
  count = data.num_train_records if split == "train" else data.num_valid_records
  records = _random_part(task.load(data, split), split, count)
  if data.shuffled_completions and split == "train":
    records = shuffled_completions(records, config.seed)
  slots = slots_of(config)
  limit = min(data.max_length, base.model.num_positions) - slots.count
  if slots.count and limit < 2:
    raise ValueError(
      f"the {slots.count} slots of prefix.num_prefix and prefix.num_infix leave no room in "
      f"data.max_length={data.max_length} and the model's {base.model.num_positions} positions. "
      "Lower them"
    )
  examples = encode(base, records, limit)
  if task.permutation is None:
    return text.with_slots(examples, slots)
  kept = {base.end_of_text, *base.text.end_ids}
  ids = task.permutation(data, base.tokenizer.get_vocab_size(), kept)
  permuted = [
    example._replace(tokens=ids[example.tokens], targets=ids[example.targets])
    for example in examples
  ]
  return text.with_slots(permuted, slots)


def served(config: E2EConfig, method: lj.Adaptation, params: PyTree, trained: PyTree) -> PyTree:
  """Returns the params of `Base.decoder`: merged, or base model and adapter side by side.

  Args:
    config: of the run.
    method: its method, applied to any function.
    params: of the base model.
    trained: the trained tree.
  """
  if not find_method(config.method).merges:
    return {"base": params, "adapter": trained}
  return method.merge(lj.dequantize(params), trained)


def validation_loss(config: E2EConfig, base: Base, params: PyTree, data: Data, mesh: Mesh) -> float:
  """Returns the loss of served params on the validation examples, in nats per token."""
  loss = language_model_loss(base.module)
  if find_method(config.method).merges:
    step = make_eval_step(lj.full_finetuning(loss))
    return evaluate_loss(step, params, params, iter(data.valid), mesh)
  step = make_eval_step(adapt(config)(loss))
  return evaluate_loss(step, params["base"], params["adapter"], iter(data.valid), mesh)


def _random_part(records: Sequence[e2e.Record], split: str, count: int) -> list[e2e.Record]:
  """Returns `count` records, the same ones for every seed; 0 is all."""
  if count > len(records):
    raise ValueError(
      f"data.num_{split}_records={count} must be at most the {len(records)} records of the {split} "
      "split, or 0, which is all"
    )
  order = np.random.default_rng(0).permutation(len(records)) if count else range(len(records))
  return _take(records, order[: count or None])


def _take(records: Sequence[e2e.Record], indices: Iterable[int]) -> list[e2e.Record]:
  if isinstance(records, e2e_tfds.Records):
    return records.take(indices)  # in one read
  return [records[int(i)] for i in indices]


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


def decoded_inputs(texts: Texts, split: e2e.Split, count: int) -> list[e2e.Group]:
  """Returns the first distinct inputs of a split, with their references.

  They are the first of E2E's file, and of a fixed random order of the other data sets' inputs.

  Raises:
    ValueError: if there are fewer.
  """
  if not count:
    return []
  task = TASKS[texts.name]
  groups = e2e.grouped(task.load(texts, split))
  if count > len(groups):
    raise ValueError(
      f"decoding.num_inputs={count} must be at most the {len(groups)} distinct inputs of the "
      f"{split} split"
    )
  if task.in_file_order:
    return groups[:count]
  return [groups[i] for i in np.random.default_rng(0).permutation(len(groups))[:count]]


def inputs_of(config: E2EConfig) -> list[e2e.Group]:
  """Returns the inputs that a run decodes."""
  return decoded_inputs(config.data, config.decoding.split, config.decoding.num_inputs)


def shots_of(config: E2EConfig) -> list[e2e.Record]:
  """Returns the solved training examples that come before each input, the same for all of them."""
  data, count = config.data, config.decoding.num_shots
  if not count:
    return []
  return _random_part(TASKS[data.name].load(data, "train"), "train", count)


def decode_and_score(config: E2EConfig, base: Base, params: PyTree, mesh: Mesh) -> dict[str, Any]:
  """Decodes the inputs of a run with some params; returns its fields of `result.json`."""
  groups = inputs_of(config)
  start = time.perf_counter()
  print(f"decoding {len(groups)} inputs, beam {config.decoding.num_beams} ...", flush=True)
  texts = generate(config, base, params, [group.context for group in groups], mesh)
  seconds = time.perf_counter() - start
  scores = from_first(
    lambda: score(texts, groups, Path(config.workdir), config.data, config.decoding)
  )
  return {**scores, "decode_seconds": seconds}


def generate(
  config: E2EConfig, base: Base, params: PyTree, contexts: Sequence[str], mesh: Mesh
) -> list[str]:
  """Returns one text for each context, in one line, by beam search; params as `served` returns."""
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
  slots = slots_of(config)
  room = base.model.num_slots - decoding.max_new_tokens - slots.count
  prompts = encode_prompts(base, contexts, shots_of(config))
  room = room if decoding.num_shots else min(config.data.max_length - LONGEST_TEXT, room)
  hypotheses = beam_search(
    base.decoder,
    params,
    [slots.around(ids) for ids in last_tokens(prompts, room)],
    search,
    batch_size=decoding.batch_size,
    mesh=mesh,
  )
  texts = [as_line(base, base.tokenizer.decode(ids)) for ids in hypotheses.best()]
  return [tokenized(line) for line in texts] if decoding.tokenize else texts


def last_tokens(prompts: Sequence[list[int]], room: int) -> list[list[int]]:
  """Returns the last tokens of each prompt, at most `room`; prints how many prompts are cut."""
  if cut := sum(len(ids) > room for ids in prompts):
    print(f"{cut} of {len(prompts)} prompts are longer than {room} tokens, and lose their start")
  return [ids[-room:] for ids in prompts]


def score(
  texts: Sequence[str],
  groups: Sequence[e2e.Group],
  folder: Path,
  data: Texts,
  decoding: DecodedInputs,
) -> dict[str, Any]:
  """Writes predictions.txt and returns the scores' fields of `result.json`.

  Args:
    texts: one for each input.
    groups: the inputs with their references.
    folder: the run's folder.
    data: the config's section on the data set.
    decoding: the config's section on the inputs.
  """
  (folder / "predictions.txt").write_text("".join(f"{line}\n" for line in texts), "utf-8")
  print("scoring ...", flush=True)
  start = time.perf_counter()
  result: dict[str, Any] = {"num_inputs": len(groups)}
  result |= scores_and_intervals(measure_parts([texts], groups, data, decoding.split)[0])
  for name, value in TASKS[data.name].extras(texts, groups, decoding).items():
    result[name] = {**result[name], **value} if name in result else value
  return {**result, "score_seconds": time.perf_counter() - start}


def read_predictions(folder: Path, count: int) -> list[str]:
  """Returns the texts that `score` has written into a run's folder, one for each of its inputs.

  Raises:
    ValueError: if there are more or fewer.
  """
  path = folder / "predictions.txt"
  texts = path.read_text("utf-8").removesuffix("\n").split("\n")
  if len(texts) != count:
    raise ValueError(f"{path}: expected {count} lines, one per input, got {len(texts)}")
  return texts


def measure_parts(
  systems: Sequence[Sequence[str]], groups: Sequence[e2e.Group], data: Texts, split: e2e.Split
) -> list[dict[str, Measured]]:
  """Returns each system's statistics over all inputs, "", and over each part of them.

  Args:
    systems: for each system, one text for each input.
    groups: the inputs with their references.
    data: the config's section on the data set.
    split: of the inputs.
  Raises:
    ValueError: if the data set has no texts to score.
  """
  task = TASKS[data.name]
  if task.measure is None:
    raise ValueError(f"{title(data)} is measured by its validation loss; it has no texts to score")
  measured = task.measure(systems, [group.references for group in groups])
  parts = task.parts(data, split)
  return [by_part(system, groups, parts) for system in measured]
