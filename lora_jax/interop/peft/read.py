"""Reads the tensors of an adapter in PEFT's format, checked against its config and the model."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.fields import Count, read_value
from lora_jax.files import parse_json
from lora_jax.interop.peft.config import PeftConfig
from lora_jax.interop.peft.modules import (
  CONFIG,
  MAGNITUDE,
  PREFIX,
  SHAPES,
  WEIGHTS,
  Arrays,
  Module,
  base_array,
  factor_names,
  has_values,
  is_language_model,
  magnitude_name,
  module_shapes,
)
from lora_jax.interop.peft.recognize import (
  Mismatch,
  describe_folder,
  describe_mismatch,
  resized,
  tied_head,
)
from lora_jax.models.checkpoints.hub import FLOATS, StoredTensor, open_safetensors
from lora_jax.models.checkpoints.recognize import Stored
from lora_jax.models.checkpoints.stored import stored_shape

# An adapter's name in the name of a tensor, as in the state dict of a model inside PEFT.
ADAPTER_NAME = re.compile(
  r"\.(lora_(?:A|B|E|embedding_A|embedding_B|magnitude_vector)|hira_(?:embedding_)?[AB]|ia3_l"
  r"|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|miss_block|vera_(?:A|B|lambda_[bd])"
  r"|ln_tuning_layers|trainable_tokens_delta)\.(?!weight$|bias$)([^.]+)"
  r"|\.(modules_to_save)\.(?!weight$|bias$)([^.]+)"
)
NARROW = (jnp.bfloat16, np.float16)


def check_folder(folder: Path) -> None:
  """Raises FileNotFoundError unless a folder can be an adapter in PEFT's format."""
  if not folder.is_dir():
    raise FileNotFoundError(
      f"{folder} is not a folder; expected one with {CONFIG} and {WEIGHTS}. Download an adapter "
      "from the hub by huggingface_hub.snapshot_download"
    )
  if not (folder / CONFIG).exists() and (text := describe_folder(folder)):
    raise FileNotFoundError(f"{folder / CONFIG} does not exist; {text}")


def read_arrays(
  folder: Path,
  config: PeftConfig,
  expected: Mapping[str, tuple[int, ...]],
  tensors: Sequence[StoredTensor],
  leaves: Mapping[str, Any],
) -> Arrays:
  """Returns the file's tensors by name, which must be exactly the expected ones.

  Args:
    folder: of the adapter.
    config: of the adapter.
    expected: the shapes of its tensors, by name.
    tensors: of the model.
    leaves: of the base model, or their shapes, by path.
  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is not a safetensors file, or a tensor is missing, unexpected, misshapen, not
      of floats or not finite.
  """
  path = folder / WEIGHTS
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist{_instead(folder)}")
  with open_safetensors(path) as file:
    names = _plain_names(path, file.keys())
    slices = {name: file.get_slice(key) for name, key in names.items()}
    stored = {n: Stored(tuple(x.get_shape()), x.get_dtype()) for n, x in slices.items()}

    def read(name: str) -> np.ndarray:
      if stored[name].dtype not in FLOATS:
        raise ValueError(
          f"{path}: {names[name]} is of {stored[name].dtype}, expected one of "
          f"{', '.join(FLOATS)}. Save the adapter in one of these, as by model.to(torch.bfloat16)"
        )
      with np.errstate(over="ignore"):
        array = file.get_tensor(names[name]).astype(np.float32)
      if not np.isfinite(array).all():
        raise ValueError(
          f"{path}: {names[name]} has values that are infinite, not a number or too large for "
          "float32: the training diverged, or the file is damaged. Take an earlier checkpoint"
        )
      return array

    _drop_bias_duplicates(stored, config, tensors, read)
    _drop_base_copies(folder, stored, expected, tensors, leaves, read)
    mismatch = Mismatch(stored, expected, config.peft_type)
    if faults := mismatch.faults():
      more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
      cause = describe_mismatch(mismatch)
      advice = f". {which_base(config)}, and leave {CONFIG} as PEFT wrote it"
      raise ValueError(
        f"{folder}: {cause}{'. ' if cause else ''}The tensors are not those of its {CONFIG} and "
        f"this model: {'; '.join(faults[:8])}{more}{'' if cause else advice}"
      )
    return {name: read(name) for name in expected}


def check_shapes(folder: Path, config: PeftConfig, modules: Sequence[Module]) -> None:
  """Checks the shapes of modules that the file's tensors do not tell, if the file has them.

  PEFT writes none, and lora_jax does.

  Args:
    folder: of the adapter.
    config: of the adapter.
    modules: all of the model's.
  Raises:
    ValueError: naming a module whose shape in this model is another.
  """
  with open_safetensors(folder / WEIGHTS) as file:
    stored = (file.metadata() or {}).get(SHAPES)
  if stored is None:
    return
  where = f"{folder / WEIGHTS}: {SHAPES}"
  shapes = read_value(Mapping, parse_json(stored, where), where)
  actual = module_shapes(modules)
  for name in shapes.keys() & actual.keys():
    expected = read_value(tuple[Count, ...], shapes[name], f"{where}[{name!r}]")
    if actual[name] != expected:
      sizes, others = (" x ".join(map(str, shape)) for shape in (expected, actual[name]))
      raise ValueError(
        f"{folder}: the adapter of {name} is for {sizes} (inputs x outputs), and this model has "
        f"{others}. {which_base(config)}"
      )


def lora_shapes(config: PeftConfig, modules: Sequence[Module]) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of LoRA's tensors that a config asks for, by name."""
  expected: dict[str, tuple[int, ...]] = {}
  for module in modules:
    shapes = module.factor_shapes(config.rank_of(module.name))
    expected |= dict(zip(factor_names(module, modules), shapes, strict=True))
    if config.use_dora:
      expected[magnitude_name(module)] = module.magnitude_shape
    if config.lora_bias:
      expected[f"{PREFIX}{module.name}.lora_B.bias"] = (sum(module.outputs),)
  return expected


def _plain_names(path: Path, names: Iterable[str]) -> dict[str, str]:
  """Returns the names in a file by those that PEFT's `save_pretrained` would have written.

  Raises:
    ValueError: if the file has several adapters, or a tensor by two names.
  """
  plain: dict[str, str] = {}
  adapters: set[str] = set()
  for name in names:
    adapters.update(match[2] or match[4] for match in ADAPTER_NAME.finditer(name))
    short = ADAPTER_NAME.sub(lambda match: f".{match[1]}" if match[1] else "", name)
    if short.endswith(f"{MAGNITUDE}.weight"):  # PEFT writes this name and reads both
      short = short.removesuffix(".weight")
    if short in plain:
      raise ValueError(f"{path}: {plain[short]} and {name} are one tensor by two names; keep one")
    plain[short] = name
  if len(adapters) > 1:
    raise ValueError(
      f"{path} has several adapters, {', '.join(sorted(adapters)[:8])}; expected one. Save one by "
      f"model.save_pretrained(folder, selected_adapters=[{min(adapters)!r}])"
    )
  return plain


def _drop_bias_duplicates(
  stored: dict[str, Stored],
  config: PeftConfig,
  tensors: Sequence[StoredTensor],
  read: Callable[[str], np.ndarray],
) -> None:
  """Removes the copies that PEFT saves of a fully trained module's bias where it saves all biases.

  One is the base model's, which nothing reads, and one is the trained bias again.
  """
  for tensor in tensors:
    if tensor.is_bias and config.bias == "all" and config.saves(tensor.module):
      module = f"{PREFIX}{tensor.module}"
      stored.pop(f"{module}.original_module.bias", None)
      bias, duplicate = f"{module}.bias", f"{module}.modules_to_save.bias"
      if stored.keys() >= {bias, duplicate} and np.array_equal(read(bias), read(duplicate)):
        del stored[duplicate]


def _drop_base_copies(
  folder: Path,
  stored: dict[str, Stored],
  expected: Mapping[str, tuple[int, ...]],
  tensors: Sequence[StoredTensor],
  leaves: Mapping[str, Any],
  read: Callable[[str], np.ndarray],
) -> None:
  """Removes unchanged tensors of the base model, such as the embedding that PEFT saves.

  Where `leaves` are shapes, only the shapes are compared.

  Raises:
    ValueError: if one has other values, or another number of rows.
  """
  by_name = {tensor.name: tensor for tensor in tensors}
  if is_language_model(tensors) and "lm_head.weight" not in by_name:  # a tied head
    by_name["lm_head.weight"] = next(tensor for tensor in tensors if tensor.is_embedding)
  for name in stored.keys() - expected.keys():
    plain = re.sub(r"\.(base_layer|original_module)(?=\.)", "", name.removeprefix(PREFIX))
    tensor = by_name.get(plain)
    if tensor is None or not name.startswith(PREFIX):
      continue
    shape, base_shape = stored[name].shape, stored_shape(tensor, leaves)
    if tensor.is_embedding and shape[1:] == base_shape[1:] and shape != base_shape:
      raise ValueError(f"{folder}: {resized(name, shape[0], base_shape[0])}")
    if shape != base_shape or stored[name].dtype not in FLOATS:
      continue  # is named with the unexpected ones
    has_array = has_values(leaves[tensor.paths[0]])
    if has_array and not is_copy(read(name), base_array(tensor, leaves)):
      raise ValueError(f"{folder}: {_changed(name, plain, by_name[plain].name)}")
    del stored[name]


def _changed(name: str, plain: str, base_name: str) -> str:
  """Returns the text about a tensor of the base model with other values."""
  if plain != base_name:
    return tied_head(name)
  module = plain.rpartition(".")[0]
  text = (
    f"{name}, saved with the adapter, differs from the base model's {plain}. Load the base model "
    "that it was trained on"
  )
  if ".base_layer." in name or ".original_module." in name:
    return text
  return f"{text}; if {module} itself was trained, name it in modules_to_save of {CONFIG}"


def is_copy(copy: np.ndarray, base: np.ndarray) -> bool:
  """Returns whether two arrays are the same numbers, but for rounding to narrower dtypes.

  Each may have been rounded: the copy to the dtype in which the adapter was trained or saved, the
  base model to the dtype in which it was loaded. They may differ by 0.6 of the spacing of the
  narrowest dtype: half of it, and an eighth of a half where both were rounded.

  Args:
    copy: float32.
    base: of any dtype of floats.
  """
  if copy.shape != base.shape:
    return False
  wide = base.astype(np.float32)
  if np.array_equal(copy, wide):
    return True
  narrow = [dtype for dtype in NARROW if dtype == base.dtype or _is_exact(copy, dtype)]
  if not narrow:
    return False
  spacing = np.maximum.reduce([_spacing(wide, dtype) for dtype in narrow])
  return bool((np.abs(copy - wide) <= 0.6 * spacing).all())


def _is_exact(array: np.ndarray, dtype: Any) -> bool:
  with np.errstate(over="ignore"):
    return np.array_equal(array.astype(dtype).astype(np.float32), array)


def _spacing(array: np.ndarray, dtype: Any) -> np.ndarray:
  """Returns the distance between neighbors in a dtype, at the magnitude of each element."""
  about = jnp.finfo(dtype)
  exponent = np.frexp(np.maximum(np.abs(array), float(about.tiny)))[1]
  return np.ldexp(np.float32(about.eps), exponent - 1)


def _instead(folder: Path) -> str:
  """Returns what a folder holds instead of the adapter's tensors, and the remedy."""
  if text := describe_folder(folder):
    return f"; {text}"
  kinds = ("*.bin", "*.pt", "*.pth", "*.ckpt")
  if pickles := sorted(path.name for kind in kinds for path in folder.glob(kind)):
    return (
      f"; {', '.join(pickles[:4])} may be a pickle and is not read. If you trust it, load the "
      "adapter in PEFT once and save it: PeftModel.from_pretrained(base, folder)"
      ".save_pretrained(new)"
    )
  return ". Save the adapter by PEFT's save_pretrained, as safetensors"


def which_base(config: PeftConfig) -> str:
  """Returns advice for messages: which base model to load."""
  name = f" ({config.base})" if config.base else ""
  return f"Load the base model that it was trained on{name}"
