"""One mesh with the axes `data`, `fsdp` and `tensor`, and the shardings on it.

Batches are split over `data` and `fsdp`, the base params by rules over `fsdp` and `tensor`
(`lora_jax.placement.params_shardings`); adapters, gradients and optimizer state inherit the base
params' shardings (`lora_jax.shardings`).
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from lora_jax.fields import Count, read_value
from lora_jax.marks import (
  ATTENTION_OUTPUT,
  HEAD_INPUT,
  LAYER_INPUT,
  LAYER_OUTPUT,
  MLP_OUTPUT,
  TOKEN_EMBEDDINGS,
)
from lora_jax.placement import num_parts, place
from lora_jax.transform.marks import Mark, trace_marks

BATCH = ("data", "fsdp")
BY_ROW, BY_TOKEN = P(BATCH, None, None), P(BATCH, "tensor", None)
BY_FEATURE = P(BATCH, None, "tensor")
ACTIVATIONS = {
  TOKEN_EMBEDDINGS: (BY_FEATURE,),
  LAYER_INPUT: (BY_TOKEN, BY_ROW),
  ATTENTION_OUTPUT: (BY_ROW,),
  MLP_OUTPUT: (BY_ROW,),
  LAYER_OUTPUT: (BY_ROW, BY_TOKEN),
  HEAD_INPUT: (BY_FEATURE,),
}
"""The axes (B, T, D) of marked activations, and the next ones. A device of `tensor` keeps a part of
the tokens of a layer's input for the backward pass, and computes a part of the layer's features for
all tokens. Between, hidden states and their gradients are split by row only: with tokens split,
too, XLA for TPUs gathers all rows before a quantized weight. Embedding and head are split by D: no
device gathers more of their tables than that."""


def make_mesh(
  data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
  """Returns a mesh over the first data * fsdp * tensor devices, of all processes.

  On TPUs each axis is laid along the links between the chips.

  Args:
    data: copies of the model, which share the batch.
    fsdp: parts of the parameters; these devices share the batch as well.
    tensor: parts of each layer's computation.
    devices: None is all that there are.
  Raises:
    ValueError: if a size is not a positive integer, there are too few devices, or several processes
      have devices that the mesh would not use.
  """
  for name, size in {"data": data, "fsdp": fsdp, "tensor": tensor}.items():
    read_value(Count, size, f"mesh.{name}")
  count, devices = data * fsdp * tensor, jax.devices() if devices is None else devices
  if count > len(devices):
    raise ValueError(
      f"a mesh of data={data} x fsdp={fsdp} x tensor={tensor} needs {count} devices; there "
      f"are {len(devices)}. (On a CPU, XLA_FLAGS=--xla_force_host_platform_device_count={count} "
      "emulates them)"
    )
  if count < len(devices) and jax.process_count() > 1:
    raise ValueError(
      f"a mesh of data={data} x fsdp={fsdp} x tensor={tensor} has {count} devices, and "
      f"{jax.process_count()} processes have {len(devices)}. Choose a mesh of all of them"
    )
  shape, names, kinds = (data, fsdp, tensor), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3
  return jax.make_mesh(shape, names, kinds, devices=devices[:count])


def num_row_parts(mesh: Mesh) -> int:
  """Returns the number of parts that the rows of a batch are split into."""
  return num_parts(mesh, BATCH)


def shard_activations(fn: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
  """Returns a function whose marked activations are split by row, as the batch is, and by token.

  Without this, XLA derives the shardings of activations from those of the weights: with the axis
  `fsdp` in both, it may split the hidden states' last axis and give every device all rows.

  Args:
    fn: any function `fn(params, *args, **kwargs)`; `lora_jax.marks` names the marks.
    mesh: as `make_mesh` returns it. Activations that it does not divide are left to XLA, and so
      are those inside functions with custom derivatives, and all on a mesh with other axes.
  """
  if mesh.size == 1 or not mesh.are_all_axes_auto or set(mesh.axis_names) != {*BATCH, "tensor"}:
    return fn

  def split(mark: Mark, x: jax.Array, arrays: None) -> jax.Array:
    del arrays
    for spec in ACTIVATIONS[mark.name]:
      parts = [num_parts(mesh, names) for names in spec]
      if len(x.shape) == len(parts) and not any(map(operator.mod, x.shape, parts)):
        x = place(x, NamedSharding(mesh, spec))
    return x

  def sharded(params: PyTree, *args: Any, **kwargs: Any) -> Any:
    call = trace_marks(fn, tuple(ACTIVATIONS), params, args, kwargs, strict=False)
    return call.evaluate(split, dict.fromkeys(call.marks))

  return sharded


def local_rows(mesh: Mesh, batch_size: int, accumulation_steps: int = 1) -> list[int]:
  """Returns the rows of a global batch that this process places, ascending.

  They are those of its devices, so that the global batch does not depend on the processes. If the
  axis `tensor` spans several processes, they place the same rows.

  Raises:
    ValueError: if the rows cannot be split evenly.
  """
  parts = num_row_parts(mesh)
  size = _rows_in_part(batch_size, parts, accumulation_steps)
  return [
    (step * parts + part) * size + row
    for step in range(accumulation_steps)
    for part in _local_parts(mesh)
    for row in range(size)
  ]


def place_batch(mesh: Mesh, batch: Mapping[str, Any], accumulation_steps: int = 1) -> PyTree:
  """Splits a batch over `data` and `fsdp`.

  With more than one accumulation step the arrays get a leading axis of these.

  Args:
    mesh: as `make_mesh` returns it.
    batch: the rows of this process: `local_rows(mesh, batch_size, accumulation_steps)`.
    accumulation_steps: number of micro-batches.
  Raises:
    ValueError: if the rows cannot be split evenly.
  """
  parts, local = num_row_parts(mesh), _local_parts(mesh)
  spec = P(BATCH) if accumulation_steps == 1 else P(None, BATCH)
  sharding = NamedSharding(mesh, spec)

  def split(array: np.ndarray) -> jax.Array:
    size = _rows_in_part(len(array) * parts // len(local), parts, accumulation_steps)
    if accumulation_steps > 1:
      array = array.reshape(accumulation_steps, -1, *array.shape[1:])
    axis = len(spec) - 1

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None, "a part on this process's devices has an index"
      place = local.index((index[axis].start or 0) // size)
      return array[(*index[:axis], slice(place * size, (place + 1) * size))]

    shape = (*array.shape[:axis], parts * size, *array.shape[axis + 1 :])
    return jax.make_array_from_callback(shape, sharding, part)

  return {name: split(array) for name, array in batch.items()}


def _local_parts(mesh: Mesh) -> list[int]:
  """Returns the parts of a batch's rows that this process has devices for, ascending."""
  devices = mesh.devices.reshape(num_row_parts(mesh), -1)
  process = jax.process_index()
  return [part for part, row in enumerate(devices) if any(d.process_index == process for d in row)]


def _rows_in_part(rows: int, parts: int, accumulation_steps: int) -> int:
  """Returns the rows of a micro-batch in one part; raises ValueError unless they are even."""
  if not rows or rows % (parts * accumulation_steps):
    raise ValueError(
      f"a batch of {rows} rows cannot be split over {accumulation_steps} accumulation steps "
      f"and {parts} devices (data x fsdp). Choose a batch_size that is a multiple of "
      f"{parts * accumulation_steps}"
    )
  return rows // (parts * accumulation_steps)
