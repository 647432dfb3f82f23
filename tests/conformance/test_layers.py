"""lora_jax agrees with the vectors: the output, gradients and merged weight of every layer."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from conformance.check import TOLERANCE, disagreements
from lora_jax.adapters.delta import adapter_weights

from tests.conformance.vectors import VECTORS, cases, vector

Case = Mapping[str, Any]


def matmul(params, x):
  return x @ params["w"] + params.get("bias", 0.0)


def conv(params, x):
  dims = ("NHWC", "HWIO", "NHWC")
  return lax.conv_general_dilated(x, params["w"], (1, 1), "VALID", dimension_numbers=dims)


def lookup(params, x):
  return params["w"][x]


def stack(params, x):
  return lax.scan(lambda carry, pair: (carry, pair[0] @ pair[1]), None, (x, params["w"]))[1]


LAYERS = {"matmul": matmul, "conv": conv, "lookup": lookup, "stack": stack}


@dataclasses.dataclass(frozen=True)
class Names:
  """How the library calls a variant of the vectors.

  Attributes:
    variant: returns the library's variant for a case, or raises AttributeError if it has none.
    arrays: the library's name of an array by the vector's; the others have the same.
  """

  variant: Callable[[Case], lj.Variant]
  arrays: Mapping[str, str] = dataclasses.field(default_factory=dict)


INITIAL = {"start_a": "initial_a", "start_b": "initial_b"}
VARIANTS = {
  "lora": Names(lambda case: lj.LORA),
  "rslora": Names(lambda case: lj.LORA),
  "relora": Names(lambda case: lj.LORA),
  "dora": Names(lambda case: lj.DORA),
  "qa_lora": Names(lambda case: lj.qa_lora_variant(case["group_size"])),
  "pissa": Names(lambda case: lj.PISSA, INITIAL),
  "olora": Names(lambda case: lj.OLORA, INITIAL),
  "milora": Names(lambda case: lj.MILORA, INITIAL),
  "hira": Names(lambda case: lj.HIRA),
}


def prepared(name: str, case: str):
  """Returns an adaptation, its params, its trainable tree with the vector's arrays, and inputs."""
  tensors, details = vector(name)[0], cases(name)[case]
  names = VARIANTS[name]
  config = lj.LoraConfig(details["rank"], details["alpha"], "w", variant=names.variant(details))
  if name == "rslora":
    config = lj.rank_stabilized(config)
  fn = LAYERS[details["layer"]]
  params = {key: jnp.asarray(tensors[f"{case}/{key}"], jnp.float32) for key in ("w",)}
  x = jnp.asarray(tensors[f"{case}/x"])
  adaptation = lj.lora(fn, config)
  start = adaptation.init(jax.random.key(0), params, x)
  arrays = given(tensors, f"{case}/p/", names.arrays)
  arrays |= {key: value for key, value in start["w"].arrays.items() if key not in arrays}
  shapes = {key: value.shape for key, value in arrays.items()}
  assert shapes == {key: value.shape for key, value in start["w"].arrays.items()}
  return adaptation, params, {"w": start["w"].replace(**arrays)}, x


def given(tensors, prefix: str, names: Mapping[str, str]) -> dict[str, jax.Array]:
  """Returns the arrays of a case by the library's names."""
  found = {n.removeprefix(prefix): each for n, each in tensors.items() if n.startswith(prefix)}
  return {names.get(n, n): jnp.asarray(each, jnp.float32) for n, each in found.items()}


def outputs(name: str, case: str) -> dict[str, jax.Array]:
  """Returns the library's results for a case, by the vector's names."""
  tensors = vector(name)[0]
  adaptation, params, trainable, x = prepared(name, case)
  direction = jnp.asarray(tensors[f"{case}/direction"], jnp.float32)

  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(trainable):
    out = adaptation.apply(params, trainable, x)
    return jnp.sum(direction * out), out

  (_, out), gradients = jax.jit(loss)(trainable)
  results = {f"{case}/out": out, f"{case}/merged": adaptation.merge(params, trainable)["w"]}
  (node,) = adapter_weights(gradients).values()
  own = {theirs: ours for ours, theirs in VARIANTS[name].arrays.items()}
  trained = {spec.name for spec in node.table if not spec.frozen}
  return results | {f"{case}/grad/{own.get(n, n)}": node.arrays[n] for n in trained}


def layer_cases():
  for name in VECTORS:
    for case, details in cases(name).items():
      if details.get("layer") in LAYERS:
        short = name == "lora" or details["layer"] == "matmul"  # other layers have the same weight
        marks = [] if short else [pytest.mark.long]
        yield pytest.param(name, case, id=f"{name}-{case}", marks=marks)


@pytest.mark.parametrize(("name", "case"), list(layer_cases()))
def test_a_layer_agrees_with_its_vector(name, case):
  if name not in VARIANTS:
    pytest.skip(f"lora_jax has no {name} yet")
  try:
    VARIANTS[name].variant(cases(name)[case])
  except AttributeError as error:
    pytest.skip(f"lora_jax has no {name} yet: {error}")
  results = outputs(name, case)
  expected = {n for n in vector(name)[0] if n.startswith((f"{case}/grad/", f"{case}/out"))}
  assert {*results} == expected | {f"{case}/merged"}
  assert disagreements(vector(name)[0], results, TOLERANCE) == []


def test_the_arrays_of_a_vector_matter():
  """A changed array, scaling or weight is noticed: the comparison has teeth."""
  tensors = dict(vector("lora")[0])
  results = outputs("lora", "matmul")
  for changed in ("matmul/out", "matmul/grad/lora_a", "matmul/merged"):
    wrong = {**tensors, changed: tensors[changed] * np.float64(1.0001)}
    (line,) = disagreements(wrong, results)
    assert line.startswith(f"{changed} differs by ")
