"""Partial fine-tuning: some leaves are fully trained; the others are frozen."""

from collections.abc import Callable, Iterable
from typing import Any

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.checks import check_adapter
from lora_jax.adapters.copies import in_dtypes_of, merged_leaves, trained_copy
from lora_jax.adapters.delta import adapter_extra
from lora_jax.adapters.targets import array_leaves, select_arrays
from lora_jax.transform.dequantized import dequantized
from lora_jax.trees import as_patterns, nest, replace_leaves


def partial_finetuning(fn: Callable[..., Any], train: str | Iterable[str]) -> Adaptation:
  """Returns fine-tuning of some leaves of `fn(params, *args, **kwargs)` as an `Adaptation`.

  The trainable tree mirrors `params` where a leaf is trained, and holds copies, float32 or wider;
  `fn` gets them in the base model's dtypes. `LoraConfig.extra` trains leaves in the same way, in
  addition to the factors; partial fine-tuning trains only them, a classification head for instance.

  Args:
    fn: any JAX function of a parameter tree and further arguments.
    train: regular expressions for whole paths.

  >>> import jax, jax.numpy as jnp
  >>> fn = lambda params, x: x @ params["body"] @ params["head"]
  >>> params = {"body": jnp.eye(3), "head": jnp.ones((3, 2))}
  >>> method = partial_finetuning(fn, "head")
  >>> jax.tree.map(jnp.shape, method.init(jax.random.key(0), params))
  {'head': (3, 2)}
  """

  patterns, fn = as_patterns(train, "train"), dequantized(fn)
  if not patterns:
    raise ValueError(f"train must name a pattern, got {train!r}")

  def chosen(params):
    leaves = array_leaves(params)
    return {path: leaves[path] for path in select_arrays(patterns, params, leaves, "train")}

  def init(key, params, *args, **kwargs):
    del key, args, kwargs
    leaves = chosen(params).items()
    return nest((keys, trained_copy(path, leaf)) for path, (keys, leaf) in leaves)

  def merge(params, trainable):
    leaves = chosen(params)
    check_adapter(trainable, {}, leaves)
    return replace_leaves(params, merged_leaves(leaves, adapter_extra(trainable)))

  def apply(params, trainable, *args, lora_key=None, scaling=None, dropout_rate=None, **kwargs):
    del lora_key, scaling, dropout_rate
    leaves = chosen(params)
    check_adapter(trainable, {}, leaves)
    trained = in_dtypes_of(leaves, adapter_extra(trainable))
    return fn(replace_leaves(params, trained), *args, **kwargs)

  return Adaptation(init, apply, merge)
