"""LoRA on your model with your data: an adapter for this project, PEFT and servers.

    python -m experiments.finetune --model=FOLDER_OR_REPOSITORY --data=mine.jsonl [--dry_run]

`run` is the whole of it: lines -> model -> LoRA -> fit -> samples -> an adapter in PEFT's form.
"""

import functools
import json
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

import lora_jax as lj
from experiments.harness.launch import launch
from experiments.harness.recipe import fit_config, lora_config, make_optimizer, params_places
from experiments.harness.workdir import (
  Config,
  check_examples,
  check_experiment,
  check_model,
  check_same,
  file_digest,
  provenance,
  run_once,
)
from experiments.nlg.user_data import Data, Text, load_data
from lora_jax.adapters.delta import adapter_weights
from lora_jax.data import batches as data_batches
from lora_jax.decoding import CachedModel, SamplingConfig, generate
from lora_jax.interop import save_peft
from lora_jax.models.checkpoints.hub import weight_files
from lora_jax.models.zoo import LanguageModel, load_causal_lm, plan_causal_lm
from lora_jax.training.checkpoint import save_adapter
from lora_jax.training.loop import fit
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import make_mesh, place_batch
from lora_jax.training.step import make_train_step, start


def run(config: Config) -> dict[str, Any]:
  """Fine-tunes and exports; goes on where it was, and does not repeat a finished run."""
  check(config)
  if (Path(config.workdir) / "data.json").exists():  # also of a finished run
    _check_data(config, Path(config.workdir))
  result = run_once(config, lambda workdir: _run(config, workdir))
  print(report(config, result))
  return result


def check(config: Config) -> None:
  """Raises ValueError if a config lacks what it needs."""
  check_experiment(config, "finetune")
  if not config.model.folder:
    raise ValueError("no model is given: add --model=FOLDER, or a repository of the hub")
  if not config.data.file:
    raise ValueError("no data is given: add --data=FILE.jsonl")
  if config.fit.keep not in ("best", "last"):
    raise ValueError(f"fit.keep must be best or last, got {config.fit.keep!r}")
  if not 0 < config.data.valid_share < 1:
    raise ValueError(f"data.valid_share must be between 0 and 1, got {config.data.valid_share}")
  try:
    datetime.fromisoformat(config.data.today)
  except ValueError:
    raise ValueError(f"data.today must be a day as 2024-07-26, got {config.data.today!r}") from None


def _run(config: Config, workdir: Path) -> dict[str, Any]:
  begun = time.perf_counter()
  mesh = make_mesh(**config.mesh)
  model = load_causal_lm(config.model.folder, **_loading(config, mesh))
  text, data = load_data(config, model)
  loss, trainable = adapt(config, model, data)
  check_export(config, model, trainable)
  _check_data(config, workdir)
  check_examples(workdir, data.digest)
  check_model(workdir, model.module.config)
  weights = weights_digests(model.folder)
  check_same(workdir / "weights.json", weights, "weights")
  steps = len(data.train)
  optimizer, schedule = make_optimizer(config, steps, warmup_steps=_warmup(config, steps))
  count = optax.tree.size(trainable)
  print(_outline(config, model, data, count), flush=True)
  fitted = fit(
    loss,
    model.params,
    trainable,
    optimizer,
    iter(data_batches.as_grain(data.train)),
    config=fit_config(config, steps),
    eval_loss=loss,
    eval_batches=lambda: iter(data.valid),
    workdir=workdir,
    key=jax.random.split(jax.random.key(config.seed))[1],
    mesh=mesh,
    schedule=schedule,
  )
  best = config.fit.keep == "best"
  adapter = fitted.best if best else fitted.last
  export(config, model, adapter, workdir)
  return {
    "experiment": config.experiment,
    "model": config.model.folder,
    "weights": weights,
    "method": "lora",
    "seed": config.seed,
    "num_train_records": data.num_train,
    "num_valid_records": data.num_valid,
    "base_parameters": optax.tree.size(model.params),
    "trainable_parameters": count,
    "num_train_steps": steps,
    "best_step": fitted.best_step,
    "valid_loss": fitted.best_loss if best else fitted.last_loss,
    "last_valid_loss": fitted.last_loss,
    "train_seconds": fitted.seconds,
    "train_tokens": fitted.tokens,
    "samples": samples(config, model, text, data, adapter, mesh),
    "seconds": time.perf_counter() - begun,
    **provenance(),
  }


def _check_data(config: Config, workdir: Path) -> None:
  """Raises ValueError if the run in this folder was trained with other lines, or another form."""
  files = [config.data.file, config.data.valid_file, config.data.chat_template]
  check_same(workdir / "data.json", [file_digest(file) for file in files if file], "data")


def weights_digests(folder: Path) -> dict[str, str]:
  """Returns the SHA-256 of each of the base's weight files, by name."""
  return {name: file_digest(folder / name) for name in weight_files(folder)[0]}


def _warmup(config: Config, steps: int) -> int:
  """Returns the steps of the warmup, at most a tenth of all."""
  return min(config.optimizer.warmup_steps, steps // 10)


def _loading(config: Config, mesh: Mesh) -> dict[str, Any]:
  """Returns the arguments of `load_causal_lm`."""
  usual = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  given = config.model

  return {
    "shardings": params_places(mesh),
    "dtype": usual if given.dtype == "auto" else given.dtype,
    "param_dtype": usual if given.param_dtype == "auto" else given.param_dtype,
    "scan_layers": given.scan_layers,
    "remat": given.remat or None,
    "attention": given.attention,
  }


def adapt(config: Config, model: LanguageModel, data: Data) -> tuple[lj.Adaptation, PyTree]:
  """Returns the adapted loss and its new adapter."""
  lora = functools.partial(lj.lora, config=lora_config(config))
  loss = lora(language_model_loss(model.module, chunk_size=config.fit.loss_chunk or None))
  key = jax.random.split(jax.random.key(config.seed))[0]
  return loss, loss.init(key, model.params, data.train[0])


def export(config: Config, model: LanguageModel, adapter: PyTree, workdir: Path) -> None:
  """Writes the adapter in our own form, and in PEFT's."""
  if not (workdir / "adapter").exists():
    save_adapter(workdir / "adapter", adapter)
  if not (workdir / "peft").exists():
    write_peft(config, model, adapter, workdir / "peft")


def check_export(config: Config, model: LanguageModel, adapter: PyTree) -> None:
  """Raises ValueError, before anything is trained, if PEFT has no form for the adapter."""
  with tempfile.TemporaryDirectory() as folder:
    write_peft(config, model, adapter, Path(folder) / "peft")


def write_peft(config: Config, model: LanguageModel, adapter: PyTree, folder: Path) -> None:
  """Writes the adapter as PEFT reads it; as servers do too, unless fused experts are adapted."""
  adapted = set(adapter_weights(adapter))
  fused = any(one.is_parameter and adapted & set(one.paths) for one in model.stored)
  save_peft(
    folder,
    lora_config(config),
    adapter,
    model.stored,
    model.params,
    base_model=config.model.folder,
    for_server=not fused,
  )


def samples(
  config: Config, model: LanguageModel, text: Text, data: Data, adapter: PyTree, mesh: Mesh
) -> list[dict[str, str]]:
  """Returns the adapted model's answers to held-out prompts, and what their lines say."""
  room = model.num_slots - config.samples.max_new_tokens
  given = [ids[-room:] for ids in data.prompts]
  if not given or room < 1:
    return []
  params = {"base": model.params, "adapter": adapter}
  search = SamplingConfig(
    eos_ids=text.end_ids, temperature=0.0, max_new_tokens=config.samples.max_new_tokens
  )
  rows = mesh.shape["data"] * mesh.shape["fsdp"]  # a prompt each
  found = generate(cached_model(config, model), params, given, search, batch_size=rows, mesh=mesh)
  decode = text.tokenizer.decode
  return [
    {"prompt": decode(ids, skip_special_tokens=False), "generated": decode(new), "answer": answer}
    for ids, new, answer in zip(given, found, data.answers, strict=True)
  ]


def cached_model(config: Config, model: LanguageModel) -> CachedModel:
  """Returns the adapted model as decoding sees it: nothing is merged, the base is not copied."""

  def adapted(name: str) -> Any:
    def call(params: PyTree, *args: Any) -> Any:
      return model.module.apply({"params": params}, *args, method=name)

    apply = lj.lora(call, lora_config(config)).apply
    return lambda params, *args: apply(params["base"], params["adapter"], *args, lora_key=None)

  return CachedModel(adapted("extend"), adapted("logits"), model.init_cache, model.num_slots)


def plan(config: Config) -> None:
  """Prints what `run` would do: what matches, parameters, memory and steps; loads no weights."""
  check(config)
  mesh = make_mesh(**config.mesh)
  model = plan_causal_lm(config.model.folder, **_loading(config, mesh))
  _, data = load_data(config, model)
  loss, trainable = adapt(config, model, data)
  check_export(config, model, trainable)
  count = optax.tree.size(trainable)
  print(lj.summary(model.params, trainable, lora_config(config)), end="\n\n")
  print(_outline(config, model, data, count))
  steps = len(data.train)
  optimizer, _ = make_optimizer(config, steps, warmup_steps=_warmup(config, steps))
  state, frozen, optimizer = start(model.params, trainable, optimizer, jax.random.key(0), mesh)
  parts = config.fit.accumulation_steps
  step: Any = make_train_step(loss, optimizer, state, parts)
  first: Any = data.train[0]
  batch = place_batch(mesh, first, parts)
  memory = step.lower(state, frozen, batch).compile().memory_analysis()
  held, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  print(
    f"memory     {_gigabytes(held + temporary)} a device by the compiler's estimate: "
    f"{_gigabytes(held)} of weights, adapter, optimizer and batch, {_gigabytes(temporary)} of "
    "temporaries of a step\n"
    f"folder     {config.workdir}\n"
    "nothing was trained (--dry_run)"
  )


def _gigabytes(size: int) -> str:
  return f"{size / 1e9:.2f} GB"


def _outline(config: Config, model: LanguageModel, data: Data, count: int) -> str:
  """Returns what is trained on what."""
  base, given = optax.tree.size(model.params), config.data
  length = data.train.row_lengths[-1]
  return "\n".join(
    [
      f"model      {config.model.folder}: {model.model_type}, {base:,} parameters",
      f"adapter    rank {config.lora.rank}, {count:,} parameters ({100 * count / base:.2f} %)",
      f"data       {given.file}: {data.num_train:,} lines, and {data.num_valid:,} held out",
      f"steps      {len(data.train):,} in {given.num_epochs} epochs, each of {given.batch_size} "
      f"rows of {length} tokens{', packed' if given.packing else ''}",
    ]
  )


def report(config: Config, result: dict[str, Any]) -> str:
  """Returns a finished run as text: losses, samples, and how to load the adapter."""
  lines = []
  for sample in result["samples"]:
    lines += [f"prompt     {sample['prompt']!r}", f"generated  {sample['generated']!r}"]
    lines += [f"data       {sample['answer']!r}", ""]
  kept = result["best_step"] if config.fit.keep == "best" else result["num_train_steps"]
  lines += [
    f"loss       {result['valid_loss']:.4f} nats/token on {result['num_valid_records']:,} "
    f"held-out lines, after step {kept:,} of {result['num_train_steps']:,}",
    f"time       {result['seconds']:.0f} s on {result['device']}",
    f"adapter    {config.workdir}/peft",
  ]
  return "\n".join([*lines, *how_to_load(config.model.folder, Path(config.workdir) / "peft")])


def how_to_load(model: str, folder: Path) -> list[str]:
  """Returns lines that load an adapter here, in PEFT, and in a server."""
  written = json.loads((folder / "adapter_config.json").read_text("utf-8"))
  ranks = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM knows
  rank = next((rank for rank in ranks if rank >= written["r"]), None)
  lines = [
    "",
    "# here",
    "import lora_jax, lora_jax.interop, lora_jax.models.zoo",
    f"base = lora_jax.models.zoo.load_causal_lm({model!r})",
    f"config, adapter = lora_jax.interop.load_peft({str(folder)!r}, base.stored, base.params)",
    "adapted = lora_jax.lora(base.call, config)  # .apply(base.params, adapter, tokens)",
    "",
    "# in PEFT",
    "import peft, transformers",
    f"model = transformers.AutoModelForCausalLM.from_pretrained({model!r})",
    f"model = peft.PeftModel.from_pretrained(model, {str(folder)!r})",
  ]
  if rank is not None and "target_parameters" not in written:
    lines += ["", "# a server that has LoRA for models of this type"]
    lines += [f"# vllm serve {model} --enable-lora --max-lora-rank {rank} \\"]
    lines += [f"#   --lora-modules mine={folder}"]
  return lines


if __name__ == "__main__":
  launch(run, "finetune.py", {"model": "model.folder", "data": "data.file"}, plan)
