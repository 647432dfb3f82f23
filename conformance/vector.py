"""One file of vectors: its arrays, its metadata, and the check of its gradients."""

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from conformance import starts
from conformance.files import write
from conformance.formulas import Formula
from conformance.layers import MATMUL, Layer, inputs, single

Tensors = dict[str, np.ndarray]
Cases = dict[str, dict[str, Any]]


class Vector:
  """The arrays of one file, by name, and its metadata."""

  def __init__(self, name: str, formula: Formula):
    self.name, self.formula = name, formula
    self.draw = np.random.default_rng(zlib.crc32(name.encode()))
    self.tensors: Tensors = {}
    self.cases: Cases = {}

  def add(self, case: str, **tensors: Any) -> None:
    """Adds arrays to a case; `__` in a name is a slash."""
    for name, tensor in tensors.items():
      array = np.asarray(tensor)
      dtype = array.dtype if array.dtype.kind in "ib" else np.float64
      self.tensors[f"{case}/{name.replace('__', '/')}"] = array.astype(dtype)

  def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
    return single(scale * self.draw.standard_normal(shape))

  def save(self, folder: Path) -> None:
    formula, variant = self.formula, self.name
    arrays = {
      name: {"axes": words, "trained": name not in formula.frozen}
      for name, words in formula.arrays.items()
    }
    metadata = {
      "format": "1",
      "variant": variant,
      "formula": formula.equation,
      "source": formula.source,
      "constant": formula.constant,
      "license": "Apache-2.0",
      "arrays": json.dumps(arrays, sort_keys=True),
      "cases": json.dumps(self.cases, sort_keys=True),
    }
    write(folder / f"{variant}.safetensors", self.tensors, metadata)


def check_gradients(
  loss: Callable[[SimpleNamespace], float], p: SimpleNamespace, gradients: Mapping[str, np.ndarray]
) -> None:
  """Compares gradients derived by hand with central differences, element by element."""
  for name, gradient in gradients.items():
    array, step = getattr(p, name), 1e-5
    estimate = np.zeros_like(array)
    for index in np.ndindex(array.shape):
      losses = []
      for sign in (1, -1):
        changed = array.copy()
        changed[index] += sign * step
        losses.append(loss(SimpleNamespace(**{**vars(p), name: changed})))
      estimate[index] = (losses[0] - losses[1]) / (2 * step)
    error = np.max(np.abs(estimate - gradient)) / np.max(np.abs(gradient))
    assert error < 1e-7, f"the gradient of {name} differs from central differences by {error:.2g}"


def add_layer(
  vector: Vector,
  case: str,
  layer: Layer,
  p: Mapping[str, np.ndarray],
  scaling: float,
  w: np.ndarray | None = None,
  bias: str = "",
  formula: Formula | None = None,
  **details: Any,
) -> None:
  """Adds a layer with given arrays: input, output, loss direction, gradients and merged weight.

  Args:
    vector: the file.
    case: its name in the file.
    layer: the kind and shape of the layer.
    p: the arrays of the variant, in the layer's own shape.
    scaling: a number.
    w: the frozen weight; drawn if None.
    bias: "added" to the layer's output, "scaled" with it by (IA)^3, or "" for none.
    formula: of this case, if not the file's.
    details: of the case, for the metadata.
  """
  formula = formula or vector.formula
  shape = (*layer.batch, *layer.inputs, *layer.outputs)
  w = vector.normal(*shape, scale=0.5) if w is None else w
  x = inputs(layer, vector.draw)
  rows, matrix = layer.rows(x), layer.matrix("batch in out", w)
  flat = {name: layer.matrix(formula.arrays[name], array) for name, array in p.items()}
  arrays = SimpleNamespace(**flat)
  beta = vector.normal(*layer.outputs) if bias else np.zeros(layer.outputs)

  def merged_bias(p: SimpleNamespace) -> np.ndarray:
    return beta * p.scale if bias == "scaled" else beta

  def output(p: SimpleNamespace) -> np.ndarray:
    return formula.output(rows, matrix, p, scaling, held=arrays) + merged_bias(p)

  out, merged = output(arrays), formula.weight(matrix, arrays, scaling)
  np.testing.assert_allclose(out, rows @ merged + merged_bias(arrays), rtol=1e-12, atol=1e-12)
  direction = vector.normal(*out.shape)
  gradients = formula.gradients(matrix, arrays, scaling, starts.T(rows) @ direction)
  if bias == "scaled":
    gradients["scale"] = gradients["scale"] + np.sum(direction * beta, axis=-2)
  check_gradients(lambda changed: float(np.sum(direction * output(changed))), arrays, gradients)

  layer_output = layer.output(x, out)
  vector.add(case, x=x, w=w, out=layer_output, direction=direction.reshape(layer_output.shape))
  vector.add(case, merged=merged.reshape(shape), scaling=scaling)
  vector.add(case, **{f"p__{name}": array for name, array in p.items()})
  vector.add(case, **{f"grad__{name}": g.reshape(p[name].shape) for name, g in gradients.items()})
  if bias:
    vector.add(case, bias=beta, merged_bias=merged_bias(arrays))
  vector.cases[case] = {"layer": layer.kind, "scaling": scaling, **details}


def drawn(vector: Vector, layer: Layer, formula: Formula, **sizes: int) -> Tensors:
  """Draws the arrays of a variant."""
  shapes = {name: layer.shape(words, sizes) for name, words in formula.arrays.items()}
  return {name: vector.normal(*shape, scale=0.5) for name, shape in shapes.items()}


def single_all(p: Mapping[str, np.ndarray]) -> Tensors:
  return {name: single(array) for name, array in p.items()}


def plain(name: str, formula: Formula, layers: tuple[Layer, ...], scaling: float = 1.5) -> Vector:
  """A variant whose arrays are drawn, at rank 2, or 3 for the matrix."""
  vector = Vector(name, formula)
  for layer in layers:
    rank = 3 if layer is MATMUL else 2
    p = drawn(vector, layer, formula, rank=rank)
    details = {"rank": rank, "alpha": scaling * rank}
    add_layer(vector, layer.kind, layer, p, scaling, **details)
  return vector
