"""Writes and reads adapters in llama.cpp's format, GGUF.

    general.type              adapter
    adapter.type              lora
    adapter.lora.alpha        the scaling is alpha / rank; 0 is a scaling of 1
    blk.0.attn_q.weight.lora_a          (rank, in)            ours, transposed
    blk.0.attn_q.weight.lora_b          (out, rank)           ours, transposed
    token_embd.weight.lora_a            (V, rank)             ours
    token_embd.weight.lora_b            (D, rank)             ours, transposed
    blk.0.ffn_up_exps.weight.lora_a     (experts, rank, in)
    blk.0.ffn_up_exps.weight.lora_b     (experts, out, rank)

A has the inputs of a weight in the base model's file, B its outputs. In `llama` files the outputs
of query and key are interleaved, so the rows of B are too. GPT-2 has one weight for query, key and
value: their As are concatenated along the rank, and B is zero outside its own blocks.

A file has one alpha for all weights. If alphas differ, B is multiplied by its scaling, and alpha is
0. Source: `llama_adapter_lora_init_impl` and `llama_adapter_lora_weight::get_scale` of
llama.cpp. Its own converter ignores `rank_pattern`, `alpha_pattern` and rank-stabilized scalings,
and swaps A and B of GPT-2.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import PyTree

from lora_jax.adapters.config import LoraConfig
from lora_jax.fields import Finite, read_value
from lora_jax.files import local_path
from lora_jax.interop.peft.fused import Fused
from lora_jax.interop.peft.leaves import Factors, as_tree, split_modules
from lora_jax.interop.peft.modules import Module, find_modules
from lora_jax.interop.peft.parts import AdapterParts, check_parts
from lora_jax.models.checkpoints.gguf import GGUF, open_gguf, write_gguf
from lora_jax.models.checkpoints.gguf_config import EMBEDDING, HEAD
from lora_jax.models.checkpoints.gguf_tensors import GGUFTensors
from lora_jax.models.checkpoints.hub import StoredTensor
from lora_jax.models.gpt2 import gguf as gpt2_gguf
from lora_jax.models.gpt2.model import GPT2Config
from lora_jax.models.llama import gguf as llama_gguf
from lora_jax.models.llama.model import LlamaConfig
from lora_jax.trees import closest_names, weights_with_path
from lora_jax.variants.lora import LORA

ADAPTER_TYPE, ALPHA = "adapter.type", "adapter.lora.alpha"
INVOCATION = "adapter.alora.invocation_tokens"
POSITIONS = "position_embd.weight"
A, B = ".lora_a", ".lora_b"
MERGE = "Merge the adapter instead: python -m experiments.export RUN FOLDER --merged"


def save_gguf_adapter(
  path: str | Path,
  config: LoraConfig,
  trainable: PyTree,
  model: LlamaConfig | GPT2Config,
  params: PyTree,
  *,
  architecture: str | None = None,
  base_model: str | None = None,
  dtype: Literal["float32", "float16"] = "float32",
) -> None:
  """Writes an adapter as a new GGUF file, with which llama.cpp computes the same outputs.

  Args:
    path: the file to write.
    config: the adapter's config.
    trainable: the trained tree.
    model: the base model's config.
    params: the base model's params, or their shapes.
    architecture: that of the base model's GGUF file; None chooses as llama.cpp's converter does.
    base_model: its name, for the metadata.
    dtype: the dtype of the factors in the file.
  Raises:
    FileExistsError: if there is such a file.
    ValueError: if the adapter is not for the base model, or llama.cpp cannot express it.
    OSError: if it cannot be written, such as on a full disk; nothing is left behind.
  """
  path = local_path(path)
  if path.exists():
    raise FileExistsError(f"{path} exists; nothing is overwritten")
  architecture, tensors = _names(model, architecture)
  parts = check_parts(config, trainable, tensors, params).as_lora()
  _check_expressible(parts, tensors)
  fused = parts.fuse()
  alpha = _common_alpha(fused.values())
  arrays: dict[str, np.ndarray] = {}
  for module, joined in fused.items():
    a, b = _to_file(module, joined, is_scaled=alpha == 0)
    for suffix, array in ((A, a), (B, b)):
      arrays[module.stored.name + suffix] = _narrow(module.stored.name + suffix, array, dtype)
  metadata: dict[str, Any] = {ADAPTER_TYPE: "lora", ALPHA: float(alpha)}
  metadata["general.file_type"] = 0 if dtype == "float32" else 1
  if base_model is not None:
    metadata |= {"general.base_model.count": 1, "general.base_model.0.name": base_model}
  write_gguf(path, architecture, metadata, arrays, kind="adapter")


def load_gguf_adapter(
  path: str | Path,
  model: LlamaConfig | GPT2Config,
  params: PyTree,
  *,
  architecture: str | None = None,
) -> tuple[LoraConfig, PyTree]:
  """Reads an adapter written by llama.cpp's converter or by `save_gguf_adapter`.

  Args:
    path: the file to read.
    model: the base model's config.
    params: the base model's params, or their shapes.
    architecture: as in `save_gguf_adapter`.

  Returns:
    The config and the trainable tree of `lora_jax.lora`.
  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is not a plain LoRA adapter for this model, or a tensor is missing,
      unexpected, of a wrong shape or not finite; each is named.
  """
  file = open_gguf(path)
  architecture, tensors = _names(model, architecture)
  alpha = _check_metadata(file, architecture)
  leaves = dict(weights_with_path(params))
  modules = {module.stored.name: module for module in find_modules(tensors, leaves)}
  shapes = _check_tensors(file, modules)
  if EMBEDDING in shapes:
    _check_embedding(str(file.path), tensors)
  if POSITIONS in shapes:
    raise ValueError(f"{file.path}: {_about_positions()}")
  stored = GGUFTensors(file, {n + s: x for n, pair in shapes.items() for s, x in pair.items()})
  factors = {}
  for name, module in modules.items():
    if name in shapes:
      a, b = (_read(stored, file, name + suffix) for suffix in (A, B))
      rank = b.shape[-1]
      factors[module] = _from_file(module, a, b, alpha / rank if alpha else 1.0)
  weights, settings = split_modules(file.path, factors, leaves)
  return as_tree(weights, settings, {})


def _names(
  model: LlamaConfig | GPT2Config, architecture: str | None
) -> tuple[str, list[StoredTensor]]:
  """Returns the architecture and the tensors of a base model in llama.cpp."""
  family: Any = gpt2_gguf if isinstance(model, GPT2Config) else llama_gguf
  name: str = family.architecture_of(model) if architecture is None else architecture
  return name, family.gguf_tensors(model, name)


def _check_expressible(parts: AdapterParts, tensors: list[StoredTensor]) -> None:
  """Raises ValueError, with the remedy, if llama.cpp has no such adapters."""
  for path, target in parts.targets.items():
    variant = target.variant or LORA
    if variant != LORA:
      raise ValueError(
        f"llama.cpp's adapters are plain LoRA, and {path} is adapted by {variant.name}. Take the "
        f"nearest LoRA, lora_jax.convert(config, trainable, params, rank=...). {MERGE}"
      )
  if parts.extra:
    raise ValueError(
      "llama.cpp's adapters have no fully trained leaves, such as biases, norms or a head: "
      f"{', '.join(list(parts.extra)[:8])}. {MERGE}"
    )
  for module in parts.adapted:
    if module.stored.name == EMBEDDING:
      _check_embedding(", ".join(module.stored.paths), tensors)
    if module.stored.name == POSITIONS:
      raise ValueError(f"{', '.join(module.stored.paths)}: {_about_positions()}")


def _check_embedding(where: str, tensors: list[StoredTensor]) -> None:
  if not any(stored.name == HEAD for stored in tensors):
    raise ValueError(
      f"{where}: the embedding is the head too (tied), and llama.cpp aborts when it computes with "
      f"factors of such {EMBEDDING}. Leave it out of `target`, or untie the head. {MERGE}"
    )


def _about_positions() -> str:
  return (
    f"llama.cpp adds {POSITIONS} without its adapter. Leave wpe/embedding out of `target`. {MERGE}"
  )


def _common_alpha(fused: Iterable[Fused]) -> float:
  """Returns the alpha of all weights; 0 if they differ, or float32 cannot hold it."""
  alphas = {joined.alpha for joined in fused}
  with np.errstate(over="ignore", under="ignore"):
    alpha = float(np.float32(alphas.pop())) if len(alphas) == 1 else 0.0
  return alpha if np.finfo(np.float32).tiny <= abs(alpha) < np.inf else 0.0


def _to_file(module: Module, joined: Fused, is_scaled: bool) -> tuple[np.ndarray, np.ndarray]:
  """Returns A and B as the file stores them.

  Args:
    module: the module in llama.cpp.
    joined: its arrays.
    is_scaled: whether B is multiplied by the scaling.
  """
  a = joined.a.swapaxes(-1, -2) if module.stored.is_embedding else joined.a
  b = joined.b * np.float32(joined.scaling) if is_scaled and joined.scaling != 1 else joined.b
  return a, b[..., np.argsort(module.stored.our_outputs(b.shape[-2])), :]


def _from_file(module: Module, a: np.ndarray, b: np.ndarray, scaling: float) -> Factors:
  """Returns the factors in the axes of our leaves; the inverse of `_to_file`."""
  a = a if module.stored.is_embedding else a.swapaxes(-1, -2)
  b = b.swapaxes(-1, -2)
  return Factors(a, b[..., module.stored.our_outputs(b.shape[-1])], scaling)


def _narrow(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
  with np.errstate(over="ignore"):  # is raised below
    narrow = array.astype(dtype)
  if not np.isfinite(narrow).all():
    largest = np.abs(array[np.isfinite(array)]).max(initial=0)
    raise ValueError(
      f"{name} has values up to {largest:g}, or not finite ones, which {dtype} cannot hold. "
      "Take dtype='float32', or an earlier checkpoint if the training diverged"
    )
  return narrow


def _check_metadata(file: GGUF, architecture: str) -> float:
  """Returns alpha; raises ValueError unless the file is a plain LoRA adapter for the model."""
  path, metadata = file.path, file.metadata
  if file.kind != "adapter":
    raise ValueError(
      f"{path}: general.type is {file.kind!r}, expected an adapter. A model is loaded by "
      f"load_causal_lm({str(path)!r})"
    )
  kind = metadata.get(ADAPTER_TYPE)
  if kind != "lora":
    raise ValueError(f"{path}: {ADAPTER_TYPE} is {kind!r}, expected 'lora'")
  if file.architecture != architecture:
    raise ValueError(
      f"{path} is for a base model of the architecture {file.architecture!r}, expected "
      f"{architecture!r}. Load the base model that it was trained on"
    )
  if metadata.get(INVOCATION):
    raise ValueError(
      f"{path}: {INVOCATION}: there is no support for activated LoRA, which adapts only the tokens "
      "after an invocation"
    )
  try:
    return read_value(Finite, metadata.get(ALPHA, 0.0), ALPHA)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _check_tensors(
  file: GGUF, modules: Mapping[str, Module]
) -> dict[str, dict[str, tuple[int, ...]]]:
  """Returns the shapes of A and B in the file, by the name of the adapted weight and suffix.

  Raises:
    ValueError: naming each tensor that is unexpected, lacks its other factor, or has a wrong shape.
  """
  faults, pairs = [], {}
  for name in file.tensors:
    weight, suffix = name[: -len(A)], name[-len(A) :]
    if suffix not in (A, B):
      faults.append(f"unexpected {name[:100]}: neither {A} nor {B} of a weight")
    elif weight not in modules:
      faults.append(f"unexpected {name[:100]}: the model has {_near(weight, modules)}")
    else:
      pairs.setdefault(weight, set()).add(suffix)
  faults += [
    f"missing {weight}{suffix}"
    for weight, suffixes in pairs.items()
    for suffix in (A, B)
    if suffix not in suffixes
  ]
  shapes = {}
  for weight, suffixes in pairs.items():
    if suffixes == {A, B}:
      shapes[weight], wrong = _shapes(file, modules[weight], weight)
      faults += wrong
  if not pairs and not faults:
    faults.append("it has no tensors")
  if faults:
    more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
    raise ValueError(
      f"{file.path}: {_swapped(file, modules, pairs)}the tensors are not those of an adapter for "
      f"this model: {'; '.join(faults[:8])}{more}. Load the base model that it was trained on"
    )
  return shapes


def _near(weight: str, modules: Mapping[str, Module]) -> str:
  return f"no weight {weight[:100]}; did you mean {', '.join(closest_names(weight, modules, 3))}?"


def _shapes(
  file: GGUF, module: Module, weight: str
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
  """Returns the shapes of a module's A and B, and the faults; leading ones may be left out."""
  size = 2 + len(module.experts)
  a, b = (file.tensors[weight + suffix].shape for suffix in (A, B))
  a, b = ((1,) * (size - len(shape)) + shape for shape in (a, b))
  rank, outputs = b[-1], sum(module.outputs)
  inputs = module.shapes[0][-2]
  in_and_rank = (inputs, rank) if module.stored.is_embedding else (rank, inputs)
  expected = {A: (*module.experts, *in_and_rank), B: (*module.experts, outputs, rank)}
  return {A: a, B: b}, [
    f"{weight}{suffix} has shape {shape}, expected {expected[suffix]} with B's rank of {rank}"
    for suffix, shape in ((A, a), (B, b))
    if shape != expected[suffix]
  ]


def _swapped(file: GGUF, modules: Mapping[str, Module], pairs: Mapping[str, set[str]]) -> str:
  """Returns what is wrong if A and B have been swapped, as llama.cpp's converter does for GPT-2."""
  for weight, suffixes in pairs.items():
    outputs, inputs = sum(modules[weight].outputs), modules[weight].shapes[0][-2]
    if suffixes == {A, B} and outputs != inputs:
      a, b = (file.tensors[weight + suffix].shape for suffix in (A, B))
      if (a[-1], b[:1]) == (outputs, (inputs,)):
        return (
          "A and B are swapped, as llama.cpp's convert_lora_to_gguf.py does for GPT-2; load the "
          "adapter in PEFT's format, and write it by save_gguf_adapter. So "
        )
  return ""


def _read(stored: GGUFTensors, file: GGUF, name: str) -> np.ndarray:
  if stored.dtype(name) not in stored.readable:
    raise ValueError(
      f"{file.path}: {name} is of {stored.dtype(name)}, expected one of "
      f"{', '.join(stored.readable)}"
    )
  array = np.asarray(stored.read(name), np.float32)
  if not np.isfinite(array).all():
    raise ValueError(
      f"{file.path}: {name} has values that are infinite or not a number: the training diverged, "
      "or the file is damaged"
    )
  return array
