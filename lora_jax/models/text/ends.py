"""Tokens at the ends of a text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from tokenizers import Tokenizer


def mark_ends(tokenizer: "Tokenizer", start: Sequence[str], end: Sequence[str]) -> None:
  """Puts tokens of the vocabulary before and after every text that is encoded."""
  from tokenizers import processors

  single = [*start, "$A", *end]
  tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
    single=single,
    pair=[*single, *(f"{piece}:1" for piece in [*start, "$B", *end])],
    special_tokens=[with_id(tokenizer, token) for token in dict.fromkeys([*start, *end])],
  )


def with_id(tokenizer: "Tokenizer", token: str) -> tuple[str, int]:
  """Returns a token of the vocabulary with its id."""
  token_id = tokenizer.token_to_id(token)
  assert token_id is not None, "special tokens have been added"
  return token, token_id
