"""Bytes that each further adapter of a scanned model allocates; the base model's are shared.

    python -m benchmarks.scanned_base

The shape is that of MaxText's issue 5129: 4 scanned layers of Gemma 2 2B in float32, LoRA of rank 8
on all linear layers. There, each adapter of 6.1 MB takes 1,194 MB, a copy of the stacked layers.
"""

import argparse
import gc
from collections.abc import Sequence

import jax
import jax.numpy as jnp

import lora_jax as lj
from benchmarks.arguments import count
from lora_jax.models.llama.model import Llama, LlamaConfig

MIB = 2**20


def allocated() -> int:
  """Returns the bytes of all arrays."""
  gc.collect()
  return sum(array.nbytes for array in jax.live_arrays())


def measure(width: int, mlp_dim: int, num_layers: int, num_adapters: int) -> dict[str, list[int]]:
  """Returns bytes: of the base model, and what each adapter's weights are and what it allocates."""
  model = Llama(
    LlamaConfig(
      vocab_size=256,
      embed_dim=width,
      num_layers=num_layers,
      num_heads=8,
      num_kv_heads=4,
      head_dim=max(width // 18, 1) * 2,  # 256 in Gemma 2 2B
      mlp_dim=mlp_dim,
      scan_layers=True,
    )
  )
  tokens = jnp.zeros((1, 8), jnp.int32)
  params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
  target = r".*/(query|key|value|out|gate|up|down)/kernel"
  lora = lj.lora(lambda p, x: model.apply({"params": p}, x), lj.LoraConfig(8, 8.0, target))
  adapters, sizes, growth = [], [], []
  for i in range(num_adapters):
    before = allocated()
    adapters.append(lora.init(jax.random.key(i), params, tokens))
    jax.block_until_ready(adapters)
    sizes.append(sum(array.nbytes for array in jax.tree.leaves(adapters[i])))
    growth.append(allocated() - before)
  base = sum(array.nbytes for array in jax.tree.leaves(params["layers"]))
  return {"base": [base], "adapter": sizes, "allocated": growth}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--width", type=count, default=2304, help="of the hidden states")
  parser.add_argument("--mlp_dim", type=count, default=9216, help="inner width of the MLP")
  parser.add_argument("--num_layers", type=count, default=4, help="scanned layers")
  parser.add_argument("--num_adapters", type=count, default=3, help="of the same base model")
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
  options = parse(arguments)
  sizes = measure(options.width, options.mlp_dim, options.num_layers, options.num_adapters)
  print(f"stacked layers of the base model: {sizes['base'][0] / MIB:,.1f} MiB")
  for i, (size, growth) in enumerate(zip(sizes["adapter"], sizes["allocated"], strict=True)):
    print(f"adapter {i}: weights {size / MIB:.2f} MiB, allocated {growth / MIB:.2f} MiB")


if __name__ == "__main__":
  main()
