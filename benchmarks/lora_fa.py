"""Peak memory of one gradient of a GPT-2, by LoRA and by LoRA-FA.

    python -m benchmarks.lora_fa [--num_layers=4] [--embed_dim=256]

Each method runs in a process of its own: the peak of its anonymous memory, the temporaries of the
compiled program, and the arrays that the backward pass keeps of one token.
"""

import argparse
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax as lj
from benchmarks.memory import finish, measure, wait_for_start
from lora_jax.models.gpt2.model import GPT2, GPT2Config

METHODS = {"LoRA": lj.LORA, "LoRA-FA": lj.LORA_FA}
ROWS, TOKENS, RANK = 8, 256, 4


def child(method: str, num_layers: int, embed_dim: int) -> None:
  """Compiles and computes a gradient, in a process that `measure` has started."""
  config = GPT2Config(
    vocab_size=512,
    num_positions=TOKENS,
    embed_dim=embed_dim,
    num_layers=num_layers,
    num_heads=embed_dim // 64,
  )
  module, tokens = GPT2(config), jnp.ones((ROWS, TOKENS), jnp.int32)
  params = jax.jit(module.init)(jax.random.key(0), tokens[:1, :2])["params"]
  target = r".*/(attn/(query|key|value|out)|mlp/(up|down))/kernel"
  lora = lj.LoraConfig(RANK, 8.0, target, variant=METHODS[method])

  def mean_square(params: Any, tokens: Any) -> jax.Array:
    logits: Any = module.apply({"params": params}, tokens)
    return jnp.mean(logits**2)

  adapted = lj.lora(mean_square, lora)
  trainable = adapted.init(jax.random.key(1), params, tokens)
  mask = lj.trainable_mask({"base": None, "adapter": trainable})["adapter"]
  part, frozen = lj.partition(trainable, mask)

  def loss(part, params, frozen):
    return adapted.apply(params, lj.combine(part, frozen), tokens)

  def kept(part, params, frozen):
    return jax.vjp(lambda part: loss(part, params, frozen), part)[1]

  arrays = jax.tree.leaves(jax.eval_shape(kept, part, params, frozen))
  rows = ROWS * TOKENS
  wide = [x for x in arrays if x.shape[:1] == (rows,) or x.shape[:2] == (ROWS, TOKENS)]
  gradient = jax.jit(jax.grad(loss)).lower(part, params, frozen).compile()
  wait_for_start()
  jax.block_until_ready(gradient(part, params, frozen))
  analysis = gradient.memory_analysis()
  assert analysis is not None, "compiled programs have one"
  finish([analysis.temp_size_in_bytes, sum(x.size for x in wide) / rows])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--num_layers", type=int, default=4)
  parser.add_argument("--embed_dim", type=int, default=256)
  parser.add_argument("--child", choices=list(METHODS), help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.child:
    child(args.child, args.num_layers, args.embed_dim)
    return
  sizes = [f"--num_layers={args.num_layers}", f"--embed_dim={args.embed_dim}"]
  for method in METHODS:
    command = [sys.executable, "-m", "benchmarks.lora_fa", f"--child={method}", *sizes]
    measured = measure(command)
    temporaries, kept = measured.result
    figures = {
      "peak_mb": round(measured.growth / 1e6, 1),
      "temporaries_mb": round(temporaries / 1e6, 1),
      "kept_numbers_per_token": round(kept),
    }
    print(f"{method}: {json.dumps(figures)}", flush=True)


if __name__ == "__main__":
  main()
