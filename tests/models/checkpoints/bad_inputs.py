"""GGUF files that must be refused: damaged, foreign or incomplete ones, and wrong metadata."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.models.bert.folder import load_bert
from lora_jax.models.checkpoints.gguf import Blocks, open_gguf, write_gguf
from lora_jax.models.gpt2.folder import load_gpt2
from lora_jax.models.llama.folder import load_llama
from lora_jax.models.zoo import load_causal_lm, plan_causal_lm

from tests.bad_inputs import BadInput
from tests.gguf_files import ARCHITECTURES, metadata_of, quantized, tensors_of, write_model

Fields = dict[str, Any]
MISSING = FileNotFoundError


def model_row(
  title: str,
  name: str,
  *words: str,
  fields: Fields | None = None,
  change: Callable[[Fields], Fields] = lambda tensors: tensors,
  architecture: str | None = None,
  kind: str = "model",
  load: Callable[..., Any] = plan_causal_lm,
  **options: Any,
) -> BadInput:
  """A model with other metadata, where None removes a key, or other tensors."""

  def call(folder: Path) -> None:
    metadata = metadata_of(name) | (fields or {})
    metadata = {key: value for key, value in metadata.items() if value is not None}
    path = folder / "model.gguf"
    tensors = change(dict(tensors_of(name)))
    write_gguf(path, architecture or ARCHITECTURES[name], metadata, tensors, kind)
    load(path, **options)

  return BadInput(f"GGUF {name}: {title}", call, words)


def field_row(name: str, key: str, value: Any, *words: str) -> BadInput:
  return model_row(f"{key} {str(value)[:40]}", name, "model.gguf", *words, fields={key: value})


def without(*names: str) -> Callable[[Fields], Fields]:
  return lambda tensors: {key: array for key, array in tensors.items() if key not in names}


def bytes_row(title: str, change: Callable[[bytes], bytes], *words: str) -> BadInput:
  """A model whose file has other bytes."""

  def call(folder: Path) -> None:
    path = write_model(folder / "whole.gguf", "llama2")
    (folder / "model.gguf").write_bytes(change(path.read_bytes()))
    plan_causal_lm(folder / "model.gguf")

  return BadInput(f"GGUF of {title}", call, ("model.gguf", *words))


def parts_row(
  title: str, change: Callable[[Path], Path], *words: str, error: Any = ValueError, more: int = 0
) -> BadInput:
  """A model in two parts, which may say that there are more tensors."""

  def call(folder: Path) -> None:
    count = len(tensors_of("llama2"))
    half = count // 2
    for i, part in enumerate((slice(None, half), slice(half, None))):
      fields = {"split.no": i, "split.count": 2, "split.tensors.count": count + more}
      fields |= metadata_of("llama2") if i == 0 else {}
      tensors = dict(list(tensors_of("llama2").items())[part])
      write_gguf(folder / f"m-{i + 1:05}-of-00002.gguf", "llama", fields, tensors)
    plan_causal_lm(change(folder))

  return BadInput(f"GGUF in parts: {title}", call, words, error)


def text(value: str) -> bytes:
  return struct.pack("<Q", len(value)) + value.encode()


def header(keys: int = 0, tensors: int = 0, rest: bytes = b"") -> Callable[[bytes], bytes]:
  """A file of a header whose counts may be wrong."""
  return lambda _: b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
  dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
  return text(name) + dims + struct.pack("<IQ", kind, offset)


def rename(old: str, new: str) -> Callable[[Path], Path]:
  def change(folder: Path) -> Path:
    (folder / old).rename(folder / new)
    return folder / "m-00001-of-00002.gguf"

  return change


STRING, ARRAY, UINT32, BOOL = (struct.pack("<I", kind) for kind in (8, 9, 4, 7))
Q = struct.Struct("<Q").pack
FIRST, SECOND = "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"
ROPE = np.ones(4, np.float32)

FILES = [
  bytes_row("nothing", lambda data: b"", "not a GGUF file"),
  bytes_row("2 bytes", lambda data: b"GG", "not a GGUF file"),
  bytes_row("text", lambda data: b"hello world", "not a GGUF file", "b'hell'"),
  bytes_row("a page", lambda data: b"<!DOCTYPE html>", "HTML"),
  bytes_row("a pointer", lambda data: b"version https://git-lfs.github.com", "git lfs pull"),
  bytes_row("old GGML", lambda data: b"tjgg" + data[4:], "not a GGUF file"),
  *(
    bytes_row(f"version {version}", lambda data, v=version: data[:4] + v + data[8:], *words)
    for version, words in {
      struct.pack("<I", 1): ("version 1", "expected 2 or 3"),
      struct.pack("<I", 4): ("version 4", "expected 2 or 3"),
      struct.pack(">I", 3): ("big-endian", "gguf-convert-endian"),
    }.items()
  ),
  bytes_row("a header that is cut", lambda data: data[:200], "truncated", "again"),
  bytes_row("data that are cut", lambda data: data[:-1], "is truncated: the data of", "again"),
  bytes_row("2^60 tensors", header(tensors=2**60), "truncated or damaged", "tensors"),
  bytes_row("2^60 keys", header(keys=2**60), "truncated or damaged", "metadata"),
  bytes_row("a key of 2^63 bytes", header(1, rest=Q(2**63) + bytes(99)), "needs 92233720"),
  bytes_row(
    "2^60 strings",
    header(1, rest=text("many") + ARRAY + STRING + Q(2**60)),
    "many needs 9223372036854775808 bytes",
  ),
  bytes_row("2^62 numbers", header(1, rest=text("many") + ARRAY + UINT32 + Q(2**62)), "many needs"),
  bytes_row(
    "a list of lists",
    header(1, rest=text("deep") + ARRAY + ARRAY + Q(1) + ARRAY + Q(1)),
    "'deep' is a list of values of type 9",
  ),
  bytes_row(
    "a value of type 13",
    header(1, rest=text("odd") + struct.pack("<I", 13) + Q(0)),
    "'odd' has a value of type 13",
  ),
  bytes_row(
    "a boolean of 2", header(1, rest=text("flag") + BOOL + b"\2"), "'flag' is a boolean of value 2"
  ),
  bytes_row("a key twice", header(2, rest=2 * (text("key") + BOOL + b"\1")), "the key 'key' twice"),
  bytes_row(
    "bytes that are not UTF-8",
    header(1, rest=text("key") + STRING + Q(1) + b"\xff"),
    "'key' is not text in UTF-8",
  ),
  bytes_row(
    "an alignment of 3",
    header(1, rest=text("general.alignment") + UINT32 + struct.pack("<I", 3)),
    "general.alignment is '3', expected a power of two",
  ),
  bytes_row(
    "an alignment of text",
    header(1, rest=text("general.alignment") + STRING + text("x")),
    "general.alignment is 'x'",
  ),
  *(
    bytes_row(f"a tensor {title}", header(tensors=count, rest=rest), *words)
    for title, count, rest, words in [
      ("without axes", 1, tensor("a", ()) + bytes(9), ("'a' has 0 axes",)),
      ("of 5 axes", 1, tensor("a", (1,) * 5), ("'a' has 5 axes",)),
      ("with an empty axis", 1, tensor("a", (0, 4)), ("shape (4, 0)", "no empty axis")),
      ("of 2^80 values", 1, tensor("a", (2**40, 2**40)), ("is truncated: the data of a",)),
      ("at 2^63", 1, tensor("a", (4,), offset=2**63), ("is truncated: the data of a",)),
      ("of type 99", 1, tensor("a", (4,), 99), ("of type 99", "llama-quantize")),
      ("of a removed type", 1, tensor("a", (32,), 4), ("of type 4", "llama-quantize")),
      ("of half a block", 1, tensor("a", (16,), 2), ("divisible by 32, for Q4_0",)),
      ("at 5", 1, tensor("a", (4,), offset=5) + bytes(99), ("offset 5", "an offset by 32")),
      ("twice", 2, 2 * tensor("a", (4,)), ("the tensor 'a' twice",)),
      ("over another", 2, tensor("a", (8,)) + tensor("b", (8,)) + bytes(99), ("overlap",)),
    ]
  ),
  bytes_row("no architecture", header(), "general.architecture is None, expected a string"),
  parts_row(
    "one is missing",
    lambda folder: rename(SECOND, "other.gguf")(folder),
    f"{SECOND} does not exist",
    "of the 2 parts",
    error=MISSING,
  ),
  parts_row("the second", lambda folder: folder / SECOND, "not the first part; give", FIRST),
  parts_row(
    "renamed",
    lambda folder: (folder / FIRST).rename(folder / "model.gguf"),
    "one of 2 parts",
    "*-00001-of-00002.gguf",
  ),
  parts_row("a tensor less", lambda folder: folder / FIRST, "split.tensors.count =", more=1),
  parts_row(
    "the first twice",
    lambda folder: (folder / SECOND).write_bytes((folder / FIRST).read_bytes()) and folder / FIRST,
    SECOND,
    "a part of another file",
  ),
]

LLAMA = "llama."
MODELS = [
  model_row("an adapter", "llama2", "is an adapter", "base model's GGUF file", kind="adapter"),
  model_row("a projector", "llama2", "general.type is 'mmproj'", kind="mmproj"),
  model_row("falcon", "llama2", "no architecture 'falcon'", "gemma, gpt2", architecture="falcon"),
  model_row(
    "a vocabulary only",
    "llama2",
    "vocabulary only",
    fields={"tokenizer.ggml.tokens": ["a", "b"]},
    change=lambda tensors: {},
  ),
  model_row("no tensors", "llama2", "missing tokenizer.ggml.tokens", change=lambda tensors: {}),
  model_row(
    "a missing tensor",
    "llama2",
    "missing blk.1.ffn_up.weight (56, 32)",
    "those of its metadata",
    change=without("blk.1.ffn_up.weight"),
  ),
  model_row(
    "an extra tensor",
    "llama2",
    "unexpected blk.0.attn_sinks.weight (4,)",
    change=lambda tensors: tensors | {"blk.0.attn_sinks.weight": ROPE},
  ),
  model_row(
    "a norm of queries",
    "llama2",
    "unexpected blk.0.attn_q_norm.weight",
    change=lambda tensors: tensors | {"blk.0.attn_q_norm.weight": ROPE},
  ),
  model_row("no biases", "qwen2", "missing blk.0.attn_k.bias", change=without("blk.0.attn_k.bias")),
  model_row(
    "another shape",
    "llama2",
    "blk.0.attn_q.weight has shape (32, 16), expected (32, 32)",
    change=lambda tensors: tensors | {"blk.0.attn_q.weight": np.zeros((32, 16), np.float32)},
  ),
  model_row(
    "integers",
    "llama2",
    "blk.0.attn_q.weight is of I8, expected one of F64",
    change=lambda tensors: (
      tensors | {"blk.0.attn_q.weight": Blocks("I8", np.zeros((32, 32), np.uint8))}
    ),
  ),
  model_row(
    "a layer less",
    "llama2",
    "it has 2 layers, and block_count says 3",
    fields={"llama.block_count": 3},
  ),
  model_row(
    "experts with tensors of their own",
    "mixtral",
    "each expert has tensors of its own",
    change=lambda tensors: (
      without("blk.0.ffn_up_exps.weight")(tensors) | {"blk.0.ffn_up.0.weight": ROPE}
    ),
  ),
  model_row(
    "fewer tokens than rows",
    "llama2",
    "token_embd.weight has shape (64, 32), expected (2, 32)",
    fields={"tokenizer.ggml.tokens": ["a", "b"]},
  ),
  *(
    field_row("llama2", f"llama.{key}", value, *words)
    for key, value, *words in [
      ("block_count", None, "missing llama.block_count"),
      ("block_count", "two", "llama.block_count must be an integer"),
      ("block_count", 0, "[1, 10000]"),
      ("block_count", 4 * 10**9, "[1, 10000]"),
      ("embedding_length", None, "missing llama.embedding_length"),
      ("attention.head_count", [4, 2], "llama.attention.head_count must be an integer", "[4, 2]"),
      ("attention.head_count", 0, "llama.attention.head_count must be an integer in"),
      ("attention.head_count_kv", 3, "num_kv_heads must divide num_heads"),
      ("attention.layer_norm_rms_epsilon", None, "missing llama.attention.layer_norm_rms_epsilon"),
      ("attention.layer_norm_rms_epsilon", float("nan"), "epsilon must be", "nan"),
      ("attention.value_length", 16, "value_length=16 is not supported; expected 8"),
      ("attention.causal", False, "llama.attention.causal=False is not supported"),
      ("attention.key_length", 7, "rope.dimension_count=8 is not supported; expected 7"),
      ("rope.dimension_count", 4, "rope.dimension_count=4 is not supported; expected 8"),
      ("rope.freq_base", -1.0, "llama.rope.freq_base must be"),
      ("rope.scaling.type", "yarn", "'yarn' is not supported; expected none or linear"),
      ("rope.scaling.factor", 0.0, "llama.rope.scaling.factor must be"),
      ("logit_scale", 2.0, "the key llama.logit_scale is not supported", "computation"),
      ("expert_count", -1, "llama.expert_count must be an integer in"),
      ("expert_count", 4, "missing llama.expert_used_count"),
    ]
  ),
  field_row("mixtral", "llama.expert_used_count", 99, "from 1 to num_experts"),
  field_row("mixtral", "llama.expert_gating_func", 2, "expert_gating_func=2 is not supported"),
  field_row("qwen2_moe", "qwen2moe.expert_weights_norm", True, "expert_weights_norm=True"),
  field_row("qwen3_moe", "qwen3moe.expert_feed_forward_length", None, "missing qwen3moe.expert_f"),
  field_row("tied", "gpt2.attention.head_count", 5, "num_heads must divide embed_dim"),
  field_row("tied", "gpt2.feed_forward_length", None, "missing gpt2.feed_forward_length"),
  field_row("tied", "gpt2.rope.freq_base", 1.0, "the key gpt2.rope.freq_base is not supported"),
  *(
    model_row(
      f"factors of the rotation {title}",
      "llama2",
      *words,
      change=lambda tensors, factors=factors: tensors | {"rope_freqs.weight": factors},
    )
    for title, factors, words in [
      ("of another kind", ROPE * np.float32([1, 3, 2, 4]), ("not a scaling of Llama 3's kind",)),
      ("below 1", ROPE / 2, ("not a scaling of Llama 3's kind",)),
      ("infinite", ROPE * np.float32(np.inf), ("not a scaling of Llama 3's kind",)),
      ("too many", np.ones(8, np.float32), ("rope_freqs.weight is F32 of shape (8,)",)),
    ]
  ),
  model_row(
    "layers of two types, scanned",
    "llama2",
    "layers/attn/query/kernel is a stack of layers of the types F32 and Q8_0",
    "scan_layers=False",
    change=lambda tensors: (
      tensors | {"blk.0.attn_q.weight": quantized(tensors["blk.0.attn_q.weight"], "Q8_0")}
    ),
    param_dtype="stored",
    scan_layers=True,
  ),
  model_row(
    "nf4 of narrow weights",
    "llama2",
    "has 32 inputs, which blocks of 64 values in nf4 do not divide",
    "int8",
    param_dtype="nf4",
  ),
  *(
    model_row(
      f"param_dtype {dtype}", "llama2", "float16, stored, int8, nf4; got", dtype, param_dtype=dtype
    )
    for dtype in ("q4", "float64")
  ),
  model_row("for load_llama", "llama2", "load_causal_lm", load=load_llama),
  model_row("for load_gpt2", "llama2", "load_causal_lm", load=load_gpt2),
  model_row("for load_bert", "llama2", "load_causal_lm", load=load_bert),
  BadInput(
    "GGUF that does not exist",
    lambda folder: load_causal_lm(folder / "none.gguf"),
    ("none.gguf does not exist",),
    MISSING,
  ),
  BadInput("a folder to open_gguf", open_gguf, ("is a folder, expected a file",)),
]

ROWS = [*FILES, *MODELS]
