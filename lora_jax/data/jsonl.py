"""Users' own data: files of JSON lines, one example a line, in either of two formats.

    {"prompt": "Translate: cat\\n", "completion": "chat"}
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}

The supervised tokens are the completion's and the end token after it; in a conversation, those of
its supervised segments (`lora_jax.models.text.chat` renders them by the model's template).

The tokens of a prompt, encoded as it is asked, are a prefix of the tokens that are trained on:
`encode_prompts` for completions, `encode_chat_prompts` for conversations.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_jax.data.text import Example, check_length, encode_texts
from lora_jax.files import parse_json, read_lines

if TYPE_CHECKING:
  from tokenizers import Encoding, Tokenizer

logger = logging.getLogger(__name__)
ROLES = ("system", "user", "assistant")
BOUNDARIES = ("\n", "\0")  # before a text; one of them is a token of its own there

Span = tuple[int, int]  # of characters in a text


class Completion(NamedTuple):
  """A prompt and its completion; `where` is the file and line."""

  where: str
  prompt: str
  completion: str


class Conversation(NamedTuple):
  """Messages, each with `role` and `content`; `where` is the file and line."""

  where: str
  messages: list[dict[str, str]]


class Rendered(NamedTuple):
  """A conversation as text, in parts of segments.

  Attributes:
    where: the file and line.
    parts: the first ends where the prompt for the first answer ends, each other where the prompt
      for the next one does. A segment is a text and whether it is supervised.
  """

  where: str
  parts: list[list[tuple[str, bool]]]


def read_jsonl(
  path: str | Path, ignored: Sequence[str] = ()
) -> list[Completion] | list[Conversation]:
  """Returns the examples of a file, all of one format.

  Args:
    path: a file in UTF-8; empty lines are left out.
    ignored: fields that an example may have in addition to those of its format.
  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if a line is malformed, naming it, or there is none.
  """
  examples: list[Any] = []
  for where, line in read_lines(path):
    if line.strip():
      examples.append(_example(where, line, ignored))
      if type(examples[-1]) is not type(examples[0]):
        raise ValueError(
          f"{where} is a {type(examples[-1]).__name__.lower()} and {examples[0].where} a "
          f"{type(examples[0]).__name__.lower()}; expected one format in a file"
        )
  if not examples:
    raise ValueError(f"{path} has no lines; expected one example a line")
  return examples


def _example(where: str, line: str, ignored: Sequence[str]) -> Completion | Conversation:
  value = parse_json(line, where)
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
    f"{', '.join(sorted(value)) or 'none':.200}. Further fields are named in data.ignored_fields"
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
      raise ValueError(f"{label}: role must be {', '.join(ROLES)}; got {message['role']!r:.200}")
    _check_text(f"{label}: content", message["content"])
  if all(message["role"] != "assistant" for message in messages):
    raise ValueError(f"{where}: no message is the assistant's, so that there is nothing to learn")
  return messages


def _check_text(label: str, value: Any) -> None:
  if not isinstance(value, str) or not value:
    raise ValueError(f"{label}: expected a text that is not empty, got {value!r:.200}")


def encode_prompts(tokenizer: "Tokenizer", prompts: Sequence[str], end_id: int) -> list[list[int]]:
  """Returns the tokens that completions are generated from.

  They have the start token that many tokenizers put before a text, and no end token.

  Raises:
    ValueError: if the tokenizer cuts or pads.
  """
  _check_tokenizer(tokenizer)
  encoded = [encoding.ids for encoding in encode_texts(tokenizer, prompts, special=True)]
  return [ids[:-1] if ids[-1:] == [end_id] else ids for ids in encoded]


def encode_chat_prompts(
  tokenizer: "Tokenizer", prompts: Sequence[Sequence[str]]
) -> list[list[int]]:
  """Returns the tokens that answers are generated from.

  Args:
    prompts: as in `chat.prompt_parts`.
  Raises:
    ValueError: if the tokenizer cuts or pads, or has no tokens for a part within a text.
  """
  where = [f"prompt {i}" for i in range(len(prompts))]
  return [tokens for tokens, _ in _encode_parts(tokenizer, where, prompts)]


def encode_completions(
  tokenizer: "Tokenizer",
  records: Sequence[Completion],
  end_id: int,
  max_length: int,
  truncate: bool = False,
) -> list[Example]:
  """Returns prompt + completion + end token of each example.

  The prompt's tokens are those that it is asked with; the completion's are those that it has
  within a text.

  Args:
    tokenizer: of the model.
    end_id: the token after the completion.
    max_length: of the whole, tokens.
    truncate: whether longer ones are truncated at their end, and logged; otherwise it is an
      error. They are cut at 128 characters for each of `max_length` before they are encoded.
  Raises:
    ValueError: if an example is too long, or has no room left for its completion.
  """
  where = [record.where for record in records]
  texts = _limited([[r.prompt, r.completion] for r in records], where, max_length, truncate)
  prompts = encode_prompts(tokenizer, [prompt for prompt, _ in texts], end_id)
  completions = _within_texts(tokenizer, where, [completion for _, completion in texts])
  tokens, masks = [], []
  for record, (_, text), prompt, (completion, _) in zip(
    records, texts, prompts, completions, strict=True
  ):
    if not completion:
      raise ValueError(f"{record.where}: the completion has no tokens: {record.completion!r:.200}")
    end = [end_id] if text == record.completion else []  # no end where it was cut
    tokens.append([*prompt, *completion, *end])
    masks.append([False] * len(prompt) + [True] * len([*completion, *end]))
  return _examples(where, tokens, masks, max_length, truncate)


def encode_rendered(
  tokenizer: "Tokenizer", records: Sequence[Rendered], max_length: int, truncate: bool = False
) -> list[Example]:
  """Returns the tokens of each rendered conversation, whose text has the special tokens already.

  They are the tokens of the whole text, as `transformers` has them, where those begin with the
  tokens of each prompt. Where a token would join the end of a prompt to the answer, as " Hello"
  does after a prompt that ends with a space, the prompt and the rest are encoded separately.

  A token is supervised if any of its text is. Arguments and errors as in `encode_completions`.
  """
  where = [record.where for record in records]
  texts = [["".join(text for text, _ in part) for part in record.parts] for record in records]
  texts = _limited(texts, where, max_length, truncate)
  tokens, masks = [], []
  for record, (ids, spans) in zip(records, _encode_parts(tokenizer, where, texts), strict=True):
    segments = [segment for part in record.parts for segment in part]
    sizes, flags = zip(*((len(text), flag) for text, flag in segments), strict=True)
    before = np.cumsum([0, *np.repeat(flags, sizes)])  # supervised characters before each
    tokens.append(ids)
    masks.append([bool(before[end] > before[start]) for start, end in spans])
  return _examples(where, tokens, masks, max_length, truncate)


def _encode_parts(
  tokenizer: "Tokenizer", where: Sequence[str], texts: Sequence[Sequence[str]]
) -> list[tuple[list[int], list[Span]]]:
  """Returns the tokens of texts in parts, and the characters of each token.

  The tokens of the first parts are always a prefix of the tokens of more parts.
  """
  _check_tokenizer(tokenizer)
  encoded: list[tuple[list[int], list[Span]]] = [([], []) for _ in texts]
  for count in range(1, max(map(len, texts), default=0) + 1):
    longer = [i for i, parts in enumerate(texts) if len(parts) >= count]
    joined = ["".join(texts[i][:count]) for i in longer]
    apart: list[tuple[int, int]] = []
    encodings = encode_texts(tokenizer, joined)
    for i, text, encoding in zip(longer, joined, encodings, strict=True):
      ids, spans = encoded[i]
      start = len(text) - len(texts[i][count - 1])
      if encoding.ids[: len(ids)] == ids:
        # White space at the prompt's end has no token as asked, but may have one in the whole.
        rest = [(max(a, start), max(b, start + 1)) for a, b in _spans(encoding)[len(ids) :]]
        encoded[i] = encoding.ids, [*spans, *rest]
      else:
        apart.append((i, start))
    separate = _within_texts(
      tokenizer, [where[i] for i, _ in apart], [texts[i][count - 1] for i, _ in apart]
    )
    for (i, start), (ids, spans) in zip(apart, separate, strict=True):
      shifted = [(start + a, start + b) for a, b in spans]
      encoded[i] = [*encoded[i][0], *ids], [*encoded[i][1], *shifted]
  return encoded


def _spans(encoding: "Encoding") -> list[Span]:
  """Returns the characters of each token; of white space, some tokenizers only say the end."""
  ends = [0, *(end for _, end in encoding.offsets)]
  return [
    (start if start < end else min(last, end), end)
    for last, (start, end) in zip(ends[:-1], encoding.offsets, strict=True)
  ]


def _within_texts(
  tokenizer: "Tokenizer", where: Sequence[str], texts: Sequence[str]
) -> list[tuple[list[int], list[Span]]]:
  """Returns the tokens that texts have within a longer one, not at its start, and their spans.

  A character goes before each that is a token of its own: tokenizers join line breaks with white
  space, and NUL with punctuation.
  """
  encoded: dict[int, tuple[list[int], list[Span]]] = {}
  for boundary in BOUNDARIES:
    numbers = [
      i
      for i, text in enumerate(texts)
      if i not in encoded and not (boundary.isspace() and text[0].isspace())
    ]
    prefix = encode_texts(tokenizer, [boundary])[0].ids
    encodings = encode_texts(tokenizer, [boundary + texts[i] for i in numbers])
    for i, encoding in zip(numbers, encodings, strict=True):
      is_joined = any(start < 1 < end for start, end in encoding.offsets)
      if prefix and encoding.ids[: len(prefix)] == prefix and not is_joined:
        spans = _spans(encoding)[len(prefix) :]
        shifted = [(max(0, start - 1), end - 1) for start, end in spans]
        encoded[i] = encoding.ids[len(prefix) :], shifted
  for i, text in enumerate(texts):
    if i not in encoded:
      raise ValueError(
        f"{where[i]}: the tokenizer has no separate token for a line break or NUL before "
        f"{text[:20]!r}"
      )
  return [encoded[i] for i in range(len(texts))]


def _check_tokenizer(tokenizer: "Tokenizer") -> None:
  if tokenizer.padding is not None or tokenizer.truncation is not None:
    raise ValueError("expected a tokenizer that neither pads nor truncates")


def _limited(
  texts: Sequence[Sequence[str]], where: Sequence[str], max_length: int, truncate: bool
) -> list[list[str]]:
  return [
    check_length(parts, max_length, place, truncate)
    for parts, place in zip(texts, where, strict=True)
  ]


def _examples(
  where: Sequence[str],
  tokens: Sequence[list[int]],
  masks: Sequence[list[bool]],
  max_length: int,
  truncate: bool,
) -> list[Example]:
  """Returns the examples up to the last supervised token, which is not an input."""
  long = [i for i, ids in enumerate(tokens) if len(ids) > max_length]
  if long and not truncate:
    raise ValueError(
      f"{len(long)} of {len(tokens)} examples have more than {max_length} tokens, the first "
      f"{where[long[0]]} ({len(tokens[long[0]])}). Raise data.row_length as far as the model's "
      "positions and memory allow, or set data.truncate"
    )
  if long:
    logger.warning("%d of %d examples truncated to %d tokens", len(long), len(tokens), max_length)
  examples = []
  for place, ids, mask in zip(where, tokens, masks, strict=True):
    learned = np.flatnonzero(mask[:max_length])
    learned = learned[learned > 0]  # nothing comes before the first token that could predict it
    if not len(learned):
      raise ValueError(
        f"{place}: none of the first {max_length} tokens is supervised; expected room for an answer"
      )
    whole = np.asarray(ids[: learned[-1] + 1], np.int32)
    examples.append(Example(whole[:-1], whole[learned], (learned - 1).astype(np.int32)))
  return examples
