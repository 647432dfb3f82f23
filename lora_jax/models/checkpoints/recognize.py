"""Recognizes folders, files and tensors that are not a readable model, and says why."""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

_FOLDERS = (  # pattern of a file, and what it says of the folder; the first that matches counts
  (
    "adapter_config.json",
    "it holds a PEFT adapter: load the base model that adapter_config.json names, then the adapter "
    "by lora_jax.interop.load_peft",
  ),
  (
    "snapshots/*/config.json",
    "it is the cache of a hub repository: give the repository's name, or a folder in snapshots",
  ),
  (
    "[0-9]*_Transformer/config.json",
    "it is a model of sentence-transformers: give its folder 0_Transformer",
  ),
  ("model_index.json", "it is a pipeline of diffusers, not a single model"),
  (
    "metrics.jsonl",
    "it is the folder of a run: export the run's model, python -m experiments.export {file.parent} "
    "NEW --merged, and give NEW",
  ),
  ("*.gguf", "it has a GGUF file: give the file itself, {file}"),
  (
    "params.json",
    "it has Meta's original format: convert it by convert_llama_weights_to_hf.py of transformers",
  ),
  ("consolidated*", "it has the original format of its authors: give the converted folder"),
  ("weights*.npz", "it has the format of MLX: give the folder that it was converted from"),
  ("tf_model.h5", "TensorFlow's weights are not read: save them again by transformers"),
  ("flax_model.msgpack", "weights in msgpack are not read: save them again by transformers"),
  ("_CHECKPOINT_METADATA", "it is a checkpoint of Orbax, not a Hugging Face folder"),
  ("_METADATA", "it is a checkpoint of Orbax, not a Hugging Face folder"),
  (
    "model-*-of-*.safetensors",
    "it has parts of the weights, but not model.safetensors.index.json: copy or download that too",
  ),
  ("*.safetensors", "it has safetensors by another name: rename them to model.safetensors"),
  ("*.onnx", "ONNX is not read: give the folder that it was exported from"),
)
_FILES = (  # first bytes of a file, and its kind
  (b"version https://git-lfs", "a pointer of git-lfs: run `git lfs pull` where it was cloned"),
  (b"<", "a page in HTML or XML: download the file itself"),
  (b"GGUF", "a GGUF file of llama.cpp: name it *.gguf, and give the file"),
  (b"PK\x03\x04", "a zip archive or a pickle of torch.save"),
  (b"\x80", "a pickle"),
  (b"\x89HDF", "an HDF5 file, such as TensorFlow's"),
  (b"\x1f\x8b", "compressed by gzip: unpack it"),
)
_QUANTIZED = (  # names of tensors, and the method
  (r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format)$", "bitsandbytes"),
  (r"\.quant_state\.", "bitsandbytes"),
  (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
  (r"\.weight_(packed|shape|zero_point|global_scale)$", "compressed-tensors"),
  (r"\.(weight|input|activation|k|v)_scale(_inv)?$", "float8 or int8 with scales"),
  (r"_(blocks|scales)$", "MXFP4"),
  (r"\.scales$", "MLX or AWQ"),
)
_HEADS = r"(^|\.)(score|classifier|qa_outputs|v_head|multiple_choice_head)\."
_FORMATS = (  # names of tensors, and the format
  (r"^(tok_embeddings|layers\.\d+\.attention\.wq)\.", "Meta's original format"),
  (r"^(token_embd|blk\.\d+\.attn_q)\.", "GGUF"),
)
_TABLES = r"(^|\.)(wte|embed_tokens|word_embeddings|lm_head)\.weight$"


class Stored(NamedTuple):
  """The shape and dtype of a tensor in a file; the dtype by the file's name for it."""

  shape: tuple[int, ...]
  dtype: str


class QuantizedTensor(NamedTuple):
  """The name of a part of quantized weights, and the method of quantization."""

  name: str
  method: str


def describe_folder(folder: Path) -> str:
  """Returns what a folder without a readable model is, and the remedy; empty if unknown."""
  if folder.is_dir():
    for pattern, text in _FOLDERS:
      if files := sorted(folder.glob(pattern)):
        return text.format(file=files[0])
    inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if inside:
      return f"there is a config.json in {', '.join(inside[:5])}: did you mean that folder?"
  return ""


def describe_file(path: Path) -> str:
  """Returns what a file that is not safetensors is, by its first bytes; empty if unknown."""
  with path.open("rb") as file:
    start = file.read(64).lstrip()
  return next((text for prefix, text in _FILES if start.startswith(prefix)), "")


def describe_tensors(
  stored: Mapping[str, Stored],
  expected: Mapping[str, tuple[int, ...]],
  dtypes: Collection[str],
) -> str:
  """Returns why tensors are not the expected ones, and the remedy; empty if unknown.

  Args:
    stored: the tensors of the files by name.
    expected: shapes by name.
    dtypes: those that are read.
  """
  return (
    _quantized(stored, dtypes)
    or _wrapped(stored)
    or _foreign(stored)
    or _renamed(stored, expected)
    or _resized(stored, expected)
    or _other_head(stored, expected)
  )


def _quantized(stored: Mapping[str, Stored], dtypes: Collection[str]) -> str:
  remedy = (
    "Quantized weights are not read: give the folder of the original model, or dequantize it in "
    "transformers: model.dequantize(), then save_pretrained"
  )
  if part := quantized_tensor(stored):
    return f"the weights are quantized ({part.method}), as {part.name} shows. {remedy}"
  for name, (shape, dtype) in stored.items():
    if name.endswith(".weight") and len(shape) > 1 and dtype not in dtypes:
      return f"the weights are quantized or cast: {name} is of {dtype}. {remedy}"
  return ""


def _wrapped(stored: Mapping[str, Stored]) -> str:
  if name := first_match(r"\.(base_layer|lora_[AB]|modules_to_save|original_module)\.", stored):
    return (
      f"the model was saved inside PEFT's wrappers, as {name} shows. Save it by "
      "model.merge_and_unload().save_pretrained(...), or give the base model's folder and load the "
      "adapter by lora_jax.interop.load_peft"
    )
  return ""


def _foreign(stored: Mapping[str, Stored]) -> str:
  for pattern, format_ in _FORMATS:
    if name := first_match(pattern, stored):
      return (
        f"{name} is a name of {format_}. Convert the folder to the format of transformers, or give "
        "the converted one"
      )
  return ""


def _renamed(stored: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]]) -> str:
  """Recognizes names that all have a prefix, or lack one."""
  missing = [name for name in expected if name not in stored]
  extra = [name for name in stored if name not in expected]
  for longer, shorter, text in (
    (extra, missing, "the names in the files begin with {!r}, as in a wrapped or larger model"),
    (missing, extra, "the names in the files lack the prefix {!r}, as in a model without a head"),
  ):
    if not shorter:
      continue
    prefixes = [name.removesuffix(shorter[0]) for name in longer if name.endswith(f".{shorter[0]}")]
    names = set(longer)
    for prefix in prefixes[:1]:
      if 2 * sum(prefix + name in names for name in shorter) > len(shorter):
        return (
          f"{text.format(prefix)}. Save the model itself by save_pretrained, of the class that "
          "config.json's architectures should name"
        )
  return ""


def _resized(stored: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]]) -> str:
  """Recognizes embeddings and heads of more or fewer rows than the vocabulary."""
  rows = {}
  for name, shape in expected.items():
    if re.search(_TABLES, name) and name in stored and stored[name].shape[1:] == shape[1:]:
      rows[name] = stored[name].shape[0], shape[0]
  different = {name: pair for name, pair in rows.items() if pair[0] != pair[1]}
  if not different:
    return ""
  name, (count, vocab_size) = next(iter(different.items()))
  if len({count for count, _ in rows.values()}) > 1:
    counts = ", ".join(f"{name} has {count}" for name, (count, _) in rows.items())
    return (
      f"the embedding and the head differ in rows: {counts}. Resize both in transformers by "
      "model.resize_token_embeddings, and save it again"
    )
  more, kind = abs(count - vocab_size), "more" if count > vocab_size else "fewer"
  why = "were added as tokens or as padding" if count > vocab_size else "are missing"
  return (
    f"{name} has {count} rows, {more} {kind} than vocab_size {vocab_size}; they {why}. Set "
    f"vocab_size to {count} in config.json"
  )


def _other_head(stored: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]]) -> str:
  missing = [name for name in expected if name not in stored]
  extra = [name for name in stored if name not in expected]
  if name := first_match(_HEADS, extra):
    return (
      f"{name} belongs to the head of another task, such as classification. Expected a model "
      "without it: give the one that it was fine-tuned from"
    )
  if missing == ["lm_head.weight"]:
    return (
      "the head lm_head.weight is not in the files, and config.json says that it is not tied to "
      "the embedding. Set tie_word_embeddings to true if it is; otherwise files are missing"
    )
  return ""


def check_layer_count(
  folder: Path, names: Iterable[str], stack: str, key: str, num_layers: int
) -> None:
  """Raises ValueError if the number of layers in the files is not that of config.json.

  Args:
    folder: of the model.
    names: of its tensors.
    stack: the name before a layer's number, such as `model.layers`.
    key: the field of config.json.
    num_layers: its value.
  """
  pattern = re.compile(rf"(?:^|\.){re.escape(stack)}\.(\d{{1,9}})\.")
  numbers = {int(match[1]) for name in names if (match := pattern.search(name))}
  if numbers and max(numbers) + 1 != num_layers:
    raise ValueError(
      f"{folder}: {key} is {num_layers} in config.json, but the weights have "
      f"{max(numbers) + 1} layers, {stack}.0 to {stack}.{max(numbers)}. Set {key} to "
      f"{max(numbers) + 1} if that is the model's depth; otherwise files are missing"
    )


def quantized_tensor(names: Collection[str]) -> QuantizedTensor | None:
  """Returns a tensor that only quantized weights have, and the method; None if there is none."""
  for pattern, method in _QUANTIZED:
    if name := first_match(pattern, names):
      return QuantizedTensor(name, method)
  return None


def first_match(pattern: str, names: Iterable[str]) -> str | None:
  """Returns the first name in which a regular expression is found; None if there is none."""
  return next((name for name in names if re.search(pattern, name)), None)
