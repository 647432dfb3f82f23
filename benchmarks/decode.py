"""Compares beam search with the `generate` of `transformers`: same weights, same prompts.

    python -m benchmarks.decode --model FOLDER             # a merged, adapted model
    python -m benchmarks.decode --model FOLDER --inputs 64 --repeats 1

The prompts are the 630 distinct inputs of E2E's test set, or a random sample of them. Both
implementations use the same beams, penalties and limits, in float32, and get the prompts sorted by
length. `transformers` pads each batch in front to its longest prompt. Each implementation first
chooses its fastest batch size on `--tuning` of the prompts. Then they take turns, so that other
work on the machine slows both; the ratio is the median of the turns' ratios.

The embedded base model has not seen E2E, and its outputs seldom end: pass an adapted model's folder
for a realistic comparison.

    batch       prompts in a batch
    compile_s   seconds of the first pass over the prompts, less those of a later one
    seconds     to decode all prompts, median, without compilation
    x           ratio to `transformers`
    steps       forward passes, summed over the batches
    tokens      in the best outputs, end tokens included

The last lines have the number of equal outputs and the largest difference of scores. Outputs may
differ where scores tie within rounding.
"""

import argparse
import dataclasses
import functools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

import lora_jax
from lora_jax.data import text
from lora_jax.data.sets import e2e
from lora_jax.decoding import BeamConfig, CachedModel, beam_search, from_linen
from lora_jax.models.gpt2.folder import load_gpt2
from lora_jax.models.gpt2.model import GPT2, init_cache
from lora_jax.models.text.tokenizer import end_of_text_id, load_tokenizer

GOAL = 0.3
BASE = Path(lora_jax.__file__).parent / "assets" / "gpt2"

Prompts = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Decoded:
  """The outputs of one implementation.

  Attributes:
    outputs: the best token ids of each prompt, end token included.
    scores: of these outputs.
    steps: forward passes, summed over the batches.
  """

  outputs: list[list[int]]
  scores: np.ndarray
  steps: int


Search = Callable[[Prompts, int], Decoded]


def lora_jax_search(model: CachedModel, params: PyTree, config: BeamConfig) -> Search:
  """Returns `search(prompts, batch_size)` by lora_jax."""

  def search(prompts: Prompts, batch_size: int) -> Decoded:
    beams = beam_search(model, params, prompts, config, batch_size=batch_size)
    rows = zip(beams.tokens[:, 0], beams.lengths[:, 0], strict=True)
    order = np.argsort([-len(prompt) for prompt in prompts], kind="stable")
    steps = int(beams.steps[order[::batch_size]].sum())
    return Decoded([row[:length].tolist() for row, length in rows], beams.scores[:, 0], steps)

  return search


def transformers_search(folder: Path, config: BeamConfig, threads: int) -> Search:
  """Returns `search(prompts, batch_size)` by transformers."""
  import torch  # pyright: ignore[reportMissingImports]
  from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

  torch.set_num_threads(threads)
  model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  device = "cuda" if torch.cuda.is_available() else "cpu"
  model.to(device)
  settings: dict[str, Any] = {
    "num_beams": config.num_beams,
    "length_penalty": config.length_penalty if config.num_beams > 1 else None,
    "no_repeat_ngram_size": config.no_repeat_ngram_size,
    "max_new_tokens": config.max_new_tokens,
    "eos_token_id": list(config.eos_ids),
    "pad_token_id": config.eos_ids[0],
  }
  steps = [0]
  model.register_forward_hook(lambda *_: steps.__setitem__(0, steps[0] + 1))

  def search(prompts: Prompts, batch_size: int) -> Decoded:
    steps[0] = 0
    outputs: list[list[int]] = [[] for _ in prompts]
    scores = np.zeros(len(prompts))
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch_size):
      rows = order[start : start + batch_size]
      width = len(prompts[rows[0]])
      lengths = torch.tensor([len(prompts[i]) for i in rows])
      tokens = torch.zeros((len(rows), width), dtype=torch.long)
      for row, i in enumerate(rows):
        tokens[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
      mask = (torch.arange(width)[None] >= width - lengths[:, None]).long()
      with torch.inference_mode():
        out = model.generate(
          input_ids=tokens.to(device),
          attention_mask=mask.to(device),
          do_sample=False,
          early_stopping=False if config.num_beams > 1 else None,
          output_scores=config.num_beams > 1,
          return_dict_in_generate=True,
          **settings,
        )
      if config.num_beams > 1:
        scores[rows] = out.sequences_scores.cpu().numpy()
      for i, row in zip(rows, out.sequences[:, width:].tolist(), strict=True):
        ends = [index for index, token in enumerate(row) if token in config.eos_ids]
        outputs[i] = row[: ends[0] + 1] if ends else row
    return Decoded(outputs, scores, steps[0])

  return search


def seconds_of(search: Search, prompts: Prompts, batch_size: int) -> tuple[float, Decoded]:
  start = time.perf_counter()
  decoded = search(prompts, batch_size)
  return time.perf_counter() - start, decoded


def best_batch_size(search: Search, prompts: Prompts, sizes: Sequence[int]) -> int:
  """Returns the batch size that is fastest on these prompts, without compilation."""
  if len(sizes) == 1:
    return sizes[0]
  times = {}
  for size in sizes:
    search(prompts, size)
    times[size], _ = seconds_of(search, prompts, size)
  print("  seconds by batch size:", {size: round(t, 1) for size, t in times.items()}, flush=True)
  return min(times, key=lambda size: times[size])


def measure(options: argparse.Namespace, searches: dict[str, Search], prompts: Prompts) -> dict:
  """Returns by implementation: batch size, seconds of the first pass and of each turn, result."""
  results: dict[str, dict[str, Any]] = {}
  tuning = random.Random(1).sample(list(prompts), min(options.tuning, len(prompts)))
  for name, search in searches.items():
    print(f"{name}: choosing the batch size", flush=True)
    size = best_batch_size(search, tuning, options.batches)
    first, _ = seconds_of(search, prompts, size)
    results[name] = {"batch": size, "first": first, "seconds": []}
  for turn in range(options.repeats):
    for name in list(searches)[:: 1 if turn % 2 == 0 else -1]:
      seconds, decoded = seconds_of(searches[name], prompts, results[name]["batch"])
      results[name]["seconds"].append(seconds)
      results[name]["result"] = decoded
  return results


def print_table(results: dict[str, dict[str, Any]]) -> None:
  print(
    f"\n{'way':13}{'batch':>6}{'compile_s':>11}{'seconds':>10}{'x':>7}{'steps':>8}{'tokens':>8}"
  )
  peer = results.get("transformers", results["lora_jax"])["seconds"]
  for name, result in results.items():
    seconds, decoded = statistics.median(result["seconds"]), result["result"]
    ratio = statistics.median(a / b for a, b in zip(result["seconds"], peer, strict=True))
    print(
      f"{name:13}{result['batch']:6}{max(0.0, result['first'] - seconds):11.1f}{seconds:10.2f}"
      f"{ratio:7.2f}{decoded.steps:8}{sum(map(len, decoded.outputs)):8}"
    )
  if "transformers" not in results:
    return
  decoded, expected = results["lora_jax"]["result"], results["transformers"]["result"]
  equal = sum(a == b for a, b in zip(decoded.outputs, expected.outputs, strict=True))
  difference = np.abs(decoded.scores - expected.scores).max()
  ratio = statistics.median(
    a / b for a, b in zip(results["lora_jax"]["seconds"], peer, strict=True)
  )
  print(
    f"\nequal outputs: {equal} of {len(decoded.outputs)}; scores differ by at most {difference:.1e}"
  )
  print(f"goal: at most {GOAL} of its time: {ratio:.2f}, {'met' if ratio <= GOAL else 'MISSED'}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description="Beam search: lora_jax against transformers.")
  parser.add_argument("--model", type=Path, default=BASE, help="a GPT-2 folder")
  parser.add_argument("--inputs", type=int, default=630)
  parser.add_argument("--beams", type=int, default=10)
  parser.add_argument("--length_penalty", type=float, default=0.9)
  parser.add_argument("--ngram", type=int, default=4, help="no repeated n-grams of this size")
  parser.add_argument("--max_new_tokens", type=int, default=64)
  parser.add_argument("--batches", type=int, nargs="+", default=[16, 32, 64], help="to choose from")
  parser.add_argument("--tuning", type=int, default=64, help="prompts to choose the batch size on")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--threads", type=int, default=2, help="of torch; JAX uses all cores")
  parser.add_argument("--precision", default="highest", help="of JAX's float32 matmuls on GPUs")
  parser.add_argument("--alone", action="store_true", help="lora_jax only")
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
  options = parse(arguments)
  jax.config.update("jax_default_matmul_precision", options.precision)
  tokenizer = load_tokenizer(options.model)
  end = end_of_text_id(tokenizer)
  contexts = [group.context for group in e2e.grouped(e2e.read("test"))]
  prompts = text.encode_context(tokenizer, contexts, end)
  prompts = random.Random(0).sample(prompts, min(options.inputs, len(prompts)))
  config = BeamConfig(
    eos_ids=(end,),
    num_beams=options.beams,
    length_penalty=options.length_penalty,
    no_repeat_ngram_size=options.ngram,
    max_new_tokens=options.max_new_tokens,
  )
  device = jax.devices()[0]
  print(f"JAX {jax.__version__}, {device.device_kind} ({device.platform}), {vars(options)}")
  shape, params = load_gpt2(options.model)
  model = from_linen(GPT2(shape), functools.partial(init_cache, shape), shape.num_positions)
  searches = {"lora_jax": lora_jax_search(model, params, config)}
  if not options.alone:
    searches["transformers"] = transformers_search(options.model, config, options.threads)
  print_table(measure(options, searches, prompts))


if __name__ == "__main__":
  main()
