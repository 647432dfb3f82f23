"""Adapters and checkpoints on disk: arrays by Orbax, the rest as JSON; no base weights, no pickle.

Versions of checkpoints:

    1    has no field `version`
    2    the same, with the field; later with `step`, which tells a renamed folder
"""

import contextlib
import glob
import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from lora_jax.adapters.storage import pack, packed_shapes, unpack
from lora_jax.files import local_path, make_folder
from lora_jax.training.fingerprint import fingerprint
from lora_jax.training.processes import first_message, from_first, is_first, wait_for_all
from lora_jax.trees import leaves_with_path

logger = logging.getLogger(__name__)

VERSION = 2
DAMAGED, REMOVED = ".damaged", ".removed"
SECONDS = 10.0  # at most, to remove what a failed save has written
STORED_NAMES = {"part": "trainable"}  # of a train state's fields, where disk and code differ


def save_adapter(folder: str | Path, trainable: PyTree) -> None:
  """Writes a trainable tree to a new folder: plain arrays, and their axes as JSON.

  Raises:
    ValueError: if the folder exists: nothing is overwritten. Or if it is not a local path.
    OSError: if it cannot be written, as on a full disk. Nothing is left of it.
  """
  arrays, axes = pack(trainable)
  folder = local_path(folder).absolute()
  if from_first(folder.exists):
    raise ValueError(f"{folder} already exists, and nothing is overwritten. Choose another folder")
  make_folder(folder.parent)
  if is_first():
    _remove_leftovers(folder.parent, glob.escape(folder.name))
  args = ocp.args.Composite(
    arrays=ocp.args.StandardSave(arrays), axes=ocp.args.JsonSave({"axes": axes})
  )
  try:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
      checkpointer.save(folder, args=args)
  except Exception as error:  # storage libraries raise errors of many kinds
    left = _remove_failed(folder.parent, glob.escape(folder.name)) if is_first() else []
    kept = f"Remove {', '.join(map(str, left))}" if left else "Nothing is left of it"
    raise OSError(
      f"the adapter could not be written to {folder} ({reason(error)}). {kept}. If the disk is "
      "full, make room; then save it again"
    ) from error


def restore_adapter(folder: str | Path, like: PyTree) -> PyTree:
  """Reads a trainable tree, which must agree with `like` in paths, axes, shapes and dtypes.

  Args:
    folder: as `save_adapter` wrote it.
    like: arrays or `ShapeDtypeStruct`s; if they have shardings, the result has the same, on any
      devices; otherwise it is on the default device.
  Raises:
    FileNotFoundError: if there is no adapter.
    ValueError: if the stored tree differs; every missing, unexpected or mis-shaped leaf, every
      difference in axes and every other dtype is listed.
  """
  folder = local_path(folder).absolute()
  if not (folder / "axes").is_dir():
    raise FileNotFoundError(f"{folder} holds no adapter: expected one written by save_adapter")
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
    args = ocp.args.Composite(axes=ocp.args.JsonRestore())
    with _readable(folder):
      axes = str(checkpointer.restore(folder, args=args)["axes"]["axes"])
    expected, _ = pack(like)
    abstract = {path: _abstract(leaf) for path, leaf in expected.items()}
    stored_shapes = packed_shapes(axes).items()
    shapes = {
      name: jax.ShapeDtypeStruct(shape, abstract[name].dtype if name in abstract else "float32")
      for name, shape in stored_shapes
    }
    unpack(shapes, axes, like)  # refuses before an array is read
    with _readable(folder):
      handler: Any = ocp.StandardCheckpointHandler()
      metadata = handler.metadata(folder / "arrays").tree
      dtypes = {path: metadata[path].dtype for path in abstract}
    _check_dtypes(folder, dtypes, abstract)
    args = ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract))
    with _readable(folder):
      arrays = checkpointer.restore(folder, args=args)["arrays"]
  return unpack(arrays, axes, like)


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
  """Turns the errors of many kinds that storage libraries raise into one."""
  try:
    yield
  except Exception as error:
    raise ValueError(
      f"the adapter in {folder} cannot be read ({reason(error)}): it "
      "is damaged, or not one of save_adapter's. Restore the folder"
    ) from error


def _check_dtypes(
  folder: Path, dtypes: Mapping[str, Any], expected: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
  """Raises ValueError if an adapter's arrays have other dtypes; Orbax would convert them."""
  problems = [
    f"{path} is {dtypes[path]}, expected {leaf.dtype}"
    for path, leaf in expected.items()
    if dtypes[path] != leaf.dtype
  ]
  if problems:
    raise ValueError(
      f"{folder} has other dtypes: {'; '.join(problems[:5])}. Restore it with a `like` of the "
      "stored dtypes, then convert the result with jax.tree.map"
    )


def _remove_leftovers(folder: Path, name: str) -> None:
  """Removes the temporary folders that a killed process left."""
  for path in _leftovers(folder, name):
    shutil.rmtree(path)


def _leftovers(folder: Path, name: str) -> list[Path]:
  patterns = (f"{name}.orbax-checkpoint-tmp*", f"{name}{REMOVED}")
  return [path for pattern in patterns for path in folder.glob(pattern)]


def _remove_failed(folder: Path, name: str) -> list[Path]:
  """Removes the temporary folders of a save that has failed; returns those that remain.

  Orbax raises the first error and does not wait for its other threads, which write for a while: it
  removes what they write until nothing is written any more.
  """
  end, quiet = time.monotonic() + SECONDS, 0
  while quiet < 5 and time.monotonic() < end:
    left = _leftovers(folder, name)
    for path in left:
      shutil.rmtree(path, ignore_errors=True)  # another thread writes there
    quiet = 0 if left else quiet + 1
    time.sleep(0.05)
  return _leftovers(folder, name)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:  # not that of the stored array, whose devices may not be here
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


class Restored(NamedTuple):
  """The contents of a checkpoint; `loss` is its validation loss, None if it was not evaluated."""

  state: PyTree
  data_state: Any
  step: int
  loss: float | None


class Checkpoints:
  """A run's checkpoints: the last two, and the best by validation loss. They hold no base weights.

  Each is a folder named by its step, with the train state, the state of the data iterator, and the
  fingerprints of the base params and of the train state, which reveal damage. A folder appears and
  disappears as a whole: Orbax writes it under a temporary name, then renames it, and it is renamed
  before it is removed.
  """

  def __init__(self, folder: str | Path):
    self.folder = make_folder(folder).absolute()
    self._checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    if is_first():
      _remove_leftovers(self.folder, "*")

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *error: object) -> None:
    try:
      self._checkpointer.close()
    except Exception:
      if error[0] is None:  # an earlier error says more than its consequences
        raise

  def steps(self) -> list[int]:
    """Returns the steps that have a checkpoint, in ascending order."""
    return from_first(self._steps_here)

  def _steps_here(self) -> list[int]:
    return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

  def save(
    self, step: int, state: PyTree, data_state: Any, base: str, loss: float | None = None
  ) -> None:
    """Writes a checkpoint, then removes those that are neither the last two nor the best.

    Args:
      step: the step of the run.
      state: any tree of arrays, PRNG keys included.
      data_state: the state of the data iterator, a JSON value.
      base: the fingerprint of the base params.
      loss: the validation loss, nats per token; the checkpoint with the smallest is the best.
    Raises:
      OSError: if it cannot be written, as on a full disk. Earlier checkpoints are untouched.
    """
    arrays = _arrays(state)
    about = {
      "version": VERSION,
      "step": step,
      "base": base,
      "state": fingerprint(arrays),
      "shapes": _shapes(arrays),
      "data_state": data_state,
      "loss": loss,
    }
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(arrays),
      about=ocp.args.JsonSave({"content": about, "digest": _digest(about)}),
    )
    try:
      self._checkpointer.save(self.folder / str(step), args=args)
    except Exception as error:  # storage libraries raise errors of many kinds
      if is_first():
        _remove_failed(self.folder, str(step))
      steps = self._steps_here()  # the error may be of this process only
      earlier = f"Those of steps {steps} are untouched" if steps else "None was saved before"
      raise OSError(
        f"the checkpoint of step {step} could not be written to {self.folder} ({reason(error)}). "
        f"{earlier}. Make room, then rerun the same command: it resumes from the last one"
      ) from error
    losses, steps = self._losses(), self.steps()
    best = min(losses, key=losses.__getitem__, default=None)
    for old in steps[:-2]:
      if old != best:
        self._rename(old, f"{old}{REMOVED}")
        if is_first():
          _remove_leftovers(self.folder, str(old))

  def restore_last(self, like: PyTree, base: str) -> Restored | None:
    """Reads the last undamaged checkpoint; returns None if there is no checkpoint at all.

    A damaged checkpoint is reported and set aside, and the one before it is read.

    Args:
      like: a state of the same structure, with the shardings that the result is to have.
      base: the fingerprint of the base params.
    Raises:
      ValueError: if a checkpoint belongs to other base params or another state, a later version of
        lora_jax wrote it, or all are damaged.
    """
    steps = self.steps()
    for step in reversed(steps):
      restored = self._restore_whole(step, like, base)
      if restored is not None:
        return restored
    if steps:
      raise ValueError(
        f"all checkpoints in {self.folder} are damaged and have been set aside as *{DAMAGED}; "
        "the same command starts from step 0"
      )
    return None

  def restore_best(self, like: PyTree, base: str) -> Restored:
    """Reads the undamaged checkpoint with the smallest validation loss.

    A damaged checkpoint is reported and set aside. The arguments are those of `restore_last`.

    Raises:
      ValueError: if none has a validation loss, or as in `restore_last`.
    """
    losses = self._losses()
    for step in sorted(losses, key=losses.__getitem__):
      restored = self._restore_whole(step, like, base)
      if restored is not None:
        return restored
    raise ValueError(f"no undamaged checkpoint in {self.folder} has a validation loss")

  def restore(self, step: int, like: PyTree, base: str) -> Restored:
    """Reads the checkpoint of a step.

    Args:
      step: of the checkpoint.
      like: a state, as `start` returns it, of arrays or `ShapeDtypeStruct`s.
      base: the fingerprint of the base params.
    Raises:
      DamagedCheckpoint: if it differs from what was written.
      ValueError: if it belongs to other base params or another state, or a later version of
        lora_jax wrote it.
    """
    about = self._about(step)
    label = f"the checkpoint of step {step} in {self.folder}"
    if about["base"] != base:
      raise ValueError(
        f"{label} belongs to a base model with fingerprint {about['base']}, and this one has "
        f"{base}. Load the base model that it was trained on, or give another workdir"
      )
    arrays = _arrays(like)
    expected, stored = _shapes(arrays), about["shapes"]
    if expected != stored:
      names = sorted(n for n in {*expected, *stored} if expected.get(n) != stored.get(n))
      faults = (
        f"{n}: {stored.get(n, 'missing')}, expected {expected.get(n, 'none')}" for n in names
      )
      raise ValueError(
        f"{label} has another state: {'; '.join(list(faults)[:5])}. Resume with the method, the "
        "optimizer and the version of lora_jax that wrote it, or give another workdir"
      )
    abstract = {path: _abstract(leaf) for path, leaf in arrays.items()}
    with _read_in_all(label):
      restored = self._read(step, "state", ocp.args.StandardRestore(abstract))
    if fingerprint(restored) != about["state"]:
      raise DamagedCheckpoint(f"{label} is damaged: its arrays differ from those that were saved")
    return Restored(_like(restored, like), about["data_state"], step, about["loss"])

  def _restore_whole(self, step: int, like: PyTree, base: str) -> Restored | None:
    """Reads a checkpoint, or reports that it is damaged and sets it aside."""
    try:
      return self.restore(step, like, base)
    except DamagedCheckpoint as error:
      name = f"{step}{DAMAGED}"
      logger.warning("%s. It is set aside as %s, and the one before it is used", error, name)
      self._rename(step, name)
      return None

  def _losses(self) -> dict[int, float]:
    """Returns the validation loss of each step that has one."""
    losses = {}
    for step in self.steps():
      try:
        loss = self._about(step)["loss"]
      except DamagedCheckpoint as error:
        logger.warning("%s, so that it cannot be the best", error)
        continue
      if loss is not None:
        losses[step] = loss
    return losses

  def _about(self, step: int) -> dict[str, Any]:
    label = f"the checkpoint of step {step} in {self.folder}"
    with _read_in_all(label):
      stored = self._read(step, "about", ocp.args.JsonRestore())
      about, digest = stored["content"], stored["digest"]
      if _digest(about) != digest:
        raise DamagedCheckpoint(f"{label} is damaged")
      if about.get("step", step) != step:
        raise DamagedCheckpoint(
          f"{label} is that of step {about['step']}: its folder was renamed or copied"
        )
    version = about.get("version", 1)
    if version > VERSION:
      raise ValueError(
        f"{label} has version {version}; this lora_jax reads versions 1 to {VERSION}. Use the "
        "version of lora_jax that wrote it, or a later one"
      )
    return about

  def _read(self, step: int, item: str, args: Any) -> Any:
    # The checkpointer's `restore` ends with a barrier, which a process that fails never reaches.
    handler: Any = self._checkpointer.handler
    return handler.restore(self.folder / str(step), args=ocp.args.Composite(**{item: args}))[item]

  def _rename(self, step: int, name: str) -> None:
    """Renames a checkpoint once no process uses it."""
    wait_for_all()
    if is_first():
      if (self.folder / name).exists():
        shutil.rmtree(self.folder / name)
      (self.folder / str(step)).rename(self.folder / name)
    wait_for_all()


class DamagedCheckpoint(ValueError):
  """A checkpoint differs from what was written."""


@contextlib.contextmanager
def _read_in_all(label: str) -> Iterator[None]:
  """Raises an error of one process in all of them, as damage; so none waits for another."""
  message, cause = "", None
  try:
    yield
  except Exception as error:  # storage libraries raise errors of many kinds
    is_damage, cause = isinstance(error, DamagedCheckpoint), error
    message = str(error) if is_damage else f"{label} cannot be read ({type(error).__name__})"
  if message := first_message(message):
    raise DamagedCheckpoint(message) from cause


def _arrays(state: PyTree) -> dict[str, jax.Array]:
  """Returns the leaves of a state by their path on disk, PRNG keys as integers."""
  return {_stored_path(path): _plain(leaf) for path, leaf in leaves_with_path(state)}


def _stored_path(path: str) -> str:
  field, slash, rest = path.partition("/")
  return STORED_NAMES.get(field, field) + slash + rest


def _plain(leaf: Any) -> Any:
  if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return leaf
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return jax.eval_shape(jax.random.key_data, leaf).update(sharding=leaf.sharding)
  return jax.random.key_data(leaf)


def _like(arrays: dict[str, jax.Array], like: PyTree) -> PyTree:
  """Returns arrays by path as a tree like `like`."""

  def restored(path: str, leaf: jax.Array) -> jax.Array:
    array = arrays[_stored_path(path)]
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      impl = jax.random.key_impl(jnp.empty((), leaf.dtype))  # also of a shape
      return jax.random.wrap_key_data(array, impl=impl)
    return array

  leaves = [restored(*item) for item in leaves_with_path(like)]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _shapes(arrays: dict[str, jax.Array]) -> dict[str, str]:
  return {path: f"{leaf.dtype.name}{list(leaf.shape)}" for path, leaf in arrays.items()}


def _digest(about: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def reason(error: Exception) -> str:
  """Returns the first line of a storage library's error, or only the system's reason in it."""
  system = re.search("No space left on device|File too large|Disk quota exceeded", str(error))
  first_line = str(error).partition("\n")[0][:200]
  return system[0] if system else f"{type(error).__name__}: {first_line}"
