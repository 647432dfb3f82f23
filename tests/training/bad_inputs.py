"""Bad inputs of `fit`, meshes, checkpoints, the metrics log and adapters on disk."""

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.adapters.storage import packed_shapes, unpack
from lora_jax.placement import params_shardings
from lora_jax.training.checkpoint import (
  Checkpoints,
  DamagedCheckpoint,
  restore_adapter,
  save_adapter,
)
from lora_jax.training.fingerprint import fingerprint
from lora_jax.training.finite import Diagnosis, check_initial
from lora_jax.training.held import read_held
from lora_jax.training.loop import FitConfig, _next, fit
from lora_jax.training.mesh import make_mesh, place_batch
from lora_jax.training.metrics_log import MetricsLog, read_metrics
from lora_jax.training.step import start

from tests.bad_inputs import BadInput
from tests.paths import ROOT

STORED = ROOT / "tests" / "golden" / "storage" / "adapter"


def fit_config(**fields: Any) -> Callable[[Path], Any]:
  return lambda _: FitConfig(
    **{"num_train_steps": 8, "eval_every_steps": 2, "checkpoint_every_steps": 2, **fields}
  )


def mesh(**axes: Any) -> Callable[[Path], Any]:
  return lambda _: make_mesh(**axes)


def metrics(content: bytes) -> Callable[[Path], Any]:
  def call(folder: Path) -> None:
    (folder / "metrics.jsonl").write_bytes(content)
    read_metrics(folder / "metrics.jsonl")

  return call


def fitted(workdir: str | Path) -> None:
  unused: Any = None
  options: dict[str, Any] = {"config": FitConfig(1, 1, 1), "evaluate": print, "key": None}
  fit(*(unused,) * 5, workdir=workdir, mesh=unused, **options)


def in_place_of_a_folder(use: Callable[[Path], Any], make: Callable[[Path], Any]) -> Any:
  def call(folder: Path) -> None:
    make(folder / "run")
    use(folder / "run")

  return call


def damaged_base(value: float, folder: Path) -> None:
  base = {"h_0": {"kernel": jnp.ones(3)}, "h_1": {"kernel": jnp.asarray([1.0, value])}}
  with Checkpoints(folder) as checkpoints:
    Diagnosis(checkpoints, base).check(np.nan, "loss", 1)


@functools.cache
def stored_like() -> dict[str, Any]:
  """Returns the stored adapter as shapes."""
  axes = json.loads((STORED / "axes" / "metadata").read_text())["axes"]
  shapes = packed_shapes(axes).items()
  return unpack({name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes}, axes)


def other_dtype(dtype: str) -> Callable[[Path], Any]:
  def call(_: Path) -> None:
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), stored_like())
    restore_adapter(STORED, like)

  return call


def damaged_adapter(name: str, content: bytes) -> Callable[[Path], Any]:
  def call(folder: Path) -> None:
    shutil.copytree(STORED, folder / "adapter")
    (folder / "adapter" / name).write_bytes(content)
    restore_adapter(folder / "adapter", stored_like())

  return call


def renamed_checkpoint(copied: bool) -> Callable[[Path], Any]:
  def call(folder: Path) -> None:
    state = {"w": jnp.ones(2)}
    with Checkpoints(folder) as checkpoints:
      checkpoints.save(4, state, None, "base")
      (shutil.copytree if copied else os.rename)(folder / "4", folder / "9")
      checkpoints.restore(9, state, "base")

  return call


ONE = np.ones((3, 2), "float32")
FOLDER_USERS: dict[str, Callable[[Any], Any]] = {
  "fit": fitted,
  "checkpoints": Checkpoints,
  "metrics log": MetricsLog,
  "save_adapter": lambda path: save_adapter(Path(path) / "adapter", {"w": ONE}),
}

ROWS = [
  *(
    BadInput(f"FitConfig {name}={value!r}", fit_config(**{name: value}), (name, "integer", got))
    for name, value, got in [
      ("num_train_steps", 0, "got 0"),
      ("num_train_steps", -1, "got -1"),
      ("num_train_steps", 2.5, "got 2.5"),
      ("num_train_steps", "8", "got '8'"),
      ("num_train_steps", True, "got True"),
      ("num_train_steps", None, "got None"),
      ("eval_every_steps", 0, "got 0"),
      ("checkpoint_every_steps", -3, "got -3"),
      ("log_every_steps", 0, "got 0"),
      ("log_every_steps", float("nan"), "got nan"),
      ("accumulation_steps", 0, "got 0"),
    ]
  ),
  *(
    BadInput(
      f"FitConfig checkpoint_every_seconds={value!r}",
      fit_config(checkpoint_every_seconds=value),
      ("checkpoint_every_seconds", "number", repr(value)),
    )
    for value in (-1.0, float("nan"), float("inf"), "5m", True)
  ),
  *(
    BadInput(f"mesh {name}={value!r}", mesh(**{name: value}), (f"mesh.{name}", "integer", got))
    for name, value, got in [
      ("data", 0, "got 0"),
      ("fsdp", -1, "got -1"),
      ("tensor", 1.5, "got 1.5"),
      ("data", "2", "got '2'"),
      ("tensor", True, "got True"),
    ]
  ),
  BadInput("mesh of too many devices", mesh(data=9), ("data=9", "needs 9 devices", "there are 8")),
  BadInput("mesh of very many", mesh(data=10**9, fsdp=10**9), ("devices; there are 8",)),
  BadInput(
    "a batch that cannot be split",
    lambda _: place_batch(make_mesh(data=2), {"x": ONE}),
    ("a batch of 3 rows", "a multiple of 2"),
  ),
  BadInput(
    "a batch of no rows",
    lambda _: place_batch(make_mesh(), {"x": ONE[:0]}),
    ("a batch of 0 rows", "batch_size"),
  ),
  BadInput(
    "a sharding rule that matches nothing",
    lambda _: params_shardings(make_mesh(), {"w": ONE}, [("v", jax.P())]),
    ("sharding rule 'v'", "matches none"),
  ),
  BadInput(
    "a batch without segment_ids",
    lambda _: _next(iter([{"tokens": ONE}]), 1, FitConfig(1, 1, 1)),
    ("segment_ids", "got tokens"),
  ),
  BadInput(
    "a batch that is an array",
    lambda _: _next(iter([ONE]), 1, FitConfig(1, 1, 1)),  # pyright: ignore[reportArgumentType]
    ("a dict of arrays", "got ndarray"),
  ),
  BadInput(
    "batches that end",
    lambda _: _next(iter([]), 3, FitConfig(5, 1, 1)),
    ("ended before step 3 of 5",),
  ),
  BadInput(
    "nothing to train",
    lambda _: start({"w": ONE}, {}, optax.sgd(1.0), jax.random.key(0), make_mesh()),
    ("nothing would be trained",),
  ),
  *(
    BadInput(
      f"a fingerprint of {type(leaf).__name__}",
      lambda _, leaf=leaf: fingerprint({"a": {"b": leaf}}),
      ("a/b: expected an array or a number",),
    )
    for leaf in ("text", object(), 2**70, np.array(["text"]))
  ),
  *(
    BadInput(f"{name} in a bucket", lambda _, use=use: use("gs://bucket/run"), ("gs:// address",))
    for name, use in FOLDER_USERS.items()
  ),
  *(
    BadInput(
      f"{name} {kind}", in_place_of_a_folder(use, make), ("cannot be a folder", "run is", words)
    )
    for name, use in FOLDER_USERS.items()
    for kind, make, words in [
      ("in a file", Path.touch, "a file"),
      ("in a fifo", os.mkfifo, "a fifo"),
    ]
  ),
  BadInput(
    "an adapter over another one",
    lambda folder: save_adapter(folder, {"w": ONE}),
    ("already exists", "Choose another folder"),
  ),
  BadInput(
    "an adapter in a bucket",
    lambda _: restore_adapter("s3://bucket/adapter", {}),
    ("s3:// address",),
  ),
  BadInput(
    "no adapter",
    lambda folder: restore_adapter(folder, {}),
    ("holds no adapter",),
    FileNotFoundError,
  ),
  *(
    BadInput(
      f"an adapter as {dtype}",
      other_dtype(dtype),
      ("has other dtypes", "lora_a is float32, expected", dtype, "stored dtypes"),
    )
    for dtype in ("bfloat16", "float16")
  ),
  *(
    BadInput(
      f"an adapter whose axes are {kind}",
      damaged_adapter("axes/metadata", content),
      ("adapter", word),
    )
    for kind, content, word in [
      ("empty", b"", "cannot be read"),
      ("cut", b'{"axes": "{', "cannot be read"),
      ("a list", b"[1]", "cannot be read"),
      ("binary", bytes(range(128, 256)), "cannot be read"),
      ("of another format", b'{"axes": "{}"}', "version 1 or 2"),
    ]
  ),
  BadInput(
    "an adapter without its arrays' metadata",
    damaged_adapter("arrays/_METADATA", b"{}"),
    ("cannot be read", "Restore the folder"),
  ),
  BadInput(
    "a renamed checkpoint",
    renamed_checkpoint(copied=False),
    ("checkpoint of step 9", "is that of step 4", "renamed"),
    DamagedCheckpoint,
  ),
  BadInput(
    "a copied checkpoint",
    renamed_checkpoint(copied=True),
    ("checkpoint of step 9", "is that of step 4", "copied"),
    DamagedCheckpoint,
  ),
  BadInput(
    "lost arrays of an adapter",
    lambda folder: read_held(folder, {"w": jnp.ones(2)}),
    ("adapter_frozen does not exist", "Restore it"),
    FileNotFoundError,
  ),
  *(
    BadInput(f"a log with {kind}", metrics(content + b'\n{"step": 2}\n'), ("metrics.jsonl:1", got))
    for kind, content, got in [
      ("rubbish", b"rubbish", "got 'rubbish'"),
      ("an empty line", b"", "got ''"),
      ("a list", b"[1]", "got '[1]'"),
      ("a number", b"3", "got '3'"),
      ("no step", b'{"train/loss": 1.0}', "with a step"),
      ("a step of text", b'{"step": "1"}', "with a step"),
      ("a step of half", b'{"step": 1.5}', "with a step"),
      ("bytes that are not text", b"\xff\xfe", "metrics.jsonl:1"),
      ("zeros", bytes(8), "expected a JSON object"),
      ("deep nesting", b"[" * 100_000, "expected a JSON object"),
    ]
  ),
  BadInput(
    "a log that is a folder",
    lambda folder: read_metrics(folder),
    ("is a folder, expected a file",),
  ),
  *(
    BadInput(
      f"base params of {value}",
      functools.partial(damaged_base, value),
      (words, "h_1/kernel", "damaged"),
      FloatingPointError,
    )
    for value, words in [
      (float("nan"), "hold NaN at"),
      (float("inf"), "infinite at"),
      (float("-inf"), "unless that is a mask"),
    ]
  ),
  BadInput(
    "weights to train that are NaN",
    lambda _: check_initial({"a": jnp.ones(2), "b": jnp.asarray([1.0, jnp.nan])}),
    ("b is not finite before the first step", "damaged"),
    FloatingPointError,
  ),
]
