"""Maps a model's tensors to the names and shapes of Hugging Face PEFT's adapters.

    base_model.model.transformer.h.0.attn.c_attn.lora_A.weight   (rank, in)    ours, transposed
    base_model.model.transformer.h.0.attn.c_attn.lora_B.weight   (out, rank)   ours, transposed
    base_model.model.transformer.wte.lora_embedding_A            (rank, V)
    base_model.model.transformer.wte.lora_embedding_B            (D, rank)
    base_model.model.model.layers.0.mlp.experts.lora_A.weight    (experts * rank, in)
    base_model.model.model.layers.0.mlp.experts.lora_B.weight    (out, rank * experts)
    base_model.model.deberta.encoder.conv.conv.lora_A.weight     (rank, in, width)
    base_model.model.deberta.encoder.conv.conv.lora_B.weight     (out, rank, 1)

DoRA adds a magnitude; that of a fused weight is those of its parts, concatenated:

    base_model.model.transformer.h.0.attn.c_attn.lora_magnitude_vector       (out,)
    base_model.model.transformer.wte.lora_magnitude_vector                   (D,)
    base_model.model.deberta.encoder.conv.conv.lora_magnitude_vector         (1, out, 1)

Where PEFT adapts a fused weight and our leaves are its parts, the exchange is exact. From PEFT, all
parts share A, and each has its rows of B. To PEFT, the As of the parts are concatenated along the
rank, so that ranks add up, with zeros in B elsewhere; equal As are written once.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models.checkpoints.hub import StoredTensor
from lora_jax.quantization.leaf import dequantize

Arrays = dict[str, np.ndarray]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
SHAPES = "lora_jax.shapes"
"""In a file's metadata: `module_shapes` as JSON, of the modules whose tensors do not tell them."""


class Module:
  """A module with a weight, or a parameter: its name and shapes in PEFT, and our leaves."""

  def __init__(self, stored: StoredTensor, params: Mapping[str, Any]):
    self.stored = stored
    self.name = stored.name if stored.is_parameter else stored.name.removesuffix(".weight")
    self.module = stored.module
    self.shapes = [tuple(params[path].shape)[len(stored.place) :] for path in stored.paths]

  @property
  def is_linear(self) -> bool:
    return not self.stored.is_embedding

  @property
  def is_input(self) -> bool:
    """Whether it is the embedding of the model's tokens."""
    return re.search(r"(wte|embed_tokens|word_embeddings)$", self.name) is not None

  @property
  def is_body(self) -> bool:
    """Whether PEFT calls it linear: not an embedding, a convolution or the head."""
    return self.is_linear and not self.is_conv and self.name != "lm_head"

  @property
  def is_conv(self) -> bool:
    """Whether it is a convolution: its weight is (..., in, out) here, over one axis or more."""
    return len(self.shapes[0]) > 2 and not self.stored.is_parameter

  @property
  def experts(self) -> tuple[int, ...]:
    """The number of experts, if it is a parameter of several; else ()."""
    return () if self.is_conv else self.shapes[0][:-2]

  @property
  def inputs(self) -> int:
    """Returns the length of a row of A: the inputs, times a convolution's window."""
    return math.prod(self.shapes[0][:-1]) if self.is_conv else self.shapes[0][-2]

  @property
  def outputs(self) -> list[int]:
    return [shape[-1] for shape in self.shapes]

  def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of A and B in the file, where experts and rank are one axis."""
    if self.is_conv:
      *window, inputs, outputs = self.shapes[0]
      return (rank, inputs, *window), (outputs, rank, *[1] * len(window))
    ranks = math.prod((rank, *self.experts))
    return (ranks, self.inputs), (sum(self.outputs), ranks)

  @property
  def magnitude_shape(self) -> tuple[int, ...]:
    """The shape of DoRA's magnitude in the file."""
    outputs = sum(self.outputs)
    return (1, outputs, *[1] * (len(self.shapes[0]) - 2)) if self.is_conv else (outputs,)

  def from_file(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns A (..., in, rank), of a convolution over its window, and B (..., rank, out).

    In the file, the rows of A are grouped by expert; in B the experts alternate.
    """
    if self.is_conv:
      return self.stored.to_ours(a), b.reshape(b.shape[:2]).T
    if not self.experts:
      return a.T, b.T
    a = a.reshape(*self.experts, -1, self.inputs)
    return a.swapaxes(-1, -2), b.reshape(len(b), -1, *self.experts).transpose(2, 1, 0)

  def to_file(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns A and B of the file from A (..., rank, in) and B (..., out, rank)."""
    if self.is_conv:
      shape_a, shape_b = self.factor_shapes(len(a))
      return a.reshape(shape_a), b.reshape(shape_b)
    if not self.experts:
      return a, b
    return a.reshape(-1, self.inputs), b.transpose(1, 2, 0).reshape(b.shape[1], -1)


def factor_names(module: Module, adapted: Sequence[Module]) -> tuple[str, str]:
  """Returns the names of A and B in the file.

  PEFT wraps a module once for each of its adapted parameters; the wrapper of the last one is
  outermost.

  Args:
    module: an adapted one.
    adapted: all adapted modules, in the order of the model's tensors.
  """
  name = PREFIX + module.name
  if module.stored.is_embedding:
    return f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"
  if module.stored.is_parameter:
    same = [other.name for other in adapted if other.module == module.module]
    name = PREFIX + module.module + ".base_layer" * (len(same) - 1 - same.index(module.name))
  return f"{name}.lora_A.weight", f"{name}.lora_B.weight"


def magnitude_name(module: Module) -> str:
  """Returns the name of DoRA's magnitude in the file."""
  return f"{PREFIX}{module.name}.{MAGNITUDE}"


def module_shapes(modules: Sequence[Module]) -> dict[str, tuple[int, int]]:
  """Returns the numbers of inputs and outputs of modules, by name."""
  return {module.name: (module.inputs, sum(module.outputs)) for module in modules}


def find_modules(tensors: Sequence[StoredTensor], leaves: Mapping[str, Any]) -> list[Module]:
  """Returns a model's linear layers, embeddings and convolutions, and the parameters like them."""

  def has_factors(stored: StoredTensor) -> bool:
    matrix = len(leaves[stored.paths[0]].shape) - len(stored.place) >= 2
    return stored.is_parameter or (matrix and stored.name.endswith(".weight"))

  return [Module(stored, leaves) for stored in tensors if has_factors(stored)]


def has_values(leaf: Any) -> bool:
  """Returns whether a leaf of the base model, quantized or not, is more than its shape."""
  return not any(isinstance(part, jax.ShapeDtypeStruct) for part in jax.tree.leaves(leaf))


def values_of(leaf: Any) -> jax.Array:
  """Returns a leaf of the base model as one array."""
  return jnp.asarray(dequantize(leaf))


def base_array(stored: StoredTensor, leaves: Mapping[str, Any]) -> np.ndarray:
  """Returns a tensor of the base model as in its files, from the leaves, in their dtype."""
  parts = [np.asarray(values_of(leaves[path]))[stored.place] for path in stored.paths]
  return stored.to_file(np.concatenate(parts, axis=-1))


def is_encoder(tensors: Sequence[StoredTensor]) -> bool:
  """Returns whether a model is an encoder, with or without a classifier."""
  return any("encoder.layer." in stored.name for stored in tensors)


def is_language_model(tensors: Sequence[StoredTensor]) -> bool:
  """Returns whether a model generates text: it has an embedding and is not an encoder."""
  return any(stored.is_embedding for stored in tensors) and not is_encoder(tensors)


def check_called(where: Path, adapted: Sequence[Module]) -> None:
  """Raises ValueError if `transformers` never calls the module of an adapted weight."""
  names = [module.name for module in adapted if module.name.endswith(".rel_embeddings")]
  if names:
    raise ValueError(
      f"{where}: transformers reads the weight of {names[0]} but never calls the module, so PEFT's "
      "adapter of it changes nothing, and lora_jax's would. Leave it out"
    )


def check_tied(where: Path, embeddings: Sequence[Module], tensors: Sequence[StoredTensor]) -> None:
  """Raises ValueError if a trained embedding is also the head, which PEFT would not train."""
  untied = is_encoder(tensors) or any(stored.name == "lm_head.weight" for stored in tensors)
  tied = [module.name for module in embeddings if module.is_input]
  if tied and not untied:
    raise ValueError(
      f"{where}: {tied[0]} is the head too (tied). PEFT trains only the lookup and lora_jax both "
      "uses, so they would differ. Leave it out, or untie the head: set tie_word_embeddings to "
      "false in config.json and save the embedding as lm_head.weight too"
    )
