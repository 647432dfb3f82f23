"""SentencePiece models as `tokenizers.Tokenizer`, with the ids of SentencePiece itself.

A model is a protobuf message of three parts that are read here: the pieces with their scores, the
trainer's options, and the normalization of text. Fields are numbered as in SentencePiece's own
`sentencepiece_model.proto`.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jax.files import read_bytes

if TYPE_CHECKING:
  from tokenizers import Tokenizer, normalizers

SPACE = "\u2581"  # a space within a piece
UNIGRAM, BPE = 1, 2
MAX_PIECE = 1000  # characters; all ways to cut a piece are tried


class Kind(IntEnum):
  """The purpose of a piece."""

  NORMAL = 1
  UNKNOWN = 2
  CONTROL = 3  # marks of a text's ends, for example, never found in a text
  USER_DEFINED = 4  # always found, whatever its score
  UNUSED = 5
  BYTE = 6  # a byte of a character that no piece has


@dataclass(frozen=True)
class Piece:
  text: str
  score: float
  kind: Kind


@dataclass(frozen=True)
class SentencePieceModel:
  """A trained model.

  Attributes:
    pieces: by id.
    algorithm: UNIGRAM or BPE.
    byte_fallback: whether characters that no piece has are written as bytes.
    charsmap: the compiled replacements of characters; empty if there are none.
    dummy_prefix: whether a space is put before a text.
    tidy_spaces: whether spaces at the ends are removed, and several become one.
    special_tokens: the tokens for the ends, padding and the unknown, as `{"bos_token": "<s>"}`.
  """

  pieces: tuple[Piece, ...]
  algorithm: int
  byte_fallback: bool
  charsmap: bytes
  dummy_prefix: bool
  tidy_spaces: bool
  special_tokens: Mapping[str, str]


def read_sentencepiece(path: Path) -> SentencePieceModel:
  """Returns the model in a file.

  Raises:
    ValueError: if it is truncated, not a SentencePiece model, or of an unsupported kind.
  """
  parts: dict[int, list[Any]] = {1: [], 2: [], 3: []}
  try:
    for number, value in _fields(read_bytes(path)):
      parts.setdefault(number, []).append(value)
    pieces = tuple(_piece(message) for message in parts[1])
    trainer, normalizer = (dict(_fields(message)) for i in (2, 3) for message in parts[i])
  except (ValueError, TypeError, AttributeError, IndexError, struct.error) as error:
    raise ValueError(f"{path} is truncated or not a SentencePiece model: {error}") from error
  _refuse_others(path, pieces, trainer, normalizer)
  ids = {"unk": trainer.get(40, 0), "bos": trainer.get(41, 1), "eos": trainer.get(42, 2)}
  ids["pad"] = trainer.get(43, -1)
  return SentencePieceModel(
    pieces=pieces,
    algorithm=trainer.get(3, UNIGRAM),
    byte_fallback=bool(trainer.get(35, 0)),
    charsmap=normalizer.get(2, b""),
    dummy_prefix=bool(normalizer.get(3, 1)),
    tidy_spaces=bool(normalizer.get(4, 1)),
    special_tokens={
      f"{use}_token": pieces[i].text for use, i in ids.items() if 0 <= i < len(pieces)
    },
  )


def build_sentencepiece(
  model: SentencePieceModel, dummy_prefix: bool, prefix_at_parts: bool, lower_case: bool
) -> "Tokenizer":
  """Returns a model's tokenizer, without a post-processor.

  Its ids are those of SentencePiece, except where the library `tokenizers` differs:

  - Control symbols in a text are read as such; to SentencePiece they are plain text.
  - No space is put before a text that begins with a user-defined symbol (BPE).
  - Of two ways to cut a text with equal scores, either may be taken (Unigram).
  - Of several marks on one letter, as in U+0065 U+0301 U+0302, some may not be composed, or lost.

  Args:
    model: as in `read_sentencepiece`.
    dummy_prefix: whether a space is put before a text.
    prefix_at_parts: whether one is put before the text after a control symbol, too.
    lower_case: whether the text is lower-cased first.
  """
  from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers

  tokenizer = Tokenizer(_unigram(model) if model.algorithm == UNIGRAM else _bpe(model))
  normalizer = _normalizer(model, dummy_prefix, lower_case)
  tokenizer.normalizer = normalizer  # pyright: ignore[reportAttributeAccessIssue]
  decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
  if dummy_prefix:
    # The first puts a space before a text that has none, the second makes it SPACE. Either by
    # itself would omit the prefix of a text that starts with SPACE, which SentencePiece keeps.
    scheme = "always" if prefix_at_parts else "first"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore
      [
        pre_tokenizers.Metaspace(" ", prepend_scheme=scheme, split=False),
        pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=False),
      ]
    )
    decoding.append(decoders.Strip(" ", left=1, right=0))
  tokenizer.decoder = decoders.Sequence(decoding)  # pyright: ignore[reportAttributeAccessIssue]
  special = [p.text for p in model.pieces if p.kind in (Kind.CONTROL, Kind.UNKNOWN)]
  tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
  if model.algorithm == BPE:  # Unigram finds them by their score, 0
    tokenizer.add_tokens(
      [
        AddedToken(
          piece.text, normalized=tokenizer.normalizer.normalize_str(piece.text) == piece.text
        )
        for piece in model.pieces
        if piece.kind is Kind.USER_DEFINED
      ]
    )
  return tokenizer


def _normalizer(
  model: SentencePieceModel, dummy_prefix: bool, lower_case: bool
) -> "normalizers.Normalizer":
  """Returns the normalization of a text, without its dummy prefix.

  If there is a prefix and spaces are tidied, a space at the start is kept: it is the prefix.
  """
  from tokenizers import Regex, normalizers

  steps: list[normalizers.Normalizer] = [normalizers.Lowercase()] if lower_case else []
  if model.charsmap:
    steps.append(normalizers.Precompiled(model.charsmap))
  if not model.tidy_spaces:
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
  if not dummy_prefix:
    steps.append(normalizers.Replace(Regex(r"\A +"), ""))
  steps.append(normalizers.Replace(Regex(" {2,}"), " "))
  steps.append(normalizers.Replace(Regex(r"(?!\A) "), SPACE))
  steps.append(normalizers.Replace(Regex(rf"[ {SPACE}]+\z"), ""))
  return normalizers.Sequence(steps)


def _unigram(model: SentencePieceModel) -> Any:
  from tokenizers import models

  unknown = next(i for i, piece in enumerate(model.pieces) if piece.kind is Kind.UNKNOWN)
  vocab = [(piece.text, piece.score) for piece in model.pieces]
  return models.Unigram(vocab, unknown, model.byte_fallback)


def _bpe(model: SentencePieceModel) -> Any:
  """Returns the core of a BPE model, with a merge for every way to split a piece in two.

  SentencePiece merges the two neighbours that give the piece with the highest score.
  """
  from tokenizers import models

  ids = {piece.text: i for i, piece in enumerate(model.pieces)}
  normal = {piece.text for piece in model.pieces if piece.kind is Kind.NORMAL}
  merges = [
    (left, right)
    for piece in sorted(model.pieces, key=lambda piece: -piece.score)
    if piece.kind is Kind.NORMAL
    for i in range(1, len(piece.text))
    if (left := piece.text[:i]) in normal and (right := piece.text[i:]) in normal
  ]
  unknown = next(piece.text for piece in model.pieces if piece.kind is Kind.UNKNOWN)
  return models.BPE(
    ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback
  )


def _refuse_others(
  path: Path, pieces: tuple[Piece, ...], trainer: dict[int, Any], normalizer: dict[int, Any]
) -> None:
  """Raises ValueError for a model that the tokenizer built here would differ from."""
  unknown = sum(piece.kind is Kind.UNKNOWN for piece in pieces)
  number_of_bytes = sum(piece.kind is Kind.BYTE for piece in pieces)
  faults = {
    f"the algorithm {trainer.get(3)}, expected Unigram (1) or BPE (2)": (
      trainer.get(3, UNIGRAM) not in (UNIGRAM, BPE)
    ),
    f"{unknown} pieces for the unknown, expected one": unknown != 1,
    f"{number_of_bytes} pieces for bytes, expected 256": (
      bool(trainer.get(35, 0)) and number_of_bytes != 256
    ),
    "a piece without text": any(not piece.text for piece in pieces),
    f"a piece of more than {MAX_PIECE} characters": any(len(p.text) > MAX_PIECE for p in pieces),
    "a score that is not finite": not all(math.isfinite(piece.score) for piece in pieces),
    "two pieces of the same text": len({piece.text for piece in pieces}) != len(pieces),
    "unused pieces": any(piece.kind is Kind.UNUSED for piece in pieces),
    "spaces after words instead of before": bool(trainer.get(24, 0)),
    "spaces as they are in its pieces": not normalizer.get(5, 1),
  }
  present = [fault for fault, is_present in faults.items() if is_present]
  if present:
    raise ValueError(
      f"{path} has {'; '.join(present)}, which is not supported. Save the model's tokenizer with "
      "transformers and take its tokenizer.json"
    )


def _piece(message: bytes) -> Piece:
  fields = dict(_fields(message))
  score = struct.unpack("<f", fields.get(2, bytes(4)))[0]
  return Piece(fields[1].decode("utf-8"), score, Kind(fields.get(3, Kind.NORMAL)))


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
  """Yields the number and the value of each field of a protobuf message, in order."""
  position = 0

  def varint() -> int:
    nonlocal position
    value = shift = 0
    while True:
      byte = message[position]
      position += 1
      value |= (byte & 0x7F) << shift
      shift += 7
      if byte < 0x80:
        return value - (1 << 64) if value >= 1 << 63 else value
      if shift > 63:
        raise ValueError("a number has more than 64 bits")

  while position < len(message):
    key = varint()
    wire_type = key & 7
    if wire_type == 0:
      yield key >> 3, varint()
      continue
    if wire_type not in (1, 2, 5):
      raise ValueError(f"byte {position}: a field of the unknown wire type {wire_type}")
    length = {1: 8, 5: 4}.get(wire_type) or varint()
    if not 0 <= length <= len(message) - position:
      raise ValueError(
        f"byte {position}: {length} bytes are announced, {len(message) - position} are left"
      )
    yield key >> 3, message[position : position + length]
    position += length
