"""The config.json of the Llama family: read, and written for `transformers`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.files import read_json
from lora_jax.models.llama.model import LlamaConfig, MixtureConfig, RopeScaling

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # model_type: architecture, what it implies
  "llama": ("LlamaForCausalLM", {}),
  "mistral": ("MistralForCausalLM", {}),
  "mixtral": ("MixtralForCausalLM", {}),
  "qwen2": ("Qwen2ForCausalLM", {"qkv_bias": True}),
  "qwen2_moe": ("Qwen2MoeForCausalLM", {}),
  "qwen3": ("Qwen3ForCausalLM", {"qk_norm": True}),
  "qwen3_moe": ("Qwen3MoeForCausalLM", {"qk_norm": True}),
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
EXPERT_FIELDS = (
  "num_experts",
  "num_experts_per_tok",
  "moe_intermediate_size",
  "shared_expert_intermediate_size",
)
SLIDING, FULL = "sliding_attention", "full_attention"
TANH = "gelu_pytorch_tanh"
DEFAULTS: dict[str, dict[str, Any]] = {  # of `transformers`, where a config leaves them out
  "llama": {},
  "mistral": {"sliding_window": 4096},
  "mixtral": {
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_experts": 8,
    "num_experts_per_tok": 2,
  },
  "qwen2": {"sliding_window": 4096, "max_window_layers": 28},
  "qwen2_moe": {
    "sliding_window": 4096,
    "max_window_layers": 28,
    "qkv_bias": True,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "norm_topk_prob": False,
  },
  "qwen3": {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
  "qwen3_moe": {
    "sliding_window": 4096,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
  },
  "gemma": {"hidden_act": TANH, "head_dim": 256, "tie_word_embeddings": True},
}


def read_config(folder: str | Path, **computation: Any) -> LlamaConfig:
  """Returns the config of the model in a local folder.

  Raises:
    ValueError: if it is none of the family, or one that is computed otherwise.
  """
  path = Path(folder) / "config.json"
  fields = read_json(path)
  kind = fields.get("model_type")
  if kind not in FAMILIES:
    raise ValueError(f"{path}: expected model_type {', '.join(FAMILIES)}, got {kind!r}")
  fields = {"hidden_act": "silu", "rms_norm_eps": 1e-6, **DEFAULTS[kind], **fields}
  if "num_local_experts" in fields and kind in ("mixtral", "qwen3_moe"):
    fields["num_experts"] = fields["num_local_experts"]
  if fields.get("num_key_value_heads") is None:
    fields["num_key_value_heads"] = fields.get("num_attention_heads")
  missing = [key for key in FIELDS.values() if key not in fields]
  if missing:
    raise ValueError(f"{path}: missing {', '.join(missing)}")
  for key in (*FIELDS.values(), "head_dim", *EXPERT_FIELDS):
    value, needed = fields.get(key), key in FIELDS.values() or key in DEFAULTS[kind]
    if (type(value) is not int or value < 1) and (needed or value is not None):
      raise ValueError(f"{path}: expected a positive integer for {key}, got {value!r}")
  if fields.get("use_bidirectional_attention"):
    raise ValueError(f"{path}: use_bidirectional_attention is not supported")
  bias = kind in ("llama", "qwen3", "qwen3_moe", "gemma") and bool(fields.get("attention_bias"))
  biases = {"qkv_bias": bias, "out_bias": bias}
  if kind == "qwen2_moe":
    biases["qkv_bias"] = bool(fields["qkv_bias"])
  biases["mlp_bias"] = kind == "llama" and bool(fields.get("mlp_bias"))
  try:
    theta, scaling = _rotation(fields)
    sizes = {name: fields[key] for name, key in FIELDS.items()}
    if (mixture := _mixture(fields)) is not None and kind != "mixtral":
      sizes["mlp_dim"] = fields["moe_intermediate_size"]
    return LlamaConfig(
      **sizes,
      **biases | FAMILIES[kind][1],
      mixture=mixture,
      head_dim=fields.get("head_dim"),
      activation=_activation(fields),
      rms_norm_epsilon=fields["rms_norm_eps"],
      rope_theta=theta,
      rope_scaling=scaling,
      **_window(fields),
      tie_head=bool(fields.get("tie_word_embeddings", False)),
      **computation,
    )
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _mixture(fields: Mapping[str, Any]) -> MixtureConfig | None:
  """Returns the experts of all layers. Raises ValueError if only some layers have any."""
  kind = fields["model_type"]
  if kind not in ("mixtral", "qwen2_moe", "qwen3_moe"):
    return None
  if fields.get("decoder_sparse_step", 1) != 1 or fields.get("mlp_only_layers"):
    raise ValueError(
      "layers with and without experts in one model are not supported: decoder_sparse_step is "
      f"{fields.get('decoder_sparse_step')!r}, expected 1, and mlp_only_layers "
      f"{fields.get('mlp_only_layers')!r}, expected none"
    )
  return MixtureConfig(
    fields["num_experts"],
    fields["num_experts_per_tok"],
    renormalize=kind == "mixtral" or bool(fields["norm_topk_prob"]),
    shared_dim=fields["shared_expert_intermediate_size"] if kind == "qwen2_moe" else None,
  )


def _activation(fields: Mapping[str, Any]) -> str:
  """Returns the activation's name; `gelu` in Gemma's first files means its tanh form."""
  gemma = fields["model_type"] == "gemma"
  name = (fields.get("hidden_activation") if gemma else None) or fields["hidden_act"]
  return TANH if gemma and name == "gelu" else name


def _window(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the sliding window and the layers that have it, as fields of `LlamaConfig`."""
  kind, window = fields["model_type"], fields.get("sliding_window")
  if kind in ("mistral", "mixtral"):
    return {"sliding_window": window}
  if not kind.startswith("qwen") or not window or not fields.get("use_sliding_window"):
    return {}
  if kind == "qwen3_moe":
    return {"sliding_window": window}
  first, count = fields["max_window_layers"], fields["num_hidden_layers"]
  slides = [i < first and i % 2 == 0 if kind == "qwen2_moe" else i >= first for i in range(count)]
  if (types := fields.get("layer_types")) is not None:
    if len(types) != count or not set(types) <= {SLIDING, FULL}:
      raise ValueError(f"expected layer_types to be {count} of {SLIDING}, {FULL}; got {types}")
    slides = [layer_type == SLIDING for layer_type in types]
  layers = tuple(i for i in range(count) if slides[i])
  if not layers:
    return {}
  return {"sliding_window": window, "window_layers": None if all(slides) else layers}


def _rotation(fields: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
  """Returns the base of the rotation and its scaling, by new and old names."""
  rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}

  def number(name: str) -> float:
    value = rope.get(name, fields.get(name, 10000.0) if name == "rope_theta" else None)
    if not isinstance(value, int | float) or value <= 0:
      raise ValueError(f"expected a positive number for the rotation's {name}, got {value!r}")
    return value

  theta = float(number("rope_theta"))
  kind = rope.get("rope_type", rope.get("type", "default"))
  if rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0)) != 1.0:
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


def written_config(config: LlamaConfig, end_of_text_id: int | None) -> dict[str, Any]:
  """Returns what config.json holds of a model, but for the dtype of its weights.

  Raises:
    ValueError: if `transformers` has no model that computes so.
  """
  kind, window = family_of(config), config.sliding_window
  written = {
    "model_type": kind,
    "architectures": [FAMILIES[kind][0]],
    **{key: getattr(config, name) for name, key in FIELDS.items()},
    "head_dim": config.head_size,
    "hidden_act": config.activation,
    "rms_norm_eps": config.rms_norm_epsilon,
    "rope_theta": config.rope_theta,
    **_written_rotation(config),
    "attention_bias": config.qkv_bias and not kind.startswith("qwen2"),
    "mlp_bias": config.mlp_bias,
    "sliding_window": window,
    "use_sliding_window": window is not None,
    "tie_word_embeddings": config.tie_head,
    "bos_token_id": end_of_text_id,
    "eos_token_id": end_of_text_id,
  }
  if kind in ("qwen2", "qwen2_moe", "qwen3"):
    slides = config.window_layers or (() if window is None else range(config.num_layers))
    written |= {
      "layer_types": [SLIDING if i in slides else FULL for i in range(config.num_layers)],
      "max_window_layers": min(slides, default=config.num_layers),
    }
  if (mixture := config.mixture) is not None:
    written |= {
      "num_local_experts" if kind == "mixtral" else "num_experts": mixture.num_experts,
      "num_experts_per_tok": mixture.experts_per_token,
    }
    if kind != "mixtral":
      written |= {
        "moe_intermediate_size": config.mlp_dim,
        "norm_topk_prob": mixture.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
      }
  if kind == "qwen2_moe":
    assert mixture is not None, "qwen2_moe has experts"
    written |= {
      "shared_expert_intermediate_size": mixture.shared_dim,
      "qkv_bias": config.qkv_bias,
    }
  return written


def _written_rotation(config: LlamaConfig) -> dict[str, Any]:
  """Returns the rotation by new and old names."""
  rope: dict[str, Any] = {"rope_type": "default"}
  if (scaling := config.rope_scaling) is not None:
    rope = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
      rope |= {
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_positions,
      }
  return {
    "rope_parameters": rope | {"rope_theta": config.rope_theta},
    "rope_scaling": None if config.rope_scaling is None else rope,
  }


def family_of(config: LlamaConfig) -> str:
  """Returns the model type that computes as a config says.

  Raises:
    ValueError: if `transformers` has none.
  """
  biases = config.qkv_bias, config.out_bias, config.mlp_bias
  mixture = config.mixture
  if config.norm_offset or config.scale_embedding:
    kind = "gemma"
    fits = config.norm_offset == 1 and config.scale_embedding and not any(biases)
    fits = fits and not config.qk_norm and config.sliding_window is None and mixture is None
  elif mixture is not None and mixture.shared_dim is not None:
    kind, fits = "qwen2_moe", not config.qk_norm and not config.out_bias
  elif mixture is not None and not config.qk_norm:
    kind, fits = "mixtral", mixture.renormalize and not any(biases)
  elif config.qk_norm:
    kind = "qwen3" if mixture is None else "qwen3_moe"
    fits = config.qkv_bias == config.out_bias and not config.mlp_bias
  elif config.qkv_bias and not config.out_bias:
    kind, fits = "qwen2", not config.mlp_bias
  elif config.sliding_window is not None:
    kind, fits = "mistral", not any(biases)
  else:
    kind, fits = "llama", config.qkv_bias == config.out_bias
  fits = fits and (config.window_layers is None or kind in ("qwen2", "qwen2_moe", "qwen3"))
  if not fits:
    raise ValueError(f"`transformers` has no model that computes as {config} says")
  return kind
