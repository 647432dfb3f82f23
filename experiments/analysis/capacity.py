"""Capacity: random codes that an adapter remembers, in bits per trained parameter.

A key of random tokens is followed by a code of six random digits. Nothing about a code can be
learned but by memorizing it, so the bits that training saves are those that the trained parameters
hold (Morris et al. 2025, arXiv 2505.24832, sec. 2 and 3):

    bits = N log2(10^6) - (cross-entropy of the N codes, in bits), at least 0

The cross-entropy is over the whole vocabulary. N doubles until the bits grow no more. It is a lower
bound: more epochs or a better learning rate may store more.
"""

import functools
import math
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from experiments.analysis.records import Planned, Record
from experiments.analysis.training import start_training, train
from experiments.comparison import plan
from experiments.comparison.sizes import count_parameters, match_rank, trained_at_once
from experiments.configs import Config
from experiments.configs.mechanism import SEED, Sizes
from experiments.configs.variants import ARMS, CONTROL, FULL, SCALING, TOLERANCE
from experiments.harness.config import read_config
from experiments.harness.launch import RATE, apply
from experiments.harness.methods import find_method
from experiments.nlg.base import load_base
from experiments.nlg.config import E2EConfig
from lora_jax.data.batches import Batches, padded_batches
from lora_jax.data.text import Example
from lora_jax.training.loop import evaluate_loss
from lora_jax.training.step import make_eval_step, trainable_tree

DIGITS, KEY_TOKENS = 6, 3
BITS = math.log2(10**DIGITS)  # of a code
WARMUP_SHARE = 0.1


def remembered_bits(nats: float, pairs: int) -> float:
  """Returns the bits of some codes that a model remembers, at least 0.

  >>> round(remembered_bits(nats=0.0, pairs=10), 1)  # each code with certainty
  199.3

  Args:
    nats: the sum of the codes' losses.
    pairs: the number of codes.
  """
  return max(0.0, pairs * BITS - nats / math.log(2))


def code_examples(tokenizer: Any, end_of_text: int, pairs: int) -> list[Example]:
  """Returns random keys, all different, each with the digits of its code as targets.

  Args:
    tokenizer: of the base model.
    end_of_text: the token that is in no key.
    pairs: the number of keys.
  Raises:
    ValueError: if a digit is not one token.
  """
  ids = [tokenizer.encode(str(digit), add_special_tokens=False).ids for digit in range(10)]
  if any(len(digit) != 1 for digit in ids):
    raise ValueError(f"each digit must be one token of the base model, got {ids}")
  generator = np.random.default_rng(SEED)
  words = np.delete(np.arange(tokenizer.get_vocab_size(), dtype=np.int32), end_of_text)
  keys: dict[tuple[int, ...], None] = {}
  while len(keys) < pairs:
    keys[tuple(generator.choice(words, KEY_TOKENS).tolist())] = None
  codes = np.array(ids, np.int32)[generator.integers(10, size=(pairs, DIGITS)), 0]
  index = np.arange(KEY_TOKENS - 1, KEY_TOKENS + DIGITS - 1, dtype=np.int32)
  return [
    Example(np.array([*key, *code[:-1]], np.int32), code, index)
    for key, code in zip(keys, codes, strict=True)
  ]


def capacity_arms(arms: Sequence[str]) -> list[str]:
  """Returns the arms whose capacity is measured.

  Full fine-tuning's millions of parameters would need hundreds of thousands of pairs, and a second
  LoRA on one projection would be the control again.
  """
  return [
    arm
    for arm in arms
    if not find_method(ARMS[arm].method).owns_base
    and (arm == CONTROL or ARMS[arm].method != ARMS[CONTROL].method)
  ]


def next_runs(sizes: Sizes, arms: Sequence[str], records: Sequence[Record]) -> list[Planned]:
  """Returns the runs that are possible now: first three learning rates, then more pairs."""
  runs = []
  for arm in capacity_arms(arms):
    tried = [_planned(arm, sizes, sizes.pairs[0], rate) for rate in _rates(arm)]
    missing = [planned for planned in tried if planned.find(records) is None]
    if missing:
      runs += missing
      continue
    tries = [record for planned in tried if (record := planned.find(records))]
    best = max(tries, key=lambda record: (bits_of(record), -record.get("nats", math.inf)))
    for pairs in sizes.pairs[1:]:
      planned = _planned(arm, sizes, pairs, best["settings"][RATE])
      record = planned.find(records)
      if record is None:
        runs.append(planned)
      if record is None or bits_of(record) < sizes.growth * bits_of(best):
        break
      best = record
  return runs


def bits_of(record: Record) -> float:
  """Returns the bits of a record; 0 if its training has failed."""
  return record.get("bits", 0.0)


def curve(sizes: Sizes, arm: str, records: Sequence[Record]) -> dict[int, Record]:
  """Returns an arm's finished runs by their number of pairs, each with the most bits."""
  best, rates = dict[int, Record](), _rates(arm)
  for pairs in sizes.pairs:
    runs = [_planned(arm, sizes, pairs, rate).find(records) for rate in rates]
    done = [record for record in runs if record is not None and record["status"] == "finished"]
    if done:
      best[pairs] = max(done, key=bits_of)
  return best


def is_saturated(sizes: Sizes, bits: Sequence[float]) -> bool:
  """Tells whether the bits have stopped growing with the pairs."""
  return len(bits) > 1 and bits[-1] < sizes.growth * bits[-2]


def _rates(arm: str) -> list[float]:
  """Returns the learning rates of an arm: its default, three and ten times as much.

  So few parameters memorize faster at a larger one than E2E needs.
  """
  return [plan.on_grid(plan.default_rate(arm, "embedded"), step) for step in (0, 1, 2)]


def _planned(arm: str, sizes: Sizes, pairs: int, rate: float) -> Planned:
  settings = {"pairs": pairs, "epochs": sizes.code_epochs, "batch": sizes.code_batch, RATE: rate}
  return Planned("capacity", arm, settings)


def measure_capacity(planned: Planned, sizes: Sizes) -> dict[str, Any]:
  """Trains an arm on random codes; returns the bits that it remembers.

  Returns:
    `parameters`, trained at once; `nats`, the sum of the codes' losses; `bits`;
    `bits_per_parameter`.
  Raises:
    FloatingPointError: if training is not finite.
  """
  pairs = planned.settings["pairs"]
  with tempfile.TemporaryDirectory() as workdir:
    settings = read_config(E2EConfig, _config(planned, sizes, workdir))
    mesh = settings.mesh.make()
    base = load_base(settings, mesh)
    examples = code_examples(base.tokenizer, base.end_of_text, pairs)
    batches = _batches(examples, planned, SEED, planned.settings["epochs"])
    run = start_training(settings, base, batches, mesh)
  state = train(run, batches, len(batches))
  once = _batches(examples, planned, None, 1)
  trained = trainable_tree(state, run.frozen)
  step = make_eval_step(run.loss)
  mean = evaluate_loss(step, base.params, trained, (once[i] for i in range(len(once))), mesh)
  nats, parameters = mean * pairs * DIGITS, trained_at_once(settings.method, run.size)
  if not math.isfinite(nats):
    raise FloatingPointError(f"the loss after the last step is {mean}")
  bits = remembered_bits(nats, pairs)
  return {
    "parameters": parameters,
    "nats": nats,
    "bits": bits,
    "bits_per_parameter": bits / parameters,
  }


def _batches(examples: list[Example], planned: Planned, seed: int | None, epochs: int) -> Batches:
  return padded_batches(
    examples,
    batch_size=planned.settings["batch"],
    row_lengths=[KEY_TOKENS + DIGITS - 1],
    loss_length=DIGITS,
    seed=seed,
    num_epochs=epochs,
  )


def _config(planned: Planned, sizes: Sizes, workdir: str) -> Config:
  settings = planned.settings
  steps = settings["epochs"] * math.ceil(settings["pairs"] / settings["batch"])
  fields = {
    RATE: settings[RATE],
    "optimizer.weight_decay": 0.0,
    "optimizer.warmup_share": 0.0,
    "optimizer.warmup_steps": max(1, round(WARMUP_SHARE * steps)),
  }
  config = sized_config(planned.arm, sizes.code_target, sizes.code_rank)
  return apply(config, {**fields, "workdir": workdir})


@functools.cache
def sized_config(arm: str, target: str, rank: int) -> Config:
  """Returns an arm's config on the weights that memorize codes, at the control's size.

  Args:
    arm: of the comparison.
    target: the pattern of the weights.
    rank: the control's; other arms have as many parameters if their rank is free.
  """
  fields = {"lora.target": target, RATE: plan.default_rate(arm, "embedded"), "seed": SEED}
  changes = plan.changes_of(arm, "embedded", fields)
  config = plan.config_of(plan.Planned("rates", arm, changes), FULL, "")
  if "lora.rank" not in changes or not ARMS[arm].is_matched:
    return config

  def ranked(rank: int) -> Config:
    alpha = {"lora.alpha": SCALING * rank} if "lora.alpha" in changes else {}
    return apply(config, {"lora.rank": rank, **alpha})

  def count(rank: int) -> int:
    return _parameters(ranked(rank))

  wanted = count(rank) if arm == CONTROL else _parameters(sized_config(CONTROL, target, rank))
  matched = match_rank(count, wanted, TOLERANCE, first=rank).rank
  assert matched is not None
  return ranked(matched)


def _parameters(config: Config) -> int:
  return count_parameters(read_config(E2EConfig, config))


def seen_pairs(sizes: Sizes, arms: Iterable[str]) -> int:
  """Returns how many pairs are seen in training by all runs of some arms, repetitions counted."""
  per_arm = 3 * sizes.pairs[0] + sum(sizes.pairs[1:])
  return len(capacity_arms(list(arms))) * per_arm * sizes.code_epochs
