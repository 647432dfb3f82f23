"""Tokenizers of Hugging Face folders, as `tokenizers.Tokenizer`, from each form they come in.

    tokenizer.json             any
    tokenizer.model            SentencePiece of Llama 2, Mistral and Gemma
    spm.model                  SentencePiece of DeBERTa-v2 and v3
    vocab.txt                  WordPiece of BERT
    vocab.json, merges.txt     byte-level BPE of GPT-2 and RoBERTa

The first that is there counts. A tokenizer that is built here gives the ids of the reference:
SentencePiece's own, `transformers`' for the others.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jax.files import read_json_if_present, read_text
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


def load_tokenizer(folder: str | Path, vocab_size: int | None = None) -> "Tokenizer":
  """Returns the tokenizer of a folder, from the first of the forms above that it holds.

  Args:
    folder: a local folder.
    vocab_size: of the model, whose table may be padded above the tokenizer's vocabulary.
  Raises:
    FileNotFoundError: if there is no tokenizer.
    ValueError: if its files are broken, or it does not fit the model.
  """
  folder = Path(folder)
  try:
    tokenizer = _build(folder)
  except (ValueError, FileNotFoundError):
    raise
  except Exception as error:  # the library raises bare Exceptions
    raise ValueError(f"{folder}: the tokenizer's files are broken: {error}") from error
  if tokenizer is None:
    raise FileNotFoundError(
      f"{folder} holds no tokenizer: expected tokenizer.json, tokenizer.model, spm.model, "
      "vocab.txt, or vocab.json and merges.txt"
    )
  tokenizer.no_padding()  # which folders of fine-tuned models may have kept
  tokenizer.no_truncation()
  size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
  if vocab_size is not None and not 0 <= vocab_size - size < max(1024, vocab_size // 20):
    raise ValueError(
      f"{folder}: the tokenizer has {size:,} tokens and the model {vocab_size:,}; they do not "
      "belong together. Take both from the same model; tokens that were added to the tokenizer "
      "alone, as <pad>, must be taken out of its files"
    )
  return tokenizer


def end_of_text_id(tokenizer: Any) -> int:
  """Returns the id of `<|endoftext|>`; raises ValueError if the tokenizer has none."""
  token_id = tokenizer.token_to_id(END_OF_TEXT)
  if token_id is None:
    raise ValueError(f"the tokenizer has no token {END_OF_TEXT!r}, which ends every text")
  return token_id


def tokenizer_files(folder: Path) -> list[Path]:
  """Returns the files of a folder's tokenizer, which must load."""
  load_tokenizer(folder)
  return [path for name in TOKENIZER_FILES if (path := folder / name).is_file()]


def read_special_tokens(folder: str | Path) -> dict[str, str]:
  """Returns a folder's special tokens by their use, as `{"bos_token": "<s>"}`.

  They are those of tokenizer_config.json and, in older folders, of special_tokens_map.json.

  Raises:
    ValueError: if one of them is not text.
  """
  return {use: token["content"] for use, token in _special_tokens(Path(folder)).items()}


def _special_tokens(folder: Path) -> dict[str, dict[str, Any]]:
  """Returns the special tokens with the options of their search in a text."""
  tokens: dict[str, dict[str, Any]] = {}
  for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
    values = read_json_if_present(path)
    for use in (f"{use}_token" for use in SPECIAL_TOKENS):
      token = values.get(use)
      if token is not None:
        tokens[use] = _options(path, use, {"content": token} if isinstance(token, str) else token)
  return tokens


def _options(path: Path, name: str, token: Any) -> dict[str, Any]:
  if not (isinstance(token, dict) and isinstance(token.get("content"), str)):
    raise ValueError(f"{path}: expected {name} as text, got {token!r:.100}")
  return {key: value for key, value in token.items() if key == "content" or key in OPTIONS}


def _build(folder: Path) -> "Tokenizer | None":
  from tokenizers import Tokenizer, processors

  if (folder / "tokenizer.json").is_file():
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
  config = read_json_if_present(folder / "tokenizer_config.json")
  if (folder / "tokenizer.model").is_file():
    tokenizer, special = _sentencepiece(folder / "tokenizer.model", config)
    special = _add_tokens(tokenizer, folder, config, special)
    _mark_ends(tokenizer, config, special, True)
  elif (folder / "spm.model").is_file():
    tokenizer, _ = _sentencepiece(folder / "spm.model", config)
    tokenizer.add_special_tokens([BERT_TOKENS["mask_token"]])  # which the model does not hold
    special = _add_tokens(tokenizer, folder, config, BERT_TOKENS)
    _mark_sentences(tokenizer, special)
  elif (folder / "vocab.txt").is_file():
    tokenizer = _word_piece(folder / "vocab.txt", config)
    special = _add_tokens(tokenizer, folder, config, BERT_TOKENS)
    _mark_sentences(tokenizer, special)
  elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
    tokenizer = _byte_level_bpe(folder, config)
    if _is_roberta(folder, config):
      special = _add_tokens(tokenizer, folder, config, ROBERTA_TOKENS)
      ends = (_with_id(tokenizer, special[f"{use}_token"]) for use in ("sep", "cls"))
      space = bool(config.get("add_prefix_space"))
      tokenizer.post_processor = processors.RobertaProcessing(  # pyright: ignore
        *ends, trim_offsets=True, add_prefix_space=space
      )
    else:
      if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])
      special = _add_tokens(tokenizer, folder, config, {})
      _mark_ends(tokenizer, config, special, False)
  else:
    return None
  return tokenizer


def _sentencepiece(path: Path, config: dict[str, Any]) -> tuple["Tokenizer", dict[str, str]]:
  """Returns the tokenizer of a SentencePiece model, and the special tokens that it names."""
  if config.get("split_by_punct"):
    raise ValueError(f"{path}: split_by_punct in tokenizer_config.json is not known here")
  model = read_sentencepiece(path)
  prefix = config.get("add_prefix_space")
  tokenizer = build_sentencepiece(
    model,
    dummy_prefix=model.dummy_prefix if prefix is None else bool(prefix),
    prefix_at_parts=path.name == "spm.model" or bool(config.get("legacy")),
    lower_case=bool(config.get("do_lower_case")),
  )
  return tokenizer, dict(model.special_tokens)


def _word_piece(path: Path, config: dict[str, Any]) -> "Tokenizer":
  from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

  tokens = read_text(path).removesuffix("\n").split("\n")
  vocab = {token: i for i, token in enumerate(tokens)}
  if len(vocab) < len(tokens):
    raise ValueError(f"{path}: {len(tokens) - len(vocab)} tokens stand there twice")
  if config.get("do_basic_tokenize") is False:
    raise ValueError(f"{path}: do_basic_tokenize=false in tokenizer_config.json is not known here")
  lower_case = config.get("do_lower_case")
  if lower_case is None:
    if any(token != token.lower() for token in tokens if not token.startswith("[")):
      raise ValueError(
        f"{path} has upper-case letters, but no tokenizer_config.json beside it says whether text "
        'is lower-cased. Write one with {"do_lower_case": false}, or true'
      )
    lower_case = True
  tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
  tokenizer.normalizer = normalizers.BertNormalizer(  # pyright: ignore
    clean_text=True,
    handle_chinese_chars=config.get("tokenize_chinese_chars") is not False,
    strip_accents=config.get("strip_accents"),  # None: if text is lower-cased
    lowercase=lower_case,
  )
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore
  tokenizer.decoder = decoders.WordPiece(prefix="##")  # pyright: ignore
  return tokenizer


def _byte_level_bpe(folder: Path, config: dict[str, Any]) -> "Tokenizer":
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers

  files = (str(folder / name) for name in ("vocab.json", "merges.txt"))
  tokenizer = Tokenizer(models.BPE.from_file(*files))
  space = bool(config.get("add_prefix_space"))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)  # pyright: ignore
  tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
  return tokenizer


def _is_roberta(folder: Path, config: dict[str, Any]) -> bool:
  """Returns whether byte-level BPE has RoBERTa's tokens about a text rather than GPT-2's none."""
  if (name := config.get("tokenizer_class")) is not None:
    return name in ("RobertaTokenizer", "RobertaTokenizerFast")
  return read_json_if_present(folder / "config.json").get("model_type") == "roberta"


def _add_tokens(
  tokenizer: "Tokenizer", folder: Path, config: dict[str, Any], defaults: Mapping[str, str]
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
    i: {"content": token} for token, i in read_json_if_present(path).items()
  }
  path = folder / "tokenizer_config.json"
  for i, token in (config.get("added_tokens_decoder") or {}).items():
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


def _with_id(tokenizer: "Tokenizer", token: str) -> tuple[str, int]:
  token_id = tokenizer.token_to_id(token)
  assert token_id is not None, "special tokens have been added"
  return token, token_id


def _mark_ends(
  tokenizer: "Tokenizer", config: dict[str, Any], special: Mapping[str, str], add_bos: bool
) -> None:
  """Puts the beginning's and the end's token about texts, as far as tokenizer_config.json wants."""
  from tokenizers import processors

  flags = {"bos_token": config.get("add_bos_token"), "eos_token": config.get("add_eos_token")}
  flags["bos_token"] = add_bos if flags["bos_token"] is None else flags["bos_token"]
  ends = [use for use, is_wanted in flags.items() if is_wanted]
  if not ends:
    return
  start = [special[use] for use in ends if use == "bos_token"]
  end = [special[use] for use in ends if use == "eos_token"]
  single = [*start, "$A", *end]
  tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
    single=single,
    pair=[*single, *(f"{piece}:1" for piece in [*start, "$B", *end])],
    special_tokens=[_with_id(tokenizer, special[use]) for use in ends],
  )


def _mark_sentences(tokenizer: "Tokenizer", special: Mapping[str, str]) -> None:
  """Puts BERT's tokens about one text or two, and tells the two apart by their type."""
  from tokenizers import processors

  start, end = special["cls_token"], special["sep_token"]
  tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
    single=[start, "$A", end],
    pair=[start, "$A", end, "$B:1", f"{end}:1"],
    special_tokens=[_with_id(tokenizer, start), _with_id(tokenizer, end)],
  )
