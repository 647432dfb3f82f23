"""A compiled step has no more values of a weight's size than the base model's step."""

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import lora_jax as lj

from tests.toy_models import LAYERS, block, make_params, randomized, scanned, tokens

KEY = jax.random.key(0)
IDS = tokens()


def one_layer(params, ids):
  return block(params["h_0"], params["embed"]["embedding"][ids]) @ params["embed"]["embedding"].T


FORMS = {
  "one layer": (one_layer, make_params(), r"h_0/.*kernel"),
  "scanned": (scanned, make_params(stacked=True), r"blocks/.*kernel"),
}


def compiled_steps(form):
  fn, params, target = FORMS[form]
  lora = lj.lora(fn, lj.LoraConfig(rank=1, alpha=4.0, target=target))  # no factor as large as W
  trainable = randomized(lora.init(KEY, params, IDS))
  optimizer = optax.adamw(1e-3)

  def loss(out):
    return jnp.mean(out**2)

  def factored(params, trainable, state):
    grads = jax.grad(lambda t: loss(lora.apply(params, t, IDS)))(trainable)
    updates, state = optimizer.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state

  def merged(params, trainable, state):
    grads = jax.grad(lambda t: loss(fn(lora.merge(params, t), IDS)))(trainable)
    updates, state = optimizer.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state

  def base(params, shift):  # the base model and its gradient for an input
    def shifted(shift):
      embedding = params["embed"]["embedding"]
      return loss(fn(params | {"embed": {"embedding": embedding + shift}}, IDS))

    return jax.grad(shifted)(shift)

  state = optimizer.init(trainable)
  shift = jnp.zeros_like(params["embed"]["embedding"])
  return (
    jax.jit(base).lower(params, shift).compile(),
    jax.jit(factored, donate_argnums=(1, 2)).lower(params, trainable, state).compile(),
    jax.jit(merged, donate_argnums=(1, 2)).lower(params, trainable, state).compile(),
    params,
  )


def values_of_sizes(compiled, sizes):
  """Counts the values of a weight's size in the optimized program, without its parameters."""
  count = 0
  for line in compiled.as_text().splitlines():
    value = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = \w+\[([\d,]*)\]\S* (\S+?)\(", line)
    if value and value[2] not in ("parameter", "get-tuple-element", "bitcast"):
      count += math.prod(int(n) for n in value[1].split(",") if n) in sizes
  return count


@pytest.mark.parametrize("form", FORMS)
def test_no_more_outputs_or_temporaries_of_a_weights_size_than_the_base(form):
  base, factored, merged, params = compiled_steps(form)
  layers = params["blocks"] if form == "scanned" else params["h_0"]
  kernels = [leaf for leaf in jax.tree.leaves(layers) if leaf.ndim == 2 + (form == "scanned")]
  sizes = {leaf.size for leaf in kernels}
  if form == "scanned":
    sizes |= {leaf.size // LAYERS for leaf in kernels}
  assert values_of_sizes(factored, sizes) <= values_of_sizes(base, sizes)
  assert values_of_sizes(merged, sizes) > values_of_sizes(base, sizes)  # the count can tell
  outputs = [math.prod(x.shape) for x in jax.tree.leaves(factored.out_info)]
  assert not sizes & set(outputs)


def test_the_step_takes_frozen_weights_as_arguments():
  fn, params, target = FORMS["one layer"]
  lora = lj.lora(fn, lj.LoraConfig(rank=2, alpha=4.0, target=target))
  trainable = lora.init(KEY, params, IDS)
  jaxpr = jax.make_jaxpr(lora.apply)(params, trainable, IDS)
  assert not [const for const in jaxpr.consts if getattr(const, "ndim", 0)]
