"""Finished runs as models that generate text, whatever their experiment and method."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

import lora_jax as lj
from experiments.harness.config import Rows, Seed, replace_fields
from experiments.harness.methods import exported_adapter, find_method, has_servers, slots_of
from experiments.harness.restore import restore_trained
from experiments.harness.workdir import read_finished, read_run, stored_config
from experiments.nlg.config import E2EConfig, FinetuneConfig, NewTokens, PretrainConfig
from experiments.nlg.finetuned import adapted_loss, cached_model, export_folder, loading_options
from experiments.nlg.prompts import encode_prompts as encode_inputs
from experiments.nlg.prompts import end_ids
from experiments.nlg.restore import load_run, trainable_shapes
from experiments.nlg.tasks.table import TASKS
from experiments.nlg.user_data import chat_prompts, load_text
from lora_jax.data.jsonl import encode_prompts
from lora_jax.decoding import CachedModel, SamplingConfig, adapted_by_row, from_linen, generate
from lora_jax.decoding.sampling import not_tiny
from lora_jax.fields import Within, check_fields
from lora_jax.models.text.tokenizer import end_of_text_id, load_tokenizer
from lora_jax.models.zoo import LanguageModel, load_causal_lm
from lora_jax.training.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How texts are generated.

  Attributes:
    max_new_tokens: the longest answer, tokens.
    temperature: divides the logits; 0 takes the likeliest token.
    top_p: samples among the likeliest tokens whose probabilities first sum to this.
    seed: of the samples.
    batch_size: prompts that are answered at once.
  """

  max_new_tokens: NewTokens = 64
  temperature: Annotated[float, Within("[0, 100]"), not_tiny] = 0.0
  top_p: Annotated[float, Within("(0, 1]")] = 1.0
  seed: Seed = 0
  batch_size: Rows = 8

  def __post_init__(self):
    check_fields(self, "--")
    if self.top_p < 1 and self.temperature == 0:
      raise ValueError(
        f"--top_p={self.top_p} has no effect with --temperature=0, which takes the likeliest "
        "token; give a --temperature above 0, or leave out --top_p"
      )


class Generator(NamedTuple):
  """A finished run's model, with its tokenizer.

  Attributes:
    model: the functions of decoding.
    params: their parameters.
    tokenizer: of the run's base model.
    end_ids: the tokens that end an answer.
    encode: returns the tokens of prompts, in the format that the run was trained on.
    mesh: the devices that the params are on.
  """

  model: CachedModel
  params: PyTree
  tokenizer: Any
  end_ids: tuple[int, ...]
  encode: Callable[[Sequence[str]], list[list[int]]]
  mesh: Mesh

  def answer(
    self, prompts: Sequence[str], sampling: Sampling, bank_slots: Sequence[int] | None = None
  ) -> list[str]:
    """Returns one text for each prompt.

    Args:
      prompts: the texts.
      sampling: how answers are generated.
      bank_slots: of several runs' adapters, the one for each prompt.
    Raises:
      ValueError: if a prompt is empty, or too long for the model.
    """
    check_prompts(prompts)
    search = SamplingConfig(
      self.end_ids, sampling.temperature, sampling.top_p, sampling.max_new_tokens
    )
    tokens = generate(
      self.model,
      self.params,
      self.encode(prompts),
      search,
      jax.random.key(sampling.seed),
      batch_size=sampling.batch_size,
      mesh=self.mesh,
      bank_slots=bank_slots,
    )
    return [self.tokenizer.decode(ids).strip() for ids in tokens]


def check_prompts(prompts: Sequence[str]) -> None:
  """Raises ValueError if a prompt is empty or not text."""
  for number, prompt in enumerate(prompts, 1):
    if not prompt.strip():
      raise ValueError(f"prompt {number} must not be empty, got {prompt!r}")
    try:
      prompt.encode("utf-8")
    except UnicodeEncodeError as error:
      raise ValueError(f"prompt {number} must be text in UTF-8: {error}") from error


def load_generator(folder: str | Path, chat: bool = False) -> Generator:
  """Loads a finished run for generating text, on one device.

  Args:
    folder: of the run.
    chat: whether prompts are messages of a user, for the model's chat template.
  Raises:
    FileNotFoundError: if the folder is not a run's, or what was trained is missing.
    ValueError: if the run is not finished, generates no text, or has no chat template.
  """
  experiment = str(stored_config(folder).get("experiment"))
  if experiment not in LOADERS:
    raise ValueError(
      f"{folder} is a run of {experiment}, which generates no text; expected a run of "
      f"{', '.join(LOADERS)}"
    )
  if chat and experiment != FinetuneConfig.NAME:
    raise ValueError(
      f"{folder} is a run of {experiment}, whose model has no chat template; leave out --chat"
    )
  read_finished(folder)
  return LOADERS[experiment](folder, chat)


def _load_e2e(folder: str | Path, chat: bool) -> Generator:
  del chat
  if TASKS[read_run(E2EConfig, folder).data.name].permutation is not None:
    raise ValueError(f"{folder} is a run on a permuted vocabulary, in which no text can be read")
  run = load_run(folder)
  return Generator(
    run.base.decoder,
    run.params,
    run.base.tokenizer,
    end_ids(run.base),
    lambda prompts: [slots_of(run.config).around(ids) for ids in encode_inputs(run.base, prompts)],
    run.mesh,
  )


def _load_pretrained(folder: str | Path, chat: bool) -> Generator:
  del chat
  model = load_causal_lm(Path(folder) / "base")
  tokenizer = load_tokenizer(model.folder, model.module.config.vocab_size)
  end = end_of_text_id(tokenizer)
  return Generator(
    _decoder(model),
    model.params,
    tokenizer,
    (end,),
    lambda prompts: encode_prompts(tokenizer, list(prompts), end),
    make_mesh(),
  )


def _load_finetuned(folder: str | Path, chat: bool) -> Generator:
  config, mesh = _read_finetuned(folder), make_mesh()
  if find_method(config.method).saves_adapter:
    model = load_causal_lm(config.model.folder, **loading_options(config, mesh))
    decoder = cached_model(config, model)
    params = {"base": model.params, "adapter": _adapter(config, model, mesh)}
  else:
    model = load_causal_lm(export_folder(config), **loading_options(config, mesh))
    decoder, params = _decoder(model), model.params
  return _generator(config, model, decoder, params, mesh, chat)


def load_generator_of_runs(folders: Sequence[str | Path], chat: bool = False) -> Generator:
  """Loads the adapters of several finished runs of finetune as the slots of a bank, in order.

  Args:
    folders: of the runs, with one base model.
    chat: whether prompts are messages of a user, for the model's chat template.
  Raises:
    FileNotFoundError: if a folder is not a run's, or its adapter is missing.
    ValueError: if a run is not finished or not of finetune, is of another base model, chat template
      or date than the first, or its adapter is not plain LoRA.
  """
  configs, mesh = [_read_finetuned(folder) for folder in folders], make_mesh()
  first = configs[0]
  for folder, config in zip(folders, configs, strict=True):
    read_finished(folder)
    if config.model != first.model:
      raise ValueError(
        f"{folder} is a run on {config.model}, and {folders[0]} on {first.model}; expected runs "
        "with one base model"
      )
    if not has_servers(config):
      raise ValueError(
        f"{folder} is a run of {config.method}, whose adapter is not plain LoRA; generate with it "
        "alone"
      )
    if chat and _template(config) != _template(first):
      raise ValueError(f"{folder} has another chat template than {folders[0]}; generate separately")
    if chat and config.data.today != first.data.today:  # templates may write it
      raise ValueError(
        f"{folder} has data.today={config.data.today}, and {folders[0]} {first.data.today}; "
        "generate separately"
      )
  model = load_causal_lm(first.model.folder, **loading_options(first, mesh))
  adapters = [
    exported_adapter(config, _adapter(config, model, mesh), model.params) for config in configs
  ]
  bank = lj.bank(adapters, model.params)
  decoder = adapted_by_row(_decoder(model), functools.partial(lj.lora, config=bank.config))
  return _generator(first, model, decoder, {"base": model.params, "bank": bank}, mesh, chat)


def _template(config: FinetuneConfig) -> str | None:
  """Returns the chat template that a run was given, if it was given one."""
  template = config.data.chat_template
  return template and Path(template).read_text(encoding="utf-8")


def _read_finetuned(folder: str | Path) -> FinetuneConfig:
  """Returns the config of a run, with the chat template in its folder."""
  config = read_run(FinetuneConfig, folder)
  template = export_folder(config) / "chat_template.jinja"
  if template.is_file():  # the file that was given may have changed since
    return replace_fields(config, {"data.chat_template": str(template)})
  return config


def _generator(
  config: FinetuneConfig,
  model: LanguageModel,
  decoder: CachedModel,
  params: PyTree,
  mesh: Mesh,
  chat: bool,
) -> Generator:
  text = load_text(model, chat, config.data.chat_template, config.data.today)

  def encode(prompts: Sequence[str]) -> list[list[int]]:
    if chat:
      tokens = chat_prompts(text, [[{"role": "user", "content": prompt}] for prompt in prompts])
    else:
      tokens = encode_prompts(text.tokenizer, list(prompts), text.end_id)
    return [slots_of(config).around(ids) for ids in tokens]

  return Generator(decoder, params, text.tokenizer, text.end_ids, encode, mesh)


def _decoder(model: LanguageModel) -> CachedModel:
  return from_linen(model.module, model.init_cache, model.num_slots)


def _adapter(config: FinetuneConfig, model: LanguageModel, mesh: Mesh) -> PyTree:
  """Returns the trained adapter of a finished run."""
  shapes = trainable_shapes(adapted_loss(config, model), model.params)
  keep = config.fit.keep
  trained, _ = restore_trained(config, model.params, shapes, mesh, checkpoint=keep, saved=keep)
  return trained


LOADERS: dict[str, Callable[[str | Path, bool], Generator]] = {
  E2EConfig.NAME: _load_e2e,
  FinetuneConfig.NAME: _load_finetuned,
  PretrainConfig.NAME: _load_pretrained,
}
