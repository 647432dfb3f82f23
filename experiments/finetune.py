"""Fine-tunes your model on your data, and writes an adapter for this project, PEFT and servers.

    python -m experiments.finetune --model=FOLDER_OR_REPOSITORY --data=mine.jsonl [--dry_run]

Time: depends on your model and data; `--dry_run` prints the steps and a step's memory.
Expect: a falling loss, some answers, and the lines of Python that load the adapter.

`run` does it all: data -> model -> method -> fit -> samples -> files for other packages.
"""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from ml_collections import ConfigDict

import lora_jax as lj
from experiments.harness.config import read_config, replace_fields
from experiments.harness.fit import count, count_trained, fit_run
from experiments.harness.launch import launch
from experiments.harness.methods import (
  find_method,
  has_servers,
  is_prompt_tuning,
  lora_config,
  needs_weights,
  slots_of,
)
from experiments.harness.optimizer import run_optimizer
from experiments.harness.workdir import (
  check_examples,
  check_model,
  check_same,
  file_digest,
  provenance,
  run_once,
)
from experiments.nlg import usage
from experiments.nlg.base import other_weights
from experiments.nlg.config import FinetuneConfig
from experiments.nlg.finetuned import (
  adapted_loss,
  check_export,
  export,
  export_folder,
  exports_adapter,
  float_params,
  has_model,
  is_exported,
  loading_options,
  samples,
  weights_digests,
  whole_loss,
)
from experiments.nlg.from_data import start_from_data
from experiments.nlg.loftq import check_quantized, initial_adapter
from experiments.nlg.tokens import with_token_ids
from experiments.nlg.user_data import Data, Text, load_data
from lora_jax.files import read_json
from lora_jax.models.checkpoints.gguf import is_gguf, open_gguf
from lora_jax.models.checkpoints.pretrained import PRETRAINED, cached_path
from lora_jax.models.zoo import LanguageModel, load_causal_lm, plan_causal_lm
from lora_jax.training.mesh import place_batch
from lora_jax.training.processes import is_first
from lora_jax.training.step import make_train_step, start
from lora_jax.variants.qa_merge import MERGEABLE

FEW_STEPS = 20


def run(config: ConfigDict) -> dict[str, Any]:
  """Fine-tunes and exports; an interrupted run is resumed, and a finished one not repeated."""
  settings = _checked(config)
  if (Path(settings.workdir) / "data.json").exists():  # also of a finished run
    _check_data(settings)
  result = run_once(settings, lambda workdir: _run(settings, workdir))
  if is_first():
    print(report(settings, result))
  return result


def _run(config: FinetuneConfig, workdir: Path) -> dict[str, Any]:
  begin = time.perf_counter()
  mesh, method = config.mesh.make(), find_method(config.method)
  options = loading_options(config, mesh)
  text, data = load_checked_data(config, plan_causal_lm(config.model.folder, **options))
  model = load_causal_lm(config.model.folder, **options)
  base_parameters = count(model.params)
  start_from_data(config, whole_loss(config, model), model.params, data.train, mesh)
  loss = adapted_loss(config, model)
  trainable = initial_adapter(
    config, loss, model.params, data.train[0], lambda: float_params(config, mesh)
  )
  check_export(config, model, trainable)
  _check_data(config)
  check_examples(workdir, data.digest)
  check_model(workdir, model.module.config)
  weights = weights_digests(model.folder)
  check_same(workdir / "weights.json", weights, "weights")
  print(_outline(config, model, data, trainable), flush=True)
  trained = fit_run(
    _with_warmup(config, data),
    method,
    loss,
    model.params,
    trainable,
    data.train,
    mesh,
    examples=f"{data.num_train:,} examples",
    keep=config.fit.keep,
    eval_loss=loss,
    eval_batches=lambda: iter(data.valid),
  )
  result = {
    "experiment": config.experiment,
    "model": config.model.folder,
    "weights": weights,
    "method": config.method,
    "seed": config.seed,
    "num_train_records": data.num_train,
    "num_valid_records": data.num_valid,
    "chats": text.template is not None,
    "base_parameters": base_parameters,
    **trained.fields,
    "valid_loss": trained.loss,
    "last_valid_loss": trained.fitted.last_loss,
    **provenance(),
  }
  export(config, model, text, trained.kept, result)
  return result | {
    "samples": samples(config, model, text, data, trained.kept, mesh),
    "seconds": time.perf_counter() - begin,
  }


def _checked(config: ConfigDict) -> FinetuneConfig:
  """Returns the config; raises ValueError if the model or the data is missing."""
  settings = read_config(FinetuneConfig, config)
  find_method(settings.method, settings.NAME)
  if not settings.model.folder:
    raise ValueError("no model is given: add --model=FOLDER, or a repository of the hub")
  check_quantized(settings)
  if not settings.data.file:
    raise ValueError("no data is given: add --data=FILE.jsonl")
  return with_token_ids(settings)


def load_checked_data(config: FinetuneConfig, model: LanguageModel) -> tuple[Text, Data]:
  """Returns the tokenizer and the batches; errors come before any weights are loaded.

  Args:
    config: the run's config.
    model: as `plan_causal_lm` returns it.
  """
  config.check_positions(model.num_positions, model.num_slots - slots_of(config).count)
  text, data = load_data(config, model)
  config.check_batch(config.data.batch_size, data.train.row_lengths[-1])
  return text, data


def _check_data(config: FinetuneConfig) -> None:
  """Raises ValueError if the run in this folder was trained on other data or another template."""
  files = [config.data.file, config.data.valid_file, config.data.chat_template]
  digests = [file_digest(file) for file in files if file]
  check_same(Path(config.workdir) / "data.json", digests, "data")


def _with_warmup(config: FinetuneConfig, data: Data) -> FinetuneConfig:
  """Returns the config with a warmup of at most a tenth of the steps."""
  steps = min(config.optimizer.warmup_steps, len(data.train) // 10)
  return replace_fields(config, {"optimizer.warmup_steps": steps})


def plan(config: ConfigDict, all_rows: bool = False) -> None:
  """Prints the weights, parameters, memory and steps of a run without loading any weights.

  Args:
    config: the run's config.
    all_rows: a row for each adapted weight; otherwise one for each kind of weight.
  """
  settings = _checked(config)
  mesh, method = settings.mesh.make(), find_method(settings.method)
  model = plan_causal_lm(settings.model.folder, **loading_options(settings, mesh))
  _, data = load_checked_data(settings, model)
  loss = adapted_loss(settings, model)
  arguments = jax.random.key(0), model.params, data.train[0]
  trainable = loss.init(*arguments) if method.owns_base else jax.eval_shape(loss.init, *arguments)
  if exports_adapter(settings, model):
    if not needs_weights(settings):
      zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), trainable)
      check_export(settings, model, zeros)
    if not is_prompt_tuning(settings):
      table = lj.summary(model.params, trainable, lora_config(settings), by_kind=not all_rows)
      print(table, end="\n\n")
  print(_outline(settings, model, data, trainable))
  warmed = _with_warmup(settings, data)
  optimizer, _ = run_optimizer(warmed, method, model.params, trainable, len(data.train))
  state, frozen, optimizer = start(model.params, trainable, optimizer, jax.random.key(0), mesh)
  parts = settings.fit.accumulation_steps
  step: Any = make_train_step(loss, optimizer, state, parts)
  first: Any = data.train[0]
  batch = place_batch(mesh, first, parts)
  memory = step.lower(state, frozen, batch).compile().memory_analysis()
  held, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  print(
    f"memory     {_gigabytes(held + temporary)} per device by the compiler's estimate: "
    f"{_gigabytes(held)} for weights, adapter, optimizer and batch, {_gigabytes(temporary)} for "
    "a step's temporaries\n"
    f"folder     {settings.workdir}\n"
    "nothing was trained (--dry_run)"
  )


def _gigabytes(size: int) -> str:
  return f"{size / 1e9:.2f} GB"


def _outline(config: FinetuneConfig, model: LanguageModel, data: Data, trainable: PyTree) -> str:
  """Returns the model, the method, the data and the steps as text."""
  base, size, method = count(model.params), count_trained(trainable), find_method(config.method)
  epochs = config.data.num_epochs
  rank = f", rank {config.lora.rank}" if method.uses("lora") else ""
  note = f"note       {len(data.train)} steps change little: raise data.num_epochs"
  return "\n".join(
    [
      f"model      {config.model.folder}: {model.model_type}, {base:,} parameters",
      f"method     {method.label}{rank}, {size:,} parameters ({100 * size / base:.2f} %)",
      f"data       {config.data.file}: {data.num_train:,} examples, {data.num_valid:,} held out",
      f"steps      {len(data.train):,} in {epochs} epoch{'s' if epochs > 1 else ''}, each of "
      f"{config.data.batch_size} rows of {data.train.row_lengths[-1]} tokens"
      f"{', packed' if config.data.packing else ''}",
      *([note] if len(data.train) < FEW_STEPS else []),
    ]
  )


def report(config: FinetuneConfig, result: dict[str, Any]) -> str:
  """Returns a finished run as text: losses, samples, and how to load the adapter."""
  lines = []
  folder = export_folder(config) if is_exported(config) else Path(config.workdir) / "adapter"
  for sample in result["samples"]:
    lines += [f"prompt     {sample['prompt']!r}", f"generated  {sample['generated']!r}"]
    lines += [f"data       {sample['answer']!r}", ""]
  held_out = result["num_valid_records"]
  kept = result["best_step"] if config.fit.keep == "best" else result["num_train_steps"]
  lines += [
    f"loss       {result['valid_loss']:.4f} nats/token on {held_out:,} "
    f"held-out example{'s' if held_out > 1 else ''}, after step {kept:,} of "
    f"{result['num_train_steps']:,}",
    f"time       {result['seconds']:.0f} s on {result['device']}",
    f"wrote      {folder}",
    "",
  ]
  return "\n".join([*lines, *how_to_load(config)])


def how_to_load(config: FinetuneConfig) -> list[str]:
  """Returns lines that load the adapter or model here, in PEFT or transformers, in a server."""
  model, folder = config.model.folder, export_folder(config)
  if not is_exported(config):
    return ["# here", f'# python -m experiments.generate {config.workdir} "PROMPT"']
  if has_model(config):
    return [
      "# here",
      "import lora_jax.models.zoo",
      f"model = lora_jax.models.zoo.load_causal_lm({str(folder)!r})",
      "",
      "# in transformers",
      "import transformers",
      f"model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})",
    ]
  dtype = config.model.param_dtype
  here = usage.in_lora_jax(model, str(folder), dtype)
  if is_prompt_tuning(config):
    here = usage.prompt_in_lora_jax(model, str(folder), slots_of(config).count, dtype)
  lines = ["# here", *here, ""]
  if find_method(config.method).corrects_quantization:  # on other weights it is another model
    command = f"# python -m experiments.export {config.workdir} FOLDER --merged"
    return [*lines, "# for all other programs, merged into float32 weights", command]
  path = cached_path(model) if model in PRETRAINED else Path(model)  # without asking the hub
  lines += ["# in PEFT", *usage.in_peft(model, path, str(folder))]
  written = read_json(folder / "adapter_config.json")
  served = has_servers(config) and "target_parameters" not in written
  if served and not is_gguf(path) and (command := usage.in_vllm(model, str(folder), written["r"])):
    lines += ["", "# in a server that supports LoRA for models of this type"]
    lines += [f"# {line}" for line in command]
  if has_servers(config):
    lines += ["", "# for llama.cpp and Ollama"]
    lines += [f"# python -m experiments.export {config.workdir} adapter.gguf"]
  on_file = not other_weights(config)
  if on_file and find_method(config.method).variant == lj.QA_LORA and _has_minima(path):
    lines += ["", "# for llama.cpp, merged into a copy of the base model's file"]
    lines += [f"# python -m experiments.export {config.workdir} merged.gguf --merged"]
  return lines


def _has_minima(path: Path) -> bool:
  """Returns whether a model is a GGUF file with weights that QA-LoRA merges into."""
  if not (path.is_file() and is_gguf(path)):
    return False
  return any(tensor.type in MERGEABLE for tensor in open_gguf(path).tensors.values())


if __name__ == "__main__":
  launch(run, "finetune.py", {"model": "model.folder", "data": "data.file"}, plan)
