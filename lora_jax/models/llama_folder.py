"""The Llama family from and to Hugging Face folders."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models.files import read_json
from lora_jax.models.hub import StoredTensor, find_folder, open_tensors, save_folder
from lora_jax.models.llama import Llama, LlamaConfig, RopeScaling
from lora_jax.models.stored import load_params, tensors_of

PyTree = Any

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # model_type: architecture, what it implies
  "llama": ("LlamaForCausalLM", {}),
  "mistral": ("MistralForCausalLM", {}),
  "qwen2": ("Qwen2ForCausalLM", {"qkv_bias": True}),
  "qwen3": ("Qwen3ForCausalLM", {"qk_norm": True}),
  "gemma": ("GemmaForCausalLM", {"norm_offset": 1.0, "scale_embedding": True}),
}
FIELDS = {  # ours: Hugging Face's
  "vocab_size": "vocab_size",
  "num_positions": "max_position_embeddings",
  "embed_dim": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "num_kv_heads": "num_key_value_heads",
  "mlp_dim": "intermediate_size",
}
TANH = "gelu_pytorch_tanh"
DEFAULTS: dict[str, dict[str, Any]] = {  # of `transformers`, where a config leaves them out
  "llama": {},
  "mistral": {"sliding_window": 4096},
  "qwen2": {"max_window_layers": 28},
  "qwen3": {"max_window_layers": 28, "head_dim": 128},
  "gemma": {"hidden_act": TANH, "head_dim": 256, "tie_word_embeddings": True},
}
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
}


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
    param_dtype: that the weights are brought to.
    shardings: where the params lie, each device reading its own part: a tree like theirs or
      a prefix of it, or a function from `params_shapes` to such a tree. None is the default
      device.
    **computation: fields of `LlamaConfig` that the folder does not give: `dtype`,
      `scan_layers`, `remat`, `attention`.

  Returns:
    The model's config and params, `Llama(config).apply({"params": params}, tokens)`.
  Raises:
    FileNotFoundError: if config.json or weights are missing.
    ValueError: if the folder holds no model of the family that is computed as ours is, or its
      tensors are missing, unexpected, mis-shaped or truncated.
  """
  folder = find_folder(name)
  config = read_config(folder, param_dtype=param_dtype, **computation)

  def ignored(tensor: str) -> bool:  # constants of old files, and a tied head that is written out
    return tensor.endswith("rotary_emb.inv_freq") or (config.tie_head and tensor == HEAD)

  if config.tie_head:
    _check_tied(folder)
  return config, load_params(
    folder, stored_tensors(config), params_shapes(config), shardings, ignored
  )


def _check_tied(folder: Path) -> None:
  """Raises ValueError if a head stands in the files and is not the embedding."""
  with open_tensors(folder) as tensors:
    written_out = {HEAD, EMBEDDING} <= set(tensors)
    if written_out and not np.array_equal(tensors.read(HEAD), tensors.read(EMBEDDING)):
      raise ValueError(
        f"{folder}: {HEAD} differs from {EMBEDDING}, but config.json says that they are tied. Set "
        "tie_word_embeddings to false there"
      )


def params_shapes(config: LlamaConfig) -> PyTree:
  """Returns the params' tree of `ShapeDtypeStruct`s."""
  tokens = jax.ShapeDtypeStruct((1, 1), "int32")
  return jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)["params"]


def stored_tensors(config: LlamaConfig) -> list[StoredTensor]:
  """Returns the tensors of a model in `transformers`, and which of our leaves they hold."""
  shapes = jax.tree_util.tree_leaves_with_path(params_shapes(config))
  paths = {jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in shapes}
  stored = [StoredTensor(EMBEDDING, ("token_embedding/embedding",), is_embedding=True)]
  for i in range(config.num_layers):
    layer, stack = (i, "layers") if config.scan_layers else (None, f"layers_{i}")
    for leaf, (name, transposed) in LAYER.items():
      if f"{stack}/{leaf}" in paths:
        ours = (f"{stack}/{leaf}",)
        stored.append(StoredTensor(f"model.layers.{i}.{name}", ours, layer, transposed))
  stored.append(StoredTensor("model.norm.weight", ("final_norm/scale",)))
  if not config.tie_head:
    stored.append(StoredTensor(HEAD, ("lm_head/kernel",), transposed=True))
  return stored


def read_config(folder: str | Path, **computation: Any) -> LlamaConfig:
  """Returns the config of the model in a local folder.

  Raises:
    ValueError: if it is none of the family, or one that is computed otherwise.
  """
  path = Path(folder) / "config.json"
  given = read_json(path)
  kind = given.get("model_type")
  if kind not in FAMILIES:
    raise ValueError(f"{path}: expected model_type {', '.join(FAMILIES)}, got {kind!r}")
  given = {"hidden_act": "silu", "rms_norm_eps": 1e-6, **DEFAULTS[kind], **given}
  if given.get("num_key_value_heads") is None:
    given["num_key_value_heads"] = given.get("num_attention_heads")
  missing = [key for key in FIELDS.values() if key not in given]
  if missing:
    raise ValueError(f"{path}: missing {', '.join(missing)}")
  for key in (*FIELDS.values(), "head_dim"):
    value = given.get(key)
    if (type(value) is not int or value < 1) and not (key == "head_dim" and value is None):
      raise ValueError(f"{path}: expected a positive integer for {key}, got {value!r}")
  if given.get("use_bidirectional_attention"):
    raise ValueError(f"{path}: use_bidirectional_attention is not supported")
  bias = kind in ("llama", "qwen3", "gemma") and bool(given.get("attention_bias"))
  biases = {"qkv_bias": bias, "out_bias": bias}
  biases["mlp_bias"] = kind == "llama" and bool(given.get("mlp_bias"))
  try:
    theta, scaling = _rotation(given)
    return LlamaConfig(
      **{ours: given[theirs] for ours, theirs in FIELDS.items()},
      **biases | FAMILIES[kind][1],
      head_dim=given.get("head_dim"),
      activation=_activation(given),
      rms_norm_epsilon=given["rms_norm_eps"],
      rope_theta=theta,
      rope_scaling=scaling,
      sliding_window=_window(given),
      tie_head=bool(given.get("tie_word_embeddings", False)),
      **computation,
    )
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _activation(given: Mapping[str, Any]) -> str:
  """Returns the activation's name; `gelu` in Gemma's first files means its tanh form."""
  gemma = given["model_type"] == "gemma"
  name = (given.get("hidden_activation") if gemma else None) or given["hidden_act"]
  return TANH if gemma and name == "gelu" else name


def _window(given: Mapping[str, Any]) -> int | None:
  """Returns the sliding window of all layers. Raises ValueError if only some have one."""
  kind, window = given["model_type"], given.get("sliding_window")
  if kind == "mistral":
    return window
  if kind not in ("qwen2", "qwen3") or window is None or not given.get("use_sliding_window"):
    return None
  first, count = given["max_window_layers"], given["num_hidden_layers"]
  by_number = ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
  kinds = set(given.get("layer_types") or by_number)
  if len(kinds) > 1:
    raise ValueError("layers with and without a sliding window in one model are not supported yet")
  return window if kinds == {"sliding_attention"} else None


def _rotation(given: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
  """Returns the base of the rotation and its scaling, by new and old names."""
  rope = given.get("rope_scaling") or given.get("rope_parameters") or {}

  def number(name: str) -> float:
    value = rope.get(name, given.get(name, 10000.0) if name == "rope_theta" else None)
    if not isinstance(value, int | float) or value <= 0:
      raise ValueError(f"expected a positive number for the rotation's {name}, got {value!r}")
    return value

  theta = float(number("rope_theta"))
  kind = rope.get("rope_type", rope.get("type", "default"))
  if rope.get("partial_rotary_factor", given.get("partial_rotary_factor", 1.0)) != 1.0:
    raise ValueError("a rotation of a part of each head is not supported")
  if kind == "default":
    return theta, None
  if kind == "linear":
    return theta, RopeScaling("linear", number("factor"))
  if kind == "llama3":
    low, high = number("low_freq_factor"), number("high_freq_factor")
    first = int(number("original_max_position_embeddings"))
    return theta, RopeScaling("llama3", number("factor"), low, high, first)
  raise ValueError(f"rope_type {kind!r} is not supported; expected default, linear or llama3")


def save_llama(
  folder: str | Path,
  config: LlamaConfig,
  params: PyTree,
  tokenizer_from: str | Path | None = None,
  end_of_text_id: int | None = None,
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a model as a new folder that `transformers` and `load_llama` read.

  Arguments and errors as of `save_gpt2`.
  """
  kind = _family(config)
  rope: dict[str, Any] = {"rope_type": "default"}
  if (scaling := config.rope_scaling) is not None:
    rope = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
      rope |= {
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_positions,
      }
  window = config.sliding_window
  written = {
    "model_type": kind,
    "architectures": [FAMILIES[kind][0]],
    **{theirs: getattr(config, ours) for ours, theirs in FIELDS.items()},
    "head_dim": config.head_size,
    "hidden_act": config.activation,
    "rms_norm_eps": config.rms_norm_epsilon,
    "rope_theta": config.rope_theta,
    "rope_parameters": rope | {"rope_theta": config.rope_theta},
    "rope_scaling": None if config.rope_scaling is None else rope,
    "attention_bias": config.qkv_bias and kind != "qwen2",
    "mlp_bias": config.mlp_bias,
    "sliding_window": window,
    "use_sliding_window": window is not None,
    "tie_word_embeddings": config.tie_head,
    "bos_token_id": end_of_text_id,
    "eos_token_id": end_of_text_id,
    "torch_dtype": str(jnp.result_type(*jax.tree.leaves(params))),
  }
  if kind in ("qwen2", "qwen3"):
    written |= {"max_window_layers": 0 if window is not None else config.num_layers}
  tensors = tensors_of(stored_tensors(config), params_shapes(config), params)
  save_folder(folder, written, tensors, tokenizer_from, max_shard_bytes)


def _family(config: LlamaConfig) -> str:
  """Returns the model type that computes as a config says."""
  biases = config.qkv_bias, config.out_bias, config.mlp_bias
  if config.norm_offset or config.scale_embedding:
    kind = "gemma"
    fits = config.norm_offset == 1 and config.scale_embedding and not any(biases)
    fits = fits and not config.qk_norm and config.sliding_window is None
  elif config.qk_norm:
    kind, fits = "qwen3", config.qkv_bias == config.out_bias and not config.mlp_bias
  elif config.qkv_bias and not config.out_bias:
    kind, fits = "qwen2", not config.mlp_bias
  elif config.sliding_window is not None:
    kind, fits = "mistral", not any(biases)
  else:
    kind, fits = "llama", config.qkv_bias == config.out_bias
  if not fits:
    raise ValueError(f"`transformers` has no model that computes as {config} says")
  return kind
