"""Users' own data: files of JSON lines, one example a line, in either of two forms.

    {"prompt": "Translate: cat\\n", "completion": "chat"}
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}

Loss is taken on the completion and the end token after it; of a conversation, on what its
segments say (`lora_jax.models.text.chat` renders them by the model's template).
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_jax.data.text import Example

if TYPE_CHECKING:
  from tokenizers import Tokenizer

logger = logging.getLogger(__name__)
ROLES = ("system", "user", "assistant")
BOUNDARIES = ("\n", "\0")  # before a text; one of them is a token of its own there


class Completion(NamedTuple):
  """A prompt and what is to follow; `where` is its file and line."""

  where: str
  prompt: str
  completion: str


class Conversation(NamedTuple):
  """Messages, each with `role` and `content`; `where` is its file and line."""

  where: str
  messages: list[dict[str, str]]


class Rendered(NamedTuple):
  """A conversation as text: segments one after another, and whether each has a loss."""

  where: str
  segments: list[tuple[str, bool]]


def read_jsonl(
  path: str | Path, ignored: Sequence[str] = ()
) -> list[Completion] | list[Conversation]:
  """Returns the examples of a file, all of one form.

  Args:
    path: of the file, UTF-8; empty lines are left out.
    ignored: fields that a line may have besides those of its form.
  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if a line is malformed, naming it, or there is none.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; expected a file of JSON lines")
  records: list[Any] = []
  for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
    if line.strip():
      records.append(_record(f"{path}:{number}", line, ignored))
      if type(records[-1]) is not type(records[0]):
        raise ValueError(
          f"{path}:{number} is a {type(records[-1]).__name__.lower()} and {records[0].where} a "
          f"{type(records[0]).__name__.lower()}; expected one form in a file"
        )
  if not records:
    raise ValueError(f"{path} has no lines; expected one example a line")
  return records


def _record(where: str, line: bytes, ignored: Sequence[str]) -> Completion | Conversation:
  try:
    value = json.loads(line.decode("utf-8"))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{where}: no JSON in UTF-8: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{where}: expected an object, got {type(value).__name__}")
  fields = set(value) - set(ignored)
  if fields == {"messages"}:
    return Conversation(where, _messages(where, value["messages"]))
  if fields == {"prompt", "completion"}:
    for name in ("prompt", "completion"):
      _check_text(f"{where}: {name}", value[name])
    return Completion(where, value["prompt"], value["completion"])
  raise ValueError(
    f"{where}: expected the fields prompt and completion, or messages; got "
    f"{', '.join(sorted(value)) or 'none'}. Further fields are named in data.ignored_fields"
  )


def _messages(where: str, messages: Any) -> list[dict[str, str]]:
  if not isinstance(messages, list) or not messages:
    raise ValueError(f"{where}: expected messages to be a list of one or more")
  for number, message in enumerate(messages, 1):
    label = f"{where}: message {number}"
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
      actual = ", ".join(sorted(message)) if isinstance(message, dict) else type(message).__name__
      raise ValueError(
        f"{label}: expected an object with role and content, got {actual or 'neither'}"
      )
    if message["role"] not in ROLES:
      raise ValueError(f"{label}: role must be {', '.join(ROLES)}; got {message['role']!r}")
    _check_text(f"{label}: content", message["content"])
  if all(message["role"] != "assistant" for message in messages):
    raise ValueError(f"{where}: no message is the assistant's, so that there is nothing to learn")
  return messages


def _check_text(label: str, value: Any) -> None:
  if not isinstance(value, str) or not value:
    raise ValueError(f"{label}: expected a text that is not empty, got {value!r}")
  try:
    value.encode()
  except UnicodeEncodeError as error:
    half = value[error.start]
    raise ValueError(f"{label}: half of a surrogate pair, {half!a}, is no text") from None


def encode_prompts(tokenizer: "Tokenizer", prompts: Sequence[str], end_id: int) -> list[list[int]]:
  """Returns the tokens that completions are generated from.

  They begin as the model's texts do (many tokenizers put a start token there), and do not end.

  Raises:
    ValueError: if the tokenizer cuts or pads.
  """
  if tokenizer.padding is not None or tokenizer.truncation is not None:
    raise ValueError("expected a tokenizer that neither pads nor truncates")
  encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(prompts))]
  return [ids[:-1] if ids[-1:] == [end_id] else ids for ids in encoded]


def encode_completions(
  tokenizer: "Tokenizer",
  records: Sequence[Completion],
  end_id: int,
  max_length: int,
  truncate: bool = False,
) -> list[Example]:
  """Returns prompt + completion + end token of each record.

  The prompt's tokens are those that it has alone, as where the model is used; the completion's
  are those that it has within a text.

  Args:
    tokenizer: of the model.
    end_id: the token after the completion.
    max_length: of the whole, tokens.
    truncate: cuts longer ones at their end and logs how many; otherwise it is an error.
  Raises:
    ValueError: if a record is too long, or has no room left for its completion.
  """
  prompts = encode_prompts(tokenizer, [record.prompt for record in records], end_id)
  tokens, masks = [], []
  completions = _within_texts(tokenizer, records)
  for record, prompt, completion in zip(records, prompts, completions, strict=True):
    if not completion:
      raise ValueError(f"{record.where}: the completion has no tokens: {record.completion!r}")
    tokens.append([*prompt, *completion, end_id])
    masks.append([False] * len(prompt) + [True] * (len(completion) + 1))
  return _examples([record.where for record in records], tokens, masks, max_length, truncate)


def _within_texts(tokenizer: "Tokenizer", records: Sequence[Completion]) -> list[list[int]]:
  """Returns the tokens of completions as they are within a text, not at the start of one.

  A character goes before each that is a token of its own: tokenizers join line breaks with white
  space, and NUL with punctuation.
  """
  tokens: dict[int, list[int]] = {}
  for boundary in BOUNDARIES:
    left = [
      i
      for i, record in enumerate(records)
      if i not in tokens and not (boundary.isspace() and record.completion[0].isspace())
    ]
    before = tokenizer.encode(boundary, add_special_tokens=False).ids
    texts = [boundary + records[i].completion for i in left]
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    for i, encoding in zip(left, encodings, strict=True):
      is_joined = any(start < 1 < end for start, end in encoding.offsets)
      if before and encoding.ids[: len(before)] == before and not is_joined:
        tokens[i] = encoding.ids[len(before) :]
  for i, record in enumerate(records):
    if i not in tokens:
      raise ValueError(
        f"{record.where}: the tokenizer has no token of a line break or NUL alone before "
        f"{record.completion[:20]!r}"
      )
  return [tokens[i] for i in range(len(records))]


def encode_rendered(
  tokenizer: "Tokenizer", records: Sequence[Rendered], max_length: int, truncate: bool = False
) -> list[Example]:
  """Returns the tokens of each rendered conversation; its text holds the special tokens.

  A token has a loss if any of its text does. Arguments and errors as of `encode_completions`.
  """
  texts = ["".join(text for text, _ in record.segments) for record in records]
  encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
  masks = []
  for record, encoding in zip(records, encodings, strict=True):
    sizes, has_loss = zip(*((len(text), flag) for text, flag in record.segments), strict=True)
    before = np.cumsum([0, *np.repeat(has_loss, sizes)])  # characters with a loss before each
    ends = [0, *(end for _, end in encoding.offsets)]
    masks.append(
      [  # of white space some tokenizers say where it ends alone
        bool(before[end] > before[start if start < end else last])
        for last, (start, end) in zip(ends[:-1], encoding.offsets, strict=True)
      ]
    )
  tokens = [encoding.ids for encoding in encodings]
  return _examples([record.where for record in records], tokens, masks, max_length, truncate)


def _examples(
  where: Sequence[str],
  tokens: Sequence[list[int]],
  masks: Sequence[list[bool]],
  max_length: int,
  truncate: bool,
) -> list[Example]:
  """Returns the examples up to the last token with a loss, which is no input."""
  long = [i for i, ids in enumerate(tokens) if len(ids) > max_length]
  if long and not truncate:
    raise ValueError(
      f"{len(long)} of {len(tokens)} lines have more than {max_length} tokens, {where[long[0]]} "
      f"({len(tokens[long[0]])}) the first. Raise data.row_length as far as the model's positions "
      "and memory allow, or cut them with data.truncate"
    )
  if long:
    logger.warning("%d of %d lines cut to %d tokens", len(long), len(tokens), max_length)
  examples = []
  for place, ids, mask in zip(where, tokens, masks, strict=True):
    learned = np.flatnonzero(mask[:max_length])
    learned = learned[learned > 0]  # nothing comes before the first token that could predict it
    if not len(learned):
      raise ValueError(
        f"{place}: none of the first {max_length} tokens has a loss; expected room for an answer"
      )
    whole = np.asarray(ids[: learned[-1] + 1], np.int32)
    examples.append(Example(whole[:-1], whole[learned], (learned - 1).astype(np.int32)))
  return examples
