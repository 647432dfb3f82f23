"""Variants whose equations use more of the engine than LoRA's.

They resemble VeRA, LoHa, LoRA-XS and (IA)^3, without the papers' initial values.
"""

import jax
import jax.numpy as jnp

import lora_jax as lj
from lora_jax.axes import RANK


def draw(key, site, arrays, **sizes):
  names = list(arrays)
  keys = jax.random.split(key, len(names))
  return {
    name: 0.3 * jax.random.normal(k, site.array_shape(arrays[name], **sizes))
    for name, k in zip(names, keys, strict=True)
  }


# Frozen factors, scaled along their axes by trained vectors.
SCALED = {"a": "batch in rank", "b": "batch rank out", "d": "batch rank", "e": "batch out"}


def scaled_start(key, site):
  arrays = draw(key, site, SCALED)
  return arrays | {"e": jnp.zeros_like(arrays["e"])}


SCALED_VARIANT = lj.Variant(
  "scaled frozen factors",
  SCALED,
  scaled_start,
  lambda w, p, scaling: w + scaling * ((p.a * p.d) @ (p.b * p.e)),
  frozen=("a", "b"),
)

# Two inner axes, joined into one: the Hadamard product of two low-rank pairs.
HADAMARD = {
  "a1": "batch in rank",
  "b1": "batch rank out",
  "a2": "batch in rank2",
  "b2": "batch rank2 out",
}


def hadamard_start(key, site):
  arrays = draw(key, site, HADAMARD, rank2=3)
  return arrays | {"b2": jnp.zeros_like(arrays["b2"])}


HADAMARD_VARIANT = lj.Variant(
  "Hadamard product",
  HADAMARD,
  hadamard_start,
  lambda w, p, scaling: w + scaling * ((p.a1 * p.a2) @ (p.b1 * p.b2)),
  sizes=lambda site: {"rank2": 3},
)

# A small matrix between frozen factors.
CORE = {"a": "batch in rank", "r": "batch rank rank2", "b": "batch rank2 out"}


def core_start(key, site):
  arrays = draw(key, site, CORE, rank2=site.rank)
  return arrays | {"r": jnp.zeros_like(arrays["r"])}


CORE_VARIANT = lj.Variant(
  "core between frozen factors",
  CORE,
  core_start,
  lambda w, p, scaling: w - -scaling * (p.a.sum_over(p.r, (RANK,)) @ p.b),
  frozen=("a", "b"),
  sizes=lambda site: {"rank2": site.rank},
)


# Only a gain, on the outputs or on the inputs.
def gain(words):
  return lj.Variant(
    f"gain over {words}",
    {"gain": words},
    lambda key, site: {"gain": jnp.ones(site.array_shape(words))},
    lambda w, p, scaling: w * p.gain,
  )


GAIN_OUT, GAIN_IN = gain("batch out"), gain("batch in")
