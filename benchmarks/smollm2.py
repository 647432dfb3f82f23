"""Times SmolLM2-135M, in float32: one LoRA step against PEFT, decoding against transformers.

    make smollm2                                     # fetches the model, once
    python -m benchmarks.smollm2                     # about ten minutes on two free cores
    python -m benchmarks.smollm2 --only full packed  # some of the rows

LoRA of rank 16 on all linear layers and AdamW, on E2E's training examples; both implementations
start from the same weights, get exactly the same batches, and must have the same first loss:

    full      8 rows of 128 tokens without padding, a loss at every token
    padded    16 examples, one a row, padded to the longest; a loss on the completions
    packed    5 rows of 256 tokens, several examples a row; a loss on the completions

lora_jax computes logits only for supervised tokens. Decoding is by the base model, which seldom
ends its texts, so that most have 64 new tokens:

    greedy    100 of the test inputs in batches of 20
    beam      20 inputs in batches of 5 by default; 10 beams, no repeated 4-grams

The implementations take turns, so that other work on the machine slows both; `x` is the median of
the turns' ratios of lora_jax's time to the peer's, and `x_cpu` that of CPU time, all threads.

    compile_s   seconds of lora_jax's first call beyond those of a later one
    ours, peer  seconds of a step, or of decoding all inputs, median
    tokens/s    of lora_jax: tokens without padding, or generated tokens
    floor       tokens/s if a step had only its matmuls with weights, at the speed of a matmul of
                2048 x 2048 (`e2e_epoch.matmul_operations`)

The last line compares the time for a token of lora_jax's packed rows with that of PEFT's
padded ones: what a user gains who would pad with PEFT. The two are not measured in turns.

Torch's threads wait for each other, so with several threads its times mean little while other work
shares the cores. In that case give both one core: `taskset -c 0 python -m benchmarks.smollm2`.
"""

import argparse
import dataclasses
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import decode, e2e_epoch
from experiments.harness.flops import matmul_flops
from lora_jax.data import batches, text
from lora_jax.data.sets import e2e
from lora_jax.decoding import BeamConfig, CachedModel, SamplingConfig, from_linen, generate
from lora_jax.models.checkpoints.pretrained import find_pretrained
from lora_jax.models.text.tokenizer import end_of_text_id, load_tokenizer
from lora_jax.models.zoo import LanguageModel, load_causal_lm
from lora_jax.training.allocator import keep_freed_memory

TARGET = r".*/(attn/(query|key|value|out)|mlp/(gate|up|down))/kernel"
PEFT_TARGET = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
STEPS, DECODING = ("full", "padded", "packed"), ("greedy", "beam")
GOALS = {"full": 0.85, "padded": 0.85, "packed": 0.6, "beam": 0.5}
PACKED_TO_PADDED_GOAL = 0.45
AGREEMENT = 1e-4  # of first losses, relative
NEW_TOKENS = 64
LIMITS = {"greedy_inputs": 630, "beam_inputs": 630, "repeats": 1000, "decode_repeats": 1000}
HEADS = ("compile_s", "ours", "peer", "x", "x_cpu", "goal", "tokens/s", "floor")


@dataclasses.dataclass
class Row:
  """The measurements of one row: wall-clock and CPU seconds of each turn.

  Attributes:
    first: wall-clock seconds of lora_jax's first call.
    tokens: of each turn of lora_jax.
    floor: tokens per second, or None.
    note: on the agreement of the outputs.
  """

  first: float
  note: str
  ours: list[tuple[float, float]] = dataclasses.field(default_factory=list)
  peer: list[tuple[float, float]] = dataclasses.field(default_factory=list)
  tokens: list[int] = dataclasses.field(default_factory=list)
  floor: float | None = None

  def ratio(self, column: int) -> float | None:
    """Returns the median ratio of wall-clock (0) or CPU (1) times; None without a peer."""
    pairs = list(zip(self.ours, self.peer, strict=False))
    return statistics.median(a[column] / b[column] for a, b in pairs) if pairs else None


def timed(call: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
  """Returns the wall-clock and CPU seconds of a call, and its result."""
  wall, cpu = time.perf_counter(), time.process_time()
  result = call()
  return (time.perf_counter() - wall, time.process_time() - cpu), result


# ---- a step ----------------------------------------------------------------------------


def make_batches(name: str, examples: Sequence[text.Example], repeats: int) -> list[batches.Batch]:
  """Returns the batches of the first step and of each turn."""
  count = repeats + 1
  if name == "full":
    stream = np.concatenate([example.tokens for example in examples])
    rows = stream[: count * 8 * 129].reshape(count, 8, 129)
    return [_full(row) for row in rows]
  if name == "padded":
    used = examples[: count * 16]
    longest = max(len(example.tokens) for example in used)
    targets = max(len(example.targets) for example in used)
    data = batches.padded_batches(
      used, batch_size=16, row_lengths=[longest], loss_length=targets, seed=None
    )
  else:
    targets = batches.suggest_loss_length(examples, 256)
    data = batches.packed_batches(
      examples, batch_size=5, row_length=256, loss_length=targets, seed=0
    )
  return [data[i] for i in range(count)]


def _full(rows: np.ndarray) -> batches.Batch:
  tokens = rows[:, :-1]
  index = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  return batches.Batch(
    tokens=tokens,
    positions=index,
    segment_ids=np.ones_like(tokens),
    target_index=index,
    targets=rows[:, 1:],
    target_weights=np.ones(tokens.shape, np.float32),
  )


def measure_step(
  name: str,
  model: LanguageModel,
  folder: Path | None,
  examples: Sequence[text.Example],
  repeats: int,
  flops: float,
) -> Row:
  """Times a step of both on the same batches; raises ValueError if their first losses differ."""
  first, *turns = make_batches(name, examples, repeats)
  ours = e2e_epoch.make_jax(model.module, model.params, first, TARGET)
  (seconds, _), loss = timed(lambda: float(ours.step(first)))
  row = Row(seconds, f"first loss {loss:.5f}")
  operations = e2e_epoch.matmul_operations(model.params, ours.num_trainable, first)
  row.floor = flops * int(np.count_nonzero(first["segment_ids"])) / operations
  peer = None
  if folder is not None:
    peer = e2e_epoch.make_peft(folder, "float32", name == "packed", PEFT_TARGET, False)
    expected = float(peer.step(first))
    row.note += f", PEFT's {expected:.5f}"
    if not abs(loss - expected) <= AGREEMENT * expected:
      raise ValueError(f"{name}: the first losses differ: {row.note}")
  for number, batch in enumerate(turns):
    row.tokens.append(int(np.count_nonzero(batch["segment_ids"])))
    pairs = [(ours, row.ours)] + ([] if peer is None else [(peer, row.peer)])
    for trainer, times in pairs[:: -1 if number % 2 else 1]:
      times.append(timed(lambda trainer=trainer, batch=batch: _one_step(trainer, batch))[0])
  return row


def _one_step(trainer: e2e_epoch.Trainer, batch: batches.Batch) -> None:
  trainer.step(batch)
  trainer.wait()


# ---- decoding --------------------------------------------------------------------------


def greedy_search(model: CachedModel, params: Any, end: int) -> decode.Search:
  """Returns `search(prompts, batch_size)` by lora_jax; the outputs end with the end token."""
  config = SamplingConfig(eos_ids=(end,), temperature=0.0, max_new_tokens=NEW_TOKENS)

  def search(prompts: decode.Prompts, batch_size: int) -> decode.Decoded:
    outputs = generate(model, params, prompts, config, batch_size=batch_size)
    outputs = [ids if len(ids) == NEW_TOKENS else [*ids, end] for ids in outputs]
    return decode.Decoded(outputs, np.zeros(len(prompts)), 0)

  return search


def measure_decoding(
  name: str,
  model: LanguageModel,
  folder: Path | None,
  prompts: decode.Prompts,
  batch_size: int,
  end: int,
  repeats: int,
) -> Row:
  """Times decoding of both, and counts equal outputs."""
  beams, ngram = (10, 4) if name == "beam" else (1, 0)
  config = BeamConfig(
    eos_ids=(end,), num_beams=beams, no_repeat_ngram_size=ngram, max_new_tokens=NEW_TOKENS
  )
  cached = from_linen(model.module, model.init_cache, model.num_positions)
  if name == "beam":
    ours = decode.lora_jax_search(cached, model.params, config)
  else:
    ours = greedy_search(cached, model.params, end)
  (seconds, _), _ = timed(lambda: ours(prompts, batch_size))
  row = Row(seconds, "")
  searches = [(ours, row.ours)]
  if folder is not None:
    threads = len(os.sched_getaffinity(0))
    searches.append((decode.transformers_search(folder, config, threads), row.peer))
  outputs: list[Any] = [None, None]
  for number in range(repeats):
    for i in (0, 1)[: len(searches)][:: -1 if number % 2 else 1]:
      search, times = searches[i]
      seconds, outputs[i] = timed(lambda search=search: search(prompts, batch_size))
      times.append(seconds)
    row.tokens.append(sum(map(len, outputs[0].outputs)))
  if folder is not None:
    equal = sum(a == b for a, b in zip(outputs[0].outputs, outputs[1].outputs, strict=True))
    row.note = f"equal outputs: {equal} of {len(prompts)}"
  return row


# ---- the report ------------------------------------------------------------------------


def print_row(name: str, row: Row) -> None:
  ours = statistics.median(wall for wall, _ in row.ours)
  speed = statistics.median(n / wall for n, (wall, _) in zip(row.tokens, row.ours, strict=True))

  def cell(number: float | None, digits: int) -> str:
    return f"{'-':>9}" if number is None else f"{number:9.{digits}f}"

  peer = statistics.median(wall for wall, _ in row.peer) if row.peer else None
  print(
    f"{name:8}{cell(max(row.first - ours, 0), 1)}{cell(ours, 2)}{cell(peer, 2)}"
    f"{cell(row.ratio(0), 2)}{cell(row.ratio(1), 2)}{cell(GOALS.get(name), 2)}"
    f"{cell(speed, 0)}{cell(row.floor, 0)}   {row.note}",
    flush=True,
  )


def packed_to_padded(packed: Row, padded: Row, column: int) -> float:
  """Returns the time per token of lora_jax's packed rows over that of the peer's padded rows.

  Args:
    column: wall-clock (0) or CPU (1) time.
  """

  def per_token(row: Row, times: list[tuple[float, float]]) -> float:
    return statistics.median(
      turn[column] / count for turn, count in zip(times, row.tokens, strict=True)
    )

  return per_token(packed, packed.ours) / per_token(padded, padded.peer)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description="SmolLM2: lora_jax against PEFT and transformers.")
  parser.add_argument("--only", nargs="+", choices=STEPS + DECODING, default=STEPS + DECODING)
  parser.add_argument("--repeats", type=int, default=6, help="turns of a step")
  parser.add_argument("--decode_repeats", type=int, default=1, help="turns of decoding")
  parser.add_argument("--greedy_inputs", type=int, default=100)
  parser.add_argument("--beam_inputs", type=int, default=20)
  options = parser.parse_args(arguments)
  for name, most in LIMITS.items():
    if not 1 <= (count := getattr(options, name)) <= most:
      parser.error(f"argument --{name}: expected 1 to {most}, got {count}")
  return options


def decoded_contexts() -> list[str]:
  """Returns the distinct test inputs: 200 drawn at random, then all others."""
  contexts = [group.context for group in e2e.grouped(e2e.read("test"))]
  drawn = random.Random(0).sample(contexts, 200)
  return [*drawn, *(context for context in contexts if context not in set(drawn))]


def main(arguments: Sequence[str] | None = None) -> dict[str, Row]:
  options = parse(arguments)
  missing, rows = e2e_epoch.missing_peers(), {}
  print(f"JAX {jax.__version__}, {jax.devices()[0].platform}, {vars(options)}")
  if missing:
    print(f"the peers are left out; missing: {', '.join(missing)}")
  else:
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(len(os.sched_getaffinity(0)))
  path = find_pretrained("smollm2")
  tokenizer = load_tokenizer(path)
  end = end_of_text_id(tokenizer)
  records = random.Random(0).sample(e2e.read("train"), 400)
  examples = text.encode(tokenizer, records, end, 256)
  prompts = text.encode_context(tokenizer, decoded_contexts(), end)
  model, flops = load_causal_lm(path), matmul_flops()
  print(f"a matmul of 2048 x 2048: {flops / 1e9:.0f} gflop/s\n")
  print(f"{'':8}" + "".join(f"{head:>9}" for head in HEADS), flush=True)
  with tempfile.TemporaryDirectory() as scratch, jax.default_matmul_precision("highest"):
    folder = None if missing else Path(scratch) / "smollm2"
    if folder is not None:
      model.save(folder, model.params)
    for name in options.only:
      if name in STEPS:
        row = measure_step(name, model, folder, examples, options.repeats, flops)
      else:
        count, size = {
          "greedy": (options.greedy_inputs, 20),
          "beam": (options.beam_inputs, 5),
        }[name]
        row = measure_decoding(
          name, model, folder, prompts[:count], size, end, options.decode_repeats
        )
      rows[name] = row
      print_row(name, row)
  if {"packed", "padded"} <= rows.keys() and not missing:
    wall, cpu = (packed_to_padded(rows["packed"], rows["padded"], column) for column in (0, 1))
    print(
      f"\na token of packed rows, to one of the peer's padded rows: x {wall:.2f}, x_cpu {cpu:.2f} "
      f"(at most {PACKED_TO_PADDED_GOAL})"
    )
  return rows


if __name__ == "__main__":
  keep_freed_memory()
  main()
