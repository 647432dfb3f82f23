"""DyLoRA (Valipour et al. 2022, arXiv 2210.07558). With x a row vector, as in JAX:

    h = x W + (alpha / b) * (x A[:, :b]) B[:b]

In each step of training b is drawn uniformly from 1 to rank, one for all weights. So the first b
components are an adapter of rank b, for every b: `dylora_truncated` returns it, without another
training. Evaluation and the merged model have all components. The trainable tree is plain LoRA's.

A step trains the first b components, or only the last of these, the paper's "frozen" variant. With
an optimizer that has momentum, those of gradient 0 move, too.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.config import LoraConfig, check_config
from lora_jax.adapters.delta import adapter_weights, is_lora_weight
from lora_jax.adapters.settings import NOT_GIVEN, NotGiven
from lora_jax.axes import RANK
from lora_jax.fields import Count, read_value
from lora_jax.transform.interpreter import OpaqueRule
from lora_jax.variants.lora import LORA, lora

Trained = Literal["first", "last"]


def dylora(
  fn: Callable[..., Any],
  config: LoraConfig,
  trained: Trained = "first",
  opaque: Mapping[str, OpaqueRule] | None = None,
) -> Adaptation:
  """Adapts `fn(params, *args, **kwargs)` by LoRA of a rank that is drawn in each step.

  Args:
    fn: any JAX function of a parameter tree and further arguments.
    config: the weights to adapt, by plain LoRA, and their settings; weights of a lower rank than
      the one that is drawn have all their components.
    trained: the components that a step trains: all of the first b, or the last of these.
    opaque: as in `lora_jax.adapters.adapt.adapt`.

  Returns:
    `Adaptation(init, apply, merge)`. `apply` needs `lora_key`: a key draws b, None evaluates.
  Raises:
    ValueError: if the config has a variant or no target, or `trained` is another word.
  """
  read_value(Trained, trained, "trained")
  check_config(config)
  _check_plain(config)
  if not config.target:
    raise ValueError("DyLoRA draws a rank of the adapted weights, so the config needs a target")
  adapted = lora(fn, config, opaque)

  def apply(
    params: PyTree,
    trainable: PyTree,
    *args: Any,
    lora_key: PRNGKeyArray | NotGiven | None = NOT_GIVEN,
    **kwargs: Any,
  ) -> Any:
    if isinstance(lora_key, NotGiven):
      raise ValueError(
        "DyLoRA draws a rank in each step, so apply needs lora_key: a key to train, None to "
        "evaluate"
      )
    if lora_key is not None:
      rank_key, lora_key = jax.random.split(lora_key)
      most = max(node.rank for node in adapter_weights(trainable).values())
      rank = jax.random.randint(rank_key, (), 1, most + 1)
      trainable = first_components(trainable, rank, trained)
    return adapted.apply(params, trainable, *args, lora_key=lora_key, **kwargs)

  return Adaptation(adapted.init, apply, adapted.merge)


def first_components(
  trainable: PyTree, rank: Int[Array, ""] | int, trained: Trained = "first"
) -> PyTree:
  """Returns a tree of plain LoRA whose first b components have a scaling of alpha / b, others 0.

  Args:
    trainable: the tree of all components.
    rank: b; may be traced.
    trained: the components that have a gradient.
  """

  def first(array: jax.Array, axis: int) -> jax.Array:
    size = array.shape[axis]
    component = jnp.arange(size).reshape([-1 if d == axis else 1 for d in range(array.ndim)])
    b = jnp.minimum(rank, size)
    if trained == "last":
      array = jnp.where(component == b - 1, array, jax.lax.stop_gradient(array))
    return jnp.where(component < b, array, 0) * jnp.sqrt(size / b)  # of A and of B: size / b

  return _map_arrays(first, trainable)


def dylora_truncated(config: LoraConfig, trainable: PyTree, rank: int) -> tuple[LoraConfig, PyTree]:
  """Returns the adapter of the first components, plain LoRA of a lower rank and the same alpha.

  >>> fn, params = lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((8, 6))}
  >>> config = LoraConfig(rank=4, alpha=4.0, target="kernel")
  >>> trainable = dylora(fn, config).init(jax.random.key(0), params, jnp.ones((3, 8)))
  >>> config, trainable = dylora_truncated(config, trainable, 2)
  >>> config.rank, trainable["kernel"].lora_a.shape
  (2, (8, 2))

  Args:
    config: of the adapter.
    trainable: its tree.
    rank: b; weights of a lower rank keep theirs.
  Raises:
    ValueError: if `rank` is not a positive integer, or the config has a variant.
  """
  read_value(Count, rank, "rank")
  _check_plain(config)

  def first(array: jax.Array, axis: int) -> jax.Array:
    return jax.lax.slice_in_dim(array, 0, min(rank, array.shape[axis]), axis=axis)

  rules = [
    rule if rule.rank is None else dataclasses.replace(rule, rank=min(rule.rank, rank))
    for rule in config.rules
  ]
  config = dataclasses.replace(config, rank=min(config.rank, rank), rules=rules)
  return config, _map_arrays(first, trainable)


def _map_arrays(change: Callable[[jax.Array, int], jax.Array], trainable: PyTree) -> PyTree:
  """Applies a function of an array and its rank axis to the arrays of all weights."""

  def changed(node: Any) -> Any:
    if not is_lora_weight(node):
      return node
    return node.replace(
      **{
        spec.name: change(node.arrays[spec.name], node.axes.labels(spec.words).index(RANK))
        for spec in node.table
      }
    )

  return jax.tree.map(changed, trainable, is_leaf=is_lora_weight)


def _check_plain(config: LoraConfig) -> None:
  for variant in (config.variant, *(rule.variant for rule in config.rules)):
    if variant not in (None, LORA):
      raise ValueError(
        f"DyLoRA trains plain LoRA of several ranks, and the config has {variant.name}. Leave it "
        "out"
      )
