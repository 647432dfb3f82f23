"""Similarity of subspaces (Hu et al. 2021, arXiv 2106.09685, sec. 7.2 and appendix G).

With U_A^i the first i singular directions of A, as columns, and U_B^j the first j of B:

    phi(A, B, i, j) = ||(U_A^i)^T U_B^j||_F^2 / min(i, j)

It is 1 if one of the two subspaces contains the other, and 0 if they are orthogonal. Subspaces are
compared for all i and j and all layers at once, from the factors: the product A B is never formed.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import LoraWeight, adapter_weights
from lora_jax.arithmetic.opened import open_adapter
from lora_jax.fields import Count, read_value
from lora_jax.quantization.leaf import is_quantized
from lora_jax.trees import select, weights_with_path

Layers = Float[np.ndarray, "*layers rows columns"]


class Subspaces(NamedTuple):
  """Singular directions of adapters of one shape, as orthonormal columns, the largest ones first.

  Attributes:
    names: of the layers, by their numbers: the weight's path; for a stacked weight with the indices
      of its layer and expert, `h/attn/query/kernel[3]`.
    a: directions of A alone, in the space of inputs, as in the paper's Figures 3 and 4.
    b: directions of B alone, in the space of outputs.
    inputs, outputs: directions of the delta, scaling * A B.
    values: its singular values, from the largest to the smallest.
  """

  names: tuple[str, ...]
  a: Float[np.ndarray, "layers d_in rank"]
  b: Float[np.ndarray, "layers d_out rank"]
  inputs: Float[np.ndarray, "layers d_in rank"]
  outputs: Float[np.ndarray, "layers d_out rank"]
  values: Float[np.ndarray, "layers rank"]

  @property
  def norm(self) -> Float[np.ndarray, " layers"]:
    """The Frobenius norm of each delta."""
    return np.linalg.norm(self.values, axis=-1)


def subspaces(config: LoraConfig, trainable: PyTree, params: PyTree, pattern: str) -> Subspaces:
  """Returns the singular directions of an adapter's layers.

  All layers are decomposed in one call for A, one for B and one for the delta: with A = Q_a R_a
  and B^T = Q_b R_b, the singular values of A B are those of R_a R_b^T, a matrix of rank x rank.

  Args:
    config: of the adapter: plain LoRA, or a variant after `lora_jax.to_lora`.
    trainable: its tree.
    params: of the base model, or their shapes.
    pattern: of the paths of adapted weights, all of one shape and rank:
      `r".*/attn/query/kernel"`.
  Raises:
    ValueError: if the adapter is not for these params or not plain LoRA, the pattern matches none
      of its weights or weights of several shapes, values are not finite, or a layer's delta has a
      smaller rank than the adapter, so that its last directions would be arbitrary.
  """
  chosen = _chosen(open_adapter(config, trainable, params).weights, pattern)
  names = tuple(itertools.chain.from_iterable(_names(*item) for item in chosen.items()))
  a, b = (np.concatenate(parts) for parts in zip(*map(_factors, chosen.values()), strict=True))
  rank, smallest = a.shape[-1], min(a.shape[-2], b.shape[-1])
  if rank > smallest:
    raise ValueError(
      f"{names[0]}: A and B have rank {rank}, and the delta at most {smallest}. Shorten them with "
      "lora_jax.truncate_rank"
    )
  _check_finite(f"the adapter of {pattern!r}", a, b)
  (q_a, r_a), (q_b, r_b) = np.linalg.qr(a), np.linalg.qr(b.mT)
  (u_a, values_a, _), (u_b, values_b, _) = np.linalg.svd(r_a), np.linalg.svd(r_b)
  u, values, v = np.linalg.svd(r_a @ r_b.mT)
  _check_rank(names, values, values_a[:, 0] * values_b[:, 0])
  return Subspaces(names, q_a @ u_a, q_b @ u_b, q_a @ u, q_b @ v.mT, values)


def adapted_matrices(
  params: PyTree, trainable: PyTree, pattern: str
) -> Float[np.ndarray, "layers d_in d_out"]:
  """Returns the base model's weights of an adapter's layers, in the order of `subspaces`.

  Args:
    params: real arrays with the base model's structure, such as its rounded weights; quantized ones
      are dequantized.
    trainable: the adapter's tree.
    pattern: of the paths of adapted weights.
  Raises:
    ValueError: if the pattern matches none of the adapter's weights or weights of several shapes,
      or params lack one.
  """
  leaves = dict(weights_with_path(params))
  chosen = _chosen(adapter_weights(trainable), pattern)
  if missing := sorted(chosen.keys() - leaves.keys()):
    raise ValueError(f"params have no {', '.join(missing)}, which the adapter adapts")
  return np.concatenate([_matrices(leaves[path], weight) for path, weight in chosen.items()])


def directions(
  matrices: Float[np.ndarray, "*layers rows columns"],
) -> Float[np.ndarray, "*layers rows rank"]:
  """Returns the left singular vectors of matrices as columns, from the largest singular value.

  They are directions of inputs for a weight (d_in, d_out), and of outputs for its transpose.

  Raises:
    ValueError: if a matrix is not of full rank: its last directions would be arbitrary.
  """
  matrices = np.asarray(matrices, np.float64)
  _check_finite("the matrices", matrices)
  u, values, _ = np.linalg.svd(matrices, full_matrices=False)
  flat = values.reshape(-1, values.shape[-1])
  _check_rank([f"matrix {i}" for i in range(len(flat))], flat, flat[:, 0])
  return u


def similarity(
  first: Float[np.ndarray, "*layers dim rank1"], second: Float[np.ndarray, "*layers dim rank2"]
) -> Float[np.ndarray, "*layers rank1 rank2"]:
  """Returns phi(i, j) for all i and j; entry [i - 1, j - 1] compares the first i and j directions.

  >>> eye = np.eye(4)
  >>> similarity(eye[:, :2], eye[:, [1, 2, 0]])
  array([[0. , 0. , 1. ],
         [1. , 0.5, 1. ]])

  Args:
    first, second: orthonormal columns in one space, of as many layers.
  Raises:
    ValueError: if their shapes do not agree, or the columns are not orthonormal.
  """
  first, second = (np.asarray(u, np.float64) for u in (first, second))
  if first.ndim < 2 or first.ndim != second.ndim or first.shape[:-1] != second.shape[:-1]:
    raise ValueError(
      "expected directions of shapes (*layers, dim, rank1) and (*layers, dim, rank2), got "
      f"{first.shape} and {second.shape}"
    )
  for name, u in (("first", first), ("second", second)):
    if not np.allclose(u.mT @ u, np.eye(u.shape[-1]), atol=1e-4):
      raise ValueError(
        f"the columns of {name} are not orthonormal: pass singular directions, such as those of "
        "lora_jax.analysis.subspaces or directions, not a matrix itself"
      )
  cosines = first.mT @ second
  sums = np.square(cosines).cumsum(-2).cumsum(-1)
  return sums / np.minimum(*_counts(*sums.shape[-2:]))


def random_similarity(dim: int, rank1: int, rank2: int) -> Float[np.ndarray, "rank1 rank2"]:
  """Returns the expected phi(i, j) of a subspace with a random one: max(i, j) / dim, exactly.

  The projection P onto a uniformly random j-dimensional subspace has the mean (j / dim) I, so that
  E ||U^T V||_F^2 = tr(U U^T E P) = i j / dim for any i orthonormal columns U.

  >>> random_similarity(8, 2, 2)
  array([[0.125, 0.25 ],
         [0.25 , 0.25 ]])

  Args:
    dim: of the space.
    rank1, rank2: the numbers of directions, at most dim.
  Raises:
    ValueError: if they are not positive integers, or a rank is above dim.
  """
  _check_ranks(dim, rank1, rank2)
  return np.maximum(*_counts(rank1, rank2)) / dim


def random_similarity_deviation(
  dim: int, rank1: int, rank2: int
) -> Float[np.ndarray, "rank1 rank2"]:
  """Returns the standard deviation of phi(i, j) of a subspace with a random one, exactly.

  For orthogonal projections P and P' of ranks i and j, one of them uniformly random,

      Var tr(P P') = 2 i (d - i) j (d - j) / (d^2 (d - 1) (d + 2))

  since P - (i / d) I and P' - (j / d) I are symmetric with trace 0, a space of (d - 1)(d + 2) / 2
  dimensions on which rotations act without an invariant subspace.

  Args:
    dim: of the space, at least 2.
    rank1, rank2: the numbers of directions, at most dim.
  Raises:
    ValueError: as `random_similarity`.
  """
  _check_ranks(dim, rank1, rank2)
  if dim < 2:
    raise ValueError(f"dim must be at least 2, got {dim}")
  i, j = _counts(rank1, rank2)
  variance = 2 * i * (dim - i) * j * (dim - j) / (dim**2 * (dim - 1) * (dim + 2))
  return np.sqrt(variance) / np.minimum(i, j)


def _counts(rank1: int, rank2: int) -> tuple[np.ndarray, np.ndarray]:
  return np.arange(1, rank1 + 1)[:, None], np.arange(1, rank2 + 1)[None, :]


def _check_ranks(dim: int, rank1: int, rank2: int) -> None:
  for name, value in (("dim", dim), ("rank1", rank1), ("rank2", rank2)):
    read_value(Count, value, name)
    if value > dim:
      raise ValueError(f"{name}={value} directions in a space of dim={dim}; expected at most dim")


def _chosen(weights: dict[str, LoraWeight], pattern: str) -> dict[str, LoraWeight]:
  """Returns the adapted weights that a pattern selects, `h_2` before `h_10`.

  Raises:
    ValueError: if it matches none, or the matrices of their layers have several shapes.
  """
  paths = sorted(select(pattern, weights, "the pattern of weights"), key=_by_number)
  chosen = {path: weights[path] for path in paths}
  shapes: dict[tuple[int, ...], str] = {}
  for path, weight in chosen.items():
    (_, d_in, rank), (_, _, d_out) = (x.shape for x in _factors(weight))
    shapes.setdefault((d_in, d_out, rank), path)
  if len(shapes) > 1:
    listed = ", ".join(f"{path} {shape}" for shape, path in shapes.items())
    raise ValueError(
      f"the pattern of weights {pattern!r} matches several shapes (inputs, outputs, rank): "
      f"{listed}. Narrow it to weights of one shape"
    )
  return chosen


def _by_number(path: str) -> list[tuple[int, str]]:
  """Returns the key by which paths are sorted: numbers as numbers, where JAX sorts their digits."""
  return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path)]


def _factors(weight: LoraWeight) -> tuple[Layers, Layers]:
  """Returns A (layers, d_in, rank) and B (layers, rank, d_out) in float64."""
  a, b = (np.asarray(factor, np.float64) for factor in (weight.lora_a, weight.lora_b))
  count = int(np.prod(a.shape[: len(weight.axes.batch)]))
  return a.reshape(count, -1, weight.rank), b.reshape(count, weight.rank, -1)


def _names(path: str, weight: LoraWeight) -> Iterator[str]:
  """Yields the name of each layer of a weight."""
  shape = weight.lora_a.shape[: len(weight.axes.batch)]
  for index in np.ndindex(*shape):
    if index and weight.layers is not None:
      index = (weight.layers[index[0]], *index[1:])
    yield f"{path}[{', '.join(map(str, index))}]" if index else path


def _matrices(leaf: Any, weight: LoraWeight) -> Layers:
  """Returns the adapted layers of a weight as matrices of inputs times outputs."""
  array = leaf.dequantize() if is_quantized(leaf) else leaf
  whole = np.asarray(jnp.asarray(array, jnp.float32), np.float64)
  axes = weight.axes
  if weight.layers is not None:
    whole = whole.take(weight.layers, axis=axes.batch[0])
  ordered = whole.transpose(*axes.batch, *axes.inputs, *axes.outputs)
  batch, inputs = len(axes.batch), len(axes.inputs)
  d_in = int(np.prod(ordered.shape[batch : batch + inputs]))
  return ordered.reshape(int(np.prod(ordered.shape[:batch])), d_in, -1)


def _check_finite(name: str, *arrays: np.ndarray) -> None:
  if not all(np.isfinite(array).all() for array in arrays):
    raise ValueError(f"{name} has values that are not finite")


def _check_rank(
  names: Sequence[str],
  values: Float[np.ndarray, "layers rank"],
  scale: Float[np.ndarray, " layers"],
) -> None:
  """Raises ValueError if singular values are 0 up to the rounding errors of numbers of a scale."""
  rank = values.shape[-1]
  threshold = rank * np.finfo(np.float64).eps * scale
  for name, row, limit in zip(names, values, threshold, strict=True):
    count = int((row > limit).sum())
    if not count:
      raise ValueError(f"{name} is 0 and has no directions; an adapter needs some training first")
    if count < rank:
      raise ValueError(
        f"{name} has rank {count}, expected {rank}: its last directions are arbitrary. Truncate it "
        f"to its rank with lora_jax.truncate_rank(..., rank={count})"
      )
