"""An adapter's frozen arrays on disk: written once, read by a resumed run.

`init` computed them from the base params (DoRA's |W|^2) or drew them. Another machine may round
differently, so a resumed run reads them and never computes them again. Checkpoints leave them out.
"""

import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from lora_jax.training.checkpoint import reason
from lora_jax.training.fingerprint import fingerprint
from lora_jax.training.processes import is_first, wait_for_all
from lora_jax.trees import leaves_with_path

FOLDER = "adapter_frozen"


def write_held(workdir: str | Path, adapter: PyTree) -> None:
  """Writes the held arrays of an adapter, replacing those of an earlier run.

  Args:
    workdir: the run's folder.
    adapter: the frozen part of a trainable tree, None where an array is trained. Nothing is
      written if it has no array.
  Raises:
    OSError: if they cannot be written, as on a full disk.
  """
  arrays = dict(leaves_with_path(adapter))
  if not arrays:
    return
  folder = Path(workdir).absolute() / FOLDER
  if is_first():
    shutil.rmtree(folder, ignore_errors=True)
  wait_for_all()
  args = ocp.args.Composite(
    arrays=ocp.args.StandardSave(arrays),
    about=ocp.args.JsonSave({"fingerprint": fingerprint(arrays)}),
  )
  try:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
      checkpointer.save(folder, args=args)
  except Exception as error:  # storage libraries raise errors of many kinds
    raise OSError(
      f"the adapter's frozen arrays could not be written to {folder} ({reason(error)}). Nothing "
      "was trained yet. If the disk is full, make room; then start again"
    ) from error


def read_held(workdir: str | Path, adapter: PyTree) -> PyTree:
  """Returns the held arrays that a run has written, placed as those of `adapter` are.

  Args:
    workdir: the run's folder.
    adapter: the frozen part of a trainable tree, as `init` returns it.
  Raises:
    FileNotFoundError: if they do not exist.
    ValueError: if they belong to another adapter, or are damaged.
  """
  expected = dict(leaves_with_path(adapter))
  if not expected:
    return adapter
  folder = Path(workdir).absolute() / FOLDER
  if not folder.is_dir():
    raise FileNotFoundError(
      f"{folder} does not exist: the run's checkpoints need the arrays that its adapter holds. "
      "Restore it, or start again with another workdir"
    )
  abstract = {
    path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    for path, leaf in expected.items()
  }
  args = ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract), about=ocp.args.JsonRestore())
  try:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
      restored = checkpointer.restore(folder, args=args)
      arrays, digest = dict(restored["arrays"]), restored["about"]["fingerprint"]
  except Exception as error:  # storage libraries raise errors of many kinds
    raise ValueError(
      f"{folder} cannot be read, or belongs to another adapter ({type(error).__name__}). Restore "
      "it, or start again with another workdir"
    ) from error
  if fingerprint(arrays) != digest:
    raise ValueError(f"{folder} is damaged. Restore it, or start again with another workdir")
  return jax.tree.unflatten(jax.tree.structure(adapter), [arrays[path] for path in expected])
