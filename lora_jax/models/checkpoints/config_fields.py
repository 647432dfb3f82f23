"""Reads config.json of a model's folder, each field checked by the model's own config class."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from lora_jax.fields import read_value
from lora_jax.files import read_json
from lora_jax.models.checkpoints.recognize import describe_folder


def read_config_json(folder: str | Path) -> tuple[Path, dict[str, Any]]:
  """Returns the path of a folder's config.json and its content.

  Raises:
    FileNotFoundError: if there is none, saying what the folder is instead if that is known.
    ValueError: if it is not a JSON object, or the folder is a file.
  """
  path = Path(folder) / "config.json"
  if Path(folder).is_file():
    raise ValueError(
      f"{folder} is a file, expected a folder with config.json. A language model in a GGUF file is "
      "loaded by load_causal_lm"
    )
  try:
    return path, read_json(path)
  except FileNotFoundError as error:
    kind = describe_folder(Path(folder))
    raise FileNotFoundError(
      f"{error}; expected a model's folder, with config.json and *.safetensors"
      f"{', but ' if kind else ''}{kind}"
    ) from None


def read_model_json(
  folder: str | Path, model_types: Collection[str]
) -> tuple[Path, dict[str, Any]]:
  """Returns the path of a folder's config.json and its content.

  Raises:
    FileNotFoundError: if there is none.
    ValueError: if it is of another type of model, or the weights are quantized.
  """
  path, fields = read_config_json(folder)
  kind = fields.get("model_type")
  if not isinstance(kind, str) or kind not in model_types:
    raise ValueError(f"{path}: expected model_type {', '.join(model_types)}, got {kind!r}")
  for key in ("quantization_config", "quantization"):  # the second one is MLX's
    if fields.get(key) is not None:
      method = fields[key].get("quant_method") if isinstance(fields[key], dict) else None
      raise ValueError(
        f"{path}: {key} says that the weights are quantized{f' by {method}' if method else ''}. "
        "Quantized weights are not read: give the folder of the original model, or dequantize it "
        f"in transformers: model.dequantize(), then save_pretrained. Remove {key} if they are not"
      )
  return path, fields


def read_fields(kind: type, fields: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
  """Returns fields of a model's config by our names.

  Args:
    kind: the dataclass of the config, whose annotations are the types and bounds.
    fields: the content of config.json.
    keys: names in config.json by ours.
  Raises:
    ValueError: naming the field of config.json, if it is missing, of another type or out of bounds.
  """
  if missing := [key for key in keys.values() if key not in fields]:
    raise ValueError(f"missing {', '.join(missing)}")
  hints = get_type_hints(kind, include_extras=True)
  return {name: read_value(hints[name], fields[key], key) for name, key in keys.items()}


def check_supported(path: Path, fields: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
  """Raises ValueError if a field of config.json has another value than the supported one."""
  for key, value in supported.items():
    actual = fields.get(key, value)
    if type(actual) is not type(value) or actual != value:
      raise ValueError(f"{path}: {key}={actual!r} is not supported; expected {value!r}")
