"""Merges a run's QA-LoRA adapter into the minima of its base model's GGUF file."""

from pathlib import Path

import jax
from jaxtyping import PyTree

import lora_jax as lj
from experiments.harness.config import replace_fields
from experiments.harness.methods import find_method, lora_config
from experiments.nlg.base import load_base, model_folder, other_weights
from experiments.nlg.config import E2EConfig, FinetuneConfig
from experiments.nlg.finetuned import check_weights, trained_tree
from experiments.nlg.restore import load_adapter
from lora_jax.interop import save_merged_gguf
from lora_jax.models.checkpoints.gguf import is_gguf
from lora_jax.models.checkpoints.loaded_weights import STORED
from lora_jax.models.zoo import LanguageModel, load_causal_lm
from lora_jax.training.mesh import make_mesh


def export_merged_gguf(config: E2EConfig | FinetuneConfig, out: str | Path) -> dict[str, float]:
  """Merges the adapter of a finished run into its base model's GGUF file, as a new file.

  Returns:
    By path, the error of each adapted weight relative to its update, as in `save_merged_gguf`.
  Raises:
    FileExistsError: if there is such a file.
    ValueError: if the run is not finished or has no adapter, its base model is not a GGUF file or
      has changed, or a weight cannot be merged exactly.
  """
  if not find_method(config.method).saves_adapter:
    raise ValueError(
      f"{config.workdir} is a run of {config.method}, which has no adapter; QA-LoRA's merges into "
      "a GGUF file (method=qa_lora). Give a folder to make instead of a file"
    )
  base = model_folder(config)
  if not is_gguf(base):
    raise ValueError(
      f"{config.workdir} adapts {config.model.folder or 'the embedded GPT-2'}, which is not a GGUF "
      "file, and a merged GGUF file has the blocks of its base model's. Give a folder to make "
      "instead of a file"
    )
  if weights := other_weights(config):
    raise ValueError(
      f"{config.workdir} adapts {weights} weights, and a merged GGUF file has those of its base "
      "model's. Give a folder to make instead of a file"
    )
  if isinstance(config, E2EConfig):
    adapter, model = _e2e_adapter(config)
  else:
    check_weights(config, base)
    model = load_causal_lm(base, param_dtype=STORED, scan_layers=config.model.scan_layers)
    adapter = trained_tree(config, model)
  tensors = model.stored_in_folder()
  return save_merged_gguf(out, base, lora_config(config), adapter, tensors, model.params)


def _e2e_adapter(config: E2EConfig) -> tuple[PyTree, LanguageModel]:
  """Returns the adapter of a run, and its base model as stored, which is read once."""
  model = config.model
  stored = load_base(replace_fields(config, {"model.param_dtype": STORED}), make_mesh())
  trained_on = stored.params
  if model.param_dtype != STORED:
    dtype = model.param_dtype
    trained_on = jax.tree.map(lambda x: x.astype(dtype), lj.dequantize(trained_on))
  adapted = stored._replace(model=stored.model._replace(params=trained_on))
  return load_adapter(config, adapted), stored.model
