"""The plain LoRA nearest to an adapter of any variant, by singular value decompositions."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from lora_jax.adapters.adapt import merge_weight
from lora_jax.adapters.checks import check_adapter
from lora_jax.adapters.config import LoraConfig, LoraRule, exact_config
from lora_jax.adapters.delta import LoraWeight, adapter_extra, adapter_weights
from lora_jax.adapters.layers import adapted_layers
from lora_jax.adapters.targets import Target, find_leaves
from lora_jax.arithmetic.truncation import balanced_factors, check_rank
from lora_jax.trees import nest
from lora_jax.variants.lora import LORA


def convert(
  config: LoraConfig,
  trainable: PyTree,
  params: PyTree,
  *,
  rank: int | None = None,
  energy: float | None = None,
) -> tuple[LoraConfig, PyTree, dict[str, Float[Array, ""]]]:
  """Returns the nearest adapter of plain LoRA, of scaling 1.

  The merged weight less the base's is decomposed, one weight after another, each layer of a stack
  and each expert on its own. What LoRA can be summed with, truncated, served and exported for
  follows from that. A variant that multiplies the weight (DoRA) has a difference of full rank, so
  that the error says how much of it is lost.

  Args:
    config: of the adapter, with its variant.
    trainable: its tree.
    params: of the base, real arrays.
    rank: of the result, at most; or
    energy: the least share of the squared singular values that is kept, in (0, 1]. Each weight
      gets the smallest rank that keeps it; layers of one stack get the largest of theirs.

  Returns:
    The config, the trainable tree, and by path the relative error of the difference in the
    Frobenius norm, over all layers of a stack.
  Raises:
    ValueError: if the adapter is not for these params, or not one of `rank` and `energy` is given.
  """
  if (rank is None) == (energy is None):
    raise ValueError(f"expected rank or energy, one of them; got rank={rank}, energy={energy}")
  if rank is not None:
    check_rank(rank)
  if energy is not None and not 0 < energy <= 1:
    raise ValueError(f"energy must be in (0, 1], got {energy!r}")
  targets, extra = find_leaves(config, params)
  check_adapter(trainable, targets, extra)
  rules: dict[str, LoraRule] = {}
  items: list[tuple[tuple[str, ...], Any]] = []
  errors: dict[str, Float[Array, ""]] = {}
  with jax.default_matmul_precision("float32"):
    for path, weight in adapter_weights(trainable).items():
      target = targets[path]
      low_rank, errors[path] = _converted(target, weight, rank, energy)
      items.append((target.keys, low_rank))
      rules[path] = LoraRule(
        re.escape(path),
        rank=low_rank.rank,
        alpha=float(low_rank.rank),
        stacked_layers=weight.layers,
        on_unhandled=target.on_unhandled,
      )
  items += [(extra[path][0], leaf) for path, leaf in adapter_extra(trainable).items()]
  return exact_config(rules, extra), nest(items), errors


def _converted(
  target: Target, weight: LoraWeight, rank: int | None, energy: float | None
) -> tuple[LoraWeight, Float[Array, ""]]:
  """Returns the factors nearest to a weight's difference, and their relative error."""
  if isinstance(target.leaf, jax.ShapeDtypeStruct):
    raise ValueError(f"{target.path}: convert needs the base's real params, and got their shapes")
  axes = weight.axes
  wide = jnp.asarray(target.leaf, jnp.promote_types(target.leaf.dtype, jnp.float32))
  merged = merge_weight(wide, weight, target.variant or LORA, target.scaling)
  delta = adapted_layers(merged - wide, axes, weight.layers)
  order = (*axes.batch, *axes.inputs, *axes.outputs)
  delta = jnp.transpose(delta, order)
  batch = delta.shape[: len(axes.batch)]
  inputs = delta.shape[len(batch) : len(batch) + len(axes.inputs)]
  outputs = delta.shape[len(batch) + len(inputs) :]
  matrices = delta.reshape(*batch, int(np.prod(inputs)), -1)
  u, values, v = jnp.linalg.svd(matrices, full_matrices=False)
  kept = min(rank, values.shape[-1]) if rank is not None else _rank_for(values, energy)
  a, b, error = balanced_factors(u, values, v, kept)
  lora_a, lora_b = a.reshape(*batch, *inputs, kept), b.reshape(*batch, kept, *outputs)
  return LoraWeight(lora_a, lora_b, axes, weight.layers), error


def _rank_for(values: Float[Array, "*batch n"], energy: float | None) -> int:
  """Returns the smallest rank that keeps a share of the squared singular values in every matrix."""
  assert energy is not None, "is checked"
  squares = np.square(np.asarray(values, np.float64))
  total = squares.sum(-1, keepdims=True)
  enough = np.cumsum(squares, -1) >= energy * total * (1 - 1e-12)
  return max(1, int((np.argmax(enough, -1) + 1).max()))
