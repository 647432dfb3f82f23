"""Writes the README.md of an exported adapter: where it comes from, its losses, how to use it.

Its front matter has the fields that the Hugging Face hub reads of PEFT's own model cards.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.harness.config import AdaptationConfig
from experiments.harness.methods import find_method
from lora_jax.files import parse_json, read_text
from lora_jax.models.checkpoints.gguf import is_gguf, open_gguf
from lora_jax.models.checkpoints.pretrained import PRETRAINED

CARD = "README.md"
UNKNOWN = "unknown"
LIBRARIES = {"gguf": "gguf", "mlx": "mlx"}  # by format; peft for all others
LICENSE_TEXTS = (  # identifiers, and patterns of the licences' first lines
  ("apache-2.0", r"Apache License\s+Version 2\.0"),
  ("mit", r"MIT License|Permission is hereby granted, free of charge"),
  ("cc-by-sa-4.0", r"CC BY-SA 4\.0"),
)
PROVENANCE = {"device": "", "jax": "JAX ", "commit": "lora_jax at commit "}
HUB = re.compile(r"[\w.-]+/[\w.-]+")


class BaseModel(NamedTuple):
  """The base model of an adapter, for its card.

  Attributes:
    name: as the run's config has it, or that of the embedded model.
    path: its local folder or GGUF file.
    digests: SHA-256 of its weight files by name, or the fingerprint of its weights.
    weights: the format that they were quantized to for the training, such as nf4; "" if none.
  """

  name: str
  path: Path
  digests: Mapping[str, str]
  weights: str = ""

  @property
  def difference(self) -> str:
    """A sentence on the weights that the adapter was trained on; "" if they are the files' own."""
    if not self.weights:
      return ""
    return (
      f"Trained on weights quantized to {self.weights}: with the files' own, its outputs differ."
    )

  @property
  def repository(self) -> str | None:
    """Its name on the hub; None if it is unknown."""
    if self.name in PRETRAINED:
      match = re.search(rf"huggingface\.co/({HUB.pattern})", PRETRAINED[self.name].about)
      return match[1] if match else None
    return self.name if HUB.fullmatch(self.name) and not Path(self.name).exists() else None

  @property
  def shown_path(self) -> Path:
    """Its path in the card's commands; of a named model without the user's cache folder."""
    return Path(self.path.name) if self.name in PRETRAINED else self.path

  @property
  def license(self) -> str:
    """Its licence's identifier on the hub, from its own files; `unknown` if they name none."""
    if is_gguf(self.path):
      license_ = open_gguf(self.path).metadata.get("general.license", UNKNOWN)
      return license_ if isinstance(license_, str) else UNKNOWN
    for path in sorted((*self.path.glob("LICENSE*"), *self.path.glob("NOTICE*"))):
      text = read_text(path)[:2000]
      names = (name for name, pattern in LICENSE_TEXTS if re.search(pattern, text))
      return next(names, f"see {path.name}")
    return UNKNOWN


def model_card(
  form: str,
  base: BaseModel,
  config: AdaptationConfig,
  result: Mapping[str, Any],
  usage: Sequence[str],
  task: str = "text-generation",
) -> str:
  """Returns the text of a model card.

  Args:
    form: the format of the adapter's files, such as `peft` or `gguf`.
    base: the base model.
    config: the run's config.
    result: the run's `result.json`, or the part that is known so far.
    usage: lines of Markdown on how to use the adapter.
    task: the hub's name of the task.
  """
  method, license_ = find_method(config.method), base.license
  about_method = method.label
  if method.uses("lora.rank"):
    about_method += (
      f", rank {config.lora.rank}, alpha {config.lora.alpha:g}, of `{config.lora.target}`"
    )
  about_license = {
    UNKNOWN: "unknown: its files do not say. Find out before you publish the adapter"
  }
  rows = {
    "base model": f"`{base.name}`{f', {base.path.name}' if is_gguf(base.path) else ''}",
    "its weights": "; ".join(f"{name} {digest}" for name, digest in base.digests.items()),
    "as trained": base.difference,
    "its licence": about_license.get(license_, license_),
    "data": _data(config),
    "method": about_method,
    "held-out loss": _loss(result),
    "trained on": ", ".join(
      f"{label}{result[key]}" for key, label in PROVENANCE.items() if result.get(key)
    ),
  }
  lines = [*_front_matter(form, base, license_, task), ""]
  lines += [f"# {method.label} adapter of {base.name}", ""]
  lines += [f"Trained by `experiments.{config.NAME}` of lora_jax.", "", "| | |", "|---|---|"]
  lines += [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value]
  lines += ["", "## Use", "", *usage, "", "## Config", "", "```json"]
  lines += [json.dumps(config.to_json(), indent=2, ensure_ascii=False), "```", ""]
  return "\n".join(lines)


def _cell(text: str) -> str:
  """Returns a text as one cell of a table, which a bar would end even in a code span."""
  return text.replace("|", "\\|")


def code(language: str, lines: Sequence[str]) -> list[str]:
  """Returns lines of code in Markdown."""
  return [f"```{language}", *lines, "```", ""]


def _front_matter(form: str, base: BaseModel, license_: str, task: str) -> list[str]:
  name = base.repository
  tags = ([f"base_model:adapter:{name}"] if name else []) + ["lora", "lora_jax"]
  fields = {
    "base_model": name,
    "library_name": LIBRARIES.get(form, "peft"),
    "license": None if license_ == UNKNOWN or license_.startswith("see ") else license_,
    "pipeline_tag": task,
  }
  lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items() if value is not None]
  return ["---", *lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---"]


def _data(config: AdaptationConfig) -> str:
  """Returns the digests of a run's data files and of its tokenized examples."""
  parts = []
  for name, label in (("data.json", "files"), ("examples.json", "examples as tokens")):
    path = Path(config.workdir) / name
    if path.exists():
      digests = parse_json(read_text(path), path)
      digests = digests if isinstance(digests, list) else [digests]
      parts.append(f"SHA-256 of its {label}: {', '.join(map(str, digests))}")
  return "; ".join(parts)


def _loss(result: Mapping[str, Any]) -> str:
  if result.get("valid_loss") is None:
    return ""
  text = f"{result['valid_loss']:.4f} nats/token"
  if "best_step" in result:
    text += f"; best after step {result['best_step']:,} of {result['num_train_steps']:,}"
  if "last_valid_loss" in result:
    text += f", {result['last_valid_loss']:.4f} after the last"
  return text
