"""Partial fine-tuning: some leaves are trainable, whole; the others are frozen."""

from collections.abc import Callable, Iterable
from typing import Any

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.checks import check_adapter
from lora_jax.adapters.delta import adapter_extra, copied
from lora_jax.adapters.targets import array_leaves
from lora_jax.trees import nest, replace_leaves, select


def partial_finetuning(fn: Callable[..., Any], train: str | Iterable[str]) -> Adaptation:
  """Returns fine-tuning of some leaves of `fn(params, *args, **kwargs)` as an `Adaptation`.

  The trainable tree mirrors `params` where a leaf is trained, and holds copies. It is what
  `LoraConfig.extra` trains beside the factors: with the same patterns, what is left of LoRA
  without the factors, as a classification head alone.

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

  def chosen(params):
    leaves = array_leaves(params)
    return {path: leaves[path] for path in select(train, leaves, "train")}

  def init(key, params, *args, **kwargs):
    del key, args, kwargs
    leaves = chosen(params).items()
    return nest((keys, copied(path, leaf)) for path, (keys, leaf) in leaves)

  def merge(params, trainable):
    check_adapter(trainable, {}, chosen(params))
    return replace_leaves(params, adapter_extra(trainable))

  def apply(params, trainable, *args, lora_key=None, scaling=None, dropout_rate=None, **kwargs):
    del lora_key, scaling, dropout_rate
    return fn(merge(params, trainable), *args, **kwargs)

  return Adaptation(init, apply, merge)
