"""Initial adapters from the first training batches, of methods that are initialized from data."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

import lora_jax as lj
from experiments.harness.config import AdaptationConfig
from experiments.harness.fit import initialize
from experiments.harness.methods import RANKS, find_method, lora_config
from experiments.harness.workdir import has_trained, write_json
from lora_jax.adapters.delta import adapter_weights
from lora_jax.data.batches import BatchSource
from lora_jax.training.checkpoint import restore_adapter, save_adapter
from lora_jax.training.loss import mean
from lora_jax.training.mesh import place_batch

FOLDER = "adapter_initial"


def start_from_data(
  config: AdaptationConfig,
  fn: Callable[..., Any],
  params: PyTree,
  batches: BatchSource[Any],
  mesh: Mesh,
) -> None:
  """Writes the initial adapter of a run whose method needs data to the run's folder; once.

  Call it before `adapt`, which reads the ranks that it writes.

  Args:
    config: the run's config.
    fn: the loss, `fn(params, batch) -> LossSum`.
    params: the base params, placed on `mesh`.
    batches: the training batches, of which the method takes the first ones.
    mesh: as `make_mesh` returns it.
  """
  method, workdir = find_method(config.method), Path(config.workdir)
  folder = workdir / FOLDER
  if method.from_data is None or (has_trained(workdir) and folder.exists()):
    return
  if jax.process_count() > 1:
    raise ValueError(
      f"method={config.method} is initialized from data, in one process. Run it on one machine, or "
      "choose method=lora"
    )
  shutil.rmtree(folder, ignore_errors=True)  # of a run with another config
  (workdir / RANKS).unlink(missing_ok=True)
  count = min(method.num_batches, len(batches))
  first: list[Any] = [place_batch(mesh, batches[i]) for i in range(count)]
  print(f"{method.label}: {count:,} batches initialize the adapter", flush=True)
  plain = dataclasses.replace(lora_config(config), variant=None)
  with_start = method.from_data(lambda params, batch: mean(fn(params, batch)), plain, params, first)
  trainable = initialize(config, lj.lora(fn, with_start), params, first[0])
  ranks = {path: weight.rank for path, weight in adapter_weights(trainable).items()}
  write_json(workdir / RANKS, ranks)
  save_adapter(folder, trainable)


def read_start(config: AdaptationConfig, trainable: PyTree) -> PyTree:
  """Returns the adapter that `start_from_data` has written, or `trainable` if it has not.

  Args:
    config: the run's config.
    trainable: as the method's `init` returns it.
  """
  if find_method(config.method).from_data is None:
    return trainable
  return restore_adapter(Path(config.workdir) / FOLDER, trainable)
