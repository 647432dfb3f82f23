"""LoftQ's start of an adapter, from the base model's weights before and after quantization.

One iteration, which leaves the base model's codes as others have them. On weights that are not
quantized, the adapter is another model: it is exported merged. `lora_jax.loftq` has more
iterations, which change the codes.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

import lora_jax as lj
from experiments.harness.fit import initialize
from experiments.harness.methods import find_method, lora_config
from experiments.harness.workdir import has_trained
from experiments.nlg.config import E2EConfig, E2EModel, FinetuneConfig
from experiments.nlg.from_data import FOLDER, read_start
from lora_jax.models.checkpoints.loaded_weights import QUANTIZED
from lora_jax.training.checkpoint import restore_adapter, save_adapter


def check_quantized(config: E2EConfig | FinetuneConfig) -> None:
  """Raises ValueError if the run's method needs a quantized base model and has none."""
  model = config.model
  rounded_to = model.rounded_to if isinstance(model, E2EModel) else ""
  if not find_method(config.method).corrects_quantization:
    return
  if model.param_dtype not in QUANTIZED and not rounded_to:
    also = ", or model.rounded_to" if isinstance(model, E2EModel) else ""
    raise ValueError(
      f"method={config.method} starts from the error of quantization, and "
      f"model.param_dtype={model.param_dtype} has no weights before quantization and after it. Set "
      f"model.param_dtype={' or '.join(QUANTIZED)}{also}; or choose method=lora"
    )


def initial_adapter(
  config: E2EConfig | FinetuneConfig,
  loss: lj.Adaptation,
  params: PyTree,
  batch: Any,
  load_floats: Callable[[], PyTree],
) -> PyTree:
  """Returns a run's initial trainable tree, by LoftQ or from data if its method says so.

  That of LoftQ is written to the run's folder, from which a resumed run reads it.

  Args:
    config: the run's config.
    loss: the method applied to the loss.
    params: the base params, quantized or rounded.
    batch: a batch, for its shapes.
    load_floats: loads the params before quantization; called only if they are needed.
  """
  trainable = read_start(config, initialize(config, loss, params, batch))
  if not find_method(config.method).corrects_quantization:
    return trainable
  folder = Path(config.workdir) / FOLDER
  if has_trained(Path(config.workdir)) and folder.exists():
    return restore_adapter(folder, trainable)
  trainable, errors = lj.loftq_adapter(lora_config(config), trainable, load_floats(), params)
  before, after = (sum(x) / len(errors) for x in zip(*errors.values(), strict=True))
  print(
    f"LoftQ: mean error of {len(errors)} quantized weights {before:.2%}, with the initial adapter "
    f"{after:.2%}",
    flush=True,
  )
  if jax.process_count() == 1:
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted before its training
    save_adapter(folder, trainable)
  return trainable
