"""A small demonstration of the transform, in about a minute on two CPU cores.

Command: `python -m experiments.demo`, or `make e2e`.

A small Flax transformer first learns to reverse sequences of digits; LoRA then adapts it to
sort them, with the base frozen. Printed: the trainable tree, what the optimizer holds, the
losses, and that merged and unmerged outputs agree.
"""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import lora_jax as lj

DIGITS, LENGTH, WIDTH = 10, 8, 64
CONFIG = lj.LoraConfig(rank=8, alpha=16.0, target=r"block_\d/.*/kernel")


class Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    attention = nn.MultiHeadDotProductAttention(num_heads=4, name="attn")
    x = x + attention(nn.LayerNorm()(x))
    h = nn.gelu(nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm()(x)))
    return x + nn.Dense(WIDTH, name="down")(h)


class Transformer(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    positions = self.param("positions", nn.initializers.normal(0.02), (LENGTH, WIDTH))
    x = nn.Embed(DIGITS, WIDTH, name="embed")(tokens) + positions[None]
    for i in range(2):
      x = Block(name=f"block_{i}")(x)
    return nn.Dense(DIGITS, name="head")(nn.LayerNorm()(x))


def fn(params, tokens):
  """Returns the logits (batch, length, digits) of an unmodified Flax model."""
  return Transformer().apply({"params": params}, tokens)


def cross_entropy(logits, labels):
  """Returns the mean cross-entropy, in nats a digit."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def digits(seed: int, batch: int = 128) -> jax.Array:
  return jax.random.randint(jax.random.key(seed), (batch, LENGTH), 0, DIGITS)


def fit(adaptation: lj.Adaptation, params, task, learning_rate: float, num_train_steps: int):
  """Trains the adapter of a combined tree; returns the tree."""
  adapter = adaptation.init(jax.random.key(1), params, digits(0))
  tree = {"base": params, "adapter": adapter}
  mask = lj.trainable_mask(tree)
  optimizer = lj.freeze(optax.adamw(learning_rate), mask)
  trainable, frozen = lj.partition(tree, mask)

  @jax.jit
  def step(trainable, frozen, state, tokens):
    def loss(trainable):
      tree = lj.combine(trainable, frozen)
      return cross_entropy(adaptation.apply(tree["base"], tree["adapter"], tokens), task(tokens))

    grads = jax.grad(loss)(trainable)
    updates, state = optimizer.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state

  state = optimizer.init(trainable)
  for number in range(num_train_steps):
    trainable, state = step(trainable, frozen, state, digits(number))
  count = sum(leaf.size for leaf in jax.tree.leaves(state))
  print(f"optimizer state: {count:,} numbers in {len(jax.tree.leaves(state))} arrays")
  return lj.combine(trainable, frozen)


def reverse(tokens):
  return tokens[:, ::-1]


def sort(tokens):
  return jnp.sort(tokens, axis=1)


def main() -> None:
  start = time.perf_counter()
  params = Transformer().init(jax.random.key(0), digits(0))["params"]
  print("1. The base learns to reverse digits, by full fine-tuning.")
  base = fit(lj.full_finetuning(fn), params, reverse, 3e-3, 300)["adapter"]

  print("\n2. LoRA adapts it to sort them; the base is frozen.")
  lora = lj.lora(fn, CONFIG)
  tree = fit(lora, base, sort, 1e-2, 600)
  print(lj.summary(base, tree["adapter"], CONFIG))

  print("\n3. On new digits, cross-entropy in nats a digit (chance: 2.303):")
  test = digits(99, batch=1000)
  adapted = jax.jit(lora.apply)(tree["base"], tree["adapter"], test)
  merged = jax.jit(fn)(lora.merge(tree["base"], tree["adapter"]), test)
  rows = {
    "base, reversing": cross_entropy(fn(base, test), reverse(test)),
    "base, sorting": cross_entropy(fn(base, test), sort(test)),
    "LoRA, sorting": cross_entropy(adapted, sort(test)),
    "LoRA merged, sorting": cross_entropy(merged, sort(test)),
  }
  for name, loss in rows.items():
    print(f"  {name:<22}{float(loss):.4f}")
  difference = jnp.abs(adapted - merged).max() / jnp.abs(merged).max()
  print(f"  merged and unmerged differ by {float(difference):.1e} of the largest logit")
  print(f"\nDone in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
  main()
