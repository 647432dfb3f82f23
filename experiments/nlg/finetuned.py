"""Fine-tunes a user's model: the adapted loss, answers to prompts, and exported files."""

import tempfile
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

import lora_jax as lj
from experiments.harness.config import check_attention
from experiments.harness.methods import adapt, find_method, lora_config
from experiments.harness.sharding import sharding_of
from experiments.harness.workdir import file_digest
from experiments.nlg.config import FinetuneConfig
from experiments.nlg.text_files import text_files, write_with
from experiments.nlg.user_data import Data, Text
from lora_jax.adapters.delta import adapter_weights
from lora_jax.decoding import CachedModel, SamplingConfig, generate
from lora_jax.interop import save_peft
from lora_jax.models.checkpoints.hub import weight_files
from lora_jax.models.zoo import LanguageModel
from lora_jax.training.loss import language_model_loss


def loading_options(config: FinetuneConfig, mesh: Mesh) -> dict[str, Any]:
  """Returns the arguments of `load_causal_lm`; raises ValueError as `check_attention` does."""
  check_attention(config.model.attention, config.model.dtype)
  usual = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  model = config.model
  return {
    "shardings": sharding_of(mesh),
    "dtype": usual if model.dtype == "auto" else model.dtype,
    "param_dtype": usual if model.param_dtype == "auto" else model.param_dtype,
    "scan_layers": model.scan_layers,
    "remat": model.remat or None,
    "attention": model.attention,
  }


def adapted_loss(config: FinetuneConfig, model: LanguageModel) -> lj.Adaptation:
  """Returns the config's method, applied to the loss of a batch."""
  return adapt(config)(language_model_loss(model.module, chunk_size=config.fit.loss_chunk or None))


def weights_digests(folder: Path) -> dict[str, str]:
  """Returns the SHA-256 of each of the base model's weight files, by name."""
  return {name: file_digest(folder / name) for name in weight_files(folder)[0]}


def export_folder(config: FinetuneConfig) -> Path:
  """Returns the folder of a run's adapter in PEFT's format, or of its fully trained model."""
  adapter = find_method(config.method).exports_adapter
  return Path(config.workdir) / ("peft" if adapter else "model")


def export(config: FinetuneConfig, model: LanguageModel, text: Text, trained: PyTree) -> None:
  """Writes the trained adapter or model, with its tokenizer, chat template and end tokens.

  A folder that exists is kept.
  """
  folder = export_folder(config)
  if folder.exists():
    return
  own_template = text.template.source if text.template and config.data.chat_template else None
  end_ids = (text.end_id, *text.end_ids)
  files = text_files(model.folder, text.tokenizer, end_ids, own_template)
  if find_method(config.method).exports_adapter:
    write_with(files, folder, lambda path: _write_peft(config, model, trained, path))
    return
  params = adapted_loss(config, model).merge(model.params, trained)
  write_with(files, folder, lambda path: model.save(path, params, end_of_text_id=text.end_id))


def check_export(config: FinetuneConfig, model: LanguageModel, trainable: PyTree) -> None:
  """Raises ValueError if PEFT has no format for the adapter; call it before training."""
  if find_method(config.method).exports_adapter:
    with tempfile.TemporaryDirectory() as folder:
      _write_peft(config, model, trainable, Path(folder) / "peft")


def _write_peft(
  config: FinetuneConfig, model: LanguageModel, adapter: PyTree, folder: Path
) -> None:
  """Writes the adapter in PEFT's format, and in that of servers if they read such adapters."""
  adapted = set(adapter_weights(adapter))
  fused = any(tensor.is_parameter and adapted & set(tensor.paths) for tensor in model.stored)
  save_peft(
    folder,
    lora_config(config),
    adapter,
    model.stored,
    model.params,
    base_model=config.model.folder,
    for_server=find_method(config.method).has_servers and not fused,
  )


def samples(
  config: FinetuneConfig,
  model: LanguageModel,
  text: Text,
  data: Data,
  trained: PyTree,
  mesh: Mesh,
) -> list[dict[str, str]]:
  """Returns the adapted model's answers to held-out prompts, and the answers in the data."""
  room = model.num_slots - config.samples.max_new_tokens
  if not data.prompts:
    return []
  base = find_method(config.method).remaining_base(model.params, trained)
  search = SamplingConfig(
    eos_ids=text.end_ids, temperature=0.0, max_new_tokens=config.samples.max_new_tokens
  )
  prompts = [ids[-room:] for ids in data.prompts]
  answers = generate(
    cached_model(config, model),
    {"base": base, "adapter": trained},
    prompts,
    search,
    batch_size=8 * mesh.shape["data"] * mesh.shape["fsdp"],
    mesh=mesh,
  )
  decode = text.tokenizer.decode
  return [
    {"prompt": decode(ids, skip_special_tokens=False), "generated": decode(tokens), "answer": line}
    for ids, tokens, line in zip(prompts, answers, data.answers, strict=True)
  ]


def cached_model(config: FinetuneConfig, model: LanguageModel) -> CachedModel:
  """Returns the adapted model for decoding, without merging or copying the base model."""

  def adapted(name: str) -> Any:
    def call(params: PyTree, *args: Any) -> Any:
      return model.module.apply({"params": params}, *args, method=name)

    apply = adapt(config)(call).apply
    return lambda params, *args: apply(params["base"], params["adapter"], *args, lora_key=None)

  return CachedModel(adapted("extend"), adapted("logits"), model.init_cache, model.num_slots)
