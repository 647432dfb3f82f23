"""Chats as text: a folder's chat template, and which parts of it the assistant wrote.

    messages                                         segments
    {"role": "user", "content": "Hi"}           ->   ("<user>Hi<end><assistant>", False)
    {"role": "assistant", "content": "Hello!"}       ("Hello!<end>", True)

A template is a program in Jinja that comes with the model. It runs in Jinja's sandbox, with what
`transformers` gives to it, and sees nothing but the messages and the special tokens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jax.files import read_json_if_present, read_text
from lora_jax.models.text.tokenizer import read_special_tokens

if TYPE_CHECKING:
  import jinja2

Message = Mapping[str, Any]

START, END = "\ufdd0", "\ufdd1"  # around an assistant's text; Unicode keeps both free of text


@dataclass(frozen=True)
class ChatTemplate:
  """How a model wants its chats.

  Attributes:
    source: the template, in Jinja.
    special_tokens: what it may name, as `{"eos_token": "</s>"}`.
    today: what it is told if it asks for the date, as some do for every text; None is the day.
  """

  source: str
  special_tokens: Mapping[str, str] = field(default_factory=dict)
  today: datetime | None = None


def load_chat_template(folder: str | Path) -> ChatTemplate:
  """Returns the template of chat_template.jinja, or of tokenizer_config.json.

  Raises:
    FileNotFoundError: if the folder has none, as those of models without training on chats.
    ValueError: if it is not text.
  """
  folder = Path(folder)
  config = read_json_if_present(folder / "tokenizer_config.json")
  file = folder / "chat_template.jinja"
  source = read_text(file) if file.is_file() else config.get("chat_template")
  if isinstance(source, list):  # of several for different uses
    named = {part.get("name"): part.get("template") for part in source if isinstance(part, dict)}
    source = named.get("default")
  if source is None:
    raise FileNotFoundError(
      f"{folder} has no chat template: expected chat_template.jinja, or a chat_template in "
      "tokenizer_config.json. Take an instruction-tuned model, or write a chat_template.jinja"
    )
  if not isinstance(source, str):
    raise ValueError(f"{folder}: expected the chat template as text, got {type(source).__name__}")
  return ChatTemplate(source, read_special_tokens(folder))


def render_chat(
  template: ChatTemplate,
  messages: Sequence[Message],
  add_generation_prompt: bool = False,
  **variables: Any,
) -> str:
  """Returns a chat as the model's text.

  It holds the special tokens already: encode it with `add_special_tokens=False`.

  Args:
    messages: each with a `role` and a `content`, both text.
    add_generation_prompt: whether the text ends with the head of the assistant's next turn.
    variables: that this template knows besides, as `tools` or `enable_thinking`.
  Raises:
    ValueError: if a message has no role or content, or the template refuses the messages.
  """
  return _render(template, messages, add_generation_prompt, variables)


def chat_segments(
  template: ChatTemplate, messages: Sequence[Message], **variables: Any
) -> list[tuple[str, bool]]:
  """Returns the parts of `render_chat`'s text, each with whether the assistant wrote it.

  What the assistant wrote is what stands in `{% generation %}` blocks. A template without them is
  rendered turn by turn: all that an assistant's message adds to the text up to the prompt for it
  is the assistant's, the end of the turn included.

  Args:
    messages, variables: as of `render_chat`.
  Raises:
    ValueError: as of `render_chat`, or if the template does not write turn after turn, as one
      that leaves out the reasoning of earlier turns.
  """
  whole = render_chat(template, messages, **variables)
  if _compile(template.source, True).environment.has_generation:  # pyright: ignore
    spans = _marked_spans(_render(template, messages, False, variables, marked=True), whole)
  else:
    spans = _turn_spans(template, messages, variables, whole)
  segments, last = [], 0
  for start, end in spans:
    segments += [(whole[last:start], False), (whole[start:end], True)]
    last = end
  return [(text, has_loss) for text, has_loss in [*segments, (whole[last:], False)] if text]


def _render(
  template: ChatTemplate,
  messages: Sequence[Message],
  add_generation_prompt: bool,
  variables: Mapping[str, Any],
  marked: bool = False,
) -> str:
  _check(messages)
  names: dict[str, Any] = {"tools": None, "documents": None}
  names["strftime_now"] = (template.today or datetime.now()).strftime
  names |= {**template.special_tokens, **variables}
  names["messages"] = [dict(message) for message in messages]
  names["add_generation_prompt"] = add_generation_prompt
  try:
    return _compile(template.source, marked).render(names)
  except Exception as error:  # a template's own, Jinja's, or Python's of an operation in it
    roles = ", ".join(message["role"] for message in messages)
    raise ValueError(
      f"the chat template refuses messages of the roles {roles}: {type(error).__name__}: {error}"
    ) from error


def _check(messages: Sequence[Message]) -> None:
  if not messages:
    raise ValueError("expected messages, got none")
  for i, message in enumerate(messages):
    if not isinstance(message, Mapping):
      raise ValueError(f"message {i}: expected role and content, got {message!r:.100}")
    needed = ["role"] if message.get("tool_calls") else ["role", "content"]
    for key in needed:
      if not isinstance(message.get(key), str):
        raise ValueError(
          f"message {i}: expected a {key} of text, got {message.get(key)!r:.100}; a message is "
          'like {"role": "user", "content": "Hello"}'
        )


def _marked_spans(marked: str, whole: str) -> list[tuple[int, int]]:
  """Returns where in `whole` the text stands that START and END surround in `marked`."""
  spans, length = [], 0
  parts = marked.split(START)
  for i, part in enumerate(parts):
    inside, *after = part.split(END)
    if len(after) != (i > 0):
      raise ValueError("the chat template has a {% generation %} block within another")
    if i > 0:
      spans.append((length, length + len(inside)))
    length += len(inside) + sum(map(len, after))
  if marked.replace(START, "").replace(END, "") != whole:
    raise ValueError(
      "the chat template changes the text of its {% generation %} blocks, or a message holds one "
      "of the characters U+FDD0 and U+FDD1, which are no text"
    )
  return spans


def _turn_spans(
  template: ChatTemplate, messages: Sequence[Message], variables: Mapping[str, Any], whole: str
) -> list[tuple[int, int]]:
  """Returns where in `whole` the assistant's messages stand, by rendering up to each."""
  spans = []
  for i, message in enumerate(messages):
    if message["role"] != "assistant":
      continue
    if i == 0:
      raise ValueError("expected a message before the assistant's first, which nothing prompts")
    prompt = _render(template, messages[:i], True, variables)
    turns = _render(template, messages[: i + 1], False, variables)
    if not turns.startswith(prompt):
      raise ValueError(
        f"message {i}: the chat does not begin with the prompt for it, which ends with "
        f"{prompt[-60:]!r}. The template writes answers differently from how it asks for them, as "
        "one that leaves out their reasoning: put {% generation %} and {% endgeneration %} around "
        "the assistant's text in it"
      )
    if not whole.startswith(turns):
      raise ValueError(
        f"message {i}: the chat up to it is not how the whole chat begins: it ends with "
        f"{turns[-60:]!r}. The template writes earlier turns differently from the last: put "
        "{% generation %} and {% endgeneration %} around the assistant's text in it, or give one "
        "turn at a time"
      )
    spans.append((len(prompt), len(turns)))
  return spans


@lru_cache
def _compile(source: str, marked: bool) -> "jinja2.Template":
  """Returns a compiled template; `marked`: with START and END around the assistant's text."""
  import jinja2
  from jinja2.ext import loopcontrols
  from jinja2.sandbox import ImmutableSandboxedEnvironment

  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_generation(), loopcontrols]
  )
  environment.extend(marks=(START, END) if marked else ("", ""), has_generation=False)
  environment.filters["tojson"] = _to_json
  environment.globals["raise_exception"] = _raise_exception
  try:
    return environment.from_string(source)
  except jinja2.TemplateSyntaxError as error:
    raise ValueError(f"line {error.lineno} of the chat template: {error.message}") from error


def _generation() -> Any:
  """Returns Jinja's extension for `{% generation %} ... {% endgeneration %}`."""
  from jinja2 import nodes
  from jinja2.ext import Extension

  class Generation(Extension):
    tags = {"generation"}  # noqa: RUF012 - Jinja's way

    def parse(self, parser: Any) -> nodes.Node:
      self.environment.has_generation = True  # pyright: ignore[reportAttributeAccessIssue]
      line = next(parser.stream).lineno
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      return nodes.CallBlock(self.call_method("surround"), [], [], body).set_lineno(line)

    def surround(self, caller: Any) -> str:
      start, end = self.environment.marks  # pyright: ignore[reportAttributeAccessIssue]
      return f"{start}{caller()}{end}"

  return Generation


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """Returns JSON without the escapes for HTML of Jinja's own filter."""
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _raise_exception(message: str) -> None:
  raise ValueError(message)
