"""Training in a random subspace (Li et al. 2018, arXiv 1804.08838): the intrinsic dimension.

    theta = theta0 + P z                       z, (dim,), is trained and starts at 0
    theta_i = theta0_i + lambda_i (P z)_i      with layer_scales: SAID (Aghajanyan et al. 2020,
                                               arXiv 2012.13255, sec. 3), lambda_i starts at 1

P, (D, dim), maps z to all D weights. Its columns are nearly orthonormal: a step of z is a step of
the same length of theta. It is Fastfood's (Le et al. 2013), in blocks of n rows, n the power of two
from dim on, with random signs B and normal numbers G of each block, and one permutation Pi:

    block = H G Pi H B / sqrt(n D),            H the Walsh-Hadamard matrix, |G|^2 = n

P is never stored; the trainable tree holds z and a seed. The blocks are drawn where a weight is
used, in the forward and again in the backward pass, for one weight at a time, or one layer of a
scanned stack.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.checks import check_adapter
from lora_jax.adapters.copies import in_dtypes_of, merged_leaves, trained_copy, wide_dtype
from lora_jax.adapters.delta import (
  SHARED,
  SHARED_AXES,
  ArraySpec,
  LoraWeight,
  Table,
  adapter_extra,
)
from lora_jax.adapters.targets import array_leaves, select_arrays
from lora_jax.axes import GROUPS, IN1, IN2, RANK2
from lora_jax.fields import Within, read_value
from lora_jax.transform.deferred import deferred
from lora_jax.transform.factored import Factored, Source, as_values
from lora_jax.transform.factors import Factor
from lora_jax.transform.interpreter import Interpreter
from lora_jax.transform.tracing import trace_call
from lora_jax.trees import as_patterns, nest, replace_leaves

ARRAYS = {"z": "groups", "seed": "rank2", "layer_scales": "in1"}
MAX_DIM = 2**24
IMPL = "threefry2x32"  # whatever JAX's default is, so that P stays the same
MATMUL_SIZE = 64  # H is applied as products of matrices up to this size


def random_subspace(
  fn: Callable[..., Any],
  dim: int,
  target: str | Iterable[str] = ".*",
  extra: str | Iterable[str] = (),
  layer_scales: bool = False,
) -> Adaptation:
  """Returns training of `fn(params, *args, **kwargs)` in a random subspace of its weights.

  At step 0 the output is the base model's. `merge` is exact: the tree has the weights that `apply`
  computes. A weight of three or more axes counts as a stack along the first one: each of its
  entries has blocks, and a scale, of its own.

  Rebuilding P takes O(D log dim) operations and the size of one weight as memory in each pass. It
  follows from the stored seed and the weights' paths, up to the rounding of a device's normal
  numbers, by JAX's threefry generator.

  Args:
    fn: any JAX function of a parameter tree and further arguments.
    dim: the number of trained parameters, of all weights together; scales and `extra` come on top.
    target: regular expressions for whole paths: the weights that move.
    extra: the same for leaves that are fully trained instead, such as a head.
    layer_scales: whether a scale for each weight is trained as well.
  Raises:
    ValueError: if `dim` is not from 1 to 2^24; from `init`, if a pattern matches no leaf or a
      target is not of real floating-point numbers.

  >>> import jax, jax.numpy as jnp
  >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
  >>> params = {"up": jnp.ones((8, 6)), "down": jnp.ones((6, 8))}
  >>> method = random_subspace(fn, dim=5, layer_scales=True)
  >>> trainable = method.init(jax.random.key(0), params, jnp.ones((3, 8)))
  >>> jax.tree.map(jnp.shape, trainable["lora_shared"]["random subspace of 5"].arrays)
  {'layer_scales': (2,), 'seed': (2,), 'z': (5,)}
  """
  dim = read_value(Annotated[int, Within(f"[1, {MAX_DIM}]")], dim, "dim")
  layer_scales = read_value(bool, layer_scales, "layer_scales")
  target, extra = as_patterns(target, "target"), as_patterns(extra, "extra")
  name = f"random subspace of {dim}"
  names = ("z", "seed", "layer_scales") if layer_scales else ("z", "seed")
  table = Table(name, tuple(ArraySpec(n, ARRAYS[n], frozen=n == "seed") for n in names))

  def chosen(params: PyTree) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the leaves that move and those that are fully trained, with their keys, by path."""
    leaves = array_leaves(params)
    whole = select_arrays(extra, params, leaves, "extra") if extra else []
    paths = [p for p in select_arrays(target, params, leaves, "target") if p not in whole]
    _check_targets({path: leaves[path][1] for path in paths})
    return {path: leaves[path] for path in paths}, {path: leaves[path] for path in whole}

  def init(key: PRNGKeyArray, params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
    del args, kwargs
    moved, whole = chosen(params)
    seed = jax.random.bits(key, (2,), jnp.uint16).astype(jnp.float32)
    arrays = {"z": jnp.zeros(dim, jnp.float32), "seed": seed}
    if layer_scales:
      count = sum(_num_slices(leaf.shape) for _, leaf in moved.values())
      arrays["layer_scales"] = jnp.ones(count, jnp.float32)
    node = LoraWeight.from_arrays(arrays, table, SHARED_AXES, None)
    copies = ((keys, trained_copy(path, leaf)) for path, (keys, leaf) in whole.items())
    return nest([((SHARED, name), node), *copies])

  def checked(params: PyTree, trainable: PyTree) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Returns `chosen(params)`, and the subspace's node of a trainable tree that was checked."""
    moved, whole = chosen(params)
    scales = sum(_num_slices(leaf.shape) for _, leaf in moved.values())
    shapes = {"z": (dim,), "seed": (2,), "layer_scales": (scales,)}
    node = _checked_node(trainable, name, table, {n: shapes[n] for n in names})
    check_adapter({k: v for k, v in trainable.items() if k != SHARED}, {}, whole)
    return moved, whole, node

  def apply(
    params: PyTree,
    trainable: PyTree,
    *args: Any,
    lora_key: PRNGKeyArray | None = None,
    scaling: Any = None,
    dropout_rate: Any = None,
    **kwargs: Any,
  ) -> Any:
    del lora_key, scaling, dropout_rate
    moved, whole, node = checked(params, trainable)
    params = replace_leaves(params, in_dtypes_of(whole, adapter_extra(trainable)))
    traced = trace_call(fn, params, args, kwargs)
    values = as_values(traced.leaves, traced.position)
    weights, vectors = _moved_weights(moved, node)
    for path, value in (weights | vectors).items():
      values[traced.position[path]] = value
    return jax.tree.unflatten(traced.out_tree, Interpreter({}).evaluate(traced.jaxpr, values))

  def merge(params: PyTree, trainable: PyTree) -> PyTree:
    moved, whole, node = checked(params, trainable)
    weights, vectors = _moved_weights(moved, node)
    merged = {path: weight.materialize() for path, weight in weights.items()}
    return replace_leaves(params, merged | vectors | merged_leaves(whole, adapter_extra(trainable)))

  return Adaptation(init, apply, merge)


def _check_targets(leaves: Mapping[str, Any]) -> None:
  """Raises ValueError if there is no target, or one cannot move."""
  if not leaves:
    raise ValueError("target and extra match the same leaves, so that none is left to move")
  for path, leaf in leaves.items():
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise ValueError(
        f"{path} is {leaf.dtype} of shape {leaf.shape}; expected real floating-point numbers. "
        "Narrow `target`"
      )


def _checked_node(
  trainable: PyTree, name: str, table: Table, shapes: Mapping[str, tuple[int, ...]]
) -> LoraWeight:
  """Returns the node of the subspace; raises ValueError if it is not of this method and params."""
  nodes = trainable.get(SHARED, {}) if isinstance(trainable, Mapping) else {}
  node = nodes.get(name) if isinstance(nodes, Mapping) and len(nodes) == 1 else None
  if not isinstance(node, LoraWeight) or node.table != table:
    has = ", ".join(map(str, nodes)) if isinstance(nodes, Mapping) and nodes else "nothing"
    raise ValueError(
      f"the trainable tree is not of this method: {SHARED} holds {has}, expected one {table}"
    )
  got = {n: tuple(array.shape) for n, array in node.arrays.items()}
  if got != dict(shapes):
    raise ValueError(
      f"the trainable tree is not for these params: {name} has {got}, expected {dict(shapes)}"
    )
  return node


def _num_slices(shape: Sequence[int]) -> int:
  """Returns the number of parts of a weight that are projected apart: the layers of a stack."""
  return shape[0] if len(shape) >= 3 else 1


def _moved_weights(
  leaves: Mapping[str, Any], node: LoraWeight
) -> tuple[dict[str, Factored], dict[str, jax.Array]]:
  """Returns each weight with its part of `P z` as an update that waits for its use, by path.

  Vectors and scalars, which are small and many, are returned as arrays, computed at once.
  """
  shapes = {path: tuple(leaf.shape) for path, (_, leaf) in leaves.items()}
  order_key, parts = _parts(node, {path: _num_slices(shape) for path, shape in shapes.items()})
  with jax.threefry_partitionable(True):  # as IMPL
    order = jax.random.permutation(order_key, _block_size(len(node.z)))
  shared = Factor(node.z, (GROUPS,)), Factor(order, (IN1,), frozen=True)
  update = _Projection(sum(map(math.prod, shapes.values())))
  weights: dict[str, Factored] = {}
  for path, shape in shapes.items():
    if len(shape) > 1:
      base, label = leaves[path][1], 0 if len(shape) > 2 else IN2
      base = jnp.asarray(base) if isinstance(base, np.ndarray) else deferred(base)
      factors = *shared, *_labelled(parts[path], label)
      dims = (0,) if label == 0 else ()
      weights[path] = Factored(base, Source([path])).formed(update, 1.0, *factors, dims=dims)
  vectors = [path for path, shape in shapes.items() if len(shape) < 2]
  if not vectors:
    return weights, {}
  longest = max(math.prod(shapes[path]) for path in vectors)
  stacked = [
    jnp.concatenate(arrays) for arrays in zip(*[parts[path] for path in vectors], strict=True)
  ]
  rows = update(
    Factor(jnp.zeros((len(vectors), longest)), (0, 1)), *shared, *_labelled(stacked, 0)
  ).array
  moved = {}
  for path, row in zip(vectors, rows, strict=True):
    leaf, shape = jnp.asarray(leaves[path][1]), shapes[path]
    wide = leaf.astype(wide_dtype(leaf.dtype))
    moved[path] = (wide + row[: math.prod(shape)].reshape(shape)).astype(leaf.dtype)
  return weights, moved


def _parts(
  node: LoraWeight, counts: Mapping[str, int]
) -> tuple[PRNGKeyArray, dict[str, list[jax.Array]]]:
  """Returns a key for all weights, and by path the data of its slices' keys, and their scales.

  Args:
    node: of the subspace.
    counts: the number of slices of each weight, by path.
  """
  words = node.seed.astype(jnp.uint32)
  key = jax.random.key(words[0] * 2**16 + words[1], impl=IMPL)
  numbers = [zlib.crc32(f"{path} {i}".encode()) for path, n in counts.items() for i in range(n)]
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.array([0, *numbers], np.uint32))
  arrays = [jax.random.key_data(keys[1:])]
  arrays += [node.layer_scales] if "layer_scales" in node.arrays else []
  ends = np.cumsum([0, *counts.values()])
  pieces = zip(counts, ends[:-1], ends[1:], strict=True)
  return keys[0], {path: [array[a:b] for array in arrays] for path, a, b in pieces}


def _labelled(part: Sequence[jax.Array], label: int) -> list[Factor]:
  """Returns the keys of a weight's slices, and their scales, as factors."""
  keys, *scales = part
  return [Factor(keys, (label, RANK2), frozen=True), *(Factor(s, (label,)) for s in scales)]


@dataclasses.dataclass(frozen=True)
class _Projection:
  """One weight's part of `P z`, as an array of the weight's size.

  Attributes:
    num_weights: D, of all weights that move.
  """

  num_weights: int

  def __call__(
    self, w: Factor, z: Factor, order: Factor, keys: Factor, scales: Factor | None = None
  ) -> Factor:
    is_stack, shape = 0 in keys.labels, w.array.shape
    size = math.prod(shape[1:] if is_stack else shape)

    def rows_of(data: jax.Array) -> jax.Array:
      return fastfood(jax.random.wrap_key_data(data, impl=IMPL), order.array, z.array, size)

    rows = jax.vmap(rows_of)(keys.array.reshape(-1, 2))
    if scales is not None:
      rows = rows * scales.array.reshape(-1, 1)
    return Factor((rows / math.sqrt(self.num_weights)).reshape(shape), w.labels)


def _block_size(dim: int) -> int:
  return 1 << (dim - 1).bit_length()


def fastfood(
  key: PRNGKeyArray, order: Int[Array, " size"], z: Float[Array, " dim"], num_rows: int
) -> Float[Array, " num_rows"]:
  """Returns the product of z and a random matrix whose entries have a variance of 1.

  Two of its columns are orthogonal up to about 1 / sqrt(num_rows) of the product of their lengths
  (Le et al. 2013, "Fastfood: Approximating kernel expansions in loglinear time").

  Args:
    key: of the signs and normal numbers, which follow from it.
    order: a permutation of the power of two from `dim` on.
    z: the vector.
    num_rows: the length of the result.
  """
  size = len(order)
  with jax.threefry_partitionable(True):  # as IMPL
    bits = jax.random.bits(key, (-(-num_rows // size), size), jnp.uint32)
  signs = 1 - 2 * (bits & 1).astype(jnp.float32)
  uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2**-22 - 1  # above -1, below 1
  normal = math.sqrt(2) * jax.lax.erf_inv(uniform)
  normal = normal * (size**0.5 / jnp.linalg.norm(normal, axis=1, keepdims=True))
  padded = jnp.pad(z.astype(jnp.float32), (0, size - len(z)))
  mixed = hadamard(signs * padded[None])[:, order]
  rows = hadamard(normal * mixed) / size**0.5
  return rows.reshape(-1)[:num_rows]


def hadamard(x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
  """Returns `H x` along the last axis, H of +1 and -1 of Walsh and Hadamard; `H H = size I`.

  H is the Kronecker product of small ones, which are applied one after another as matmuls.

  Args:
    x: of a power of two in size.
  """
  *batch, size = x.shape
  left = size
  while left > 1:
    step = min(left, MATMUL_SIZE)
    x = x.reshape(*batch, size // step, step)
    x = jnp.matmul(x, _walsh(step), precision="highest").swapaxes(-1, -2)
    x, left = x.reshape(*batch, size), left // step
  return x


def _walsh(size: int) -> np.ndarray:
  matrix = np.ones((1, 1), np.float32)
  while len(matrix) < size:
    matrix = np.kron(matrix, np.array([[1, 1], [1, -1]], np.float32))
  return matrix
