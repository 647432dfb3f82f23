"""Formats of quantized weights, and the error of merging an adapter into them.

    make smollm2
    python -m benchmarks.quantization
    python -m benchmarks.quantization --model=FOLDER --kernels 7

The weights are the model's kernels in float32: of a quantized file what it dequantizes to, so that
its own format has no error.

    bits          of a weight, from the bytes of codes and scales
    error         of quantized weights over their norm
    quantize_ms   milliseconds per million weights, compiled
    dequantize_ms the same of the way back

Then an update of 5 % of each weight's norm is merged into the quantized weights. QA-LoRA, in groups
of a block, is added to the blocks' minima. LoRA is added to the dequantized weights, which are
quantized again. The error is over the update's norm: at 100 % as much is lost as was merged.

LoftQ (`--loftq`) starts LoRA of rank 16 from the error of quantization. Its table has the error of
the quantized weights alone, and with the initial adapter after 1 and 5 iterations.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.axes import LoraAxes
from lora_jax.models.zoo import load_causal_lm
from lora_jax.quantization.formats import FORMATS
from lora_jax.trees import weights_with_path

SHOWN = ("Q8_0", "int8", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "nf4", "rtn3", "rtn2")
MERGED = ("Q4_1", "Q5_1")
CORRECTED = ("nf4", "Q4_0", "rtn3", "rtn2")
RANK, SHARE = 16, 0.05


def timed(fn: Callable[..., Any], *args: Any) -> tuple[Any, float]:
  """Returns the value of a compiled function, and the seconds of its second call."""
  jax.block_until_ready(fn(*args))
  start = time.perf_counter()
  value = jax.block_until_ready(fn(*args))
  return value, time.perf_counter() - start


def format_row(name: str, kernels: Sequence[jax.Array]) -> list[str]:
  kind, bits, error, norm, times = FORMATS[name], 0, 0.0, 0.0, np.zeros(2)
  assert kind.quantize is not None
  quantize, dequantize = jax.jit(kind.quantize), jax.jit(kind.dequantize)
  for kernel in kernels:
    values = kernel.T  # blocks run along the inputs
    arrays, first = timed(quantize, values)
    back, second = timed(dequantize, arrays)
    bits += 8 * sum(array.nbytes for array in arrays.values())
    error += float(jnp.sum((back - values) ** 2))
    norm += float(jnp.sum(values**2))
    times += (first, second)
  size = sum(kernel.size for kernel in kernels)
  milliseconds = 1e9 * times / size
  return [name, f"{bits / size:.3f}", f"{(error / norm) ** 0.5:.2%}"] + [
    f"{value:.2f}" for value in milliseconds
  ]


def adapter(variant: lj.Variant, shape: tuple[int, ...], draw: np.random.Generator) -> Any:
  """Returns an adapter of a weight with random factors."""
  num_inputs, num_outputs = shape
  rows = num_inputs if variant == lj.LORA else num_inputs // 32
  a, b = draw.standard_normal((rows, RANK)), draw.standard_normal((RANK, num_outputs))
  arrays = {"lora_a": jnp.asarray(a, jnp.float32), "lora_b": jnp.asarray(b, jnp.float32)}
  axes = LoraAxes((), (0,), (1,))
  return {"w": lj.LoraWeight.from_arrays(arrays, variant.table, axes, None)}


def merge_row(format: str, variant: lj.Variant, kernels: Sequence[jax.Array]) -> list[str]:
  """Returns the errors of merging, of all kernels: their mean and the largest."""
  config = lj.LoraConfig(RANK, float(RANK), "w", variant=variant)
  merge = lj.lora(lambda params, x: x @ params["w"], config).merge
  draw, errors = np.random.default_rng(0), []
  for kernel in kernels:
    base = lj.quantize({"w": kernel}, format, target="w")
    plain = lj.dequantize(base)
    trainable = adapter(variant, kernel.shape, draw)
    node, size = trainable["w"], jnp.linalg.norm(merge(plain, trainable)["w"] - plain["w"])
    ratio = SHARE * jnp.linalg.norm(plain["w"]) / size
    trainable = {"w": node.replace(lora_b=ratio * node.lora_b)}
    exact = merge(plain, trainable)
    if variant == lj.LORA:
      merged = lj.quantize(exact, format, target="w")
    else:
      merged, _ = lj.merge_quantized(config, base, trainable)
    difference = merged["w"].dequantize() - exact["w"]
    update = exact["w"] - plain["w"]
    errors.append(float(jnp.linalg.norm(difference) / jnp.linalg.norm(update)))
  return [format, variant.name, f"{np.mean(errors):.1%}", f"{max(errors):.1%}"]


def loftq_row(format: str, kernels: Sequence[jax.Array]) -> list[str]:
  """Returns the relative errors of all kernels: quantized, and with LoftQ's adapter."""
  config = lj.LoraConfig(RANK, float(RANK), "w")
  fn, squares, norm = lambda params, x: x @ params["w"], np.zeros(3), 0.0
  for kernel in kernels:
    params, size = {"w": kernel}, float(jnp.sum(kernel**2))
    inputs = jax.ShapeDtypeStruct((1, kernel.shape[0]), jnp.float32)
    start = lj.lora(fn, config).init(jax.random.key(0), params, inputs)
    one, five = (lj.loftq(config, start, params, format, count)[2]["w"] for count in (1, 5))
    errors = np.asarray([one.rounded, one.corrected, five.corrected])
    squares, norm = squares + errors**2 * size, norm + size
  return [format, *(f"{error:.2%}" for error in np.sqrt(squares / norm))]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
  return "\n".join(
    "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    for row in (head, *rows)
  )


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser("benchmarks.quantization", description=__doc__)
  parser.add_argument("--model", default="smollm2", help="a folder or file; default: %(default)s")
  parser.add_argument("--kernels", type=int, default=0, help="the first ones only; 0 is all")
  parser.add_argument("--loftq", action="store_true", help="only LoftQ's table")
  options = parser.parse_args(arguments)
  if options.kernels < 0:
    parser.error(f"argument --kernels: expected 0 or more, got {options.kernels}")
  leaves = weights_with_path(load_causal_lm(options.model).params)
  kernels = [leaf for path, leaf in leaves if path.endswith("/kernel") and leaf.ndim == 2]
  kernels = kernels[: options.kernels or None]
  print(f"{len(kernels)} kernels, {sum(kernel.size for kernel in kernels):,} weights")
  if options.loftq:
    head = ["format", "quantized", "1 iteration", "5 iterations"]
    print(table(head, [loftq_row(name, kernels) for name in CORRECTED]))
    return
  head = ["format", "bits", "error", "quantize_ms", "dequantize_ms"]
  print(table(head, [format_row(name, kernels) for name in SHOWN]))
  print(f"\nmerged: an update of {SHARE:.0%} of the norm, rank {RANK}")
  rows = [merge_row(name, variant, kernels) for name in MERGED for variant in (lj.QA_LORA, lj.LORA)]
  print(table(["format", "variant", "mean error", "largest"], rows))


if __name__ == "__main__":
  main()
