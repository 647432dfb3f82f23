"""The layers of the vectors, each written as a matmul `rows @ weight`.

matmul      x (tokens, in) @ w (in, out)
conv        x (images, height, width, channels), w (height, width, channels, out); stride 1,
            no padding. A row is a window of x, and the three axes of a window are the inputs.
lookup      x is ids, w (rows, out). A row is the id's one-hot vector.
stack       x (layers, tokens, in), w (layers, in, out): layer by layer
"""

import math
from typing import NamedTuple

import numpy as np


class Layer(NamedTuple):
  """A kind of layer, and the shapes of its weight's batch, input and output axes."""

  kind: str
  batch: tuple[int, ...]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]

  def shape(self, words: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """Returns the shape of an array with the axes `words`, such as "batch in rank"."""
    roles = {"batch": self.batch, "in": self.inputs, "out": self.outputs}
    roles |= {word: (size,) for word, size in sizes.items()}
    return tuple(size for word in words.split() for size in roles[word])

  def matrix(self, words: str, array: np.ndarray) -> np.ndarray:
    """Returns an array with its input axes, and its output axes, joined into one each."""
    if not {"in", "out"} & {*words.split()}:
      return array
    shape, dims = list(array.shape), []
    for word in words.split():
      if word in ("in", "out"):
        count = len(self.inputs if word == "in" else self.outputs)
        dims.append(math.prod(shape[:count]))
        del shape[:count]
      elif word != "batch" or self.batch:
        dims.append(shape.pop(0))
    return array.reshape(dims)

  def rows(self, x: np.ndarray) -> np.ndarray:
    """Returns the inputs as rows: (batch..., tokens, in)."""
    if self.kind == "conv":
      height, width, _ = self.inputs
      windows = np.lib.stride_tricks.sliding_window_view(x, (height, width), axis=(1, 2))
      return np.moveaxis(windows, 3, -1).reshape(-1, math.prod(self.inputs))
    if self.kind == "lookup":
      return np.eye(self.inputs[0])[x.reshape(-1)]
    return x

  def output(self, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns an output of rows (batch..., tokens, out) in the layer's own shape."""
    if self.kind == "conv":
      height, width, _ = self.inputs
      images, high, wide, _ = x.shape
      return rows.reshape(images, high - height + 1, wide - width + 1, *self.outputs)
    if self.kind == "lookup":
      return rows.reshape(*x.shape, *self.outputs)
    return rows


MATMUL = Layer("matmul", (), (12,), (10,))
CONV = Layer("conv", (), (2, 2, 4), (6,))
LOOKUP = Layer("lookup", (), (11,), (8,))
STACK = Layer("stack", (3,), (8,), (6,))


def inputs(layer: Layer, draw: np.random.Generator) -> np.ndarray:
  """Draws the inputs of a layer."""
  if layer.kind == "lookup":
    return draw.integers(0, layer.inputs[0], (2, 3))
  shapes = {"matmul": (5, *layer.inputs), "conv": (2, 4, 3, layer.inputs[-1])}
  return single(draw.standard_normal(shapes.get(layer.kind, (*layer.batch, 4, *layer.inputs))))


def single(array: np.ndarray) -> np.ndarray:
  """Rounds to values that float32 represents: inputs are the same in both precisions."""
  return array.astype(np.float32).astype(np.float64)
