"""Adapters on disk: Orbax for the arrays, JSON for the axes; never the base, never a pickle."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lora_jax.adapter import pack, packed_shapes, unpack

PyTree = Any


def save_adapter(folder: str | Path, trainable: PyTree) -> None:
  """Writes a trainable tree to a new folder, as plain arrays with their axes beside them.

  Raises:
    ValueError: if the folder exists: nothing is overwritten.
  """
  arrays, axes = pack(trainable)
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
    checkpointer.save(
      Path(folder).absolute(),
      args=ocp.args.Composite(
        arrays=ocp.args.StandardSave(arrays), axes=ocp.args.JsonSave({"axes": axes})
      ),
    )


def restore_adapter(folder: str | Path, like: PyTree) -> PyTree:
  """Reads a trainable tree, which must agree with `like` in paths, axes, shapes and dtypes.

  Args:
    folder: as `save_adapter` wrote it.
    like: arrays or `ShapeDtypeStruct`s; where they have shardings, the arrays are placed so.
  Raises:
    FileNotFoundError: if there is no adapter.
    ValueError: listing every missing, unexpected and mis-shaped leaf, and other axes.
  """
  folder = Path(folder).absolute()
  if not (folder / "axes").is_dir():
    raise FileNotFoundError(f"{folder} holds no adapter: expected one written by save_adapter")
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
    stored = checkpointer.restore(folder, args=ocp.args.Composite(axes=ocp.args.JsonRestore()))
    axes = stored["axes"]["axes"]
    wanted, _ = pack(like)
    abstract = {path: _abstract(leaf) for path, leaf in wanted.items()}
    stored_shapes = packed_shapes(axes).items()
    shapes = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in stored_shapes}
    unpack(shapes, axes, like)  # refuses before an array is read
    restored = checkpointer.restore(
      folder, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract))
    )
  return unpack(restored["arrays"], axes, like)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
