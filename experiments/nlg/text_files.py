"""Writes the files that a trained model's text depends on: tokenizer, chat template, end tokens."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lora_jax.files import read_json
from lora_jax.models.checkpoints.hub import new_folder
from lora_jax.models.text.gguf import read_model_json
from lora_jax.models.text.tokenizer import read_special_tokens, tokenizer_files

T = TypeVar("T")

OTHERS = ("adapter_config.json", "adapter_model.safetensors", "config.json", "README.md")


def text_files(
  folder: Path, tokenizer: Any, end_ids: Sequence[int], chat_template: str | None = None
) -> dict[str, bytes]:
  """Returns the files with which `transformers` tokenizes, renders and stops as in training.

  Args:
    folder: the base model's folder, or its GGUF file; the tokenizer's files and generation settings
      are copied from the folder, or made from the file's metadata.
    tokenizer: the folder's, as it was loaded.
    end_ids: the tokens that end an answer, the one that ends a text first.
    chat_template: the user's own; None keeps the folder's.

  Returns:
    The content by name.
  """
  files = tokenizer_files(folder)
  config = read_model_json(folder, "tokenizer_config.json")
  special = {"eos_token": tokenizer.id_to_token(end_ids[0])} | read_special_tokens(folder)
  config |= {use: token for use, token in special.items() if not _is_read(config.get(use))}
  if config.get("tokenizer_class") is None:  # which transformers would guess from the model
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    files.setdefault("tokenizer.json", tokenizer.to_str().encode())
  if chat_template is not None:
    config["chat_template"] = chat_template
    files["chat_template.jinja"] = chat_template.encode()
    if (folder / "chat_template.json").is_file():  # of a processor
      files["chat_template.json"] = _as_json({"chat_template": chat_template})
  files["tokenizer_config.json"] = _as_json(config)
  ids = list(dict.fromkeys(end_ids))
  generation = read_model_json(folder, "generation_config.json")
  generation["eos_token_id"] = ids if len(ids) > 1 else ids[0]
  files["generation_config.json"] = _as_json(generation)
  return files


def exported_text_files(folder: Path) -> dict[str, bytes]:
  """Returns the files of an exported adapter's folder other than the adapter and its card."""
  paths = (path for path in sorted(folder.iterdir()) if path.is_file())
  return {path.name: path.read_bytes() for path in paths if path.name not in OTHERS}


def end_token_ids(folder: Path) -> list[int]:
  """Returns the end tokens in the generation settings of an exported folder."""
  ids = read_json(folder / "generation_config.json")["eos_token_id"]
  return ids if isinstance(ids, list) else [ids]


def write_with(files: dict[str, bytes], folder: str | Path, write: Callable[[Path], T]) -> T:
  """Makes a folder and adds files to it; if either fails, no folder is left behind.

  Args:
    files: the content by name; replaces files of the same name.
    folder: to make.
    write: makes the folder that it is given.

  Returns:
    The result of `write`.
  Raises:
    FileExistsError: if there is such a folder.
  """
  with new_folder(folder) as temporary:
    temporary.rmdir()
    result = write(temporary)
    for name, content in files.items():
      (temporary / name).write_bytes(content)
  return result


def _is_read(token: Any) -> bool:
  """Returns whether `transformers` reads a special token in tokenizer_config.json."""
  return isinstance(token, str) or (isinstance(token, dict) and "__type" in token)


def _as_json(value: dict[str, Any]) -> bytes:
  return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
