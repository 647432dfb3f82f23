"""Switches between the adapters of two tasks: the time until the first logits of the other task.

    python -m benchmarks.switch
    python -m benchmarks.switch --megabytes 20 --repeats 2 --alone

The base model is a Llama with random weights; the adapters are LoRA of all its linear layers, of
ranks R and R/2. Consecutive requests alternate between the tasks. The ways take turns, so that
other work on the machine slows all of them; the ratio is the median of the turns' ratios.

    lora_jax             another tree of `lora_jax.align` is passed to one compiled function
    lora_jax merged      the adapter is merged into a copy of the base model, which is then run
    peft set_adapter     both adapters are loaded; one is made active
    peft merge           one adapter is unmerged from the weights, the other merged into them

    switch_ms   milliseconds before the model can run: the merge, or PEFT's switch
    run_ms      milliseconds of a forward pass of one row of tokens
    both_ms     their sum
    x           ratio of both_ms to `lora_jax`
    copies      copies of the base model's weights in memory, the original included
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from benchmarks.load import random_llama
from lora_jax.interop import save_peft
from lora_jax.models.zoo import LanguageModel, load_causal_lm

LINEAR = r".*/(query|key|value|out|gate|up|down)/kernel"
PEERS = ("torch", "transformers", "peft")

Adapter = tuple[lora_jax.LoraConfig, Any]
Request = Callable[[int], tuple[float, float, np.ndarray]]  # task -> switch_s, run_s, logits


def make_adapter(model: LanguageModel, rank: int, seed: int) -> Adapter:
  """Returns a LoRA adapter of all linear layers, with random A and B."""
  config = lora_jax.LoraConfig(rank, 2.0 * rank, LINEAR)
  fn = functools.partial(_logits, model.module)
  tokens = jax.ShapeDtypeStruct((1, 2), "int32")
  shapes = jax.eval_shape(lora_jax.lora(fn, config).init, jax.random.key(0), model.params, tokens)
  draw = np.random.default_rng(seed)
  return config, jax.tree.map(
    lambda x: jnp.asarray(0.02 * draw.standard_normal(x.shape, np.float32)), shapes
  )


def _logits(module: Any, params: Any, tokens: Any) -> jax.Array:
  return module.apply({"params": params}, tokens)


def timed(switch: Callable[[], Any], run: Callable[[Any], Any]) -> tuple[float, float, np.ndarray]:
  """Returns the seconds of `switch` and of `run`, and the logits."""
  start = time.perf_counter()
  ready = switch()
  middle = time.perf_counter()
  logits = np.asarray(run(ready))
  return middle - start, time.perf_counter() - middle, logits


def lora_jax_ways(
  model: LanguageModel, adapters: Sequence[Adapter], tokens: np.ndarray
) -> dict[str, Request]:
  fn = functools.partial(_logits, model.module)
  config, trees = lora_jax.align(adapters, model.params)
  adapted = lora_jax.lora(fn, config)
  apply, merge, plain = jax.jit(adapted.apply), jax.jit(adapted.merge), jax.jit(fn)

  def pass_adapter(task: int) -> tuple[float, float, np.ndarray]:
    return timed(lambda: trees[task], lambda tree: apply(model.params, tree, tokens))

  def merge_adapter(task: int) -> tuple[float, float, np.ndarray]:
    def switch() -> Any:
      return jax.block_until_ready(merge(model.params, trees[task]))

    return timed(switch, lambda params: plain(params, tokens))

  return {"lora_jax": pass_adapter, "lora_jax merged": merge_adapter}


def peft_ways(
  model: LanguageModel, adapters: Sequence[Adapter], tokens: np.ndarray, folder: Path, threads: int
) -> dict[str, Request]:
  import peft  # pyright: ignore[reportMissingImports]
  import torch  # pyright: ignore[reportMissingImports]
  from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

  torch.set_num_threads(threads)
  input_ids = torch.tensor(tokens, dtype=torch.long)
  for task, adapter in enumerate(adapters):
    save_peft(folder / str(task), *adapter, model.stored, model.params)

  def load() -> Any:
    base: Any = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    peft_model: Any = peft.PeftModel.from_pretrained(base, folder / "0", adapter_name="0")
    peft_model.load_adapter(folder / "1", adapter_name="1")
    return peft_model.eval()

  def run(peft_model: Any) -> np.ndarray:
    with torch.inference_mode():
      return peft_model(input_ids=input_ids).logits.numpy()

  switched, merged = load(), load()

  def set_adapter(task: int) -> tuple[float, float, np.ndarray]:
    return timed(lambda: switched.set_adapter(str(task)), lambda _: run(switched))

  def merge_adapter(task: int) -> tuple[float, float, np.ndarray]:
    def switch() -> None:
      merged.unmerge_adapter()
      merged.merge_adapter([str(task)])

    return timed(switch, lambda _: run(merged))

  return {"peft set_adapter": set_adapter, "peft merge": merge_adapter}


COPIES = {"lora_jax": 1, "lora_jax merged": 2, "peft set_adapter": 1, "peft merge": 1}


def compare(ways: dict[str, Request], repeats: int) -> dict[str, list[tuple[float, float]]]:
  """Returns the seconds of each turn, after checking that all ways return the same logits.

  Raises:
    ValueError: if the logits differ.
  """
  first: list[np.ndarray] = []
  for name, request in ways.items():
    for task in (0, 1, 0):  # warm-up: compiles
      _, _, logits = request(task)
      if len(first) < 2:
        first.append(logits)
      error = np.abs(logits - first[task]).max() / np.abs(first[task]).max()
      if error > 1e-3:
        raise ValueError(f"the logits of {name} differ by {error:.1e} of the largest")
  seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
  for turn in range(repeats):
    for name in list(ways)[:: 1 if turn % 2 == 0 else -1]:
      seconds[name].append(ways[name](1 - turn % 2)[:2])
  return seconds


def print_table(seconds: dict[str, list[tuple[float, float]]]) -> None:
  print(f"{'way':18}{'switch_ms':>11}{'run_ms':>9}{'both_ms':>9}{'x':>7}{'copies':>8}")
  reference = [sum(turn) for turn in seconds["lora_jax"]]
  for name, turns in seconds.items():
    switch, run = (1e3 * statistics.median(turn[i] for turn in turns) for i in (0, 1))
    both = [sum(turn) for turn in turns]
    ratio = statistics.median(a / b for a, b in zip(both, reference, strict=True))
    median = 1e3 * statistics.median(both)
    print(f"{name:18}{switch:11.2f}{run:9.1f}{median:9.1f}{ratio:7.2f}{COPIES[name]:8}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description="Switching between two adapters: lora_jax against PEFT."
  )
  parser.add_argument(
    "--megabytes", type=float, default=200, help="size of the base model, float32"
  )
  parser.add_argument("--width", type=int, default=512, help="of the model")
  parser.add_argument("--vocabulary", type=int, default=4096)
  parser.add_argument("--rank", type=int, default=8)
  parser.add_argument("--length", type=int, default=32, help="tokens of a request")
  parser.add_argument("--repeats", type=int, default=11)
  parser.add_argument("--threads", type=int, default=2, help="of torch; JAX uses all cores")
  parser.add_argument("--alone", action="store_true", help="lora_jax only")
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, list[tuple[float, float]]]:
  options = parse(arguments)
  missing = [name for name in PEERS if find_spec(name) is None]
  if missing and not options.alone:
    print(f"PEFT is left out; missing: {', '.join(missing)}")
  device = jax.devices()[0]
  print(f"JAX {jax.__version__}, {device.device_kind} ({device.platform}), {vars(options)}")
  with tempfile.TemporaryDirectory() as name:
    base = Path(name) / "base"
    size = (options.megabytes, 1, "float32", options.width, options.vocabulary)
    random_llama(base, *size)
    model = load_causal_lm(base)
    ranks = options.rank, max(1, options.rank // 2)
    adapters = [make_adapter(model, rank, seed) for seed, rank in enumerate(ranks)]
    tokens = np.random.default_rng(0).integers(0, options.vocabulary, (1, options.length), np.int32)
    ways = lora_jax_ways(model, adapters, tokens)
    if not (missing or options.alone):
      ways |= peft_ways(model, adapters, tokens, Path(name), options.threads)
    seconds = compare(ways, options.repeats)
  print_table(seconds)
  return seconds


if __name__ == "__main__":
  main()
