"""Loads and saves GPT-2 as a Hugging Face folder, where query, key and value are one c_attn."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lora_jax.models.checkpoints.config_fields import (
  check_supported,
  read_fields,
  read_model_json,
)
from lora_jax.models.checkpoints.hub import (
  StoredTensor,
  check_tied,
  find_folder,
  open_tensors,
  save_folder,
)
from lora_jax.models.checkpoints.loaded_weights import float_dtype, weights_format
from lora_jax.models.checkpoints.recognize import check_layer_count
from lora_jax.models.checkpoints.stored import Loaded, load_params, tensors_of
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.models.parts.causal_lm import shapes_of

FIELDS = {  # ours: Hugging Face's
  "vocab_size": "vocab_size",
  "num_positions": "n_positions",
  "embed_dim": "n_embd",
  "num_layers": "n_layer",
  "num_heads": "n_head",
  "mlp_dim": "n_inner",
  "activation": "activation_function",
  "layer_norm_epsilon": "layer_norm_epsilon",
  "tie_head": "tie_word_embeddings",
}
DEFAULTS = {  # of `transformers`, where a config leaves them out
  "n_inner": None,
  "activation_function": "gelu_new",
  "layer_norm_epsilon": 1e-5,
  "tie_word_embeddings": True,
}
SUPPORTED = {
  "scale_attn_weights": True,
  "scale_attn_by_inverse_layer_idx": False,
  "add_cross_attention": False,
}
PREFIX, HEAD = "transformer.", "lm_head.weight"
LAYER = {  # the tensor: our leaves along its last axis
  "ln_1.weight": ("ln_1/scale",),
  "ln_1.bias": ("ln_1/bias",),
  "attn.c_attn.weight": ("attn/query/kernel", "attn/key/kernel", "attn/value/kernel"),
  "attn.c_attn.bias": ("attn/query/bias", "attn/key/bias", "attn/value/bias"),
  "attn.c_proj.weight": ("attn/out/kernel",),
  "attn.c_proj.bias": ("attn/out/bias",),
  "ln_2.weight": ("ln_2/scale",),
  "ln_2.bias": ("ln_2/bias",),
  "mlp.c_fc.weight": ("mlp/up/kernel",),
  "mlp.c_fc.bias": ("mlp/up/bias",),
  "mlp.c_proj.weight": ("mlp/down/kernel",),
  "mlp.c_proj.bias": ("mlp/down/bias",),
}
OUTSIDE = {
  "wte/embedding": "wte.weight",
  "wpe/embedding": "wpe.weight",
  "ln_f/scale": "ln_f.weight",
  "ln_f/bias": "ln_f.bias",
}
MASKS = re.compile(r".*\.attn\.(bias|masked_bias)")  # constants that old files hold


def load_gpt2(
  name: str | Path,
  *,
  param_dtype: Any = "float32",
  shardings: PyTree | Callable[[PyTree], PyTree] | None = None,
  **computation: Any,
) -> tuple[GPT2Config, PyTree]:
  """Loads a GPT-2 from a local folder or the hub.

  Args:
    name: a folder with config.json and safetensors, or a hub repository.
    param_dtype: to convert the weights to; or a format, as in `load_causal_lm`.
    shardings: of the params, each device reading its own part: a tree like theirs or a prefix of
      it, such as one `Sharding` for all; or a function from `params_shapes` to such a tree. None
      is the default device.
    **computation: fields of `GPT2Config` that the folder does not set: `dtype`,
      `scan_layers`, `remat`, `attention`.

  Returns:
    The model's config and params, `GPT2(config).apply({"params": params}, tokens)`.
  Raises:
    FileNotFoundError: if config.json or weights are missing.
    ValueError: if the folder is not of a supported GPT-2, or its tensors are missing,
      unexpected, misshapen or truncated.
  """
  folder = find_folder(name)
  config = read_config(folder, param_dtype=float_dtype(param_dtype), **computation)
  stored = stored_in(folder, config)
  unused = functools.partial(is_unused, config=config)
  weights = weights_format(param_dtype)
  params = load_params(folder, stored, params_shapes(config), shardings, unused, weights)
  return Loaded(config, params)


def stored_in(folder: Path, config: GPT2Config) -> list[StoredTensor]:
  """Returns the tensors of a folder's files, by their names there.

  Raises:
    ValueError: if they have other layers or another head than the config.
  """
  with open_tensors(folder) as tensors:
    check_layer_count(folder, tensors, "h", "n_layer", config.num_layers)
    if config.tie_head:
      check_tied(folder, tensors, HEAD, "transformer.wte.weight", "wte.weight")
    is_old = any(name.startswith(("wte.", "h.")) for name in tensors)
  stored = stored_tensors(config)
  if not is_old:
    return stored
  return [tensor._replace(name=tensor.name.removeprefix(PREFIX)) for tensor in stored]


def is_unused(tensor: str, config: GPT2Config) -> bool:
  """Returns whether a tensor is a constant of old files, or a stored copy of a tied head."""
  return bool(MASKS.fullmatch(tensor)) or (config.tie_head and tensor == HEAD)


def params_shapes(config: GPT2Config) -> PyTree:
  """Returns the params' tree of `ShapeDtypeStruct`s."""
  return shapes_of(GPT2(config))


def read_config(folder: str | Path, **computation: Any) -> GPT2Config:
  """Returns the config of the GPT-2 in a local folder.

  Raises:
    ValueError: if it is not a GPT-2, or needs an option that is not supported.
  """
  path, fields = read_model_json(folder, ["gpt2"])
  check_supported(path, fields, SUPPORTED)
  try:
    return GPT2Config(**read_fields(GPT2Config, DEFAULTS | fields, FIELDS), **computation)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def save_gpt2(
  folder: str | Path,
  config: GPT2Config,
  params: PyTree,
  tokenizer_from: str | Path | None = None,
  end_of_text_id: int | None = None,
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a GPT-2 as a new folder that `transformers` and `load_gpt2` read.

  Args:
    folder: the new folder.
    config: of the model.
    params: of the model, unrolled or scanned, in the dtype to save; merged, if it was adapted.
    tokenizer_from: a folder to copy the tokenizer's files from.
    end_of_text_id: config.json's bos_token_id and eos_token_id.
    max_shard_bytes: the largest size of one file.
  Raises:
    FileExistsError: if there is such a folder.
    ValueError: if the params are not those of the config.
  """
  written = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    **{key: getattr(config, name) for name, key in FIELDS.items()},
    "bos_token_id": end_of_text_id,
    "eos_token_id": end_of_text_id,
    "torch_dtype": str(jnp.result_type(*jax.tree.leaves(params))),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
  }
  tensors = tensors_of(stored_tensors(config), params_shapes(config), params)
  save_folder(folder, written, tensors, tokenizer_from, max_shard_bytes)


def stored_tensors(config: GPT2Config) -> list[StoredTensor]:
  """Returns the tensors of a GPT-2 in `transformers`, and the leaves that they hold."""
  stored = [
    StoredTensor(PREFIX + name, (path,), is_embedding=path.endswith("embedding"))
    for path, name in OUTSIDE.items()
  ]
  for i in range(config.num_layers):
    layer, stack = (i, "h") if config.scan_layers else (None, f"h_{i}")
    for name, paths in LAYER.items():
      leaves = tuple(f"{stack}/{path}" for path in paths)
      stored.append(StoredTensor(f"{PREFIX}h.{i}.{name}", leaves, layer))
  if not config.tie_head:
    stored.append(StoredTensor(HEAD, ("lm_head/kernel",), transposed=True))
  return stored
