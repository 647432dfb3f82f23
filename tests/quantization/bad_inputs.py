"""Weights that cannot be quantized."""

import jax.numpy as jnp
import numpy as np

import lora_jax as lj

from tests.bad_inputs import BadInput

PARAMS = {
  "kernel": jnp.ones((64, 6)),
  "ids": jnp.ones((64, 6), jnp.int32),
  "nan": jnp.full((64, 6), np.nan),
  "bias": jnp.ones(64),
  "stored": lj.quantize({"w": jnp.ones((64, 6))}, "nf4", target="w")["w"],
}


def quantize(format="nf4", target="kernel", **settings):
  return lambda _: lj.quantize(PARAMS, format, target, **settings)


ROWS = [
  BadInput("unknown format", quantize("nf5"), ("'nf5'", "did you mean nf4", "int8")),
  BadInput("format without quantizer", quantize("Q4_K"), ("Q4_K", "can be read", "Q4_0", "nf4")),
  BadInput("no leaf", quantize(target="kernels"), ("target 'kernels'", "did you mean kernel")),
  BadInput("integers", quantize(target="ids"), ("ids", "floating-point", "int32")),
  BadInput("quantized twice", quantize(target="stored"), ("stored is quantized already", "nf4")),
  BadInput("NaN", quantize(target="nan"), ("nan has values", "infinite or NaN")),
  BadInput(
    "block does not divide",
    quantize(axis=-1),
    ("kernel", "have 64 values", "axis -1", "(64, 6)", "of size 6", "Choose another axis"),
  ),
  BadInput("axis from the start", quantize(axis=0), ("kernel: axis", "-1, down to -2", "got 0")),
  BadInput("axis that is missing", quantize(target="bias"), ("bias: axis", "got -2", "(64,)")),
]
