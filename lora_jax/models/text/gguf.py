"""The tokenizer and the chat templates in a GGUF file's metadata, as files of a model's folder.

    tokenizer.ggml.model    algorithm
    gpt2                    byte-level BPE by a list of merges; tokenizer.ggml.pre splits the text
    llama                   SentencePiece's BPE, by the scores of the tokens

They are written as transformers' tokenizer.json, tokenizer_config.json and generation_config.json.
Token ids and end tokens equal llama.cpp's, which serves such files.
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from lora_jax.fields import Within, read_value
from lora_jax.files import local_path, parse_json, read_json_if_present, regular_file
from lora_jax.models.checkpoints.gguf import is_gguf, open_gguf
from lora_jax.models.text.ends import mark_ends
from lora_jax.models.text.sentencepiece import (
  BPE,
  MAX_PIECE,
  Kind,
  Piece,
  SentencePieceModel,
  build_sentencepiece,
)

if TYPE_CHECKING:
  from tokenizers import Tokenizer, pre_tokenizers

MODELS = ("gpt2", "llama")
PRE_TOKENIZERS = ("gpt-2", "smollm", "llama-bpe", "qwen2")
NAMES = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # in the keys, spelled as there
USES = ("bos", "eos", "unk", "sep", "pad", "mask")
DEFAULT_IDS = {"gpt2": {}, "llama": {"bos": 1, "eos": 2, "unk": 0}}  # of llama.cpp
ENDS = (  # of turns and texts; llama.cpp stops at them even if the metadata does not name them
  *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"),
  *("<end_of_turn>", "<end_of_utterance>", "<EOT>", "_<EOT>", "<｜end▁of▁sentence｜>"),
  *("</s>", "<eos>", "[EOS]", "[EOT]"),
)
FILL_IN_ENDS = {  # tokens of code models, by the name in their key; llama.cpp stops at them too
  "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
  "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
  "fim_sep": ("<|file_sep|>",),
}
SAMPLING = {  # keys of general.sampling, and transformers' names
  "temp": "temperature",
  "top_k": "top_k",
  "top_p": "top_p",
  "min_p": "min_p",
  "penalty_repeat": "repetition_penalty",
}
REMEDY = "Convert the model again with llama.cpp's convert_hf_to_gguf.py, or take its folder"


class Vocabulary(NamedTuple):
  """The tokens of a GGUF file.

  Attributes:
    model: the algorithm, one of MODELS.
    tokens: by id.
    kinds: the kinds of the tokens; end tokens are control tokens.
    special: ids by use, `{"bos": 1}`.
    end_ids: the tokens that end a text, a turn or a message; the first one ends a text.
  """

  model: str
  tokens: Sequence[str]
  kinds: Sequence[Kind]
  special: Mapping[str, int]
  end_ids: Sequence[int]


def read_model_json(source: str | Path, name: str) -> dict[str, Any]:
  """Returns the object in a folder's JSON file, or its equivalent made from a GGUF file.

  Args:
    source: a folder or a GGUF file.
    name: such as `tokenizer_config.json`.

  Returns:
    An empty object if there is none.
  Raises:
    ValueError: as in `read_json` and `gguf_text_files`.
  """
  source = local_path(source)
  if not is_gguf(source):
    return read_json_if_present(source / name)
  content = gguf_text_files(source).get(name)
  return {} if content is None else parse_json(content, source)


def gguf_text_files(path: str | Path) -> Mapping[str, bytes]:
  """Returns the files of the tokenizer and the generation settings in a GGUF file, by name.

  Raises:
    FileNotFoundError: if there is no such file, or it has no tokenizer.
    ValueError: if its tokenizer is of an unsupported kind, or broken.
  """
  status = (path := regular_file(path)).stat()
  return _text_files(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2)
def _text_files(path: Path, *_: int) -> Mapping[str, bytes]:
  metadata = open_gguf(path).metadata
  vocabulary = _read_vocabulary(path, metadata)
  tokenizer = _build(path, metadata, vocabulary)
  names = {f"{use}_token": vocabulary.tokens[i] for use, i in vocabulary.special.items()}
  config: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    **names,
  }
  if (template := _chat_template(path, metadata)) is not None:
    config["chat_template"] = template
  files = {
    "tokenizer_config.json": config,
    "generation_config.json": _generation(path, metadata, vocabulary),
  }
  return {
    "tokenizer.json": tokenizer.to_str().encode(),
    **{name: json.dumps(value, ensure_ascii=False).encode() for name, value in files.items()},
  }


def _read(path: Path, metadata: Mapping[str, Any], key: str, kind: Any, default: Any = None) -> Any:
  """Returns the value of a key, which must be of a type; the default if there is none."""
  if key not in metadata:
    return default
  return read_value(kind, metadata[key], f"{path}: {key}")


def _read_vocabulary(path: Path, metadata: Mapping[str, Any]) -> Vocabulary:
  model = _read(path, metadata, "tokenizer.ggml.model", str)
  if model is None or "tokenizer.ggml.tokens" not in metadata:
    missing = "tokenizer.ggml.model" if model is None else "tokenizer.ggml.tokens"
    raise FileNotFoundError(f"{path} holds no tokenizer: it has no {missing}. {REMEDY}")
  if model not in MODELS:
    raise ValueError(
      f"{path}: the tokenizer.ggml.model {model!r:.100} is not supported, expected one of "
      f"{', '.join(MODELS)}. Take the model's Hugging Face folder, with its tokenizer.json"
    )
  tokens = _list(path, metadata, "tokenizer.ggml.tokens", str)
  codes = _list(path, metadata, "tokenizer.ggml.token_type", int, len(tokens))
  ids: dict[str, int] = {}
  for i, (token, code) in enumerate(zip(tokens, codes, strict=True)):
    if not 0 < len(token) <= MAX_PIECE:
      raise ValueError(
        f"{path}: token {i} has {len(token)} characters, expected 1 to {MAX_PIECE}. {REMEDY}"
      )
    if ids.setdefault(token, i) != i:
      raise ValueError(f"{path}: tokens {ids[token]} and {i} are both {token!r:.100}. {REMEDY}")
    if code not in tuple(Kind):
      raise ValueError(
        f"{path}: token {i}, {token!r:.100}, has the tokenizer.ggml.token_type {code}, expected 1 "
        f"to {max(Kind)}"
      )
  special = dict(DEFAULT_IDS[model])
  for use in (*USES, "eot", "eom", *FILL_IN_ENDS):
    key = f"tokenizer.ggml.{NAMES.get(use, use)}_token_id"
    token_id = Annotated[int, Within(f"[0, {len(tokens) - 1}]")]
    if (value := _read(path, metadata, key, token_id)) is not None:
      special[use] = value
  special = {use: i for use, i in special.items() if i < len(tokens)}
  for use, names in FILL_IN_ENDS.items():
    if use not in special and (named := [ids[token] for token in names if token in ids]):
      special[use] = named[0]
  named = (ids[token] for token in ENDS if token in ids)
  first, last = ("eos", "eot", "eom"), FILL_IN_ENDS
  first, last = ([special[use] for use in uses if use in special] for uses in (first, last))
  end_ids = list(dict.fromkeys([*first, *named, *last]))
  kinds = [Kind(code) for code in codes]
  for i in end_ids:
    kinds[i] = Kind.CONTROL
  special = {use: i for use, i in special.items() if use in USES}
  return Vocabulary(model, tokens, kinds, special, end_ids)


def _list(
  path: Path, metadata: Mapping[str, Any], key: str, kind: type, length: int | None = None
) -> list[Any]:
  """Returns a list of one type from the metadata, with an entry for each token."""
  if key not in metadata:
    raise ValueError(f"{path} has no {key}, which its tokenizer needs. {REMEDY}")
  values = metadata[key]
  if not isinstance(values, list) or any(type(value) is not kind for value in values):
    raise ValueError(f"{path}: {key} must be a list of {kind.__name__}, got {values!r:.100}")
  if not values and length is None:
    raise ValueError(f"{path}: {key} is empty")
  if length is not None and len(values) != length:
    raise ValueError(
      f"{path}: {key} has {len(values):,} entries, expected one for each of the {length:,} tokens"
    )
  return values


def _build(path: Path, metadata: Mapping[str, Any], vocabulary: Vocabulary) -> "Tokenizer":
  pre = _read(path, metadata, "tokenizer.ggml.pre", str)
  if vocabulary.model == "llama":
    if pre not in (None, "default"):
      raise ValueError(
        f"{path}: expected no tokenizer.ggml.pre, or 'default', with SentencePiece (the "
        f"tokenizer.ggml.model 'llama'), got the tokenizer.ggml.pre {pre!r:.100}"
      )
    tokenizer, add_bos = _sentencepiece(path, metadata, vocabulary), True
  else:
    tokenizer, add_bos = _byte_level_bpe(path, metadata, vocabulary, pre), pre == "llama-bpe"
  flags = {"bos": add_bos, "eos": False}
  ends: dict[str, list[str]] = {}
  for use, default in flags.items():
    key = f"tokenizer.ggml.add_{use}_token"
    ends[use] = []
    if _read(path, metadata, key, bool, default):
      if use not in vocabulary.special:
        raise ValueError(f"{path}: expected a tokenizer.ggml.{use}_token_id, since {key} is true")
      ends[use] = [vocabulary.tokens[vocabulary.special[use]]]
  if any(ends.values()):
    mark_ends(tokenizer, ends["bos"], ends["eos"])
  return tokenizer


def _sentencepiece(path: Path, metadata: Mapping[str, Any], vocabulary: Vocabulary) -> "Tokenizer":
  """Returns the tokenizer of a SentencePiece model.

  As in llama.cpp, unused tokens are normal tokens, and spaces are never removed.
  """
  scores = _list(path, metadata, "tokenizer.ggml.scores", float, len(vocabulary.tokens))
  kinds = [Kind.NORMAL if kind is Kind.UNUSED else kind for kind in vocabulary.kinds]
  unknown = vocabulary.special["unk"]
  kinds[unknown] = Kind.UNKNOWN
  if not all(map(math.isfinite, scores)):
    raise ValueError(f"{path}: tokenizer.ggml.scores has a score that is not finite. {REMEDY}")
  present = {
    token for token, kind in zip(vocabulary.tokens, kinds, strict=True) if kind is Kind.BYTE
  }
  if absent := [name for name in (f"<0x{i:02X}>" for i in range(256)) if name not in present]:
    raise ValueError(
      f"{path}: the tokenizer has {256 - len(absent)} of the 256 byte tokens, expected all: "
      f"{absent[0]} is missing. {REMEDY}"
    )
  model = SentencePieceModel(
    pieces=tuple(map(Piece, vocabulary.tokens, scores, kinds)),
    algorithm=BPE,
    byte_fallback=True,
    charsmap=b"",
    dummy_prefix=_read(path, metadata, "tokenizer.ggml.add_space_prefix", bool, True),
    tidy_spaces=False,
    special_tokens={},
  )
  return build_sentencepiece(model, model.dummy_prefix, prefix_at_parts=True, lower_case=False)


def _byte_level_bpe(
  path: Path, metadata: Mapping[str, Any], vocabulary: Vocabulary, pre: str | None
) -> "Tokenizer":
  from tokenizers import AddedToken, Tokenizer, decoders, models

  if pre not in PRE_TOKENIZERS:
    if pre in (None, "default"):
      fault = "does not say how text is split (tokenizer.ggml.pre)"
      fix = "gguf-new-metadata --pre-tokenizer writes the right one of them into a copy"
    else:
      fault = f"splits text by the tokenizer.ggml.pre {pre!r:.100}, which is not supported"
      fix = "Take the model's Hugging Face folder, with its tokenizer.json"
    raise ValueError(f"{path} {fault}, expected one of {', '.join(PRE_TOKENIZERS)}. {fix}")
  merges = []
  for i, merge in enumerate(_list(path, metadata, "tokenizer.ggml.merges", str)):
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
      raise ValueError(
        f"{path}: tokenizer.ggml.merges[{i}] must be two tokens with a space between them, got "
        f"{merge!r:.100}"
      )
    merges.append((left, right))
  ids = {token: i for i, token in enumerate(vocabulary.tokens)}
  for left, right in merges:
    for token in (left, right, left + right):
      if token not in ids:
        raise ValueError(
          f"{path}: tokenizer.ggml.merges has {left!r:.100} with {right!r:.100}, but "
          f"tokenizer.ggml.tokens has no {token!r:.100}. {REMEDY}"
        )
  tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=pre == "llama-bpe"))
  tokenizer.pre_tokenizer = _pre_tokenizer(pre)  # pyright: ignore[reportAttributeAccessIssue]
  tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
  if Kind.BYTE in vocabulary.kinds:
    i = vocabulary.kinds.index(Kind.BYTE)
    raise ValueError(
      f"{path}: token {i}, {vocabulary.tokens[i]!r:.100}, has the type of a byte (6), which tokens "
      f"of byte-level BPE do not have. {REMEDY}"
    )
  kinds = (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)
  tokenizer.add_tokens(
    [
      AddedToken(token, normalized=False, special=kind is not Kind.USER_DEFINED)
      for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
      if kind in kinds
    ]
  )
  return tokenizer


def _pre_tokenizer(name: str) -> "pre_tokenizers.PreTokenizer":
  """Returns the pre-tokenizer that splits a text into words and encodes their bytes."""
  from tokenizers import Regex, pre_tokenizers

  if name == "gpt-2":
    return pre_tokenizers.ByteLevel(add_prefix_space=False)
  if name == "smollm":
    parts = [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    return pre_tokenizers.Sequence(parts)
  digits = {"llama-bpe": "{1,3}", "qwen2": ""}[name]
  alternatives = (
    r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    rf"\p{{N}}{digits}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
  )
  parts = [
    pre_tokenizers.Split(Regex("|".join(alternatives)), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ]
  return pre_tokenizers.Sequence(parts)


def _chat_template(path: Path, metadata: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
  """Returns the template, or all templates with their names if some are named."""
  key = "tokenizer.chat_template"
  prefix = f"{key}."
  named = {
    name.removeprefix(prefix): _read(path, metadata, name, str)
    for name in metadata
    if name.startswith(prefix)
  }
  default = _read(path, metadata, key, str)
  if not named:
    return default
  if default is not None:
    named = {"default": default, **named}
  return [{"name": name, "template": template} for name, template in named.items()]


def _generation(path: Path, metadata: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
  """Returns the generation settings: end tokens, and the recommended sampling."""
  ends = list(vocabulary.end_ids)
  values: dict[str, Any] = {
    f"{use}_token_id": vocabulary.special[use]
    for use in ("bos", "pad")
    if use in vocabulary.special
  }
  if ends:
    values["eos_token_id"] = ends if len(ends) > 1 else ends[0]
  for name, setting in SAMPLING.items():
    key = f"general.sampling.{name}"
    value = _read(path, metadata, key, int if name == "top_k" else float)
    if value is not None:
      values[setting] = value
  if values.get("temperature", 0) > 0:
    values["do_sample"] = True
  return values
