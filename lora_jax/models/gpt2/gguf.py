"""GPT-2 in GGUF files: names of tensors, config from the metadata, and back.

Weights are (out, in) there, transposed from the Conv1D of `transformers`, and query, key and value
are one tensor.
"""

from typing import Any

from lora_jax.models.checkpoints.gguf import GGUF
from lora_jax.models.checkpoints.gguf_config import EMBEDDING, HEAD, read_metadata, vocab_size
from lora_jax.models.checkpoints.hub import StoredTensor
from lora_jax.models.gpt2.folder import params_shapes as params_shapes
from lora_jax.models.gpt2.model import GPT2Config

ARCHITECTURE = "gpt2"
FIELDS = {  # ours: llama.cpp's, without the architecture
  "num_positions": "context_length",
  "embed_dim": "embedding_length",
  "num_layers": "block_count",
  "num_heads": "attention.head_count",
  "mlp_dim": "feed_forward_length",
  "layer_norm_epsilon": "attention.layer_norm_epsilon",
}
LAYER = {  # the tensor: our leaves along its first axis
  "attn_norm.weight": ("ln_1/scale",),
  "attn_norm.bias": ("ln_1/bias",),
  "attn_qkv.weight": ("attn/query/kernel", "attn/key/kernel", "attn/value/kernel"),
  "attn_qkv.bias": ("attn/query/bias", "attn/key/bias", "attn/value/bias"),
  "attn_output.weight": ("attn/out/kernel",),
  "attn_output.bias": ("attn/out/bias",),
  "ffn_norm.weight": ("ln_2/scale",),
  "ffn_norm.bias": ("ln_2/bias",),
  "ffn_up.weight": ("mlp/up/kernel",),
  "ffn_up.bias": ("mlp/up/bias",),
  "ffn_down.weight": ("mlp/down/kernel",),
  "ffn_down.bias": ("mlp/down/bias",),
}
OUTSIDE = {
  EMBEDDING: "wte/embedding",
  "position_embd.weight": "wpe/embedding",
  "output_norm.weight": "ln_f/scale",
  "output_norm.bias": "ln_f/bias",
}


def architecture_of(config: GPT2Config) -> str:
  """Returns llama.cpp's name of a model's architecture.

  Raises:
    ValueError: if it has none: its GPT-2 has the tanh form of GELU only.
  """
  if config.activation not in ("gelu_new", "gelu_pytorch_tanh"):
    raise ValueError(f"llama.cpp's GPT-2 has the activation gelu_new, got {config.activation}")
  return ARCHITECTURE


def gguf_tensors(config: GPT2Config, architecture: str | None = None) -> list[StoredTensor]:
  """Returns the tensors of a GPT-2 in a GGUF file, and the leaves that they hold.

  Args:
    config: of the model.
    architecture: of the file, `gpt2`.
  """
  stored = [
    StoredTensor(name, (path,), is_embedding=path.endswith("embedding"))
    for name, path in OUTSIDE.items()
  ]
  for i in range(config.num_layers):
    layer, stack = (i, "h") if config.scan_layers else (None, f"h_{i}")
    for name, leaves in LAYER.items():
      paths = tuple(f"{stack}/{leaf}" for leaf in leaves)
      stored.append(
        StoredTensor(f"blk.{i}.{name}", paths, layer, transposed=paths[0].endswith("/kernel"))
      )
  if not config.tie_head:
    stored.append(StoredTensor(HEAD, ("lm_head/kernel",), transposed=True))
  return stored


def read_config(file: GGUF, **computation: Any) -> GPT2Config:
  """Returns the config of the GPT-2 in a GGUF file, from its metadata.

  Raises:
    ValueError: if a key is missing, wrong, or asks for an option that is not supported.
  """
  try:
    fields = read_metadata(file, GPT2Config, FIELDS, (), {})
    tied = HEAD not in file.tensors or is_copy(file)
    return GPT2Config(**fields, vocab_size=vocab_size(file), tie_head=tied, **computation)
  except ValueError as error:
    raise ValueError(f"{file.path}: {error}") from error


def is_copy(file: GGUF) -> bool:
  """Returns whether the head is a copy of the embedding, as in files of old converters."""
  head, embedding = (file.tensors.get(name) for name in (HEAD, EMBEDDING))
  if head is None or embedding is None:
    return False
  return head[:2] == embedding[:2] and bool((head.bytes() == embedding.bytes()).all())


def written_metadata(config: GPT2Config, architecture: str | None = None) -> dict[str, Any]:
  """Returns the keys of a GGUF file that describe a model; arguments as in `gguf_tensors`."""
  width = config.mlp_dim or 4 * config.embed_dim
  written = {key: getattr(config, name) for name, key in FIELDS.items()}
  written |= {"feed_forward_length": width, "vocab_size": config.vocab_size}
  return {f"{architecture or ARCHITECTURE}.{key}": value for key, value in written.items()}
