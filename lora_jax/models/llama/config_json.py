"""Reads config.json of the Llama family, and writes it for `transformers`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

from lora_jax.fields import CountOrZero, Positive, read_value
from lora_jax.models.checkpoints.config_fields import read_fields, read_model_json
from lora_jax.models.llama.model import LlamaConfig, MixtureConfig, RopeScaling

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # model_type: architecture, implied fields
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
  "rms_norm_epsilon": "rms_norm_eps",
}
SLIDING, FULL = "sliding_attention", "full_attention"
HINTS = get_type_hints(LlamaConfig, include_extras=True)
LayerType = Literal["sliding_attention", "full_attention"]
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
    ValueError: if it is not of the family, or needs an option that is not supported.
  """
  path, fields = read_model_json(folder, FAMILIES)
  kind = fields["model_type"]
  fields = {"hidden_act": "silu", "rms_norm_eps": 1e-6, **DEFAULTS[kind], **fields}
  if "num_local_experts" in fields and kind in ("mixtral", "qwen3_moe"):
    fields["num_experts"] = fields["num_local_experts"]
  if fields.get("num_key_value_heads") is None:
    fields["num_key_value_heads"] = fields.get("num_attention_heads")
  keys = dict(FIELDS)
  if kind in ("qwen2_moe", "qwen3_moe"):
    keys["mlp_dim"] = "moe_intermediate_size"
  if fields.get("head_dim") is not None or "head_dim" in DEFAULTS[kind]:
    keys["head_dim"] = "head_dim"
  try:
    _check_unsupported(fields)
    return LlamaConfig(
      **read_fields(LlamaConfig, fields, keys),
      **_biases(fields) | FAMILIES[kind][1],
      **_rotation(fields),
      **_window(fields),
      mixture=_mixture(fields),
      activation=_activation(fields),
      tie_head=_flag(fields, "tie_word_embeddings"),
      **computation,
    )
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _check_unsupported(fields: Mapping[str, Any]) -> None:
  if _flag(fields, "use_bidirectional_attention"):
    raise ValueError("use_bidirectional_attention is not supported")
  if fields["model_type"] in ("qwen2_moe", "qwen3_moe") and (
    fields.get("decoder_sparse_step", 1) != 1 or fields.get("mlp_only_layers")
  ):
    raise ValueError(
      "layers with and without experts in one model are not supported: decoder_sparse_step is "
      f"{fields.get('decoder_sparse_step')!r}, expected 1, and mlp_only_layers "
      f"{fields.get('mlp_only_layers')!r}, expected none"
    )


def _flag(fields: Mapping[str, Any], key: str) -> bool:
  """Returns a field that is true or false; false if it is missing or null."""
  return bool(read_value(bool | None, fields.get(key), key))


def _biases(fields: Mapping[str, Any]) -> dict[str, bool]:
  """Returns the biases, as fields of `LlamaConfig`."""
  kind = fields["model_type"]
  bias = kind in ("llama", "qwen3", "qwen3_moe", "gemma") and _flag(fields, "attention_bias")
  return {
    "qkv_bias": _flag(fields, "qkv_bias") if kind == "qwen2_moe" else bias,
    "out_bias": bias,
    "mlp_bias": kind == "llama" and _flag(fields, "mlp_bias"),
  }


def _mixture(fields: Mapping[str, Any]) -> MixtureConfig | None:
  """Returns the experts of all layers; None if there are none."""
  kind = fields["model_type"]
  if kind not in ("mixtral", "qwen2_moe", "qwen3_moe"):
    return None
  keys = {"num_experts": "num_experts", "experts_per_token": "num_experts_per_tok"}
  if kind == "qwen2_moe":
    keys["shared_dim"] = "shared_expert_intermediate_size"
  return MixtureConfig(
    **read_fields(MixtureConfig, fields, keys),
    renormalize=kind == "mixtral" or _flag(fields, "norm_topk_prob"),
  )


def _activation(fields: Mapping[str, Any]) -> str:
  """Returns the activation's name; `gelu` in Gemma's first files means its tanh form."""
  gemma = fields["model_type"] == "gemma"
  key = "hidden_activation" if gemma and fields.get("hidden_activation") else "hidden_act"
  name = TANH if gemma and fields[key] == "gelu" else fields[key]
  return read_value(HINTS["activation"], name, key)


def _window(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the sliding window and its layers, as fields of `LlamaConfig`."""
  kind = fields["model_type"]
  if kind in ("llama", "gemma"):
    return {}
  if kind.startswith("qwen") and not _flag(fields, "use_sliding_window"):
    return {}
  window = read_value(HINTS["sliding_window"], fields.get("sliding_window"), "sliding_window")
  if window is None or kind in ("mistral", "mixtral", "qwen3_moe"):
    return {"sliding_window": window}
  count = fields["num_hidden_layers"]
  if (types := fields.get("layer_types")) is not None:
    types = read_value(tuple[LayerType, ...], types, "layer_types")
    if len(types) != count:
      raise ValueError(
        f"layer_types must have num_hidden_layers = {count} items of {SLIDING} or {FULL}, got "
        f"{len(types)}"
      )
    slides = [layer_type == SLIDING for layer_type in types]
  else:
    first = read_value(CountOrZero, fields["max_window_layers"], "max_window_layers")
    moe = kind == "qwen2_moe"
    slides = [i < first and i % 2 == 0 if moe else i >= first for i in range(count)]
  layers = tuple(i for i in range(count) if slides[i])
  if not layers:
    return {}
  return {"sliding_window": window, "window_layers": None if all(slides) else layers}


def _rotation(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the base of the rotation and its scaling, as fields of `LlamaConfig`.

  Files use new and old names.
  """
  rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
  if not isinstance(rope, dict):
    raise ValueError(f"rope_scaling and rope_parameters must be objects, got {rope!r}")
  partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
  if partial not in (None, 1.0):
    raise ValueError(f"partial_rotary_factor={partial!r} is not supported; expected 1.0")
  base = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
  theta = read_value(Positive, base, "rope_theta")
  kind = rope.get("rope_type", rope.get("type", "default"))
  keys = {"factor": "factor"}
  if kind == "llama3":
    keys |= {
      "low_freq_factor": "low_freq_factor",
      "high_freq_factor": "high_freq_factor",
      "original_positions": "original_max_position_embeddings",
    }
  if kind == "default":
    return {"rope_theta": theta}
  if kind not in ("linear", "llama3"):
    raise ValueError(f"rope_type {kind!r} is not supported; expected default, linear or llama3")
  try:
    scaling = RopeScaling(kind, **read_fields(RopeScaling, rope, keys))
  except ValueError as error:
    raise ValueError(f"the {kind} scaling of the rotation: {error}") from error
  return {"rope_theta": theta, "rope_scaling": scaling}


def written_config(config: LlamaConfig, end_of_text_id: int | None) -> dict[str, Any]:
  """Returns the content of a model's config.json, without the dtype of its weights.

  Raises:
    ValueError: if `transformers` has no such model.
  """
  kind, window = family_of(config), config.sliding_window
  written = {
    "model_type": kind,
    "architectures": [FAMILIES[kind][0]],
    **{key: getattr(config, name) for name, key in FIELDS.items()},
    "head_dim": config.head_size,
    "hidden_act": config.activation,
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
  """Returns the rotation's fields by new and old names."""
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
  """Returns the model type for a config.

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
    raise ValueError(f"`transformers` has no model for {config}")
  return kind
