"""A small random SmolLM2: a Llama in Q4_1 with the tokenizer of the embedded base model."""

from pathlib import Path

from lora_jax.models.checkpoints.gguf import Blocks, open_gguf, write_gguf
from lora_jax.models.llama import gguf as llama_gguf
from lora_jax.models.llama.model import LlamaConfig

from tests.gguf_files import write_random
from tests.gguf_vocabularies import write_vocabulary


def write_tiny_smollm2(folder: Path) -> Path:
  """Writes the model; returns its file."""
  vocabulary = open_gguf(write_vocabulary("smollm", folder)).metadata
  config = LlamaConfig(
    vocab_size=len(vocabulary["tokenizer.ggml.tokens"]),
    num_positions=256,
    embed_dim=64,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=96,
    tie_head=True,
  )
  weights = open_gguf(write_random(folder / "weights.gguf", config, llama_gguf, "Q4_1"))
  tokenizer = {key: value for key, value in vocabulary.items() if key.startswith("tokenizer.")}
  tensors = {name: Blocks(*weights.blocks(name)) for name in weights.tensors}
  path = folder / "model.gguf"
  write_gguf(path, weights.architecture, dict(weights.metadata) | tokenizer, tensors)
  return path
