"""Calls a function of a parameter tree with quantized leaves."""

from collections.abc import Callable
from typing import Any

import jax

from lora_jax.quantization.leaf import is_quantized
from lora_jax.transform.factored import as_values
from lora_jax.transform.interpreter import Interpreter
from lora_jax.transform.tracing import trace_call


def dequantized(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Returns `fn(params, *args, **kwargs)` for params with quantized leaves.

  Each weight is dequantized where it is used, and no dequantized weight is kept for the backward
  pass. Adapted functions do this by themselves; this is for evaluating and decoding with a frozen
  base model. Params without quantized leaves are passed to `fn` unchanged.

  >>> import jax.numpy as jnp, lora_jax
  >>> fn = lambda params, x: x @ params["kernel"]
  >>> params = lora_jax.quantize({"kernel": jnp.ones((64, 8))}, "int8", "kernel")
  >>> dequantized(fn)(params, jnp.ones((1, 64))).shape
  (1, 8)
  """

  def call(params: Any, *args: Any, **kwargs: Any) -> Any:
    leaves = jax.tree.leaves((params, args, kwargs), is_leaf=is_quantized)
    if not any(map(is_quantized, leaves)):
      return fn(params, *args, **kwargs)
    traced = trace_call(fn, params, args, kwargs)
    values = as_values(traced.leaves, traced.position)
    return jax.tree.unflatten(traced.out_tree, Interpreter({}).evaluate(traced.jaxpr, values))

  return call
