"""Compares models and adapters with `transformers` and PEFT: python -m tests.parity

Prints the two tables and the settings in docs/parity.md. The peers' outputs are in tests/golden,
made by `python -m tests.make_gpt2_golden` and similar commands. The columns in which peers read our
folders need them installed (extra `peers`) and are empty otherwise. A figure is
max|a - b| / max|b|.
"""

import functools
import importlib.util
import json
import tempfile
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import lora_jax as lj
from experiments.harness import table
from lora_jax.interop import load_peft, save_merged, save_peft
from lora_jax.models.bert import folder as bert_folder
from lora_jax.models.bert.model import Bert
from lora_jax.models.deberta import folder as deberta_folder
from lora_jax.models.deberta.model import Deberta
from lora_jax.models.gpt2 import folder as gpt2_folder
from lora_jax.models.gpt2.model import GPT2
from lora_jax.models.llama import folder as llama_folder
from lora_jax.models.llama.model import Llama

from tests import (
  make_bert_golden,
  make_deberta_golden,
  make_gpt2_golden,
  make_llama_golden,
  make_peft_golden,
)
from tests.toy_models import relative_difference

PEERS = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft"))
ROOT = make_peft_golden.MODELS


class Family(NamedTuple):
  """Functions that read, write and run a family's models; `peers` runs them in `transformers`."""

  load: Callable[..., tuple[Any, Any]]
  save: Callable[..., None]
  module: Callable[[Any], Any]
  stored_tensors: Callable[[Any], Any]
  peers: Callable[[Any, tuple[np.ndarray, ...]], np.ndarray]


def _decoder_logits(model: Any, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
  return make_llama_golden.logits(model, inputs[0].astype(np.int64))


def _encoder_outputs(model: Any, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
  names = ("tokens", "mask", "types")
  outputs = make_bert_golden.outputs(model, dict(zip(names, inputs, strict=True)))
  return outputs.get("logits", outputs["hidden"] * inputs[1][..., None])


FAMILIES = {
  "gpt2": Family(
    gpt2_folder.load_gpt2,
    functools.partial(gpt2_folder.save_gpt2, end_of_text_id=0),
    GPT2,
    gpt2_folder.stored_tensors,
    _decoder_logits,
  ),
  "llama": Family(
    llama_folder.load_llama,
    functools.partial(llama_folder.save_llama, end_of_text_id=0),
    Llama,
    llama_folder.stored_tensors,
    _decoder_logits,
  ),
  "bert": Family(
    bert_folder.load_bert, bert_folder.save_bert, Bert, bert_folder.stored_tensors, _encoder_outputs
  ),
  "deberta": Family(
    deberta_folder.load_deberta,
    deberta_folder.save_deberta,
    Deberta,
    deberta_folder.stored_tensors,
    _encoder_outputs,
  ),
}
MODELS = [
  *(f"gpt2/{name}" for name in make_gpt2_golden.SHAPES),
  *(f"llama/{name}" for name in make_llama_golden.MODELS),
  *(f"bert/{name}" for name in make_bert_golden.MODELS),
  *(f"deberta/{name}" for name in make_deberta_golden.MODELS),
]
ADAPTER_COLUMNS = ["adapter", "base", "read", "merged", "same", "again", "PEFT", "transformers"]
SETTINGS_INDENT = 16
ADAPTERS: Mapping[str, tuple[str, dict[str, Any]]] = (
  make_peft_golden.ADAPTERS | make_peft_golden.ENCODERS | make_peft_golden.DORA
)


def family_of(name: str) -> Family:
  return FAMILIES[name.partition("/")[0]]


def inputs_of(name: str) -> tuple[np.ndarray, ...]:
  """Returns tokens (rows, time); for an encoder also their mask and types."""
  encoder = make_peft_golden.is_encoder(name)
  return make_peft_golden.inputs_of(name) if encoder else (make_peft_golden.tokens_of(name),)


def outputs_of(name: str) -> np.ndarray:
  """Returns the logits of `transformers`; for an encoder without a head its hidden states."""
  arrays = load_file(ROOT / f"{name}.safetensors")
  if "hidden" in arrays and "logits" not in arrays:
    return arrays["hidden"] * arrays["mask"][..., None]
  return arrays["logits" if "logits" in arrays else "whole/logits"]


@functools.cache
def function(name: str, config: Any) -> Callable[..., jax.Array]:
  """Returns the model as a compiled function of its params and inputs."""
  module = family_of(name).module(config)
  if getattr(config, "num_labels", 0) is not None:
    return jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs))

  def hidden(params: Any, tokens: jax.Array, mask: jax.Array, types: jax.Array) -> jax.Array:
    states = module.apply({"params": params}, tokens, mask, types, method="hidden")
    return states * mask[..., None]

  return jax.jit(hidden)


def peers_model(name: str, folder: Path) -> Any:
  """Returns the model of a folder in `transformers`."""
  import transformers

  kind = json.loads((ROOT / name / "config.json").read_text())["architectures"][0]
  return getattr(transformers, kind).from_pretrained(folder).eval()


def model_row(name: str) -> list[str]:
  """Returns the cells of a model's row."""
  family, expected = family_of(name), outputs_of(name)
  inputs = tuple(map(jnp.asarray, inputs_of(name)))
  about = json.loads((ROOT / name / "config.json").read_text())
  config, params = family.load(ROOT / name)
  differences = {"unrolled": relative_difference(function(name, config)(params, *inputs), expected)}
  if getattr(config, "window_layers", None) is None:
    stacked = family.load(ROOT / name, scan_layers=True)
    outputs = function(name, stacked[0])(stacked[1], *inputs)
    differences["scanned"] = relative_difference(outputs, expected)
  if PEERS and not about["architectures"][0].endswith(("MaskedLM", "PreTraining")):
    with tempfile.TemporaryDirectory() as root:
      family.save(Path(root) / "new", config, params)
      peer_outputs = family.peers(peers_model(name, Path(root) / "new"), inputs_of(name))
    differences["read"] = relative_difference(peer_outputs, expected)
  cells = (_printed(differences.get(key)) for key in ("unrolled", "scanned", "read"))
  return [name, about["architectures"][0], *cells]


def adapter_row(name: str) -> list[str]:
  """Returns the cells of an adapter's row."""
  base_name, _ = ADAPTERS[name]
  family, folder = family_of(base_name), make_peft_golden.GOLDEN / name
  inputs = tuple(map(jnp.asarray, inputs_of(base_name)))
  expected = load_file(make_peft_golden.GOLDEN / f"{name}.safetensors")["logits"]
  config, params = family.load(ROOT / base_name)
  tensors, fn = family.stored_tensors(config), function(base_name, config)

  def difference(lora_config: lj.LoraConfig, trainable: Any) -> float:
    adapted = jax.jit(lj.lora(fn, lora_config).apply)
    return relative_difference(adapted(params, trainable, *inputs), expected)

  adapter = load_peft(folder, tensors, params)
  merged = lj.lora(fn, adapter[0]).merge(params, adapter[1])
  differences = {
    "read": difference(*adapter),
    "merged": relative_difference(fn(merged, *inputs), expected),
  }
  with tempfile.TemporaryDirectory() as root:
    written, merged_folder = Path(root) / "adapter", Path(root) / "merged"
    is_llama = base_name.startswith("llama")
    in_folder = llama_folder.stored_in(ROOT / base_name, config) if is_llama else tensors
    save_merged(merged_folder, ROOT / base_name, *adapter, in_folder, params)
    save_peft(written, *adapter, tensors, params)
    differences["again"] = difference(*load_peft(written, tensors, params))
    same = "yes" if _same_tensors(folder, written) else "no"
    if PEERS:
      import peft

      base = make_peft_golden.base_model(base_name)
      peers_models = {
        "transformers": peers_model(base_name, merged_folder),
        "PEFT": peft.PeftModel.from_pretrained(base, written).eval(),
      }
      for key, model in peers_models.items():
        logits = make_peft_golden.logits(model, *inputs_of(base_name))
        differences[key] = relative_difference(logits, expected)
  cells = {key: _printed(differences.get(key)) for key in ADAPTER_COLUMNS[2:]} | {"same": same}
  return [name, base_name, *cells.values()]


def _same_tensors(folder: Path, other: Path) -> bool:
  first, second = (load_file(path / "adapter_model.safetensors") for path in (folder, other))
  return first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


def _printed(value: float | None) -> str:
  if value is None:
    return ""
  return f"{value:.0e}" if value else "0"


def models_table() -> str:
  """Returns the table of models."""
  head = ["folder", "class", "ours", "ours, scanned", "transformers on our folder"]
  return table.aligned([head, *map(model_row, MODELS)])


def adapters_table() -> str:
  """Returns the table of adapters."""
  return table.aligned([ADAPTER_COLUMNS, *map(adapter_row, ADAPTERS)])


def settings() -> str:
  """Returns PEFT's settings of each adapter, wrapped to 100 columns."""
  lines = []
  for name, (_, options) in ADAPTERS.items():
    text = ", ".join(f"{key}={value!r}" for key, value in options.items())
    indent = " " * SETTINGS_INDENT
    lines += textwrap.wrap(
      f"{name:{SETTINGS_INDENT}}{text}",
      100,
      subsequent_indent=indent,
      break_long_words=False,
      break_on_hyphens=False,
    )
  return "\n".join(lines)


if __name__ == "__main__":
  print(models_table(), adapters_table(), settings(), sep="\n\n")
