"""Latency with merged LoRA, LoRA and bottleneck adapters (Hu et al. 2021, Table 1, Figure 5).

    python -m benchmarks.latency                    # sizes for a CPU
    python -m benchmarks.latency --save=runs/paper/latency.json      # for experiments.paper
    python -m benchmarks.latency --cases table1 --save=runs/paper/latency.json  # adds 32 x 512
    python -m benchmarks.latency --cases table1 --dtype bfloat16     # the paper's, for a GPU
    python -m benchmarks.latency --cases figure5 --dtype bfloat16    # widths 10, 100 and 250

GPT-2 medium's shape with random weights, in five ways:

    base         the model alone
    merged LoRA  the model with `merge(params, trainable)` as its weights
    LoRA         `apply`: rank 4 on query and value, 393,216 parameters
    Adapter_L    after each layer (Lin et al. 2020)
    Adapter_H    after the attention and the MLP (Houlsby et al. 2019)

A pass is that of a prompt: every token's hidden states, and the logits of the last token of a row.
A row of the table is a case: rows of a batch, tokens of a row, and widths of Adapter_L and
Adapter_H. In Table 1 both have about 11 M parameters, and 0.5 M at 32 x 512.

    ms   milliseconds of the base model's pass, median
    x    ratio to the base model: the median of the turns' ratios, and their quartiles

The ways take turns, so that other work on the machine slows all of them. There are `--turns` turns,
or as many as fit in `--seconds`, but at least 3. Before they are timed, the outputs of LoRA and of
the merged model are compared.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

import lora_jax as lj
from benchmarks.variants import random_tree
from experiments.harness.config import read_output
from experiments.harness.launch import explained
from experiments.harness.table import aligned
from experiments.nlg.base import random_params
from experiments.shapes.results import Latencies, TimedCase, Way, read, save
from lora_jax.fields import Within, read_value
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.models.parts.causal_lm import shapes_of
from lora_jax.training.allocator import keep_freed_memory
from lora_jax.training.mesh import make_mesh

MODELS: dict[str, dict[str, Any]] = {
  "medium": {"embed_dim": 1024, "num_layers": 24, "num_heads": 16},
  "tiny": {"embed_dim": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 64},
}
LORA = lj.LoraConfig(rank=4, alpha=32.0, target=r".*/attn/(query|value)/kernel")
BASE, MERGED, UNMERGED, LIN, HOULSBY = "base", "merged LoRA", "LoRA", "Adapter_L", "Adapter_H"
LIMITS = {
  "turns": Annotated[int, Within("[3, 1_000_000]")],  # quartiles need a few
  "seconds": Annotated[float, Within("[0, inf)")],
}
AGREEMENT = {"float32": 1e-4, "bfloat16": 0.1}  # of LoRA and the merged model, relative


class Case(NamedTuple):
  """A row of the table: rows of tokens, and widths of the adapters."""

  batch_size: int
  length: int
  lin_width: int
  houlsby_width: int


SIZE_11M, SIZE_0_5M = (224, 112), (9, 5)  # of L and H: 11.09 and 11.06 M, 0.52 and 0.54 M
CASES = {
  "cpu": [Case(1, 128, *SIZE_11M), Case(4, 256, *SIZE_11M), Case(16, 256, *SIZE_11M)],
  "table1": [Case(32, 512, *SIZE_0_5M), Case(16, 256, *SIZE_11M), Case(1, 128, *SIZE_11M)],
  "figure5": [
    Case(batch_size, length, width, width)
    for width in (10, 100, 250)
    for length in (128, 256, 512)
    for batch_size in (1, 2, 4, 8, 16, 32)
  ],
  "tiny": [Case(2, 8, 3, 3)],
}


def prompt_pass(
  module: GPT2, params: PyTree, tokens: Int[Array, "B T"]
) -> tuple[Float[Array, "B T D"], Float[Array, "B V"]]:
  """Returns all hidden states, and the logits of each row's last token."""
  hidden = module.apply({"params": params}, tokens, method="hidden")
  assert isinstance(hidden, jax.Array)
  logits = module.apply({"params": params}, hidden[:, -1], method="logits")
  assert isinstance(logits, jax.Array)
  return hidden, logits


def make_ways(
  fn: Callable[..., Any], params: PyTree, merged: PyTree, low_rank: PyTree, case: Case, tokens: Any
) -> dict[str, Callable[[], Any]]:
  """Returns the compiled passes by name, each a function of nothing.

  Args:
    fn: `fn(params, tokens)`.
    params: of the base model.
    merged: those with LoRA.
    low_rank: LoRA's trainable tree.
    case: the shape of the tokens, and the widths of the adapters.
    tokens: the input.
  """
  plain = jax.jit(fn).lower(params, tokens).compile()  # a merged model is the same program
  ways: dict[str, Callable[[], Any]] = {
    BASE: functools.partial(plain, params, tokens),
    MERGED: functools.partial(plain, merged, tokens),
    UNMERGED: _compiled(lj.lora(fn, LORA).apply, params, low_rank, tokens),
  }
  configs = {LIN: lj.lin_config(case.lin_width), HOULSBY: lj.houlsby_config(case.houlsby_width)}
  for name, config in configs.items():
    method = lj.bottleneck_adapter(fn, config)
    start = jax.eval_shape(method.init, jax.random.key(0), params, tokens)
    ways[name] = _compiled(method.apply, params, random_tree(start), tokens)
  return ways


def _compiled(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
  return functools.partial(jax.jit(fn).lower(*args).compile(), *args)


def check_agreement(ways: Mapping[str, Callable[[], Any]], dtype: str) -> None:
  """Raises ValueError if LoRA and the merged model differ, or LoRA changes nothing."""
  base, merged, unmerged = (
    np.asarray(ways[name]()[0], np.float32) for name in (BASE, MERGED, UNMERGED)
  )
  scale = float(np.abs(base).max())
  difference, change = (float(np.abs(x - merged).max()) / scale for x in (unmerged, base))
  if difference > AGREEMENT[dtype] or not change > 0:
    raise ValueError(
      f"LoRA and the merged model differ by {difference:.1e} of the largest value, expected at "
      f"most {AGREEMENT[dtype]:.0e}; the merged and the base model by {change:.1e}"
    )


def measure(
  ways: Mapping[str, Callable[[], Any]], turns: int, seconds: float
) -> dict[str, list[float]]:
  """Returns the seconds of each way in each turn."""
  times: dict[str, list[float]] = {name: [] for name in ways}
  first = time.perf_counter()
  while len(times[BASE]) < turns and (
    len(times[BASE]) < 3 or time.perf_counter() - first < seconds
  ):
    for name, run in ways.items():
      begin = time.perf_counter()
      jax.block_until_ready(run())
      times[name].append(time.perf_counter() - begin)
  return times


def row(case: Case, times: Mapping[str, Sequence[float]]) -> list[str]:
  """Returns the cells of a case."""

  def ratio(name: str) -> str:
    ratios = [way / base for way, base in zip(times[name], times[BASE], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"

  return [
    f"{case.batch_size} x {case.length}",
    f"{case.lin_width}, {case.houlsby_width}",
    str(len(times[BASE])),
    f"{1e3 * statistics.median(times[BASE]):.1f}",
    *(ratio(name) for name in times if name != BASE),
  ]


def run(options: argparse.Namespace) -> Iterable[tuple[list[str], TimedCase | None]]:
  """Yields the cells of the table with the times of their case, the header first."""
  config = GPT2Config(
    **MODELS[options.model],
    dtype=options.dtype,
    param_dtype=options.dtype,
    scan_layers=options.scanned,
  )
  module = GPT2(config)
  fn = functools.partial(prompt_pass, module)
  params = random_params(module, make_mesh(), jax.random.key(0))
  lora = lj.lora(fn, LORA)
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  low_rank = random_tree(jax.eval_shape(lora.init, jax.random.key(0), shapes_of(module), tokens))
  merged = jax.jit(lora.merge)(params, low_rank)
  heads = [f"{name} x" for name in (MERGED, UNMERGED, LIN, HOULSBY)]
  yield ["batch x tokens", "widths L, H", "turns", "ms", *heads], None
  for case in CASES[options.cases]:
    draw = np.random.default_rng(0)
    shape = case.batch_size, case.length
    rows = jnp.asarray(draw.integers(0, config.vocab_size, shape), jnp.int32)
    ways = make_ways(fn, params, merged, low_rank, case, rows)
    check_agreement(ways, options.dtype)
    for name in (LIN, HOULSBY):  # the first run of a program is slower
      jax.block_until_ready(ways[name]())
    times = measure(ways, options.turns, options.seconds)
    cells = row(case, times)
    print(", ".join(cells), flush=True)
    timed = tuple(Way(name, tuple(seconds)) for name, seconds in times.items())
    yield cells, TimedCase(*case, timed)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
  parser.add_argument("--cases", default="cpu", choices=list(CASES))
  parser.add_argument("--model", default="medium", choices=list(MODELS))
  parser.add_argument("--dtype", default="float32", choices=list(AGREEMENT))
  parser.add_argument("--scanned", action="store_true", help="layers in a loop of the program")
  parser.add_argument("--turns", type=int, default=50)
  parser.add_argument("--seconds", type=float, default=240.0, help="of the turns of a case")
  parser.add_argument("--save", default="", help="a JSON file of all times; earlier cases are kept")
  return parser.parse_args(arguments)


def earlier_results(path: Path, results: Latencies) -> Latencies:
  """Returns the results in a file, to which those of this call are added.

  Args:
    path: of the file.
    results: those of this call, without a case.
  Raises:
    ValueError: if the file's are of another model, dtype, device or kind of layers.
  """
  earlier = read(Latencies, path) or results
  if dataclasses.replace(earlier, cases=()) != results:
    raise ValueError(
      f"{path} has times of {earlier.conditions}, expected {results.conditions}. Move it away, or "
      "--save another file"
    )
  return earlier


def main(arguments: Sequence[str] | None = None) -> None:
  options = parse(arguments)
  with explained():
    for name, limits in LIMITS.items():
      read_value(limits, getattr(options, name), f"--{name}")
    time_all(options, read_output("--save", options.save) if options.save else None)


def time_all(options: argparse.Namespace, path: Path | None) -> None:
  """Times all cases, and prints the table; writes the times to a file after each case."""
  keep_freed_memory()
  device = jax.devices()[0]
  print(f"JAX {jax.__version__}, {device.device_kind} ({device.platform}), {options}")
  results = Latencies(options.model, options.dtype, device.device_kind, options.scanned)
  if path is not None:
    results = earlier_results(path, results)
  table = list[list[str]]()
  for cells, case in run(options):
    table.append(cells)
    if case is not None and path is not None:
      results = results.with_case(case)
      save(path, results)
  print(aligned(table))


if __name__ == "__main__":
  main()
