"""The nearest adapter of a smaller rank."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import LoraWeight
from lora_jax.arithmetic.opened import close_adapter, open_adapter
from lora_jax.fields import Count, read_value


def truncate_rank(
  config: LoraConfig, trainable: PyTree, params: PyTree, rank: int
) -> tuple[LoraConfig, PyTree, dict[str, Float[Array, ""]]]:
  """Returns the nearest adapter of a smaller rank, by truncated singular value decompositions.

  With A = Q_a R_a and B^T = Q_b R_b, the singular values of A B are those of R_a R_b^T, a matrix
  of rank x rank: nothing of a weight's size is materialized. Each layer of a stack and each expert
  is truncated separately. A weight of this rank or a smaller one keeps its delta.

  Args:
    config: of the adapter.
    trainable: its tree.
    params: of the base model, or their shapes.
    rank: of the result, at most.

  Returns:
    The config, the trainable tree, and by path the relative error of the delta in the
    Frobenius norm, |new - old| / |old|, over all layers of a stack.
  Raises:
    ValueError: if the adapter is not for these params, or the rank is not a positive integer.
  """
  read_value(Count, rank, "rank")
  opened = open_adapter(config, trainable, params)
  with jax.default_matmul_precision("float32"):
    truncated = {path: _truncated(weight, rank) for path, weight in opened.weights.items()}
  weights = {path: weight for path, (weight, _) in truncated.items()}
  errors = {path: error for path, (_, error) in truncated.items()}
  return *close_adapter([opened], weights | opened.extra), errors


def drop_zero_ranks(
  config: LoraConfig, trainable: PyTree, params: PyTree
) -> tuple[LoraConfig, PyTree]:
  """Returns the same adapter without the columns of A and rows of B that contribute 0.

  Each weight gets its own rank, all layers of a stack the largest of theirs; one of rank 0 is not
  adapted. For AdaLoRA's final ranks, after `to_lora`, and for cycles that were not reached.

  Args:
    config: of the adapter, of plain LoRA.
    trainable: its tree, real arrays.
    params: of the base model, or their shapes.

  Returns:
    The config, of scaling 1, and the trainable tree.
  Raises:
    ValueError: if the adapter is not for these params, or changes nothing.
  """
  opened = open_adapter(config, trainable, params)
  weights = {path: _without_zeros(weight) for path, weight in opened.weights.items()}
  leaves = {path: weight for path, weight in weights.items() if weight.rank} | opened.extra
  if not leaves:
    raise ValueError(
      "all terms of the adapter are 0: it is the base model, and has no ranks to keep"
    )
  return close_adapter([opened], leaves)


def _without_zeros(weight: LoraWeight) -> LoraWeight:
  a, b, rank = weight.lora_a, weight.lora_b, weight.rank
  batch = a.shape[: len(weight.axes.batch)]
  columns, rows = a.reshape(*batch, -1, rank), b.reshape(*batch, rank, -1)
  used = jnp.any(columns != 0, axis=-2) & jnp.any(rows != 0, axis=-1)
  kept = int(jnp.max(jnp.sum(used, axis=-1)))
  order = jnp.argsort(~used, axis=-1, stable=True)[..., :kept]
  columns = jnp.take_along_axis(columns, order[..., None, :], axis=-1)
  rows = jnp.take_along_axis(rows, order[..., :, None], axis=-2)
  a, b = (
    columns.reshape(*a.shape[:-1], kept),
    rows.reshape(*batch, kept, *b.shape[len(batch) + 1 :]),
  )
  return weight.replace(lora_a=a, lora_b=b)


def _truncated(weight: LoraWeight, rank: int) -> tuple[LoraWeight, Float[Array, ""]]:
  """Returns the best approximation of a rank, and its relative error."""
  a, b, full_rank = weight.lora_a, weight.lora_b, weight.rank
  if full_rank <= rank:
    return weight, jnp.zeros(())
  batch = a.shape[: len(weight.axes.batch)]
  q_a, r_a = jnp.linalg.qr(a.reshape(*batch, -1, full_rank))
  q_b, r_b = jnp.linalg.qr(b.reshape(*batch, full_rank, -1).mT)
  u, values, v = jnp.linalg.svd(r_a @ r_b.mT, full_matrices=False)
  rank = min(rank, values.shape[-1])
  left, right, error = balanced_factors(u, values, v, rank)
  new_a, new_b = q_a @ left, right @ q_b.mT
  a, b = new_a.reshape(*a.shape[:-1], rank), new_b.reshape(*batch, rank, *b.shape[len(batch) + 1 :])
  return weight.replace(lora_a=a, lora_b=b), error


def balanced_factors(
  u: Float[Array, "*batch m n"],
  values: Float[Array, "*batch n"],
  v: Float[Array, "*batch n k"],
  rank: int,
) -> tuple[Float[Array, "*batch m rank"], Float[Array, "*batch rank k"], Float[Array, ""]]:
  """Returns the first `rank` terms of a decomposition as two factors, and the relative error.

  Both factors are scaled by the roots of the singular values. The error is in the Frobenius norm.
  """
  half = jnp.sqrt(values[..., :rank])
  a, b = u[..., :rank] * half[..., None, :], half[..., None] * v[..., :rank, :]
  residual, total = jnp.linalg.norm(values[..., rank:]), jnp.linalg.norm(values)
  error = jnp.where(total > 0, residual / jnp.maximum(total, jnp.finfo(total.dtype).tiny), 0.0)
  return a, b, error
