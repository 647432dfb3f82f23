"""Loads and saves the Llama family as Hugging Face folders."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

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
from lora_jax.models.llama.config_json import (
  FIELDS,
  family_of,
  read_config,
  written_config,
)
from lora_jax.models.llama.model import Llama, LlamaConfig
from lora_jax.models.parts.causal_lm import shapes_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = {  # our leaf: the tensor, and whether it is transposed
  "attn_norm/scale": ("input_layernorm.weight", False),
  "attn/query/kernel": ("self_attn.q_proj.weight", True),
  "attn/query/bias": ("self_attn.q_proj.bias", False),
  "attn/key/kernel": ("self_attn.k_proj.weight", True),
  "attn/key/bias": ("self_attn.k_proj.bias", False),
  "attn/value/kernel": ("self_attn.v_proj.weight", True),
  "attn/value/bias": ("self_attn.v_proj.bias", False),
  "attn/query_norm/scale": ("self_attn.q_norm.weight", False),
  "attn/key_norm/scale": ("self_attn.k_norm.weight", False),
  "attn/out/kernel": ("self_attn.o_proj.weight", True),
  "attn/out/bias": ("self_attn.o_proj.bias", False),
  "mlp_norm/scale": ("post_attention_layernorm.weight", False),
  "mlp/gate/kernel": ("mlp.gate_proj.weight", True),
  "mlp/gate/bias": ("mlp.gate_proj.bias", False),
  "mlp/up/kernel": ("mlp.up_proj.weight", True),
  "mlp/up/bias": ("mlp.up_proj.bias", False),
  "mlp/down/kernel": ("mlp.down_proj.weight", True),
  "mlp/down/bias": ("mlp.down_proj.bias", False),
  "mlp/router/kernel": ("mlp.gate.weight", True),
  "mlp/shared/gate/kernel": ("mlp.shared_expert.gate_proj.weight", True),
  "mlp/shared/up/kernel": ("mlp.shared_expert.up_proj.weight", True),
  "mlp/shared/down/kernel": ("mlp.shared_expert.down_proj.weight", True),
  "mlp/shared_gate/kernel": ("mlp.shared_expert_gate.weight", True),
}
EXPERTS = {  # in published files: tensors of each expert
  "mixtral": {"gate": "w1", "up": "w3", "down": "w2"},
  "qwen2_moe": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
  "qwen3_moe": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
}
FUSED = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}  # all experts in one tensor


def load_llama(
  name: str | Path,
  *,
  param_dtype: Any = "float32",
  shardings: PyTree | Callable[[PyTree], PyTree] | None = None,
  **computation: Any,
) -> tuple[LlamaConfig, PyTree]:
  """Loads a model of the Llama family from a local folder or the hub.

  Args:
    name: a folder with config.json and safetensors, or a hub repository.
    param_dtype: to convert the weights to; or a format, as in `load_causal_lm`.
    shardings: of the params, each device reading its own part: a tree like theirs or a prefix of
      it, or a function from `params_shapes` to such a tree. None is the default device.
    **computation: fields of `LlamaConfig` that the folder does not set: `dtype`,
      `scan_layers`, `remat`, `attention`.

  Returns:
    The model's config and params, `Llama(config).apply({"params": params}, tokens)`.
  Raises:
    FileNotFoundError: if config.json or weights are missing.
    ValueError: if the folder is not of a supported model of the family, or its tensors are
      missing, unexpected, misshapen or truncated.
  """
  folder = find_folder(name)
  config = read_config(folder, param_dtype=float_dtype(param_dtype), **computation)
  params = load_params(
    folder,
    stored_in(folder, config),
    params_shapes(config),
    shardings,
    functools.partial(is_unused, config=config),
    weights_format(param_dtype),
  )
  return Loaded(config, params)


def is_unused(tensor: str, config: LlamaConfig) -> bool:
  """Returns whether a tensor is a constant of old files, or a stored copy of a tied head."""
  return tensor.endswith("rotary_emb.inv_freq") or (config.tie_head and tensor == HEAD)


def stored_in(folder: Path, config: LlamaConfig) -> list[StoredTensor]:
  """Returns the tensors of a folder's files, with fused or separate experts.

  Raises:
    ValueError: if they have other layers or another head than the config.
  """
  with open_tensors(folder) as tensors:
    check_layer_count(folder, tensors, "layers", FIELDS["num_layers"], config.num_layers)
    if config.tie_head:
      check_tied(folder, tensors, HEAD, EMBEDDING)
    fused = any(".experts.gate_up_proj" in name for name in tensors)
  return stored_tensors(config, published=not fused)


@functools.cache
def params_shapes(config: LlamaConfig) -> PyTree:
  """Returns the params' tree of `ShapeDtypeStruct`s."""
  return shapes_of(Llama(config))


def stored_tensors(config: LlamaConfig, *, published: bool = False) -> list[StoredTensor]:
  """Returns the tensors of a model in `transformers`, and the leaves that they hold.

  Args:
    config: of the model.
    published: whether to name them as in published folders, where each expert has its own tensors;
      otherwise as in the module, where a layer's experts are fused. Adapters use the latter.
  """
  shapes = jax.tree_util.tree_leaves_with_path(params_shapes(config))
  paths = {jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in shapes}
  embedding = StoredTensor(EMBEDDING, ("token_embedding/embedding",), is_embedding=True)
  stored = [embedding._replace(is_scaled=config.scale_embedding)]
  for i in range(config.num_layers):
    layer, stack = (i, "layers") if config.scan_layers else (None, f"layers_{i}")
    layer_tensors = [
      StoredTensor(
        name,
        (f"{stack}/{leaf}",),
        layer,
        transposed,
        is_parameter=leaf == "mlp/router/kernel" and not published,
      )
      for leaf, (name, transposed) in LAYER.items()
      if f"{stack}/{leaf}" in paths
    ]
    if config.mixture is not None:
      layer_tensors += _experts(config, f"{stack}/mlp/experts", layer, published)
    for tensor in layer_tensors:
      name = tensor.name
      if published and config.mixture is not None and family_of(config) == "mixtral":
        name = re.sub(r"^mlp\.", "block_sparse_moe.", name)
      stored.append(tensor._replace(name=f"model.layers.{i}.{name}"))
  stored.append(StoredTensor("model.norm.weight", ("final_norm/scale",)))
  if not config.tie_head:
    stored.append(StoredTensor(HEAD, ("lm_head/kernel",), transposed=True))
  return stored


def _experts(
  config: LlamaConfig, path: str, layer: int | None, published: bool
) -> list[StoredTensor]:
  """Returns the tensors of a layer's experts: one set for each, or two fused ones."""
  assert config.mixture is not None, "a model with experts"
  if not published:
    return [
      StoredTensor(
        f"mlp.experts.{name}",
        tuple(f"{path}/{leaf}" for leaf in leaves),
        layer,
        transposed=True,
        is_parameter=True,
      )
      for name, leaves in FUSED.items()
    ]
  return [
    StoredTensor(f"mlp.experts.{i}.{name}.weight", (f"{path}/{leaf}",), layer, True, expert=i)
    for i in range(config.mixture.num_experts)
    for leaf, name in EXPERTS[family_of(config)].items()
  ]


def save_llama(
  folder: str | Path,
  config: LlamaConfig,
  params: PyTree,
  tokenizer_from: str | Path | None = None,
  end_of_text_id: int | None = None,
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a model as a new folder that `transformers` and `load_llama` read.

  Arguments and errors as in `save_gpt2`.
  """
  dtype = str(jnp.result_type(*jax.tree.leaves(params)))
  written = written_config(config, end_of_text_id) | {"torch_dtype": dtype}
  stored = stored_tensors(config, published=True)
  tensors = tensors_of(stored, params_shapes(config), params)
  save_folder(folder, written, tensors, tokenizer_from, max_shard_bytes)
