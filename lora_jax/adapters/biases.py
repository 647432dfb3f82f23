"""Biases that a variant scales with the outputs of their layer.

    (x W + b) * gain = x (W * gain) + b * gain

A gain over the outputs of a layer scales its bias too (`Variant.bias`). The bias of a weight is the
leaf `bias` or `b` next to it, or the one that the variant names; `init` checks that the function
adds it to that layer's output, and uses it nowhere else.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from lora_jax.adapters.copies import is_float, wide_dtype
from lora_jax.adapters.delta import Site, adapter_weights
from lora_jax.adapters.layers import spread_layers
from lora_jax.adapters.targets import Target, array_leaves
from lora_jax.quantization.leaf import is_quantized
from lora_jax.transform.biases import misused_bias
from lora_jax.transform.factors import Factor
from lora_jax.transform.tracing import TracedCall
from lora_jax.trees import closest_names

NAMES = ("bias", "b")


@dataclasses.dataclass(frozen=True)
class Bias:
  """The bias of an adapted weight.

  Attributes:
    path: of the bias.
    leaf: its values, or its shape.
    array: the name of the array, a gain over the outputs, that multiplies it.
  """

  path: str
  leaf: Any
  array: str


def find_biases(
  targets: Mapping[str, Target], extra: Iterable[str], params: PyTree
) -> dict[str, Bias]:
  """Returns the biases to scale, by the path of their weight.

  Args:
    targets: the adapted weights, each with its variant.
    extra: the paths of fully trained leaves.
    params: the base model's parameters.
  Raises:
    ValueError: if a variant names a bias that is not there, one is fully trained or adapted too,
      or two weights have the same.
  """
  leaves, taken, biases = array_leaves(params), {*targets, *extra}, {}
  for path, target in targets.items():
    gain = None if target.variant is None else target.variant.bias
    if gain is None:
      continue
    array, paths = gain
    named = [p for p in _near(path, leaves, targets) if p.rpartition("/")[2] in NAMES]
    bias = paths[path] if path in paths else next(iter(named), None)
    if bias is None:
      continue
    if bias not in leaves:
      names = ", ".join(closest_names(bias, leaves))
      raise ValueError(f"params have no leaf {bias!r}, the bias of {path}. Did you mean {names}?")
    if bias in taken:
      raise ValueError(
        f"{bias} is scaled as the bias of {path}, and adapted or fully trained, too. Leave it out "
        "of `target` and `extra`, or leave out its weight"
      )
    taken.add(bias)
    biases[path] = Bias(bias, leaves[bias][1], array)
  return biases


def check_biases(
  biases: Mapping[str, Bias],
  targets: Mapping[str, Target],
  sites: Mapping[str, Site],
  call: TracedCall,
  params: PyTree,
) -> None:
  """Checks at `init` that the biases are those of their layers, and that none is left out.

  Raises:
    ValueError: if a bias has another shape than its layer's outputs or another use than in a sum
      with them, or a leaf next to a weight without a bias could be one.
  """
  for path, bias in biases.items():
    if not _fits(bias.leaf, sites[path]):
      raise ValueError(
        f"{bias.path} is {bias.leaf.dtype} of shape {tuple(bias.leaf.shape)}, and the bias of "
        f"{path} would have shape {_outputs(sites[path])}. {_remedy(path)}"
      )
    misuse = misused_bias(call.jaxpr, call.position[path], call.position[bias.path])
    if misuse is not None:
      raise ValueError(
        f"{bias.path} is not only added to the output of {path}, with which it would be scaled: it "
        f"is {misuse}. {_remedy(path)}"
      )
  leaves, bias_paths = array_leaves(params), {bias.path for bias in biases.values()}
  for path in targets.keys() - biases.keys():
    variant = targets[path].variant
    if variant is None or variant.bias is None or path in variant.bias.paths:
      continue
    for other in _near(path, leaves, targets):
      if other not in bias_paths and _fits(leaves[other][1], sites[path]):
        raise ValueError(
          f"{other} may be the bias of {path}, and would have to be scaled with it. {_remedy(path)}"
        )


def _near(path: str, leaves: Mapping[str, Any], targets: Mapping[str, Target]) -> list[str]:
  """Returns the paths of the leaves next to a weight that have fewer axes and are not adapted."""
  folder, ndim = path.rpartition("/")[0], targets[path].leaf.ndim
  return [
    other
    for other, (_, leaf) in leaves.items()
    if other.rpartition("/")[0] == folder and other not in targets and leaf.ndim < ndim
  ]


def _remedy(path: str) -> str:
  return (
    f"Name the bias for the variant, biases={{{path!r}: PATH}}, None for none; or leave the weight "
    "out of `target`"
  )


def _outputs(site: Site) -> tuple[int, ...]:
  """Returns the shape of a layer's bias: the weight's axes that are not inputs, in order."""
  return tuple(site.leaf.shape[d] for d in sorted((*site.axes.batch, *site.axes.outputs)))


def _fits(leaf: Any, site: Site) -> bool:
  got, expected = ([n for n in shape if n != 1] for shape in (leaf.shape, _outputs(site)))
  return got == expected and is_float(leaf.dtype) and not is_quantized(leaf)


def bias_gains(
  biases: Mapping[str, Bias], trainable: PyTree, targets: Mapping[str, Target]
) -> dict[str, jax.Array]:
  """Returns the gain of each bias, in the bias's shape, by the bias's path."""
  weights, gains = adapter_weights(trainable), {}
  for path, bias in biases.items():
    weight = weights[path]
    (spec,) = (spec for spec in weight.table if spec.name == bias.array)
    gain = Factor(weight.arrays[bias.array], weight.axes.labels(spec.words))
    if weight.layers is not None:
      dim = weight.axes.batch[0]
      gain = spread_layers(gain, dim, weight.layers, targets[path].leaf.shape[dim], 1.0)
    gains[bias.path] = gain.along(tuple(sorted(gain.labels))).reshape(bias.leaf.shape)
  return gains


def scaled(bias: jax.Array, gain: jax.Array) -> jax.Array:
  """Returns a bias times its gain, computed in float32 or wider, in the bias's dtype."""
  wide = wide_dtype(bias.dtype)
  return (bias.astype(wide) * gain.astype(wide)).astype(bias.dtype)
