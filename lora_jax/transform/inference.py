"""Infers by probing which axes of a weight are inputs and which are outputs.

The function is interpreted once on abstract values, with a probing factor for every axis of
every targeted weight. Where the weight is used, the rules report which of its axes were
contracted with the layer's input, shared with it, or left as outputs. Nothing is guessed
from a shape, so that scanned, multi-head and fused kernels are inferred too.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.axes import LoraAxes
from lora_jax.transform.deferred import deferred
from lora_jax.transform.factored import Factored, Source, as_values
from lora_jax.transform.factors import RANK, Factor, Term
from lora_jax.transform.interpreter import Interpreter
from lora_jax.transform.probing import Probe, Use
from lora_jax.transform.tracing import TracedCall


def infer_axes(
  call: TracedCall,
  sources: Mapping[str, Source],
  known: Mapping[str, LoraAxes],
  interpreter: Interpreter,
) -> dict[str, tuple[LoraAxes, bool]]:
  """Returns each weight's axes, and whether its first use is an embedding's lookup.

  Weights that are never used are left out.

  Args:
    call: the traced function.
    sources: the weights, by path.
    known: the axes that the user gave, by path; the others are inferred.
    interpreter: evaluates the call.
  Raises:
    ValueError: if two uses of one weight split its axes differently, or a weight of more than
      two axes is materialized and nothing else tells its inputs from its outputs.
    UnsupportedOperation: if a weight meets an operation that has no rule.
  """
  probes = {path: Probe(path, known.get(path)) for path in sources}

  def run(leaves):
    values = as_values(leaves, call.position)
    for path, probe in probes.items():
      position = call.position[path]
      values[position] = _probing(deferred(leaves[position]), sources[path], probe)
    interpreter.evaluate(call.jaxpr, values)

  jax.eval_shape(run, call.leaves)
  return {path: _axes(probe) for path, probe in probes.items() if probe.uses or probe.materialized}


def _probing(leaf: Any, source: Source, probe: Probe) -> Factored:
  factors = tuple(
    Factor(jnp.zeros((size, 1), jnp.float32), (axis, RANK)) for axis, size in enumerate(leaf.shape)
  )
  return Factored(leaf, source, (Term(factors, probe=probe),))


def _axes(probe: Probe) -> tuple[LoraAxes, bool]:
  """Returns the user's axes, else those of the uses, else those of a materialized matrix."""
  lookup = bool(probe.uses) and probe.uses[0].lookup
  if probe.axes is not None:
    return probe.axes, lookup
  if probe.uses:
    return _agreed(probe), lookup
  for use in probe.materialized:
    if len(use.contracted) == len(use.free) == 1:
      return LoraAxes(use.batch, use.contracted, use.free), False
  raise ValueError(
    f"{probe.path} is only used where it is materialized, which does not tell its input axes "
    "from its output axes. Give LoraRule(pattern, on_unhandled='materialize', "
    "axes=LoraAxes(batch, inputs, outputs))"
  )


def _agreed(probe: Probe) -> LoraAxes:
  """Returns the axes of the first use; later ones may only swap inputs and outputs."""
  first = probe.uses[0]
  for use in probe.uses[1:]:
    if _split(use) != _split(first):
      raise ValueError(
        f"conflicting uses of {probe.path}: first {_describe(first)}, later {_describe(use)}. "
        "Leave it out of `target`, or choose the axes of A and B with "
        "LoraRule(pattern, axes=LoraAxes(batch, inputs, outputs))"
      )
  return LoraAxes(first.batch, first.contracted, first.free)


def _split(use: Use) -> tuple[frozenset[tuple[int, ...]], tuple[int, ...]]:
  return frozenset((use.contracted, use.free)), use.batch


def _describe(use: Use) -> str:
  verb = "looks up" if use.lookup else "contracts"
  shared = f" per axes {use.batch}" if use.batch else ""
  return f"one {verb} axes {use.contracted} into {use.free}{shared}"
