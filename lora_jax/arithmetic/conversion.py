"""Adapters of any variant as plain LoRA: exactly where they are low-rank, or the nearest one."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from lora_jax.adapters.biases import Bias, find_biases
from lora_jax.adapters.checks import check_adapter
from lora_jax.adapters.config import LoraConfig, LoraRule, exact_config
from lora_jax.adapters.copies import wide_dtype
from lora_jax.adapters.delta import LoraWeight, adapter_extra, whole_weights
from lora_jax.adapters.layers import adapted_layers
from lora_jax.adapters.targets import Target, find_leaves, shapes
from lora_jax.adapters.weights import adapted_weight, merge_weight
from lora_jax.arithmetic.truncation import balanced_factors
from lora_jax.axes import RANK, LoraAxes
from lora_jax.fields import Count, Within, read_value
from lora_jax.quantization.leaf import is_quantized
from lora_jax.transform.deferred import deferred
from lora_jax.transform.factored import Source
from lora_jax.transform.factors import Factor, Term
from lora_jax.trees import nest
from lora_jax.variants.lora import ARRAYS, LORA

Energy = Annotated[float, Within("(0, 1]")]


def convert(
  config: LoraConfig,
  trainable: PyTree,
  params: PyTree,
  *,
  rank: int | None = None,
  energy: float | None = None,
) -> tuple[LoraConfig, PyTree, dict[str, Float[Array, ""]]]:
  """Returns the nearest adapter of plain LoRA, of scaling 1.

  It can be summed, truncated, served and exported as any LoRA. The difference between the merged
  weight and the base model's is decomposed, separately for each weight, layer of a stack and
  expert. A variant that multiplies the weight (DoRA) has a difference of full rank; the error tells
  how much of it is lost.

  Args:
    config: of the adapter, with its variant.
    trainable: its tree.
    params: of the base model, real arrays.
    rank: of the result, at most; or
    energy: the minimum share of the squared singular values to keep, in (0, 1]. Each weight gets
      the smallest rank that keeps it, all layers of a stack the largest of their ranks.

  Returns:
    The config, the trainable tree, and by path the relative error of the difference in the
    Frobenius norm, over all layers of a stack.
  Raises:
    ValueError: if the adapter is not for these params, or `rank` and `energy` are both set or
      both None.
  """
  if (rank is None) == (energy is None):
    raise ValueError(f"expected rank or energy, one of them; got rank={rank}, energy={energy}")
  read_value(Count | None, rank, "rank")
  read_value(Energy | None, energy, "energy")
  targets, extra = find_leaves(config, params)
  check_adapter(trainable, targets, extra)
  _check_no_bias(find_biases(targets, extra, params))
  rules: dict[str, LoraRule] = {}
  items: list[tuple[tuple[str, ...], Any]] = []
  errors: dict[str, Float[Array, ""]] = {}
  with jax.default_matmul_precision("float32"):
    for path, weight in whole_weights(trainable, shapes(targets)).items():
      target = targets[path]
      low_rank, errors[path] = _converted(target, weight, rank, energy)
      items.append((target.keys, low_rank))
      rules[path] = _rule(path, low_rank, target, 1.0)
  items += [(extra[path][0], leaf) for path, leaf in adapter_extra(trainable).items()]
  return exact_config(rules, extra), nest(items), errors


def to_lora(config: LoraConfig, trainable: PyTree, params: PyTree) -> tuple[LoraConfig, PyTree]:
  """Returns the same adapter as plain LoRA, of the same scaling; exact.

  It can be summed, truncated, served and exported as any LoRA, on the same base model. For variants
  whose change of the weight is a sum of low-rank terms. The rank is that of the terms: twice as
  large for PiSSA, OLoRA and MiLoRA, which change the weight by A B - A0 B0.

  >>> import jax.numpy as jnp, lora_jax
  >>> fn, params = lambda p, x: x @ p["kernel"], {"kernel": jnp.eye(8, 6)}
  >>> config = lora_jax.LoraConfig(2, 4.0, "kernel", variant=lora_jax.PISSA)
  >>> trainable = lora_jax.lora(fn, config).init(jax.random.key(0), params, jnp.ones((1, 8)))
  >>> plain, low_rank = to_lora(config, trainable, params)
  >>> plain.variant, low_rank["kernel"].lora_a.shape
  (None, (8, 4))

  Args:
    config: of the adapter, with its variant.
    trainable: its tree.
    params: of the base model; shapes suffice, except for variants that contract the weight.
  Raises:
    ValueError: if the adapter is not for these params, or a variant has no exact form: `convert`
      returns the nearest one, unless biases are scaled, too.
  """
  targets, extra = find_leaves(config, params)
  check_adapter(trainable, targets, extra)
  _check_no_bias(find_biases(targets, extra, params))
  rules: dict[str, LoraRule] = {}
  items: list[tuple[tuple[str, ...], Any]] = []
  with jax.default_matmul_precision("float32"):
    for path, weight in whole_weights(trainable, shapes(targets)).items():
      target = targets[path]
      low_rank = same_lora(target, weight)
      if low_rank is None:
        raise ValueError(
          f"{path}: {target.variant.name if target.variant else 'it'} changes the weight by more "
          "than low-rank terms, which plain LoRA cannot express exactly. Use lora_jax.convert, "
          "which returns the nearest one"
        )
      items.append((target.keys, low_rank))
      rules[path] = _rule(path, low_rank, target, target.scaling)
  items += [(extra[path][0], leaf) for path, leaf in adapter_extra(trainable).items()]
  return exact_config(rules, extra), nest(items)


def _rule(path: str, low_rank: LoraWeight, target: Target, scaling: float) -> LoraRule:
  """Returns a rule for a weight's factors."""
  return LoraRule(
    re.escape(path),
    rank=low_rank.rank,
    alpha=scaling * low_rank.rank,
    stacked_layers=low_rank.layers,
    on_unhandled=target.on_unhandled,
  )


def same_lora(target: Target, weight: LoraWeight) -> LoraWeight | None:
  """Returns a weight's adapter as plain LoRA of the same scaling.

  It is None if the change of the weight is not a sum of terms, each of inputs times outputs.

  Args:
    target: the weight and its settings; its leaf may be a shape.
    weight: its arrays, with those that it shares with other weights.
  """
  weight, axes, leaf = jax.tree.map(jnp.asarray, weight), weight.axes, target.leaf
  base = deferred(leaf) if is_quantized(leaf) else leaf
  variant, source = target.variant or LORA, Source([target.path])
  adapted = adapted_weight(base, weight, variant, source, target.scaling)
  pairs = [_in_order(term, axes, target.scaling) for term in adapted.terms]
  if adapted.gain is not None or adapted.base is not base or not all(pairs):
    return None
  joined = {}
  for i, (name, words) in enumerate(ARRAYS.items()):
    factors = [_full(pair[i], axes.labels(words), leaf.shape) for pair in pairs if pair]
    whole = jnp.concatenate(factors, axis=axes.labels(words).index(RANK))
    joined[name] = whole if weight.layers is None else whole[jnp.asarray(weight.layers)]
  return LoraWeight(**joined, axes=axes, layers=weight.layers)


def _in_order(term: Term, axes: LoraAxes, scaling: float) -> tuple[Factor, Factor] | None:
  """Returns a term's factors of inputs and of outputs, for a scaling; None if they are mixed."""
  a, b = sorted(term.factors, key=lambda factor: bool(set(factor.dims) & set(axes.outputs)))
  if set(a.dims) & set(axes.outputs) or set(b.dims) & set(axes.inputs):
    return None
  relative = dataclasses.replace(term, scaling=term.scaling / scaling)
  return a, dataclasses.replace(b, array=relative.scaled(b.array))


def _full(factor: Factor, labels: tuple[int, ...], shape: Sequence[int]) -> jax.Array:
  """Returns a factor with all of these axes; it may be constant along some."""
  rank = factor.array.shape[factor.axis(RANK)]
  sizes = [rank if label == RANK else shape[label] for label in labels]
  return jnp.broadcast_to(factor.along(labels), sizes)


def _converted(
  target: Target, weight: LoraWeight, rank: int | None, energy: float | None
) -> tuple[LoraWeight, Float[Array, ""]]:
  """Returns the factors nearest to a weight's change by its adapter, and their relative error."""
  if isinstance(target.leaf, jax.ShapeDtypeStruct):
    raise ValueError(f"{target.path}: convert needs the base model's params, and got their shapes")
  axes = weight.axes
  wide = jnp.asarray(target.leaf, wide_dtype(target.leaf.dtype))
  merged = merge_weight(wide, weight, target.variant or LORA, target.scaling)
  delta = adapted_layers(merged - wide, axes, weight.layers)
  order = (*axes.batch, *axes.inputs, *axes.outputs)
  delta = jnp.transpose(delta, order)
  batch = delta.shape[: len(axes.batch)]
  inputs = delta.shape[len(batch) : len(batch) + len(axes.inputs)]
  outputs = delta.shape[len(batch) + len(inputs) :]
  matrices = delta.reshape(*batch, int(np.prod(inputs)), -1)
  u, values, v = jnp.linalg.svd(matrices, full_matrices=False)
  new_rank = min(rank, values.shape[-1]) if rank is not None else _rank_for(values, energy)
  a, b, error = balanced_factors(u, values, v, new_rank)
  lora_a, lora_b = a.reshape(*batch, *inputs, new_rank), b.reshape(*batch, new_rank, *outputs)
  return LoraWeight(lora_a, lora_b, axes, weight.layers), error


def _check_no_bias(biases: Mapping[str, Bias]) -> None:
  for path, bias in biases.items():
    raise ValueError(
      f"{bias.path} is scaled with {path}, and plain LoRA leaves biases as they are. Merge the "
      "adapter instead"
    )


def _rank_for(values: Float[Array, "*batch n"], energy: float | None) -> int:
  """Returns the smallest rank that keeps a share of the squared singular values in every matrix."""
  assert energy is not None, "is checked"
  squares = np.square(np.asarray(values, np.float64))
  total = squares.sum(-1, keepdims=True)
  enough = np.cumsum(squares, -1) >= energy * total * (1 - 1e-12)
  return max(1, int((np.argmax(enough, -1) + 1).max()))
