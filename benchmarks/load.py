"""Loads a sharded safetensors folder: memory and time against `from_pretrained` of `transformers`.

    python -m benchmarks.load
    python -m benchmarks.load --megabytes 100 --repeats 1 --alone

The folder is a Llama with random weights in a temporary folder. Every measurement is a separate
process, which first imports everything and loads a tiny model once, so that only loading the large
model is measured. All load into the dtype of the folder. The implementations take turns, so that
other work on the machine slows all of them; the ratio is the median of the turns' ratios.

On CPUs `transformers` copies nothing: its weights are pages of the mapped files, read when they are
first used, and valid while the files stay unchanged. JAX owns its arrays, most of them transposed,
so that each weight is copied once. Two rows show the difference:

    transformers         as `from_pretrained` returns it, with one element of each page read
    transformers, own    the same, then each weight copied to its own memory: comparable work

    growth_MB   peak growth of anonymous memory during loading, median of the turns
    /size       growth_MB over the size of the weights
    seconds     to load, median
    x           ratio of times to `transformers, own`

Anonymous memory excludes the pages of mapped files, which the system may drop at any time. The
files have just been written, so that they are in the system's page cache throughout.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.memory import finish, measure, wait_for_start
from lora_jax.models.llama.folder import load_llama, params_shapes, save_llama
from lora_jax.models.llama.model import LlamaConfig

GROWTH, TIME = 1.2, 1.0  # goals: of the size, of the time of transformers
PAGE = 4096  # bytes


def random_llama(
  folder: Path,
  megabytes: float,
  shards: int,
  dtype: str = "float32",
  width: int = 1024,
  vocab_size: int = 32000,
) -> int:
  """Writes a Llama with random weights; returns its size in bytes.

  Args:
    folder: the folder to create.
    megabytes: approximate size of the weights.
    shards: minimum number of files.
    dtype: dtype of the weights.
    width: embedding width, a multiple of 64.
    vocab_size: vocabulary size.
  """
  config = LlamaConfig(
    vocab_size=vocab_size,
    num_positions=2048,
    embed_dim=width,
    num_heads=width // 32,
    num_kv_heads=width // 64,
    mlp_dim=11 * width // 4,
    param_dtype=dtype,
  )

  def size(num_layers: int) -> int:
    shapes = params_shapes(dataclasses.replace(config, num_layers=num_layers))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

  layer = size(2) - size(1)
  num_layers = max(1, 1 + round((1e6 * megabytes - size(1)) / layer))
  config = dataclasses.replace(config, num_layers=num_layers)
  draw = np.random.default_rng(0)

  def random_weight(leaf: Any) -> np.ndarray:
    return (0.02 * draw.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)

  params = jax.tree.map(random_weight, params_shapes(config))
  save_llama(folder, config, params, max_shard_bytes=size(num_layers) // shards)
  return size(num_layers)


def load_lora_jax(folder: Path, dtype: str) -> Any:
  _, params = load_llama(folder, param_dtype=dtype)
  return jax.block_until_ready(params)


def load_transformers(folder: Path, dtype: str) -> Any:
  import torch  # pyright: ignore[reportMissingImports]
  from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

  model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
  for parameter in model.parameters():
    parameter.detach().view(-1)[:: PAGE // parameter.itemsize].float().sum()
  return model


def load_transformers_copied(folder: Path, dtype: str) -> Any:
  model = load_transformers(folder, dtype)
  for parameter in model.parameters():
    parameter.data = parameter.data.clone()
  return model


WAYS = {
  "lora_jax": load_lora_jax,
  "transformers": load_transformers,
  "transformers, own": load_transformers_copied,
}


def run(way: str, folder: Path, warm_up: Path, dtype: str) -> None:
  """Loads once; runs in a separate process."""
  WAYS[way](warm_up, dtype)
  start = wait_for_start()
  loaded = WAYS[way](folder, dtype)
  finish(time.perf_counter() - start)
  del loaded


def compare(options: argparse.Namespace, ways: Sequence[str], dtype: str) -> dict[str, Any]:
  """Returns the folder's size and, by implementation, the growth and seconds of each turn."""
  results: dict[str, Any] = {way: {"growth": [], "seconds": []} for way in ways}
  with tempfile.TemporaryDirectory(dir=options.directory) as name:
    folder, warm_up = Path(name) / "model", Path(name) / "warm_up"
    size = random_llama(folder, options.megabytes, options.shards, dtype, options.width)
    random_llama(warm_up, 0, 2, dtype, 64, 64)
    for turn in range(options.repeats):
      for way in ways[:: 1 if turn % 2 == 0 else -1]:
        command = [sys.executable, "-m", "benchmarks.load", "--run", way]
        measured = measure([*command, str(folder), str(warm_up), dtype])
        results[way]["growth"].append(measured.growth)
        results[way]["seconds"].append(measured.result)
  return {"size": size, "ways": results}


def print_table(results: dict[str, dict[str, Any]]) -> None:
  print(f"{'way':19}{'dtype':10}{'MB':>6}{'growth_MB':>11}{'/size':>7}{'seconds':>9}{'x':>7}")
  for dtype, result in results.items():
    lora_jax, copied = (result["ways"].get(way) for way in ("lora_jax", "transformers, own"))
    for way, measured in result["ways"].items():
      growth, seconds = (statistics.median(measured[key]) for key in ("growth", "seconds"))
      print(
        f"{way:19}{dtype:10}{result['size'] / 1e6:6.0f}{growth / 1e6:11.0f}"
        f"{growth / result['size']:7.2f}{seconds:9.2f}{_ratio(measured, copied or lora_jax):7.2f}"
      )
    growth = statistics.median(lora_jax["growth"]) / result["size"]
    print(f"goal: memory grows by at most {GROWTH} of the size: {_met(growth, GROWTH)}")
    for way, peer in list(result["ways"].items())[1:]:
      print(f"goal: at most {TIME} of the time of {way}: {_met(_ratio(lora_jax, peer), TIME)}")


def _ratio(measured: dict[str, Any], peer: dict[str, Any]) -> float:
  pairs = zip(measured["seconds"], peer["seconds"], strict=True)
  return statistics.median(a / b for a, b in pairs)


def _met(value: float, goal: float) -> str:
  return f"{value:.2f}, {'met' if value <= goal else 'MISSED'}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description="Loading a model folder: lora_jax against transformers."
  )
  parser.add_argument("--megabytes", type=float, default=500, help="of the folder's weights")
  parser.add_argument("--shards", type=int, default=5, help="files in the folder, approximate")
  parser.add_argument("--width", type=int, default=1024, help="of the model")
  parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--directory", type=Path, help="where to create the temporary folder")
  parser.add_argument("--alone", action="store_true", help="lora_jax only")
  parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
  options = parse(arguments)
  if options.run:
    way, folder, warm_up, dtype = options.run
    run(way, Path(folder), Path(warm_up), dtype)
    return {}
  missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
  if missing and not options.alone:
    print(f"transformers is left out; missing: {', '.join(missing)}")
  ways = list(WAYS)[: 1 if options.alone or missing else None]
  device = jax.devices()[0]
  print(f"JAX {jax.__version__}, {device.device_kind} ({device.platform}), {vars(options)}")
  results = {dtype: compare(options, ways, dtype) for dtype in options.dtypes}
  print_table(results)
  return results


if __name__ == "__main__":
  main()
