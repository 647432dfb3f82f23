"""Weights as matrices, and their singular value decompositions."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from lora_jax.adapters.delta import Site

Svd = tuple[Float[Array, "*batch m k"], Float[Array, "*batch k"], Float[Array, "*batch k n"]]
"""U, the singular values in descending order, and V^T."""


def matrices(site: Site) -> Float[Array, "*batch inputs outputs"]:
  """Returns the weight as one matrix of inputs by outputs for each layer or expert, float32.

  Several input axes (the heads of an output projection, the window of a convolution) are joined
  into one, and so are several output axes. On a mesh with explicit axes they are replicated, as a
  decomposition needs them.
  """
  axes, w = site.axes, site.weight
  sharding = jax.typeof(w).sharding
  if sharding.mesh.are_all_axes_explicit:
    w = jax.sharding.reshard(w, sharding.update(spec=PartitionSpec()))
  moved = jnp.transpose(w, (*axes.batch, *axes.inputs, *axes.outputs)).astype(jnp.float32)
  return moved.reshape(*moved.shape[: len(axes.batch)], *axes.counts(site.shape))


def as_factors(
  site: Site, a: Float[Array, "*batch inputs rank"], b: Float[Array, "*batch rank outputs"]
) -> tuple[Float[Array, "*a"], Float[Array, "*b"]]:
  """Returns two factors of a weight's matrices in the shapes of `lora_a` and `lora_b`."""
  words = "batch in rank", "batch rank out"
  first, second = (site.array_shape(axes) for axes in words)
  return a.reshape(first), b.reshape(second)


def balanced(site: Site, terms: Svd) -> tuple[Float[Array, "*a"], Float[Array, "*b"]]:
  """Returns A = U sqrt(S / scaling) and B = sqrt(S / scaling) V^T: `scaling * A B` is U S V^T.

  Raises:
    ValueError: if the scaling is negative.
  """
  if site.scaling < 0:
    raise ValueError(
      f"{site.path}: A and B are initialized to sqrt(S / scaling), and scaling is {site.scaling}; "
      "expected a positive alpha"
    )
  u, values, v = terms
  half = jnp.sqrt(values / site.scaling)
  return as_factors(site, u * half[..., None, :], half[..., None] * v)


@jax.jit
def svd(x: Float[Array, "*batch m n"]) -> Svd:
  """Returns the decomposition of each matrix."""
  u, values, v = jnp.linalg.svd(x, full_matrices=False)
  return u, values, v


def some(terms: Svd, which: slice) -> Svd:
  """Returns some of the terms of a decomposition."""
  u, values, v = terms
  return u[..., which], values[..., which], v[..., which, :]


@functools.partial(jax.jit, static_argnames=("rank", "num_iterations"))
def leading_svd(
  key: PRNGKeyArray, x: Float[Array, "*batch m n"], rank: int, num_iterations: int
) -> Svd:
  """Returns nearly the first `rank` terms of the decomposition, by subspace iteration.

  Halko, Martinsson and Tropp 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1, in a random subspace
  of 2 `rank` dimensions: a few matmuls instead of a whole decomposition. An error in the k-th term
  shrinks by (sigma_(2 rank + 1) / sigma_k)^2 in each iteration.
  """
  with jax.default_matmul_precision("float32"):
    width = min(2 * rank, *x.shape[-2:])
    q = jnp.linalg.qr(x @ jax.random.normal(key, (*x.shape[:-2], x.shape[-1], width)))[0]
    for _ in range(num_iterations):
      q = jnp.linalg.qr(x @ jnp.linalg.qr(x.mT @ q)[0])[0]
    u, values, v = jnp.linalg.svd(q.mT @ x, full_matrices=False)
    return some((q @ u, values, v), slice(rank))
