"""A sum over chunks of which one is in memory at a time, forward and backward.

    f(w, x) = sum_c g(w, x_c)

Its backward pass would need the intermediate arrays of every g(w, x_c), such as the logits of a
chunk, or compute them again. But f is a scalar: its gradient is that of each chunk, computed
together with the chunk's value and multiplied by one number later.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from lora_jax.marks import CHUNKED_SUM

ChunkFn = Callable[..., Float[Array, ""]]


def chunked_sum(fn: ChunkFn, chunks: PyTree, constants: PyTree) -> Float[Array, ""]:
  """Returns the sum of `fn(*chunk, *constants)`; its gradient costs no second evaluation of `fn`.

  There is only a reverse-mode derivative, for the chunks and for the arrays that `fn` closes over.

  Args:
    fn: a scalar function of the arrays of one chunk and constants, which are not differentiated.
    chunks: a sequence of floating-point arrays (chunks, ...), which are.
    constants: a sequence of arrays (chunks, ...) of any dtype.
  """
  first = jax.tree.map(lambda x: x[0], (chunks, constants))
  closed, shared = jax.closure_convert(lambda chunk, constants: fn(*chunk, *constants), *first)
  return _chunked_sum(closed, list(shared), chunks, constants)


def _sum(fn: ChunkFn, shared: list[Array], chunks: PyTree, constants: PyTree) -> Array:
  def add(total: Array, slices: tuple[PyTree, PyTree]) -> tuple[Array, None]:
    return total + jax.checkpoint(fn)(*slices, *shared), None

  return jax.lax.scan(add, jnp.zeros(()), (chunks, constants))[0]


def _forward(fn: ChunkFn, shared: list[Array], chunks: PyTree, constants: PyTree) -> Any:
  """Returns the sum and its gradient; XLA removes the part for arrays that are not trained."""

  def add(sums: tuple[Array, PyTree], slices: tuple[PyTree, PyTree]) -> tuple[Any, PyTree]:
    chunk, constants = slices
    value, (to_shared, to_chunk) = jax.value_and_grad(
      lambda shared, chunk: fn(chunk, constants, *shared), argnums=(0, 1)
    )(shared, chunk)
    total, grads = sums
    grads = jax.tree.map(lambda total, part: total + part.astype(total.dtype), grads, to_shared)
    return (total + value, grads), to_chunk

  zeros = [jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)) for x in shared]
  (total, grads), to_chunks = jax.lax.scan(add, (jnp.zeros(()), zeros), (chunks, constants))
  grads = [grad.astype(x.dtype) for grad, x in zip(grads, shared, strict=True)]
  return total, (grads, to_chunks)


def _backward(fn: ChunkFn, saved: PyTree, gradient: Array) -> Any:
  del fn
  to_shared, to_chunks = jax.tree.map(lambda x: (gradient * x).astype(x.dtype), saved)
  return to_shared, to_chunks, None


_sum.__name__ = CHUNKED_SUM
_chunked_sum: Any = functools.partial(jax.custom_vjp, nondiff_argnums=(0,))(_sum)
_chunked_sum.defvjp(_forward, _backward)
