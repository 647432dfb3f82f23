"""Times one epoch over the same E2E examples: lora_jax against PEFT with PyTorch.

    python -m benchmarks.e2e_epoch                          # the embedded base model
    python -m benchmarks.e2e_epoch --model small --lines 320 --steps 1 --without_padded
    python -m benchmarks.e2e_epoch --model small --lines 0 --rows 32 --dtype bfloat16    # a GPU

Four ways to train the same weights with LoRA of all linear layers and AdamW, with the same average
number of examples in a step:

    lora_jax packed   several examples a row; logits only for supervised tokens
    lora_jax padded   one example a row, all rows padded to 512 tokens (or the model's positions, if
                      fewer), as in the code of Hu et al.; logits as above
    PEFT dynamic      one example a row, each batch padded to its longest
    PEFT packed       the rows of `lora_jax packed`, with a block-diagonal causal mask

PEFT's model computes its own loss, from all logits, on exactly the same tokens and targets. PEFT
adapts GPT-2's fused query, key and value as one matrix; lora_jax has three, so its adapter has more
parameters. `small` is GPT-2 small's shape with random weights, with the embedded model's tokenizer.

All ways take their first step on the same examples, and their losses must agree: it is the same
work. Then the ways take turns: each runs a few steps on the next batches of its epoch, batching
included. An epoch's time is the median time of a step times the steps of an epoch; no whole epoch
is run. `x` is the median over the turns of the ratio of `lora_jax packed` to a way, so that other
work on the machine slows both. `lora_jax padded` is far slower and takes part in every fifth turn.

    adapter_k   thousands of trained parameters
    compile_s   seconds of the first step beyond those of a later one
    steps       in an epoch
    step_ms     milliseconds of a step
    epoch_s     seconds of an epoch, without compilation
    cpu_s       CPU seconds of an epoch, all threads; on a GPU, of the host
    tokens/s    tokens of the examples, without padding
    x           time of `lora_jax packed` over that of the row; x of cpu_s is the same for CPU time

The last lines give the floor of a step of `lora_jax packed`, the time of its matmuls with weights
(`matmul_operations`) at the speed of a matmul of 2048 x 2048, as a share of each way's time.

glibc keeps freed memory, as in `experiments.gpt2_e2e`, for PyTorch too
(`lora_jax.training.allocator`). With GPT-2 small and the rows of `lora_jax padded`, leave that way
out (`--without_padded`) on less than 32 GB.

If torch, transformers or peft is missing, only lora_jax is timed. Torch's threads wait for each
other, so its times with several threads mean little while other work shares the cores. In that
case, give both one core: `taskset -c 0 python -m benchmarks.e2e_epoch`.
"""

import argparse
import dataclasses
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

import lora_jax as lj
from benchmarks import turns
from lora_jax.data import batches, text
from lora_jax.data.sets import e2e
from lora_jax.models.gpt2.folder import load_gpt2, save_gpt2
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.models.text.tokenizer import end_of_text_id, load_tokenizer
from lora_jax.training.allocator import keep_freed_memory
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import make_mesh, place_batch
from lora_jax.training.step import make_train_step, start
from lora_jax.trees import leaves_with_path

RANK, ALPHA = 16, 32.0
TARGET = r".*/(attn/(query|key|value|out)|mlp/(up|down))/kernel"
TOKEN_TABLES = ("wte/embedding", "token_embedding/embedding")
PEFT_TARGET = ["c_attn", "c_proj", "c_fc"]  # c_proj is the name in attention and in the MLP
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-6, 0.01
PEERS = ("torch", "transformers", "peft")
GOALS = {"PEFT dynamic": 0.45, "PEFT packed": 0.60}  # for lora_jax packed, on CPUs
AGREEMENT = {"float32": 1e-4, "bfloat16": 1e-2}


class Base(NamedTuple):
  """The base model that all ways adapt."""

  config: GPT2Config
  params: PyTree


class Trainer(NamedTuple):
  """One way to train.

  Attributes:
    step: takes a batch, returns the loss in nats per token; may return before the step is done.
    wait: waits until all steps are done.
    num_trainable: parameters of the adapter.
  """

  step: Callable[[batches.Batch], Any]
  wait: Callable[[], None]
  num_trainable: int


class Turn(NamedTuple):
  """Seconds per step of one turn: wall-clock and CPU time."""

  wall: float
  cpu: float


@dataclasses.dataclass
class Way:
  """One way with its batches and its measurements."""

  trainer: Trainer
  data: batches.Batches
  first: batches.Batch
  every: int = 1
  first_loss: float = 0.0
  first_seconds: float = 0.0
  turns: dict[int, Turn] = dataclasses.field(default_factory=dict)

  def epoch(self, column: str) -> float:
    """Returns the seconds of an epoch; `column` is "wall" or "cpu"."""
    step = statistics.median(getattr(turn, column) for turn in self.turns.values())
    return len(self.data) * step


# ---- lora_jax --------------------------------------------------------------------------


def load_base(options: argparse.Namespace) -> Base:
  """Returns the embedded model, or GPT-2 small with random weights."""
  dtypes = {"dtype": options.dtype, "param_dtype": options.dtype}
  place = NamedSharding(make_mesh(), P())
  if options.model == "embedded":
    return Base(*load_gpt2(embedded_folder(), shardings=place, **dtypes))
  config = GPT2Config(**dtypes)

  def init(key: jax.Array) -> PyTree:
    return GPT2(config).init(key, np.zeros((1, 1), np.int32))["params"]

  return Base(config, jax.jit(init, out_shardings=place)(jax.random.key(0, impl="rbg")))


def embedded_folder() -> Path:
  return Path(str(resources.files("lora_jax") / "assets" / "gpt2"))


class Prepared(NamedTuple):
  """The train step of the experiments, not compiled yet, with its first state."""

  step: Any
  state: Any
  frozen: PyTree
  num_trainable: int


def prepare(
  model: nn.Module, params: PyTree, example: batches.Batch, target: str = TARGET
) -> Prepared:
  """Returns the train step for batches of the example's shape."""
  config = lj.LoraConfig(rank=RANK, alpha=ALPHA, target=target)
  loss = lj.lora(language_model_loss(model), config)
  key = jax.random.key(0)
  trainable = jax.jit(loss.init)(key, params, example)
  optimizer = optax.adamw(
    LEARNING_RATE, b1=BETAS[0], b2=BETAS[1], eps=EPS, weight_decay=WEIGHT_DECAY
  )
  num_trainable = sum(leaf.size for leaf in jax.tree.leaves(trainable))
  state, frozen, optimizer = start(params, trainable, optimizer, key, make_mesh())
  return Prepared(make_train_step(loss, optimizer, state), state, frozen, num_trainable)


def make_jax(
  model: nn.Module, params: PyTree, example: batches.Batch, target: str = TARGET
) -> Trainer:
  """Returns a trainer with the train step of the experiments."""
  train_step, state, frozen, num_trainable = prepare(model, params, example, target)
  mesh = make_mesh()

  def step(batch: batches.Batch) -> jax.Array:
    nonlocal state
    placed = place_batch(mesh, batch)  # pyright: ignore[reportArgumentType]
    state, metrics = train_step(state, frozen, placed)
    return metrics.loss

  return Trainer(step, lambda: jax.block_until_ready(state) and None, num_trainable)


# ---- PEFT ------------------------------------------------------------------------------


def make_peft(
  folder: Path,
  dtype: str,
  packed: bool,
  target: Sequence[str] = PEFT_TARGET,
  fan_in_fan_out: bool = True,
) -> Trainer:
  """Returns a trainer with PEFT's LoRA of the model in a Hugging Face folder.

  Args:
    target: names of the adapted layers.
    fan_in_fan_out: whether their kernels are (in, out), as GPT-2's.
  """
  import peft  # pyright: ignore[reportMissingImports]
  import torch  # pyright: ignore[reportMissingImports]
  import transformers  # pyright: ignore[reportMissingImports]

  device = "cuda" if torch.cuda.is_available() else "cpu"
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
  )
  model.config.use_cache = False
  config = peft.LoraConfig(
    r=RANK,
    lora_alpha=ALPHA,
    target_modules=list(target),
    fan_in_fan_out=fan_in_fan_out,
    task_type="CAUSAL_LM",
  )
  model = peft.get_peft_model(model, config).to(device).train()
  for module in model.modules():
    if isinstance(module, torch.nn.Dropout):
      module.p = 0.0  # GPT-2 has dropout; the lora_jax loss here has none
  trained = [weight for weight in model.parameters() if weight.requires_grad]
  optimizer = torch.optim.AdamW(trained, LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, fused=True)
  mixed = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

  def step(batch: batches.Batch) -> Any:
    arrays = peft_inputs(batch, packed)
    inputs = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    optimizer.zero_grad()
    with mixed:
      loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    return loss.detach()

  wait = torch.cuda.synchronize if device == "cuda" else lambda: None
  return Trainer(step, wait, sum(weight.numel() for weight in trained))


def peft_inputs(batch: batches.Batch, packed: bool) -> dict[str, np.ndarray]:
  """Returns a batch as arguments of a causal LM; unsupervised tokens have label -100."""
  tokens = batch["tokens"].astype(np.int64)
  labels = np.full(tokens.shape, -100)
  row, index = np.nonzero(batch["target_weights"])
  labels[row, batch["target_index"][row, index]] = batch["targets"][row, index]
  inputs = {"input_ids": tokens, "labels": labels, "shift_labels": labels}
  segment_ids = batch["segment_ids"]
  if not packed:
    return {**inputs, "attention_mask": (segment_ids > 0).astype(np.int64)}
  mask = np.tril(segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
  return {**inputs, "attention_mask": mask, "position_ids": batch["positions"].astype(np.int64)}


def missing_peers() -> list[str]:
  return [name for name in PEERS if importlib.util.find_spec(name) is None]


# ---- the same examples for all ---------------------------------------------------------


def load_examples(options: argparse.Namespace, base: Base) -> list[text.Example]:
  tokenizer = load_tokenizer(embedded_folder(), 8192)
  records = e2e.read("train")
  if options.lines:
    chosen = np.random.default_rng(0).permutation(len(records))[: options.lines]
    records = [records[i] for i in chosen]
  limit = min(512, base.config.num_positions)
  return text.encode(tokenizer, records, end_of_text_id(tokenizer), limit, truncate=True)


def make_data(
  options: argparse.Namespace, examples: Sequence[text.Example], num_positions: int
) -> dict[str, Callable[[Sequence[text.Example]], batches.Batches]]:
  """Returns, for each kind of batching, a function from examples to their batches."""
  packed_length = options.row_length
  packed_targets = batches.suggest_loss_length(examples, packed_length)
  num_rows = len(batches.pack(examples, packed_length, packed_targets))
  batch_size = round(options.rows * len(examples) / num_rows)
  longest = max(len(example.tokens) for example in examples)
  most_targets = -(-max(len(example.targets) for example in examples) // 8) * 8

  def packed(examples: Sequence[text.Example]) -> batches.Batches:
    return batches.packed_batches(
      examples,
      batch_size=options.rows,
      row_length=packed_length,
      loss_length=packed_targets,
      seed=0,
    )

  def padded_to(row_lengths: Sequence[int]):
    return lambda examples: batches.padded_batches(
      examples,
      batch_size=batch_size,
      row_lengths=row_lengths,
      loss_length=most_targets,
      seed=0,
    )

  return {
    "packed": packed,
    "padded": padded_to([min(512, num_positions)]),
    "dynamic": padded_to(range(1, longest + 1)),
  }


def make_ways(options: argparse.Namespace, base: Base, folder: Path) -> dict[str, Way]:
  """Returns all ways whose packages are installed."""
  examples = load_examples(options, base)
  data = make_data(options, examples, base.config.num_positions)

  def way(trainer: Trainer, batching: str, every: int = 1) -> Way:
    make = data[batching]
    return Way(trainer, make(examples), make(examples[: options.rows])[0], every)

  ways = {}
  ours = {"packed": 1, "padded": 5}
  if options.without_padded:
    del ours["padded"]
  for batching, every in ours.items():
    example = data[batching](examples[:1])[0]
    ways[f"lora_jax {batching}"] = way(
      make_jax(GPT2(base.config), base.params, example), batching, every
    )
  if not missing_peers():
    save_gpt2(folder, base.config, base.params, end_of_text_id=0)
    for batching in ("dynamic", "packed"):
      trainer = make_peft(folder, options.dtype, batching == "packed")
      ways[f"PEFT {batching}"] = way(trainer, batching)
  print(
    f"{len(examples):,} examples of {num_tokens(examples) / len(examples):.1f} tokens, "
    f"{np.mean([len(example.targets) for example in examples]):.1f} supervised; a step has "
    f"{options.rows} packed rows of {options.row_length} tokens, or "
    f"{data['dynamic'](examples).batch_size} examples",
    flush=True,
  )
  return ways


def num_tokens(examples: Sequence[text.Example]) -> int:
  return sum(len(example.tokens) for example in examples)


# ---- measurements ----------------------------------------------------------------------


def first_steps(ways: Mapping[str, Way], dtype: str) -> None:
  """Compiles, and checks that all ways have the same loss on the same examples.

  Raises:
    ValueError: if a loss differs.
  """
  for name, way in ways.items():
    step_start = time.perf_counter()
    way.first_loss = float(way.trainer.step(way.first))
    way.trainer.wait()
    way.first_seconds = time.perf_counter() - step_start
    print(f"{name:16} first step {way.first_seconds:6.1f} s, loss {way.first_loss:.6f}", flush=True)
  losses = [way.first_loss for way in ways.values()]
  spread = (max(losses) - min(losses)) / min(losses)
  print(f"the first losses, on the same examples, agree to {spread:.1e}", flush=True)
  if not spread <= AGREEMENT[dtype]:
    raise ValueError(f"the ways' losses on the same examples differ by {spread:.1e}, relative")


def take_turns(options: argparse.Namespace, ways: Mapping[str, Way]) -> None:
  """Times the ways in turns, in alternating order."""
  for number in range(options.repeats):
    names = [name for name, way in ways.items() if number % way.every == 0]
    for name in names[:: -1 if number % 2 else 1]:
      way = ways[name]
      way.turns[number] = timed_turn(way, number * options.steps, options.steps)


def timed_turn(way: Way, first: int, steps: int) -> Turn:
  way.trainer.wait()
  wall, cpu = time.perf_counter(), time.process_time()
  for number in range(first, first + steps):
    way.trainer.step(way.data[number % len(way.data)])
  way.trainer.wait()
  return Turn((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps)


def ratios(reference: Way, way: Way, column: str) -> list[float]:
  """Returns the quartiles over the turns of the ratio of the reference's epoch to a way's."""
  per_step = [
    getattr(reference.turns[number], column) / getattr(turn, column)
    for number, turn in way.turns.items()
  ]
  scale = len(reference.data) / len(way.data)
  quartiles = statistics.quantiles(per_step, n=4, method="inclusive") if len(per_step) > 1 else None
  return [scale * ratio for ratio in quartiles or per_step * 3]


# ---- the report ------------------------------------------------------------------------


def print_table(options: argparse.Namespace, ways: Mapping[str, Way]) -> None:
  packed = ways["lora_jax packed"]
  tokens = num_tokens_of(packed.data)
  heads = "adapter_k compile_s   steps   step_ms   epoch_s     cpu_s  tokens/s"
  print(f"\n{'':16} {heads}     x (quartiles)    x of cpu_s")
  for name, way in ways.items():
    epoch, step = way.epoch("wall"), way.epoch("wall") / len(way.data)
    low, middle, high = ratios(packed, way, "wall")
    print(
      f"{name:16} {way.trainer.num_trainable / 1e3:9.1f} {max(way.first_seconds - step, 0):9.1f}"
      f" {len(way.data):7d} {1e3 * step:9.1f} {epoch:9.1f} {way.epoch('cpu'):9.1f}"
      f" {tokens / epoch:9.0f} {middle:5.2f} ({low:.2f}-{high:.2f})"
      f" {ratios(packed, way, 'cpu')[1]:8.2f}"
    )
  if jax.default_backend() != "cpu" or missing_peers():
    return
  print("\ngoals on CPUs, lora_jax packed to:")
  for name, goal in GOALS.items():
    got = ratios(packed, ways[name], "wall")[1]
    print(f"{name:16}{got:6.2f} (at most {goal})  {'met' if got <= goal else 'MISSED'}")


def num_tokens_of(data: batches.Batches) -> int:
  """Returns the tokens of an epoch without padding."""
  return sum(int(np.count_nonzero(data[i]["segment_ids"])) for i in range(len(data)))


def matmul_operations(params: PyTree, num_trainable: int, batch: batches.Batch) -> int:
  """Returns the operations in a LoRA step's matmuls with weights, without those of attention.

  A token takes 4 for each weight (forward, and backward to the input) and 6 for each parameter of
  the adapter. The head, tied to the token embedding, is computed only at positions with a target.
  The last layer, which computes somewhat less, is counted in full.
  """
  sizes = {path: leaf.size for path, leaf in leaves_with_path(params)}
  kernels = sum(size for path, size in sizes.items() if path.endswith("/kernel"))
  head = sum(size for path, size in sizes.items() if path in TOKEN_TABLES)
  tokens, targets = batch["tokens"].size, batch["target_index"].size
  return (4 * kernels + 6 * num_trainable) * tokens + 4 * head * targets


def print_floor(ways: Mapping[str, Way], params: PyTree) -> None:
  """Prints the floor of a packed step, and its share of the time of each way's epoch."""
  from experiments.harness.flops import matmul_flops  # benchmarks.gpu needs no such packages

  packed = ways["lora_jax packed"]
  matmuls: dict[str, Callable[[], float]] = {"XLA": lambda: 1 / matmul_flops(repeats=2)}
  if not missing_peers():
    matmuls["torch"] = lambda: 1 / torch_matmul_flops(repeats=2)
  seconds = turns.take_turns(matmuls, 5)  # of an operation
  rate = 1 / min(seconds["XLA"])
  operations = matmul_operations(params, packed.trainer.num_trainable, packed.data[0])
  floor = operations / rate
  print(
    f"\nfloor of a packed step: {operations / 1e9:.1f} gflop at {rate / 1e9:.0f} gflop/s are "
    f"{1e3 * floor:.1f} ms; as a share of an epoch of"
  )
  for name, way in ways.items():
    print(f"{name:16}{floor * len(packed.data) / way.epoch('wall'):6.2f}")
  if "torch" in seconds:
    print(
      f"a matmul of 2048 x 2048 by torch: {1e-9 / min(seconds['torch']):.0f} gflop/s, "
      f"{turns.ratio(seconds['XLA'], seconds['torch'])} of XLA's"
    )


def torch_matmul_flops(size: int = 2048, repeats: int = 10) -> float:
  """Returns the operations per second of a square float32 matmul by torch on the CPU."""
  import torch  # pyright: ignore[reportMissingImports]

  x = torch.ones(size, size)
  seconds = []
  for _ in range(repeats + 1):  # the first is slower
    begin = time.perf_counter()
    torch.mm(x, x)
    seconds.append(time.perf_counter() - begin)
  return 2 * size**3 / min(seconds)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description="An epoch of E2E: lora_jax against PEFT.")
  parser.add_argument("--model", choices=("embedded", "small"), default="embedded")
  parser.add_argument("--lines", type=int, default=4000, help="training examples; 0 is all")
  parser.add_argument("--rows", type=int, default=5, help="packed rows in a step")
  parser.add_argument("--row_length", type=int, default=256, help="tokens in a packed row")
  parser.add_argument("--steps", type=int, default=5, help="steps in a turn")
  parser.add_argument("--repeats", type=int, default=20, help="turns")
  parser.add_argument("--without_padded", action="store_true", help="no row of `lora_jax padded`")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Way]:
  options = parse(arguments)
  device = jax.devices()[0]
  print(f"JAX {jax.__version__}, {device.device_kind} ({device.platform}), {vars(options)}")
  if missing_peers():
    print(f"PEFT is left out; missing: {', '.join(missing_peers())}")
  else:
    import peft  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(f"PEFT {peft.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
  with jax.default_matmul_precision("highest"):  # as torch's default
    with tempfile.TemporaryDirectory() as folder:
      base = load_base(options)
      ways = make_ways(options, base, Path(folder) / "gpt2")
    first_steps(ways, options.dtype)
    take_turns(options, ways)
    print_table(options, ways)
    print_floor(ways, base.params)
  return ways


if __name__ == "__main__":
  keep_freed_memory()
  main()
