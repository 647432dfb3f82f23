"""The Llama family in GGUF files: names of tensors, config from the metadata, and back.

llama.cpp has one architecture, `llama`, for Llama, Mistral and Mixtral. It rotates neighbouring
elements of a head there, where we and `transformers` rotate those half a head apart, so that
the rows of query and key are interleaved in its files. Gemma's norms are stored with the 1 that the
model adds.

The key `attention.sliding_window` is read and written, but llama.cpp ignores it for llama, qwen2
and qwen3: it attends to the whole sequence.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from lora_jax.fields import CountOrZero, Positive, read_value
from lora_jax.models.checkpoints.config_fields import read_fields
from lora_jax.models.checkpoints.gguf import GGUF
from lora_jax.models.checkpoints.gguf_config import EMBEDDING, HEAD, read_metadata, vocab_size
from lora_jax.models.checkpoints.hub import StoredTensor
from lora_jax.models.llama.config_json import TANH, family_of
from lora_jax.models.llama.folder import params_shapes
from lora_jax.models.llama.model import LlamaConfig, MixtureConfig, RopeScaling, frequencies
from lora_jax.trees import leaves_with_path

ARCHITECTURES: dict[str, dict[str, Any]] = {  # llama.cpp's, and the fields that they imply
  "llama": {},
  "qwen2": {"qkv_bias": True},
  "qwen2moe": {},
  "qwen3": {"qk_norm": True},
  "qwen3moe": {"qk_norm": True},
  "gemma": {"norm_offset": 1.0, "scale_embedding": True, "activation": TANH},
}
ARCHITECTURE_OF = {"mistral": "llama", "mixtral": "llama"}
ARCHITECTURE_OF |= {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
ROPE_FACTORS = "rope_freqs.weight"
FIELDS = {  # ours: llama.cpp's, without the architecture
  "num_positions": "context_length",
  "embed_dim": "embedding_length",
  "num_layers": "block_count",
  "num_heads": "attention.head_count",
  "rms_norm_epsilon": "attention.layer_norm_rms_epsilon",
}
OPTIONAL = {
  "num_kv_heads": "attention.head_count_kv",
  "head_dim": "attention.key_length",
  "sliding_window": "attention.sliding_window",
}
EXPERT_FIELDS = {"num_experts": "expert_count", "experts_per_token": "expert_used_count"}
EXPERT_WIDTH, SHARED_WIDTH = "expert_feed_forward_length", "expert_shared_feed_forward_length"
ROPE_BASE, ROPE_SIZE = "rope.freq_base", "rope.dimension_count"
ROPE_TYPE, ROPE_FACTOR = "rope.scaling.type", "rope.scaling.factor"
OTHERS = ("feed_forward_length", "attention.value_length", *OPTIONAL.values())
OTHERS += (*EXPERT_FIELDS.values(), EXPERT_WIDTH, SHARED_WIDTH, "expert_weights_norm")
OTHERS += (ROPE_BASE, ROPE_SIZE, ROPE_TYPE, ROPE_FACTOR, "rope.scaling.original_context_length")
FIXED = {"expert_gating_func": 1, "expert_weights_scale": 1.0}  # 1 is a softmax
LAYER = {  # our leaf: the tensor
  "attn_norm/scale": "attn_norm.weight",
  "attn/query/kernel": "attn_q.weight",
  "attn/query/bias": "attn_q.bias",
  "attn/key/kernel": "attn_k.weight",
  "attn/key/bias": "attn_k.bias",
  "attn/value/kernel": "attn_v.weight",
  "attn/value/bias": "attn_v.bias",
  "attn/query_norm/scale": "attn_q_norm.weight",
  "attn/key_norm/scale": "attn_k_norm.weight",
  "attn/out/kernel": "attn_output.weight",
  "attn/out/bias": "attn_output.bias",
  "mlp_norm/scale": "ffn_norm.weight",
  "mlp/gate/kernel": "ffn_gate.weight",
  "mlp/gate/bias": "ffn_gate.bias",
  "mlp/up/kernel": "ffn_up.weight",
  "mlp/up/bias": "ffn_up.bias",
  "mlp/down/kernel": "ffn_down.weight",
  "mlp/down/bias": "ffn_down.bias",
  "mlp/router/kernel": "ffn_gate_inp.weight",
  "mlp/experts/gate": "ffn_gate_exps.weight",
  "mlp/experts/up": "ffn_up_exps.weight",
  "mlp/experts/down": "ffn_down_exps.weight",
  "mlp/shared/gate/kernel": "ffn_gate_shexp.weight",
  "mlp/shared/up/kernel": "ffn_up_shexp.weight",
  "mlp/shared/down/kernel": "ffn_down_shexp.weight",
  "mlp/shared_gate/kernel": "ffn_gate_inp_shexp.weight",
}


def architecture_of(config: LlamaConfig) -> str:
  """Returns llama.cpp's name of a model's architecture.

  Raises:
    ValueError: if it has none.
  """
  kind = family_of(config)
  return ARCHITECTURE_OF.get(kind, kind)


def gguf_tensors(config: LlamaConfig, architecture: str | None = None) -> list[StoredTensor]:
  """Returns the tensors of a model in a GGUF file, and the leaves that they hold.

  Args:
    config: of the model.
    architecture: of the file; None is `architecture_of(config)`. Only in `llama` are the outputs of
      query and key interleaved.
  """
  paths = {path for path, _ in leaves_with_path(params_shapes(config))}
  architecture = architecture_of(config) if architecture is None else architecture
  heads = {"query": config.num_heads, "key": config.num_kv_heads}
  heads = heads if architecture == "llama" else {}
  stored = [StoredTensor(EMBEDDING, ("token_embedding/embedding",), is_embedding=True)]
  for i in range(config.num_layers):
    layer, stack = (i, "layers") if config.scan_layers else (None, f"layers_{i}")
    stored += [
      StoredTensor(
        f"blk.{i}.{name}",
        (f"{stack}/{leaf}",),
        layer,
        transposed=leaf.endswith("/kernel") or "/experts/" in leaf,
        is_parameter="/experts/" in leaf,
        heads=heads.get(leaf.split("/")[1]),
        offset=config.norm_offset if leaf.endswith("/scale") else 0.0,
      )
      for leaf, name in LAYER.items()
      if f"{stack}/{leaf}" in paths
    ]
  stored.append(
    StoredTensor("output_norm.weight", ("final_norm/scale",), offset=config.norm_offset)
  )
  if not config.tie_head:
    stored.append(StoredTensor(HEAD, ("lm_head/kernel",), transposed=True))
  return stored


def read_config(file: GGUF, **computation: Any) -> LlamaConfig:
  """Returns the config of the model in a GGUF file, from its metadata.

  Raises:
    ValueError: if a key is missing, wrong, or asks for an option that is not supported.
  """
  try:
    return _with_factors(file, LlamaConfig(**_fields(file), **computation))
  except ValueError as error:
    raise ValueError(f"{file.path}: {error}") from error


def _fields(file: GGUF) -> dict[str, Any]:
  prefix = f"{file.architecture}."
  key = f"{prefix}expert_count"
  num_experts = read_value(CountOrZero, file.metadata.get(key, 0), key)
  keys = FIELDS | {name: key for name, key in OPTIONAL.items() if prefix + key in file.metadata}
  in_experts = num_experts and file.architecture != "llama"  # Mixtral's width has the plain key
  keys["mlp_dim"] = EXPERT_WIDTH if in_experts else "feed_forward_length"
  fields = read_metadata(file, LlamaConfig, keys, OTHERS, FIXED)
  size = fields.get("head_dim", fields["embed_dim"] // fields["num_heads"])
  for key in (ROPE_SIZE, "attention.value_length"):
    if file.metadata.get(prefix + key, size) != size:
      value = file.metadata[prefix + key]
      raise ValueError(f"{prefix}{key}={value!r} is not supported; expected {size}, a head's size")
  return {
    "num_kv_heads": fields["num_heads"],
    **fields,
    **ARCHITECTURES[file.architecture],
    **_biases(file),
    **_rotation(file, prefix),
    "vocab_size": vocab_size(file),
    "mixture": _mixture(file, prefix) if num_experts else None,
    "tie_head": HEAD not in file.tensors,
  }


def _biases(file: GGUF) -> dict[str, bool]:
  """Returns the biases, as fields of `LlamaConfig`: those whose tensors are there."""
  names = {"qkv_bias": "attn_q", "out_bias": "attn_output", "mlp_bias": "ffn_up"}
  biases = {field: f"blk.0.{name}.bias" in file.tensors for field, name in names.items()}
  return biases | ({"qkv_bias": True} if file.architecture == "qwen2" else {})


def _mixture(file: GGUF, prefix: str) -> MixtureConfig:
  """Returns the experts of all layers; llama.cpp knows by the architecture how to weigh them."""
  renormalize = file.architecture != "qwen2moe"
  if file.metadata.get(f"{prefix}expert_weights_norm", renormalize) != renormalize:
    raise ValueError(f"{prefix}expert_weights_norm={not renormalize} is not supported")
  keys = EXPERT_FIELDS | ({"shared_dim": SHARED_WIDTH} if not renormalize else {})
  names = {name: prefix + key for name, key in keys.items()}
  return MixtureConfig(**read_fields(MixtureConfig, file.metadata, names), renormalize=renormalize)


def _rotation(file: GGUF, prefix: str) -> dict[str, Any]:
  """Returns the base of the rotation and its linear scaling, as fields of `LlamaConfig`."""
  base = file.metadata.get(prefix + ROPE_BASE, 10000.0)
  fields: dict[str, Any] = {"rope_theta": read_value(Positive, base, prefix + ROPE_BASE)}
  factor = file.metadata.get(prefix + ROPE_FACTOR, 1.0)
  kind = file.metadata.get(prefix + ROPE_TYPE, "linear")  # llama.cpp's default
  if kind not in ("none", "linear"):
    raise ValueError(f"{prefix}{ROPE_TYPE} {kind!r} is not supported; expected none or linear")
  factor = read_value(Positive, factor, prefix + ROPE_FACTOR)
  if kind == "linear" and factor != 1:
    fields["rope_scaling"] = RopeScaling("linear", factor)
  return fields


def _with_factors(file: GGUF, config: LlamaConfig) -> LlamaConfig:
  """Returns the config with the scaling of Llama 3, of which files have the resulting factors.

  The rotation of each pair of a head's elements is divided by its factor. Those of Llama 3 are 1
  for high frequencies, the largest for low ones, and between them 1 / factor is linear in the
  frequency: two of those give the bounds, up to a common multiple, for which low_freq_factor is 1.
  All published models have 1 and 4 as factors, and so one frequency is enough.
  """
  if ROPE_FACTORS not in file.tensors:
    return config
  shape, kind = file.tensors[ROPE_FACTORS].shape, file.tensors[ROPE_FACTORS].type
  if shape != (config.head_size // 2,) or kind != "F32":
    raise ValueError(f"{ROPE_FACTORS} is {kind} of shape {shape}, expected F32 of a head's half")
  factors = file.blocks(ROPE_FACTORS).data.view(np.float32).astype(np.float64)
  if np.all(factors == 1):
    return config
  if config.rope_scaling is not None:
    raise ValueError(f"both {ROPE_FACTORS} and a linear scaling of the rotation are not supported")
  plain = np.asarray(frequencies(config), np.float64)
  largest = float(str(np.float32(factors.max())))
  refusal = ValueError(
    f"{ROPE_FACTORS} is not a scaling of Llama 3's kind, which is the only one that is supported: "
    f"its factors are from {factors.min():.6g} to {factors.max():.6g}"
  )
  if not (np.all(factors >= 1) and np.all(np.isfinite(factors))):
    raise refusal
  between = (factors > 1) & (factors < largest)
  turns = plain[between] / (2 * math.pi)  # of one token
  shares = (1 / factors[between] - 1 / largest) / (1 - 1 / largest)
  bounds = [(4.0, 8192)]
  if len(turns):
    bounds.append((4.0, max(round((3 * shares[0] + 1) / turns[0]), 1)))
  if len(turns) > 1:
    slope, start = np.polyfit(turns, shares, 1)  # length / (high - 1) and -1 / (high - 1)
    if start < 0:
      bounds.append((float(1 - 1 / start), max(round(slope / -start), 1)))
  for high, positions in bounds:
    scaling = RopeScaling("llama3", largest, 1.0, high, positions)
    scaled = dataclasses.replace(config, rope_scaling=scaling)
    if np.allclose(plain / np.asarray(frequencies(scaled)), factors, rtol=1e-5, atol=0):
      return scaled
  raise refusal


def written_metadata(config: LlamaConfig, architecture: str | None = None) -> dict[str, Any]:
  """Returns the keys of a GGUF file that describe a model; the scaling of Llama 3 is a tensor.

  Arguments as in `gguf_tensors`.

  Raises:
    ValueError: if only some layers have a sliding window, which the format cannot say.
  """
  architecture = architecture_of(config) if architecture is None else architecture
  if config.window_layers is not None:
    raise ValueError(
      f"layers {config.window_layers} have a sliding window and the others have not; the keys of "
      f"{architecture} in GGUF have one window for all layers"
    )
  mixture, scaling = config.mixture, config.rope_scaling
  width = EXPERT_WIDTH if mixture and architecture != "llama" else "feed_forward_length"
  written = {
    **{key: getattr(config, name) for name, key in FIELDS.items()},
    "attention.head_count_kv": config.num_kv_heads,
    "attention.key_length": config.head_size,
    "attention.value_length": config.head_size,
    "vocab_size": config.vocab_size,
    "feed_forward_length": config.mlp_dim,
    width: config.mlp_dim,
    ROPE_BASE: config.rope_theta,
    ROPE_SIZE: config.head_size,
  }
  if config.sliding_window is not None:
    written["attention.sliding_window"] = config.sliding_window
  if scaling is not None and scaling.kind == "linear":
    written |= {ROPE_TYPE: "linear", ROPE_FACTOR: scaling.factor}
  if mixture is not None:
    written |= {key: getattr(mixture, name) for name, key in EXPERT_FIELDS.items()}
    if mixture.shared_dim is not None:
      written[SHARED_WIDTH] = mixture.shared_dim
  return {f"{architecture}.{key}": value for key, value in written.items()}
