"""GPT-2 on the E2E NLG Challenge: train, decode, score, and one row of the paper's Table 3.

    python -m experiments.gpt2_e2e [--config=experiments/configs/gpt2_e2e.py:VARIANT]

`run` is the whole of it: data -> model -> method -> fit -> decode -> metrics -> result.json.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import lora_jax as lj
from experiments import table
from experiments.launch import launch
from experiments.workdir import commit, open_workdir, read_config, read_result, write_json
from lora_jax.data import batches as data_batches
from lora_jax.data import e2e, e2e_tfds, text
from lora_jax.decoding import BeamConfig, CachedModel, beam_search
from lora_jax.metrics import intervals, measure
from lora_jax.models.gpt2 import GPT2, GPT2Config, init_cache
from lora_jax.models.gpt2_folder import load_gpt2, params_shapes
from lora_jax.models.gpt2_folder import read_config as read_gpt2_config
from lora_jax.models.hub import end_of_text_id, find_folder, load_tokenizer
from lora_jax.training.checkpoint import restore_adapter, save_adapter
from lora_jax.training.loop import FitConfig, evaluate_loss, fit
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import Rules, make_mesh, params_shardings
from lora_jax.training.step import make_eval_step

PyTree = Any
SHARDING: Rules = (
  (r".*/(query|key|value|up)/kernel", P("fsdp", "tensor")),
  (r".*/(query|key|value|up)/bias", P("tensor")),
  (r".*/(out|down)/kernel", P("tensor", "fsdp")),
  (r"(wte|wpe)/embedding", P(None, ("fsdp", "tensor"))),
  (r".*", P()),
)
BATCH_FIELDS = "tokens positions segment_ids target_index targets target_weights"


class Base(NamedTuple):
  """A pretrained model as it was found."""

  module: GPT2
  params: PyTree
  tokenizer: Any
  end_of_text: int

  @property
  def config(self) -> GPT2Config:
    return self.module.config


class Data(NamedTuple):
  """The batches of a run, in full."""

  train: data_batches.Batches
  valid: data_batches.Batches
  num_train_records: int


def run(config: ConfigDict) -> dict[str, Any]:
  """Trains, decodes and scores one run; returns what `result.json` holds.

  A finished run is not done again, and a broken one goes on where it was.
  """
  _check(config)
  with open_workdir(config.workdir, config) as workdir:
    result = read_result(workdir)
    if result is None:
      result = _run(config, workdir)
      write_json(workdir / "result.json", result)
    else:
      print(f"{workdir} is finished; this is its result. Remove it to run it again.\n")
  print(report(workdir, result))
  return result


def _run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
  begun = time.perf_counter()
  mesh = make_mesh(**config.mesh)
  base = load_base(config, mesh)
  data = load_data(config, base)
  merged, trained = train(config, base, data, mesh, workdir)
  scores: dict[str, Any] = {}
  if config.decoding.num_inputs:
    scores = evaluate(config, base, merged, workdir, mesh)
  return {
    "experiment": config.experiment,
    "variant": config.variant,
    "method": config.method,
    "seed": config.seed,
    "num_train_records": data.num_train_records if config.method != "frozen_base" else 0,
    "base_parameters": _count(base.params if config.method != "full_finetuning" else merged),
    **trained,
    **scores,
    "seconds": time.perf_counter() - begun,
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "jax": jax.__version__,
    "commit": commit(),
  }


def load_base(config: ConfigDict, mesh: Mesh) -> Base:
  """Loads the model that is adapted, placed on the mesh, and its tokenizer."""
  folder = model_folder(config)
  computation = {
    "param_dtype": config.model.param_dtype,
    "dtype": config.model.dtype,
    "scan_layers": config.model.scan_layers,
    "remat": config.model.remat or None,
    "attention": config.model.attention,
  }
  places = functools.partial(params_shardings, mesh, rules=SHARDING)
  if config.model.start == "random":
    model = read_gpt2_config(folder, **computation)
    shapes = params_shapes(model)
    tokens = jax.ShapeDtypeStruct((1, 1), "int32")
    init = jax.jit(
      lambda key: GPT2(model).init(key, np.zeros(tokens.shape, tokens.dtype))["params"],
      out_shardings=places(shapes),
    )
    params = init(jax.random.key(config.seed))
  else:
    model, params = load_gpt2(folder, shardings=places, **computation)
  tokenizer = load_tokenizer(folder, model.vocab_size)
  return Base(GPT2(model), params, tokenizer, end_of_text_id(tokenizer))


def model_folder(config: ConfigDict) -> Path:
  """Returns the folder of the base; the embedded one if the config names none."""
  if config.model.folder:
    return find_folder(config.model.folder)
  return Path(str(resources.files("lora_jax") / "assets" / "gpt2"))


def load_data(config: ConfigDict, base: Base) -> Data:
  """Returns the batches of training and validation."""
  data, limit = config.data, min(512, base.config.num_positions)

  def examples(split: e2e.Split, count: int) -> list[text.Example]:
    def choose(size: int) -> Sequence[int]:
      if count > size:
        raise ValueError(f"the {split} split has {size} records, expected {count} or more")
      if not count:
        return range(size)
      return np.random.default_rng(0).permutation(size)[:count].tolist()  # whatever the seed

    records = e2e_tfds.load(split, data.form, data.source, choose=choose)
    return text.encode(base.tokenizer, records, base.end_of_text, limit, truncate=True)

  train = examples("train", data.num_train_records)
  valid = examples("valid", data.num_valid_records)

  def batches(examples: list[text.Example], seed: int | None, epochs: int):
    shape = {
      "batch_size": data.batch_size,
      "loss_length": data.loss_length,
      "seed": seed,
      "num_epochs": epochs,
      "shard_index": jax.process_index(),
      "shard_count": jax.process_count(),
    }
    if data.packing:
      return data_batches.packed_batches(examples, row_length=data.row_length, **shape)
    return data_batches.padded_batches(examples, row_lengths=[data.row_length], **shape)

  return Data(batches(train, config.seed, data.num_epochs), batches(valid, None, 1), len(train))


def method(config: ConfigDict) -> Callable[[Callable[..., Any]], lj.Adaptation]:
  """Returns the method of adaptation that a config names, for any function of the params."""
  if config.method == "lora":
    return functools.partial(lj.lora, config=lora_config(config))
  return lj.full_finetuning


def lora_config(config: ConfigDict) -> lj.LoraConfig:
  """Returns the LoRA of a config."""
  return lj.LoraConfig(**config.lora.to_dict())


def make_optimizer(config: ConfigDict, num_train_steps: int):
  """Returns AdamW as the paper has it, and the schedule of its learning rate."""
  given = config.optimizer
  warmup = min(given.warmup_steps, num_train_steps)
  rest = max(num_train_steps - warmup, 1)
  after = {
    "linear": optax.linear_schedule(given.learning_rate, 0.0, rest),
    "cosine": optax.cosine_decay_schedule(given.learning_rate, rest),
    "constant": optax.constant_schedule(given.learning_rate),
  }
  if given.schedule not in after:
    raise ValueError(f"schedule must be one of {', '.join(after)}, got {given.schedule!r}")
  schedule = optax.join_schedules(
    [optax.linear_schedule(0.0, given.learning_rate, warmup), after[given.schedule]], [warmup]
  )
  adamw = optax.adamw(
    schedule, b1=given.b1, b2=given.b2, eps=given.eps, weight_decay=given.weight_decay
  )
  clip = optax.clip_by_global_norm(given.clip_norm) if given.clip_norm else optax.identity()
  return optax.chain(clip, adamw), schedule


def train(
  config: ConfigDict, base: Base, data: Data, mesh: Mesh, workdir: Path
) -> tuple[PyTree, dict[str, Any]]:
  """Fits the adapter; returns merged params and what the result holds about training."""
  adapt = method(config)
  eval_loss = adapt(language_model_loss(base.module))
  if config.method == "frozen_base":
    step = make_eval_step(eval_loss)
    valid = evaluate_loss(step, base.params, base.params, data.valid, mesh)
    return base.params, {"trainable_parameters": 0, "valid_loss": valid}
  loss = adapt(
    language_model_loss(
      base.module, config.optimizer.label_smoothing, config.fit.loss_chunk or None
    )
  )
  key_init, key_train = jax.random.split(jax.random.key(config.seed))
  trainable = jax.block_until_ready(loss.init(key_init, base.params, data.train[0]))
  steps = config.fit.num_train_steps or len(data.train)
  optimizer, schedule = make_optimizer(config, steps)
  count = _count(trainable)
  print(
    f"{config.method} on {workdir}: {count:,} trainable parameters, "
    f"{data.num_train_records:,} lines, {steps:,} steps",
    flush=True,
  )
  fitted = fit(
    loss,
    base.params,
    trainable,
    optimizer,
    iter(data_batches.as_grain(data.train)),
    config=FitConfig(
      num_train_steps=steps,
      eval_every_steps=min(config.fit.eval_every_steps, steps),
      checkpoint_every_steps=config.fit.checkpoint_every_steps,
      log_every_steps=config.fit.log_every_steps,
      accumulation_steps=config.fit.accumulation_steps,
    ),
    eval_loss=eval_loss,
    eval_batches=lambda: iter(data.valid),
    workdir=workdir,
    key=key_train,
    mesh=mesh,
    schedule=schedule,
  )
  best = config.fit.keep == "best"
  adapter = fitted.best if best else fitted.last
  if config.method == "lora" and not (workdir / "adapter").exists():
    save_adapter(workdir / "adapter", adapter)
  return adapt(language_model_loss(base.module)).merge(base.params, adapter), {
    "trainable_parameters": count,
    "num_train_steps": steps,
    "best_step": fitted.best_step,
    "valid_loss": fitted.best_loss if best else fitted.last_loss,
    "last_valid_loss": fitted.last_loss,
    "train_seconds": fitted.seconds,
    "train_tokens": fitted.tokens,
  }


def evaluate(
  config: ConfigDict, base: Base, params: PyTree, folder: Path, mesh: Mesh
) -> dict[str, Any]:
  """Decodes and scores; writes predictions.txt to `folder`."""
  groups = test_inputs(config)
  begun = time.perf_counter()
  print(f"decoding {len(groups)} inputs, beam {config.decoding.num_beams} ...", flush=True)
  texts = generate(config, base, params, [group.context for group in groups], mesh)
  decoded = time.perf_counter()
  (folder / "predictions.txt").write_text("".join(f"{line}\n" for line in texts), "utf-8")
  print("scoring ...", flush=True)
  measured = measure([texts], [group.references for group in groups])[0]
  return {
    "num_inputs": len(groups),
    "scores": dataclasses.asdict(measured.scores()),
    "intervals": {
      name: None if interval is None else [interval.low, interval.high]
      for name, interval in intervals(measured).items()
    },
    "decode_seconds": decoded - begun,
    "score_seconds": time.perf_counter() - decoded,
  }


def test_inputs(config: ConfigDict) -> list[e2e.Group]:
  """Returns the distinct inputs that are decoded, with their references."""
  records = e2e_tfds.load(config.decoding.split, config.data.form, config.data.source)
  return e2e.grouped(records)[: config.decoding.num_inputs]


def generate(
  config: ConfigDict, base: Base, params: PyTree, contexts: list[str], mesh: Mesh
) -> list[str]:
  """Returns one text for each context, by beam search."""
  given, module = config.decoding, base.module
  newlines = base.tokenizer.encode("\n\n", add_special_tokens=False).ids
  search = BeamConfig(
    eos_ids=(base.end_of_text, *(newlines if len(newlines) == 1 else ())),
    num_beams=given.num_beams,
    length_penalty=given.length_penalty,
    no_repeat_ngram_size=given.no_repeat_ngram_size,
    max_new_tokens=given.max_new_tokens,
    pad_id=base.end_of_text,
    scoring=given.scoring,
  )
  room = min(448, base.config.num_positions - given.max_new_tokens)
  prompts = [ids[-room:] for ids in text.encode_context(base.tokenizer, contexts, base.end_of_text)]
  found = beam_search(
    cached_model(module), params, prompts, search, batch_size=given.batch_size, mesh=mesh
  )
  return [base.tokenizer.decode(ids).strip() for ids in found.best()]


@functools.cache
def cached_model(module: GPT2) -> CachedModel:
  """Returns a GPT-2 as decoding sees it."""

  def extend(params: PyTree, *args: Any) -> Any:
    return module.apply({"params": params}, *args, method="extend")

  def logits(params: PyTree, hidden: jax.Array) -> Any:
    return module.apply({"params": params}, hidden, method="logits")

  make_cache = functools.partial(init_cache, module.config)
  return CachedModel(extend, logits, make_cache, module.config.num_positions)


class Finished(NamedTuple):
  """A finished run, ready for use: `load_run(folder).generate([...])`."""

  config: ConfigDict
  base: Base
  params: PyTree
  mesh: Mesh

  def generate(self, contexts: list[str]) -> list[str]:
    """Returns one text for each context, by the run's beam search."""
    return generate(self.config, self.base, self.params, contexts, self.mesh)


def load_run(folder: str | Path) -> Finished:
  """Loads a finished LoRA run, its adapter merged into its base."""
  config = read_config(folder)
  mesh = make_mesh()
  base = load_base(config, mesh)
  lora = method(config)(language_model_loss(base.module))
  like = jax.eval_shape(lora.init, jax.random.key(0), base.params, _shapes(config))
  adapter = restore_adapter(Path(folder) / "adapter", like)
  return Finished(config, base, lora.merge(base.params, adapter), mesh)


def report(workdir: Path, result: dict[str, Any]) -> str:
  """Returns a finished run as text: the row, samples, and where everything is."""
  lines = [table.markdown([result])]
  config = read_config(workdir)
  predictions = workdir / "predictions.txt"
  if predictions.is_file():
    texts = predictions.read_text("utf-8").split("\n")
    groups = test_inputs(config)
    for i in range(0, len(groups), max(1, len(groups) // 3)):
      lines += ["", f"input      {groups[i].context}", f"generated  {texts[i]}"]
      lines += [f"reference  {groups[i].references[0]}"]
  share = 100 * result["trainable_parameters"] / result["base_parameters"]
  lines += [
    "",
    f"trainable  {result['trainable_parameters']:,} of {result['base_parameters']:,} parameters "
    f"({share:.2f} %)",
    f"loss       {result['valid_loss']:.4f} nats/token on {config.data.num_valid_records or 'all'} "
    "validation lines",
    f"time       {result['seconds']:.0f} s on {result['device']}",
  ]
  for name, reason in result.get("scores", {}).get("missing", {}).items():
    lines.append(f"no {name}: {reason}")
  lines += ["", *(f"wrote      {path}" for path in sorted(workdir.glob("[!.]*")))]
  return "\n".join(lines)


def _check(config: ConfigDict) -> None:
  if config.experiment != "gpt2_e2e":
    raise ValueError(
      f"this is a config of {config.experiment!r}, and the experiment is 'gpt2_e2e'. Start it "
      f"with python -m experiments.{config.experiment}"
    )
  for name, value, known in (
    ("method", config.method, ("lora", "full_finetuning", "frozen_base")),
    ("model.start", config.model.start, ("pretrained", "random")),
    ("fit.keep", config.fit.keep, ("best", "last")),
  ):
    if value not in known:
      raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _shapes(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of a small batch."""
  shape = (1, 2)
  return {name: jax.ShapeDtypeStruct(shape, "int32") for name in BATCH_FIELDS.split()}


def _count(tree: PyTree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
  launch(run, "gpt2_e2e.py")
