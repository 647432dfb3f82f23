"""Fine-tunes a user's model: the adapted loss, answers to prompts, and exported files."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

import lora_jax as lj
from experiments.harness.config import check_attention, replace_fields
from experiments.harness.methods import (
  adapt,
  find_method,
  has_servers,
  is_prompt_tuning,
  lora_config,
  needs_weights,
  slots_of,
)
from experiments.harness.model_card import BaseModel
from experiments.harness.workdir import file_digest, read_finished
from experiments.nlg.adapters import Format, RunAdapter, write_adapter
from experiments.nlg.base import model_folder, other_weights
from experiments.nlg.config import FinetuneConfig
from experiments.nlg.restore import trainable_shapes
from experiments.nlg.text_files import (
  end_token_ids,
  exported_text_files,
  text_files,
  write_with,
)
from experiments.nlg.user_data import Data, Text
from lora_jax.adapters.delta import adapter_weights
from lora_jax.decoding import CachedModel, SamplingConfig, adapted, from_linen, generate
from lora_jax.models.checkpoints.gguf import is_gguf, open_gguf
from lora_jax.models.checkpoints.hub import weight_files
from lora_jax.models.sharding import sharding_of
from lora_jax.models.text.tokenizer import load_tokenizer
from lora_jax.models.zoo import LanguageModel, load_causal_lm, plan_causal_lm
from lora_jax.placement import gathered
from lora_jax.training.checkpoint import restore_adapter
from lora_jax.training.loss import LossSum, language_model_loss
from lora_jax.training.processes import from_first, is_first


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


def float_params(config: FinetuneConfig, mesh: Mesh) -> PyTree:
  """Returns the base params as they are before quantization, float32."""
  floats = replace_fields(config, {"model.param_dtype": "float32"})
  return load_causal_lm(config.model.folder, **loading_options(floats, mesh)).params


def adapted_loss(config: FinetuneConfig, model: LanguageModel) -> lj.Adaptation:
  """Returns the config's method, applied to the loss of a batch."""
  return adapt(config)(whole_loss(config, model))


def whole_loss(config: FinetuneConfig, model: LanguageModel) -> Callable[..., LossSum]:
  """Returns the loss of a batch, a function of all params."""
  return language_model_loss(model.module, chunk_size=config.fit.loss_chunk or None)


def weights_digests(folder: Path) -> dict[str, str]:
  """Returns the SHA-256 of each of the base model's weight files, by name.

  Args:
    folder: the base model's folder, or its GGUF file.
  """
  if is_gguf(folder):
    paths = {tensor.path for tensor in open_gguf(folder).tensors.values()}
    return {path.name: file_digest(path) for path in sorted(paths)}
  return {name: file_digest(folder / name) for name in weight_files(folder)[0]}


def check_weights(config: FinetuneConfig, folder: Path) -> None:
  """Raises ValueError unless the base model's files are those that a finished run has adapted.

  Args:
    config: the run's config.
    folder: the base model's folder, or its GGUF file.
  """
  expected = read_finished(config.workdir).get("weights", {})
  changed = expected.items() - weights_digests(folder).items()
  if changed:
    raise ValueError(
      f"{config.workdir} was trained on other weights than are in {folder} now: "
      f"{', '.join(sorted(name for name, _ in changed))}. Restore them, since the adapter fits no "
      "others"
    )


def exports_adapter(config: FinetuneConfig, model: LanguageModel) -> bool:
  """Tells whether PEFT has a format for a run's adapter; if not, the run writes its whole model."""
  method = find_method(config.method)
  if is_prompt_tuning(config):
    return True
  return method.exports_adapter and (method.has_conv1d or model.model_type != "gpt2")


def export_folder(config: FinetuneConfig) -> Path:
  """Returns the folder that a finished run has written; see `has_model`."""
  return Path(config.workdir) / ("model" if has_model(config) else "peft")


def is_exported(config: FinetuneConfig) -> bool:
  """Tells whether a finished run has written files for other packages: an adapter, or its model."""
  return find_method(config.method).merges or _has_format(config)


def has_model(config: FinetuneConfig) -> bool:
  """Tells whether a finished run has written its whole model, and not an adapter for PEFT."""
  return (Path(config.workdir) / "model").exists() or not _has_format(config)


def _has_format(config: FinetuneConfig) -> bool:
  """Tells whether PEFT has a format for a run's method, whatever the model."""
  return find_method(config.method).exports_adapter or is_prompt_tuning(config)


def export(
  config: FinetuneConfig,
  model: LanguageModel,
  text: Text,
  trained: PyTree,
  result: Mapping[str, Any],
) -> None:
  """Writes the trained adapter or model, with its tokenizer, chat template and end tokens.

  A folder that exists is kept. Nothing is written of an adapter that cannot be merged and that PEFT
  has no format for. Several processes gather the arrays, and the first of them writes.

  Args:
    config: the run's config.
    model: the base model.
    text: its tokenizer.
    trained: the trained tree.
    result: the part of the run's result that is known, for the model card.
  """
  has_adapter = exports_adapter(config, model)
  folder = Path(config.workdir) / ("peft" if has_adapter else "model")
  if from_first(folder.exists) or not is_exported(config):
    return
  model, trained = _gathered(config, model, trained)
  if not is_first():
    return
  own_template = text.template.source if text.template and config.data.chat_template else None
  end_ids = (text.end_id, *text.end_ids)
  files = text_files(model.folder, text.tokenizer, end_ids, own_template)
  if has_adapter:
    weights = other_weights(config)
    base = BaseModel(config.model.folder, model.folder, result["weights"], weights)
    run = RunAdapter(config, result, lora_config(config), trained, model, base, files)
    write_adapter(run, folder, _format(config, model, trained))
    return
  params = adapted_loss(config, model).merge(lj.dequantize(model.params), trained)
  write_with(files, folder, lambda path: model.save(path, params, end_of_text_id=text.end_id))


def check_export(config: FinetuneConfig, model: LanguageModel, trainable: PyTree) -> None:
  """Raises ValueError if PEFT has no format for the adapter; call it before training."""
  if exports_adapter(config, model):
    model, trainable = _gathered(config, model, trainable)
    with tempfile.TemporaryDirectory() as folder:
      base = BaseModel(config.model.folder, model.folder, {})
      run = RunAdapter(config, {}, lora_config(config), trainable, model, base, {})
      write_adapter(run, Path(folder) / "peft", _format(config, model, trainable))


def _gathered(
  config: FinetuneConfig, model: LanguageModel, trainable: PyTree
) -> tuple[LanguageModel, PyTree]:
  """Returns a trainable tree of whole arrays, and its base model, too, where an export reads it."""
  if needs_weights(config) or not exports_adapter(config, model):
    model = model._replace(params=gathered(model.params))
  return model, gathered(trainable)


def _format(config: FinetuneConfig, model: LanguageModel, adapter: PyTree) -> Format:
  """Returns the servers' format if they support the adapter, otherwise PEFT's."""
  weights = set(adapter_weights(adapter))
  fused = any(tensor.is_parameter and weights & set(tensor.paths) for tensor in model.stored)
  return "server" if has_servers(config) and not fused else "peft"


def trained_tree(config: FinetuneConfig, model: LanguageModel) -> PyTree:
  """Returns the trained tree of a finished run; the base model's shapes are enough for LoRA."""
  shapes = trainable_shapes(adapted_loss(config, model), model.params)
  return restore_adapter(Path(config.workdir) / "adapter", shapes)


def base_of_adapter(config: FinetuneConfig, with_weights: bool = False) -> LanguageModel:
  """Returns the base model of a run as it was trained, in float32 if it was not quantized.

  Args:
    config: the run's config.
    with_weights: or only their shapes, unless the run's variant of LoRA needs the weights.
  """
  load = load_causal_lm if with_weights or needs_weights(config) else plan_causal_lm
  if weights := other_weights(config):
    return load(config.model.folder, param_dtype=weights, scan_layers=config.model.scan_layers)
  return load(config.model.folder)


def load_exported(config: FinetuneConfig) -> RunAdapter:
  """Returns the adapter that a finished run has exported, for `base_of_adapter`.

  Raises:
    FileNotFoundError, ValueError: if the run is not finished, has no adapter, its files are gone
      or damaged, or the base model's have changed.
  """
  result, folder = read_finished(config.workdir), export_folder(config)
  if has_model(config):
    raise ValueError(
      f"{config.workdir} is a run of {config.method}, which has no adapter: {folder}"
    )
  check_weights(config, model_folder(config))
  model = base_of_adapter(config)
  adapter = trained_tree(config, model)
  digests, weights = result.get("weights", {}), other_weights(config)
  base = BaseModel(config.model.folder, model.folder, digests, weights)
  files = exported_text_files(folder)
  tokenizer, ids = load_tokenizer(folder), end_token_ids(folder)
  ends = tuple(tokenizer.decode([token], skip_special_tokens=False) for token in ids)
  return RunAdapter(
    config,
    result,
    lora_config(config),
    adapter,
    model,
    base,
    files,
    ends,
    result.get("chats"),
    has_own_template=bool(config.data.chat_template),
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
  slots = slots_of(config)
  room = model.num_slots - config.samples.max_new_tokens - slots.count
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
    [slots.around(ids) for ids in prompts],
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
  base = from_linen(model.module, model.init_cache, model.num_slots)
  return adapted(base, adapt(config))
