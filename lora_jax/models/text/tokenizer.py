"""Tokenizers of models, as `tokenizers.Tokenizer`, from each of their formats.

    tokenizer.json             any
    tokenizer.model            SentencePiece of Llama 2, Mistral and Gemma
    spm.model                  SentencePiece of DeBERTa-v2 and v3
    vocab.txt                  WordPiece of BERT
    vocab.json, merges.txt     byte-level BPE of GPT-2 and RoBERTa

The first that is present in a folder is read. A tokenizer that is built here gives the ids of the
reference: SentencePiece's own, `transformers`' for the others. A GGUF file has its tokenizer in its
metadata (`gguf.py`).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from lora_jax.fields import CountOrZero, Within, read_section, read_value
from lora_jax.files import local_path, parse_json, read_json, read_json_if_present, read_text
from lora_jax.models.checkpoints.gguf import is_gguf
from lora_jax.models.text.ends import mark_ends, with_id
from lora_jax.models.text.gguf import gguf_text_files, read_model_json
from lora_jax.models.text.sentencepiece import build_sentencepiece, read_sentencepiece

if TYPE_CHECKING:
  from tokenizers import Tokenizer

TOKENIZER_FILES = (
  *("tokenizer.json", "tokenizer.model", "spm.model", "vocab.txt", "vocab.json", "merges.txt"),
  *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
  "chat_template.jinja",
)
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
BERT_TOKENS = {f"{use}_token": f"[{use.upper()}]" for use in ("unk", "sep", "pad", "cls", "mask")}
ROBERTA_TOKENS = {
  **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>"},
  **{"pad_token": "<pad>", "cls_token": "<s>", "mask_token": "<mask>"},
}
OPTIONS = ("single_word", "lstrip", "rstrip", "normalized", "special")

TokenId = Annotated[int, Within("[0, 2147483647]")]


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """The fields of tokenizer_config.json that count where there is no tokenizer.json.

  None is the default of the class of tokenizers; transformers' documentation explains each.
  """

  tokenizer_class: str | None = None
  added_tokens_decoder: dict[str, Any] | None = None
  add_prefix_space: bool | None = None
  add_bos_token: bool | None = None
  add_eos_token: bool | None = None
  legacy: bool | None = None
  split_by_punct: bool | None = None
  do_basic_tokenize: bool | None = None
  do_lower_case: bool | None = None
  strip_accents: bool | None = None
  tokenize_chinese_chars: bool | None = None


def load_tokenizer(folder: str | Path, vocab_size: int | None = None) -> "Tokenizer":
  """Returns the tokenizer of a folder, from the first of the formats above that it has.

  Args:
    folder: a local folder, or a GGUF file.
    vocab_size: of the model, whose table may be padded above the tokenizer's vocabulary; not in a
      GGUF file, where padding has tokens too.
  Raises:
    FileNotFoundError: if there is no tokenizer.
    ValueError: if its files are broken, or it does not fit the model.
  """
  folder = local_path(folder)
  try:
    tokenizer = _build(folder)
  except (ValueError, FileNotFoundError):
    raise
  except BaseException as error:  # the library raises bare Exceptions, and panics that are none
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
      raise
    present = ", ".join(name for name in TOKENIZER_FILES[:6] if (folder / name).exists())
    where = present or "the metadata"
    raise ValueError(f"{folder}: the tokenizer is broken, in {where}: {error}") from error
  if tokenizer is None:
    raise FileNotFoundError(
      f"{folder} holds no tokenizer: expected tokenizer.json, tokenizer.model, spm.model, "
      "vocab.txt, or vocab.json and merges.txt"
    )
  tokenizer.no_padding()  # which folders of fine-tuned models may have kept
  tokenizer.no_truncation()
  ids = tokenizer.get_vocab(with_added_tokens=True).values()
  if not ids:
    raise ValueError(f"{folder}: the tokenizer has no tokens")
  size = max(ids) + 1
  if is_gguf(folder) and vocab_size not in (None, size):
    raise ValueError(
      f"{folder}: the tokenizer has {size:,} tokens and the model {vocab_size:,}, expected one for "
      "each row of the embedding. Convert the model again"
    )
  if vocab_size is not None and not 0 <= vocab_size - size < max(1024, vocab_size // 20):
    raise ValueError(
      f"{folder}: the tokenizer has {size:,} tokens and the model {vocab_size:,}; they do not "
      "belong together. Take both from the same model; remove tokens that were added only to the "
      "tokenizer, such as <pad>, from its files"
    )
  return tokenizer


def end_of_text_id(tokenizer: Any) -> int:
  """Returns the id of `<|endoftext|>`; raises ValueError if the tokenizer has none."""
  token_id = tokenizer.token_to_id(END_OF_TEXT)
  if token_id is None:
    raise ValueError(f"the tokenizer has no token {END_OF_TEXT!r}, which ends every text")
  return token_id


def tokenizer_files(folder: Path) -> dict[str, bytes]:
  """Returns the files of a tokenizer, which must load, by name; of a GGUF file those made of it."""
  load_tokenizer(folder)
  if is_gguf(folder):
    files = gguf_text_files(folder)
    return {name: files[name] for name in TOKENIZER_FILES if name in files}
  paths = (folder / name for name in TOKENIZER_FILES)
  return {path.name: path.read_bytes() for path in paths if path.is_file()}


def read_special_tokens(folder: str | Path) -> dict[str, str]:
  """Returns a model's special tokens by their use, as `{"bos_token": "<s>"}`.

  They are those of tokenizer_config.json and, in older folders, of special_tokens_map.json; or
  those of a GGUF file.

  Raises:
    ValueError: if one of them is not text.
  """
  return {use: token["content"] for use, token in _special_tokens(local_path(folder)).items()}


def _special_tokens(folder: Path) -> dict[str, dict[str, Any]]:
  """Returns the special tokens with the options of their search in a text."""
  tokens: dict[str, dict[str, Any]] = {}
  for name in ("special_tokens_map.json", "tokenizer_config.json"):
    values, path = read_model_json(folder, name), folder / name
    for use in (f"{use}_token" for use in SPECIAL_TOKENS):
      token = values.get(use)
      if token == "":  # there is none: old folders of Llama
        tokens.pop(use, None)
      elif token is not None:
        tokens[use] = _options(path, use, {"content": token} if isinstance(token, str) else token)
  return tokens


def _options(path: Path, name: str, token: Any) -> dict[str, Any]:
  """Returns the content and the options of a token."""
  content = token.get("content") if isinstance(token, dict) else None
  if not isinstance(content, str) or not content:
    raise ValueError(f"{path}: expected {name} as text, got {token!r:.100}")
  options = {
    key: read_value(bool, token[key], f"{path}: {key} of {name}") for key in OPTIONS if key in token
  }
  return {"content": content, **options}


def _read_config(folder: Path) -> TokenizerConfig:
  path = folder / "tokenizer_config.json"
  known = {field.name for field in dataclasses.fields(TokenizerConfig)}
  values = {name: value for name, value in read_json_if_present(path).items() if name in known}
  return read_section(TokenizerConfig, values, f"{path}: ")


def _build(folder: Path) -> "Tokenizer | None":
  from tokenizers import Tokenizer, processors

  if is_gguf(folder):
    return Tokenizer.from_str(gguf_text_files(folder)["tokenizer.json"].decode())
  if (folder / "tokenizer.json").exists():
    text = read_text(folder / "tokenizer.json")
    parse_json(text, folder / "tokenizer.json")  # is stricter than the library
    return Tokenizer.from_str(text)
  config = _read_config(folder)
  if (folder / "tokenizer.model").exists():
    tokenizer, special = _sentencepiece(folder / "tokenizer.model", config)
    special = _add_tokens(tokenizer, folder, config, special)
    _mark_ends(tokenizer, folder, config, special, True)
  elif (folder / "spm.model").exists():
    tokenizer, _ = _sentencepiece(folder / "spm.model", config)
    tokenizer.add_special_tokens([BERT_TOKENS["mask_token"]])  # which the model does not hold
    special = _add_tokens(tokenizer, folder, config, BERT_TOKENS)
    _mark_sentences(tokenizer, special)
  elif (folder / "vocab.txt").exists():
    tokenizer = _word_piece(folder / "vocab.txt", config)
    special = _add_tokens(tokenizer, folder, config, BERT_TOKENS)
    _mark_sentences(tokenizer, special)
  elif (folder / "vocab.json").exists() or (folder / "merges.txt").exists():
    tokenizer = _byte_level_bpe(folder, config)
    if _is_roberta(folder, config):
      special = _add_tokens(tokenizer, folder, config, ROBERTA_TOKENS)
      ends = (with_id(tokenizer, special[f"{use}_token"]) for use in ("sep", "cls"))
      space = bool(config.add_prefix_space)
      tokenizer.post_processor = processors.RobertaProcessing(  # pyright: ignore
        *ends, trim_offsets=True, add_prefix_space=space
      )
    else:
      if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])
      special = _add_tokens(tokenizer, folder, config, {})
      _mark_ends(tokenizer, folder, config, special, False)
  else:
    return None
  return tokenizer


def _sentencepiece(path: Path, config: TokenizerConfig) -> tuple["Tokenizer", dict[str, str]]:
  """Returns the tokenizer of a SentencePiece model, and the special tokens that it names."""
  if config.split_by_punct:
    raise ValueError(f"{path}: split_by_punct in tokenizer_config.json is not supported")
  model = read_sentencepiece(path)
  prefix = config.add_prefix_space
  tokenizer = build_sentencepiece(
    model,
    dummy_prefix=model.dummy_prefix if prefix is None else bool(prefix),
    prefix_at_parts=path.name == "spm.model" or bool(config.legacy),
    lower_case=bool(config.do_lower_case),
  )
  return tokenizer, dict(model.special_tokens)


def _word_piece(path: Path, config: TokenizerConfig) -> "Tokenizer":
  from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

  tokens = read_text(path).removesuffix("\n").split("\n")
  vocab = {token: i for i, token in enumerate(tokens)}
  if tokens == [""]:
    raise ValueError(f"{path} is empty, expected one token a line")
  if len(vocab) < len(tokens):
    first = next(token for i, token in enumerate(tokens) if vocab[token] != i)
    raise ValueError(f"{path}: {len(tokens) - len(vocab)} tokens occur twice, as {first!r:.100}")
  if config.do_basic_tokenize is False:
    raise ValueError(f"{path}: do_basic_tokenize=false in tokenizer_config.json is not supported")
  lower_case = config.do_lower_case
  if lower_case is None:
    if any(token != token.lower() for token in tokens if not token.startswith("[")):
      raise ValueError(
        f"{path} has upper-case letters, but no tokenizer_config.json says whether text is "
        'lower-cased. Write one with {"do_lower_case": false}, or true'
      )
    lower_case = True
  tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
  tokenizer.normalizer = normalizers.BertNormalizer(  # pyright: ignore
    clean_text=True,
    handle_chinese_chars=config.tokenize_chinese_chars is not False,
    strip_accents=config.strip_accents,  # None: if text is lower-cased
    lowercase=lower_case,
  )
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore
  tokenizer.decoder = decoders.WordPiece(prefix="##")  # pyright: ignore
  return tokenizer


def _byte_level_bpe(folder: Path, config: TokenizerConfig) -> "Tokenizer":
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers

  read_text(folder / "merges.txt")
  tokens: dict[int, str] = {}
  for token, value in read_json(folder / "vocab.json").items():
    token_id = read_value(TokenId, value, f"{folder}/vocab.json: the id of {token!r:.100}")
    if token_id in tokens:
      raise ValueError(
        f"{folder}/vocab.json: {tokens[token_id]!r:.100} and {token!r:.100} have the same id, "
        f"{token_id}"
      )
    tokens[token_id] = token
  if not tokens:
    raise ValueError(f"{folder}/vocab.json has no tokens")
  files = (str(folder / name) for name in ("vocab.json", "merges.txt"))
  tokenizer = Tokenizer(models.BPE.from_file(*files))
  space = bool(config.add_prefix_space)
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)  # pyright: ignore
  tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
  return tokenizer


def _is_roberta(folder: Path, config: TokenizerConfig) -> bool:
  """Returns whether byte-level BPE puts RoBERTa's tokens around a text; GPT-2's puts none."""
  if (name := config.tokenizer_class) is not None:
    return name in ("RobertaTokenizer", "RobertaTokenizerFast")
  return read_json_if_present(folder / "config.json").get("model_type") == "roberta"


def _add_tokens(
  tokenizer: "Tokenizer", folder: Path, config: TokenizerConfig, defaults: Mapping[str, str]
) -> dict[str, str]:
  """Adds a folder's added and special tokens, each with its id; returns the special ones.

  Raises:
    ValueError: if the vocabulary and the files about added tokens disagree.
  """
  from tokenizers import AddedToken

  special: dict[str, dict[str, Any]] = {use: {"content": token} for use, token in defaults.items()}
  special |= _special_tokens(folder)
  path = folder / "added_tokens.json"
  added: dict[int, dict[str, Any]] = {
    read_value(CountOrZero, i, f"{path}: the id of {token!r:.100}"): {"content": token}
    for token, i in read_json_if_present(path).items()
  }
  path = folder / "tokenizer_config.json"
  for i, token in (config.added_tokens_decoder or {}).items():
    if not (i.isascii() and i.isdigit()):
      raise ValueError(f"{path}: expected ids as keys of added_tokens_decoder, got {i!r:.100}")
    added[int(i)] = _options(path, f"added token {i}", token)
  added_contents = {token["content"] for token in added.values()}
  names = {token["content"] for token in special.values()}
  for i, token in sorted(added.items()):
    is_special = token.pop("special", False) or token["content"] in names
    options: dict[str, Any] = {"normalized": not is_special, **token, "special": is_special}
    tokenizer.add_tokens([AddedToken(**options)])
    if (assigned := tokenizer.token_to_id(token["content"])) != i:
      raise ValueError(f"{folder}: the added token {token['content']!r} has id {assigned}, not {i}")
  for use, token in special.items():
    if token["content"] in added_contents:
      continue
    if tokenizer.token_to_id(token["content"]) is None:
      raise ValueError(
        f"{folder}: the {use} {token['content']!r} is not in the vocabulary, and neither "
        "added_tokens.json nor added_tokens_decoder in tokenizer_config.json gives its id"
      )
    options: dict[str, Any] = {"normalized": False, **token, "special": True}
    tokenizer.add_tokens([AddedToken(**options)])
  return {use: token["content"] for use, token in special.items()}


def _mark_ends(
  tokenizer: "Tokenizer",
  folder: Path,
  config: TokenizerConfig,
  special: Mapping[str, str],
  add_bos: bool,
) -> None:
  """Puts the start and end tokens around texts that tokenizer_config.json asks for."""
  flags = {"bos_token": config.add_bos_token, "eos_token": config.add_eos_token}
  flags["bos_token"] = add_bos if flags["bos_token"] is None else flags["bos_token"]
  ends = [use for use, is_wanted in flags.items() if is_wanted]
  if not ends:
    return
  for use in ends:
    if use not in special:
      raise ValueError(
        f"{folder}: expected a {use} in tokenizer_config.json, since add_{use} is true; got none"
      )
  start = [special[use] for use in ends if use == "bos_token"]
  end = [special[use] for use in ends if use == "eos_token"]
  mark_ends(tokenizer, start, end)


def _mark_sentences(tokenizer: "Tokenizer", special: Mapping[str, str]) -> None:
  """Puts BERT's tokens around one text or two, which have different token types."""
  from tokenizers import processors

  start, end = special["cls_token"], special["sep_token"]
  tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
    single=[start, "$A", end],
    pair=[start, "$A", end, "$B:1", f"{end}:1"],
    special_tokens=[with_id(tokenizer, start), with_id(tokenizer, end)],
  )
