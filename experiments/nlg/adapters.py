"""Writes a run's adapter for other packages, with a model card."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxtyping import PyTree

import lora_jax as lj
from experiments.harness.methods import (
  exported_adapter,
  find_method,
  is_prompt_tuning,
  slots_of,
)
from experiments.harness.model_card import CARD, BaseModel, code, model_card
from experiments.nlg import usage
from experiments.nlg.config import E2EConfig, FinetuneConfig
from experiments.nlg.text_files import write_with
from lora_jax.files import local_path, make_folder, read_json
from lora_jax.interop import save_gguf_adapter, save_mlx, save_peft, save_peft_prompt
from lora_jax.models.checkpoints.gguf import is_gguf, open_gguf
from lora_jax.models.llama.folder import stored_tensors
from lora_jax.models.llama.model import LlamaConfig
from lora_jax.models.zoo import LanguageModel

Format = Literal["peft", "server", "peft-experts", "gguf", "mlx"]
FORMATS = ("peft", "peft-experts", "gguf", "mlx")  # of the command line
RAW_PROMPT = 'TEMPLATE """{{ .Prompt }}"""'


class RunAdapter(NamedTuple):
  """The adapter of a run, and what its files need.

  Attributes:
    config: the run's config.
    result: the run's result, or the part that is known so far.
    lora: the adapter's config; without effect for prompt tuning.
    trained: the trainable tree.
    model: the base model, or its shapes.
    base: the base model, for the card.
    text_files: tokenizer, chat template and end tokens, by name.
    ends: the texts of the end tokens.
    is_chat: whether it was trained on chats; None if that is unknown.
    has_own_template: whether it was trained with a chat template other than the base model's.
  """

  config: E2EConfig | FinetuneConfig
  result: Mapping[str, Any]
  lora: lj.LoraConfig
  trained: PyTree
  model: LanguageModel
  base: BaseModel
  text_files: dict[str, bytes]
  ends: tuple[str, ...] = ()
  is_chat: bool | None = None
  has_own_template: bool = False


def write_adapter(run: RunAdapter, out: str | Path, form: Format) -> None:
  """Writes an adapter with its model card, completely or not at all.

  Args:
    run: the adapter.
    out: the folder to make, or for `gguf` the file; its card is `NAME.README.md` and its file for
      Ollama `NAME.Modelfile`.
    form: `server` is PEFT's format with one rank and alpha; `peft-experts` also gives each expert
      its own factors.
  Raises:
    FileExistsError: if there is such a file or folder.
    ValueError: if the format cannot express the adapter.
    OSError: if it cannot be written, such as on a full disk; nothing is left behind.
  """
  if is_prompt_tuning(run.config):
    _check_prompt_format(run, form)
    write_with(run.text_files, out, lambda folder: _write_prompt(run, folder))
  elif form == "gguf":
    _write_gguf(run, local_path(out))
  elif form == "mlx":
    write_with(run.text_files, out, lambda folder: _write_mlx(run, folder))
  else:
    write_with(run.text_files, out, lambda folder: _write_peft(run, folder, form))


def _write_peft(run: RunAdapter, folder: Path, form: Format) -> None:
  """Writes PEFT's files and the card."""
  save_peft(
    folder,
    *exported_adapter(run.config, run.trained, run.model.params),
    _expert_tensors(run) if form == "peft-experts" else run.model.stored,
    run.model.params,
    base_model=run.config.model.folder or None,
    for_server=form != "peft",
  )
  written = read_json(folder / "adapter_config.json")
  base, here = run.base.name, "."
  lines = _about_file(run.base)
  fits_files = not find_method(run.config.method).corrects_quantization
  if fits_files:
    lines += code("python", usage.in_peft(base, run.base.shown_path, here))
  lines += code("python", usage.in_lora_jax(base, here, run.config.model.param_dtype))
  servable = form != "peft" and fits_files and not is_gguf(run.base.path)
  if servable and (command := usage.in_vllm(base, here, written["r"])):
    lines += code("sh", command)
  _write_card(run, folder, form, lines)


def _check_prompt_format(run: RunAdapter, form: Format) -> None:
  """Raises ValueError for a format other than PEFT's."""
  if form != "peft":
    flag = "--server" if form == "server" else f"--format={form}"
    raise ValueError(
      f"{run.config.workdir} is a run of {run.config.method}, which only PEFT has, as prompt "
      f"tuning: leave out {flag}"
    )


def _write_prompt(run: RunAdapter, folder: Path) -> None:
  """Writes PEFT's files of prompt tuning and the card."""
  name = run.config.model.folder or None
  save_peft_prompt(folder, run.trained, run.model.stored, run.model.params, base_model=name)
  base, here, dtype = run.base.name, ".", run.config.model.param_dtype
  lines = _about_file(run.base)
  lines += code("python", usage.in_peft(base, run.base.shown_path, here))
  num_slots = slots_of(run.config).count
  lines += code("python", usage.prompt_in_lora_jax(base, here, num_slots, dtype))
  _write_card(run, folder, "peft", lines)


def _expert_tensors(run: RunAdapter) -> list[Any]:
  """Returns the model's tensors, with separate ones for each expert."""
  config = run.model.module.config
  if not isinstance(config, LlamaConfig) or config.mixture is None:
    raise ValueError(
      f"{run.base.name} has no experts: --format=peft-experts is for mixtures. Leave it out, or "
      "add --server for the format of servers"
    )
  return stored_tensors(config, published=True)


def _write_mlx(run: RunAdapter, folder: Path) -> None:
  """Writes MLX's files and the card."""
  save_mlx(folder, run.lora, run.trained, run.model.module.config, run.model.params)
  lines = code("sh", usage.in_mlx(run.base.repository or run.base.name, "."))
  if is_gguf(run.base.path):
    lines += ["mlx-lm reads the base model from its Hugging Face folder, not from a GGUF file.", ""]
  _write_card(run, folder, "mlx", lines)


def _about_file(base: BaseModel) -> list[str]:
  """Returns a line on the file of a named model, which others find elsewhere."""
  if base.shown_path == base.path:
    return []
  return [f"`{base.shown_path}` is {base.name}: `make {base.name}` fetches it, and says where.", ""]


def _write_card(run: RunAdapter, folder: Path, form: Format, lines: list[str]) -> None:
  card = model_card(form, run.base, run.config, run.result, lines[:-1])
  (folder / CARD).write_text(card, "utf-8")


def _write_gguf(run: RunAdapter, out: Path) -> None:
  """Writes the adapter's file, its card and a Modelfile into one folder."""
  if out.suffix.lower() != ".gguf":
    raise ValueError(f"{out}: expected a file named *.gguf for llama.cpp's format")
  names = {kind: f"{out.stem}.{kind}" for kind in (CARD, "Modelfile")}
  paths = [out, *(out.with_name(name) for name in names.values())]
  for path in paths:
    if path.exists():
      raise FileExistsError(f"{path} exists; nothing is overwritten")
  path = run.base.path
  make_folder(out.parent)
  with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
    temporary = Path(name)
    save_gguf_adapter(
      temporary / out.name,
      run.lora,
      run.trained,
      run.model.module.config,
      run.model.params,
      architecture=open_gguf(path).architecture if is_gguf(path) else None,
      base_model=run.base.repository or run.base.name,
    )
    (temporary / names["Modelfile"]).write_text(modelfile(run, out.name), "utf-8")
    base = str(run.base.shown_path) if is_gguf(path) else "base.gguf"
    lines = _about_file(run.base)
    lines += code("sh", usage.in_llama_server(base, out.name))
    lines += code("sh", usage.in_ollama(names["Modelfile"]))
    dtype = run.config.model.param_dtype
    lines += code("python", usage.gguf_in_lora_jax(run.base.name, out.name, dtype))
    if not is_gguf(path):
      lines += [f"`base.gguf` is {_converted(run)}.", ""]
    card = model_card("gguf", run.base, run.config, run.result, lines[:-1])
    (temporary / names[CARD]).write_text(card, "utf-8")
    _move_all(temporary, paths)


def _move_all(temporary: Path, paths: list[Path]) -> None:
  """Moves finished files to their final paths, all or none."""
  moved: list[Path] = []
  try:
    for path in paths:
      os.rename(temporary / path.name, path)
      moved.append(path)
  except OSError:
    for path in moved:
      path.unlink()
    raise


def _converted(run: RunAdapter) -> str:
  return f"{run.base.name}, converted by llama.cpp's convert_hf_to_gguf.py"


def modelfile(run: RunAdapter, adapter: str) -> str:
  """Returns the text of a Modelfile, from which Ollama creates a model with the adapter.

  Its stop tokens are the run's end tokens. For a run on prompts without a chat template, the
  template is the bare prompt; otherwise Ollama uses the base model's template.
  """
  path, lines = run.base.path, []
  if is_gguf(path):
    lines += [f"FROM {path.resolve()}"]
  else:
    lines += [f"# {_converted(run)}", "FROM ./base.gguf"]
  lines += [f"# {run.base.difference}"] if run.base.difference else []
  lines += [f"ADAPTER ./{adapter}"]
  if run.is_chat is False:
    lines += ["# trained on prompts without a chat template", RAW_PROMPT]
  elif run.has_own_template:
    lines += ["# trained with another chat template than the base model's, which Ollama needs in"]
    lines += ["# Go's syntax, as TEMPLATE"]
  elif run.is_chat is None:
    lines += [
      "# without TEMPLATE, Ollama takes the base model's chat template. For a run on prompts and",
      f"# completions add: {RAW_PROMPT}",
    ]
  stops = [end for end in run.ends if end.strip() and len(end.splitlines()) == 1]
  lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
  if len(stops) < len(run.ends):
    lines += ["# texts end at a line break too: give it as a stop in the request"]
  return "\n".join([*lines, ""])
