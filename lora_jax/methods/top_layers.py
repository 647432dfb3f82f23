"""FT-Top-k (Li and Liang 2021, arXiv 2101.00190; Hu et al. 2021, Table 3): the last k layers.

h_22/..., h_23/...              trained: FT-Top2 of GPT-2 medium, 25,192,448 parameters
h_0/... to h_21/..., ln_f, wte  frozen: the final normalization and the tied head too
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from jaxtyping import PRNGKeyArray, PyTree

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.targets import array_leaves, layer_number
from lora_jax.fields import Count, read_value
from lora_jax.methods.partial import partial_finetuning
from lora_jax.trees import as_patterns, matches

LAYERS = r"(.*/)?(h|layers)_\d+/.*"
"""The leaves of the layers of this project's models, unrolled."""


def top_layers(
  fn: Callable[..., Any],
  num_layers: int,
  layers: str = LAYERS,
  extra: str | Iterable[str] = (),
) -> Adaptation:
  """Returns fine-tuning of the last layers of `fn(params, *args, **kwargs)`.

  It is `partial_finetuning` of every leaf of these layers, and of `extra`.

  Args:
    fn: any JAX function of a parameter tree and further arguments.
    num_layers: k, the number of layers that are trained.
    layers: a regular expression for the whole paths of all layers' leaves; the first integer in a
      path is its layer's number.
    extra: regular expressions for further leaves that are trained, such as a head.
  Raises:
    ValueError: if `num_layers` is not a positive integer; from `init`, `apply` and `merge`, if the
      model has fewer layers, or stacks them, as with `scan_layers=True`.

  >>> import jax, jax.numpy as jnp
  >>> fn = lambda params, x: x @ params["h_0"]["kernel"] @ params["h_1"]["kernel"]
  >>> params = {f"h_{i}": {"kernel": jnp.eye(3)} for i in range(2)}
  >>> jax.tree.map(jnp.shape, top_layers(fn, 1).init(jax.random.key(0), params))
  {'h_1': {'kernel': (3, 3)}}
  """
  read_value(Count, num_layers, "num_layers")
  (pattern,), extra = as_patterns(layers, "layers"), as_patterns(extra, "extra")

  def method(params: PyTree) -> Adaptation:
    paths = _top_paths(params, num_layers, pattern)
    return partial_finetuning(fn, (*map(re.escape, paths), *extra))

  def init(key: PRNGKeyArray, params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
    return method(params).init(key, params, *args, **kwargs)

  def apply(params: PyTree, trainable: PyTree, *args: Any, **kwargs: Any) -> Any:
    return method(params).apply(params, trainable, *args, **kwargs)

  def merge(params: PyTree, trainable: PyTree) -> PyTree:
    return method(params).merge(params, trainable)

  return Adaptation(init, apply, merge)


def _top_paths(params: PyTree, num_layers: int, pattern: str) -> list[str]:
  """Returns the paths of the leaves of the last layers."""
  leaves = array_leaves(params)
  numbers = {path: layer_number(path) for path in leaves if matches(pattern, path)}
  if not numbers:
    path, (_, leaf) = next(iter(leaves.items()))
    raise ValueError(
      f"layers={pattern!r} matches none of the {len(leaves)} leaves, such as {path} of shape "
      f"{leaf.shape}; expected the number of a layer in a path, as in h_11/attn/query/kernel. The "
      "layers of a scanned stack share their leaves and cannot be trained in part: load the model "
      "with scan_layers=False. For other names give `layers`"
    )
  if unnumbered := [path for path, number in numbers.items() if number is None]:
    raise ValueError(
      f"layers={pattern!r} matches {unnumbered[0]}, which has no layer's number. Narrow `layers`"
    )
  known = sorted(set(numbers.values()))  # pyright: ignore[reportArgumentType]
  if num_layers > len(known):
    raise ValueError(
      f"num_layers={num_layers}, but the model has {len(known)} layers. Lower it, or use "
      "lora_jax.full_finetuning"
    )
  top = known[-num_layers:]
  return [path for path, number in numbers.items() if number in top]
