"""Small vocabularies as GGUF files without tensors, from the tokenizers at hand."""

import json
from pathlib import Path
from typing import Any

from lora_jax.models.checkpoints.gguf import write_gguf
from lora_jax.models.text.sentencepiece import Kind, read_sentencepiece

from tests.paths import GOLDEN, ROOT

EMBEDDED = ROOT / "lora_jax" / "assets" / "gpt2"
BYTE_LEVEL = {"gpt-2": "gpt2", "smollm": "llama", "llama-bpe": "llama", "qwen2": "qwen2"}
SENTENCEPIECE = ("llama", "gemma")
NAMES = (*BYTE_LEVEL, *SENTENCEPIECE)
ADDED = {  # to the embedded vocabulary
  **{"<|im_start|>": Kind.CONTROL, "<|im_end|>": Kind.NORMAL, "<think>": Kind.USER_DEFINED},
  **{"  x ": Kind.USER_DEFINED, "<unk>": Kind.UNKNOWN, "[PAD9]": Kind.UNUSED},
  **{"unmerged": Kind.NORMAL, "ðŁĮĪx": Kind.NORMAL},  # words that no merges give
}
TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_vocabulary(name: str, folder: Path, **changes: Any) -> Path:
  """Writes a vocabulary; returns the file's path.

  Args:
    name: one of NAMES.
    changes: values of other keys than those of the vocabulary, without `tokenizer.ggml.`; None
      leaves a key out.
  """
  path = folder / f"{name}.gguf"
  byte_level = name in BYTE_LEVEL
  values = _byte_level(name) if byte_level else _sentencepiece(GOLDEN / "tokenizers" / name)
  values |= changes
  return write_metadata(path, BYTE_LEVEL[name] if byte_level else name, values)


def write_tiny(folder: Path, model: str, **changes: Any) -> Path:
  """Writes a vocabulary of six tokens or, as SentencePiece needs, bytes too; as above."""
  tokens, kinds = ["<unk>", "<s>", "</s>", "a", "b", "ab"], [2, 3, 3, 1, 1, 1]
  values: dict[str, Any] = {"model": model, "pre": "gpt-2", "merges": ["a b"]}
  if model == "llama":
    tokens = [*tokens, "▁", "▁ab", *(f"<0x{i:02X}>" for i in range(256))]
    kinds = [*kinds, 1, 1, *[6] * 256]
    values = {"model": model, "scores": [-float(i) for i in range(len(tokens))]}
  values |= {"tokens": tokens, "token_type": kinds, "bos_token_id": 1, "eos_token_id": 2}
  return write_metadata(folder / "tiny.gguf", "llama", values | changes)


def write_metadata(path: Path, architecture: str, values: dict[str, Any]) -> Path:
  """Writes a file with keys of `tokenizer.ggml.`, and those that every model has."""
  metadata = {
    key if "." in key else f"tokenizer.ggml.{key}": value
    for key, value in values.items()
    if value is not None
  }
  shape = {"block_count": 1, "context_length": 64, "embedding_length": 8}
  shape |= {"feed_forward_length": 8, "attention.head_count": 1, "attention.head_count_kv": 1}
  shape |= {"attention.layer_norm_rms_epsilon": 1e-5, "attention.layer_norm_epsilon": 1e-5}
  shape |= {"vocab_size": len(values["tokens"] or [])}
  metadata |= {f"{architecture}.{key}": value for key, value in shape.items()}
  write_gguf(path, architecture, metadata, {})
  return path


def _byte_level(pre: str) -> dict[str, Any]:
  model = json.loads((EMBEDDED / "tokenizer.json").read_text("utf-8"))["model"]
  merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
  tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
  kinds = [Kind.CONTROL if token == "<|endoftext|>" else Kind.NORMAL for token in tokens]
  end = tokens.index("<|endoftext|>")
  return {
    **{"model": "gpt2", "pre": pre, "merges": merges, "tokens": [*tokens, *ADDED]},
    "token_type": [int(kind) for kind in [*kinds, *ADDED.values()]],
    **{"bos_token_id": end, "eos_token_id": end},
    "tokenizer.chat_template": TEMPLATE,
  }


def _sentencepiece(folder: Path) -> dict[str, Any]:
  """Returns a model's keys as llama.cpp's converter writes them, with spaces in added tokens."""
  model = read_sentencepiece(folder / "tokenizer.model")
  names = [piece.text for piece in model.pieces]
  ids = {use: names.index(token) for use, token in model.special_tokens.items()}
  return {
    **{"model": "llama", "pre": "default", "add_space_prefix": model.dummy_prefix},
    "tokens": [
      piece.text.replace("▁", " ") if piece.kind is Kind.USER_DEFINED else piece.text
      for piece in model.pieces
    ],
    "token_type": [int(piece.kind) for piece in model.pieces],
    "scores": [float(piece.score) for piece in model.pieces],
    **{f"{use}_id": ids[use] for use in ("bos_token", "eos_token")},
    "unknown_token_id": ids["unk_token"],
    "tokenizer.chat_template": TEMPLATE,
  }
