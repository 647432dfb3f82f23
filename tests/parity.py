"""How near models and adapters are to those of `transformers` and PEFT: python -m tests.parity

Prints the two tables of docs/parity.md. What the peers compute stands in tests/golden, made by
`python -m tests.make_gpt2_golden` and its like; the columns of what they read of ours need them
installed (extra `peers`) and are empty without them. A figure is max|a - b| / max|b|.
"""

import functools
import importlib.util
import json
import tempfile
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
  """How models of a family are read, written and run; `peers` runs them in `transformers`."""

  load: Callable[..., tuple[Any, Any]]
  save: Callable[..., None]
  module: Callable[[Any], Any]
  stored_tensors: Callable[[Any], Any]
  peers: Callable[[Any, tuple[np.ndarray, ...]], np.ndarray]


def _of_tokens(model: Any, given: tuple[np.ndarray, ...]) -> np.ndarray:
  return make_llama_golden.logits(model, given[0].astype(np.int64))


def _of_encoder(model: Any, given: tuple[np.ndarray, ...]) -> np.ndarray:
  names = ("tokens", "mask", "types")
  outputs = make_bert_golden.outputs(model, dict(zip(names, given, strict=True)))
  return outputs.get("logits", outputs["hidden"] * given[1][..., None])


FAMILIES = {
  "gpt2": Family(
    gpt2_folder.load_gpt2,
    functools.partial(gpt2_folder.save_gpt2, end_of_text_id=0),
    GPT2,
    gpt2_folder.stored_tensors,
    _of_tokens,
  ),
  "llama": Family(
    llama_folder.load_llama,
    functools.partial(llama_folder.save_llama, end_of_text_id=0),
    Llama,
    llama_folder.stored_tensors,
    _of_tokens,
  ),
  "bert": Family(
    bert_folder.load_bert, bert_folder.save_bert, Bert, bert_folder.stored_tensors, _of_encoder
  ),
  "deberta": Family(
    deberta_folder.load_deberta,
    deberta_folder.save_deberta,
    Deberta,
    deberta_folder.stored_tensors,
    _of_encoder,
  ),
}
MODELS = [
  *(f"gpt2/{name}" for name in make_gpt2_golden.SHAPES),
  *(f"llama/{name}" for name in make_llama_golden.MODELS),
  *(f"bert/{name}" for name in make_bert_golden.MODELS),
  *(f"deberta/{name}" for name in make_deberta_golden.MODELS),
]
ADAPTERS: Mapping[str, tuple[str, dict[str, Any]]] = (
  make_peft_golden.ADAPTERS | make_peft_golden.ENCODERS
)


def family_of(name: str) -> Family:
  return FAMILIES[name.partition("/")[0]]


def inputs_of(name: str) -> tuple[np.ndarray, ...]:
  """Returns tokens (rows, time), of an encoder with their mask and types."""
  encoder = make_peft_golden.is_encoder(name)
  return make_peft_golden.inputs_of(name) if encoder else (make_peft_golden.tokens_of(name),)


def outputs_of(name: str) -> np.ndarray:
  """Returns the logits of `transformers`; of an encoder without a head its states, no padding."""
  arrays = load_file(ROOT / f"{name}.safetensors")
  if "hidden" in arrays and "logits" not in arrays:
    return arrays["hidden"] * arrays["mask"][..., None]
  return arrays["logits" if "logits" in arrays else "whole/logits"]


@functools.cache
def function(name: str, config: Any) -> Callable[..., jax.Array]:
  """Returns the model as a compiled function of its params and inputs."""
  module = family_of(name).module(config)
  if getattr(config, "num_labels", 0) is not None:
    return jax.jit(lambda params, *given: module.apply({"params": params}, *given))

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
  given = tuple(map(jnp.asarray, inputs_of(name)))
  about = json.loads((ROOT / name / "config.json").read_text())
  config, params = family.load(ROOT / name)
  found = {"unrolled": relative_difference(function(name, config)(params, *given), expected)}
  if getattr(config, "window_layers", None) is None:
    stacked = family.load(ROOT / name, scan_layers=True)
    found["scanned"] = relative_difference(function(name, stacked[0])(stacked[1], *given), expected)
  if PEERS and not about["architectures"][0].endswith(("MaskedLM", "PreTraining")):
    with tempfile.TemporaryDirectory() as root:
      family.save(Path(root) / "new", config, params)
      again = family.peers(peers_model(name, Path(root) / "new"), inputs_of(name))
    found["read"] = relative_difference(again, expected)
  cells = (_printed(found.get(key)) for key in ("unrolled", "scanned", "read"))
  return [name, about["architectures"][0], *cells]


def adapter_row(name: str) -> list[str]:
  """Returns the cells of an adapter's row."""
  of, settings = ADAPTERS[name]
  family, folder = family_of(of), make_peft_golden.GOLDEN / name
  given = tuple(map(jnp.asarray, inputs_of(of)))
  expected = load_file(make_peft_golden.GOLDEN / f"{name}.safetensors")["logits"]
  config, params = family.load(ROOT / of)
  tensors, fn = family.stored_tensors(config), function(of, config)

  def difference(lora_config: lj.LoraConfig, trainable: Any) -> float:
    adapted = jax.jit(lj.lora(fn, lora_config).apply)
    return relative_difference(adapted(params, trainable, *given), expected)

  adapter = load_peft(folder, tensors, params)
  merged = lj.lora(fn, adapter[0]).merge(params, adapter[1])
  found = {
    "read": difference(*adapter),
    "merged": relative_difference(fn(merged, *given), expected),
  }
  with tempfile.TemporaryDirectory() as root:
    new, whole, theirs = Path(root) / "adapter", Path(root) / "merged", []
    in_folder = llama_folder.stored_in(ROOT / of, config) if of.startswith("llama") else tensors
    save_merged(whole, ROOT / of, *adapter, in_folder, params)
    save_peft(new, *adapter, tensors, params)
    found["back"] = difference(*load_peft(new, tensors, params))
    same = "yes" if _same_tensors(folder, new) else "no"
    if PEERS:
      import peft

      base = make_peft_golden.base_model(of)
      theirs = [("folder", peers_model(of, whole))]
      theirs.append(("peft", peft.PeftModel.from_pretrained(base, new).eval()))
    for key, model in theirs:
      logits = make_peft_golden.logits(model, *inputs_of(of))
      found[key] = relative_difference(logits, expected)
  described = ", ".join(f"{key}={value!r}" for key, value in settings.items())
  described = described.replace("|", "\\|")  # in a cell
  first, rest = (_printed(found[key]) for key in ("read", "merged")), ("back", "peft", "folder")
  cells = [*first, same, *(_printed(found.get(key)) for key in rest)]
  return [name, of, f"`{described}`", *cells]


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
  head = ["adapter", "base", "PEFT's settings", "ours", "merged", "written again the same"]
  head += ["ours, read again", "PEFT on our folder", "transformers on the merged folder"]
  return table.aligned([head, *map(adapter_row, ADAPTERS)])


if __name__ == "__main__":
  print(models_table(), adapters_table(), sep="\n\n")
