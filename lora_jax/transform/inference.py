"""Which axes of a weight are its inputs, which its outputs: inferred by probing.

The function is interpreted once on abstract values, with a probing factor for every axis of
every targeted weight. Where the weight is used, the rules report which of its axes were
contracted with the layer's input, shared with it, or left as outputs. Nothing is guessed
from a shape: scanned, multi-head and fused kernels come out right.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lora_jax.axes import LoraAxes
from lora_jax.transform.factored import Factored, Source
from lora_jax.transform.factors import RANK, Factor, Term
from lora_jax.transform.interpreter import Interpreter
from lora_jax.transform.probing import Probe, Use
from lora_jax.transform.tracing import TracedCall


def infer_axes(
  call: TracedCall, sources: Mapping[str, Source], interpreter: Interpreter
) -> dict[str, tuple[LoraAxes, bool]]:
  """Returns each weight's axes, and whether its first use is an embedding's lookup.

  Weights that are never used are left out.

  Args:
    call: of the function.
    sources: the weights, by path.
    interpreter: of this call.
  Raises:
    ValueError: if two uses of one weight split its axes into different sides.
    UnsupportedOperation: if a weight meets an operation that has no rule.
  """
  probes = {path: Probe(path) for path in sources}

  def run(leaves):
    values = list(leaves)
    for path, probe in probes.items():
      position = call.position[path]
      values[position] = _probing(values[position], sources[path], probe)
    interpreter.evaluate(call.jaxpr, values)

  jax.eval_shape(run, call.leaves)
  return {path: _agreed(probe) for path, probe in probes.items() if probe.uses}


def _probing(leaf: jax.Array, source: Source, probe: Probe) -> Factored:
  factors = tuple(
    Factor(jnp.zeros((size, 1), jnp.float32), (axis, RANK)) for axis, size in enumerate(leaf.shape)
  )
  return Factored(leaf, source, (Term(factors, probe=probe),))


def _agreed(probe: Probe) -> tuple[LoraAxes, bool]:
  """Returns the axes by the first use; the later ones may swap the sides, no more."""
  first = probe.uses[0]
  for use in probe.uses[1:]:
    if _split(use) != _split(first):
      raise ValueError(
        f"conflicting uses of {probe.path}: first {_describe(first)}, later {_describe(use)}. "
        "One pair A, B cannot serve both; leave it out of `target`, or give "
        "LoraRule(pattern, axes=LoraAxes(batch, inputs, outputs)) and a use that fits it"
      )
  return LoraAxes(first.batch, first.contracted, first.free), first.lookup


def _split(use: Use) -> tuple[frozenset[tuple[int, ...]], tuple[int, ...]]:
  return frozenset((use.contracted, use.free)), use.batch


def _describe(use: Use) -> str:
  verb = "looks up" if use.lookup else "contracts"
  shared = f" per axes {use.batch}" if use.batch else ""
  return f"one {verb} axes {use.contracted} into {use.free}{shared}"
