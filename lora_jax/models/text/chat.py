"""Chats as text: a folder's chat template, and which parts of it the assistant wrote.

    messages                                         segments
    {"role": "user", "content": "Hi"}           ->   ("<user>Hi<end><assistant>", False)
    {"role": "assistant", "content": "Hello!"}       ("Hello!<end>", True)

A template is a program in Jinja that comes with the model. It runs in Jinja's sandbox and in a
process of its own (`rendering.py`), with the variables that `transformers` gives to it, and sees
nothing but the messages and the special tokens.

An answer begins exactly where the prompt for it ends. A template that does not render a chat so
is refused, since it would train a model on other texts than it is asked with.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from lora_jax.files import local_path, read_text
from lora_jax.models.text.gguf import read_model_json
from lora_jax.models.text.rendering import END, START, Job, render
from lora_jax.models.text.tokenizer import read_special_tokens

Message = Mapping[str, Any]
Segment = tuple[str, bool]  # a text, and whether the assistant wrote it

_SHOWN = 40  # characters of a text around the place where it differs
_PROBE = "lorem7ipsum"  # an answer that no template takes for anything else


@dataclass(frozen=True)
class ChatTemplate:
  """The format of a model's chats.

  Attributes:
    source: the template, in Jinja.
    special_tokens: the tokens it may name, as `{"eos_token": "</s>"}`.
    today: the date, which some templates write into every text; None is the current day.
  """

  source: str
  special_tokens: Mapping[str, str] = field(default_factory=dict)
  today: datetime | None = None


def load_chat_template(folder: str | Path) -> ChatTemplate:
  """Returns the template of chat_template.jinja, of tokenizer_config.json, or of a GGUF file.

  Raises:
    FileNotFoundError: if the folder has none, as those of models without training on chats.
    ValueError: if it is not text.
  """
  folder = local_path(folder)
  config = read_model_json(folder, "tokenizer_config.json")
  file = folder / "chat_template.jinja"
  source = read_text(file) if file.exists() else config.get("chat_template")
  if isinstance(source, list):  # of several for different uses
    named = {
      str(part.get("name")): part.get("template") for part in source if isinstance(part, dict)
    }
    if "default" not in named:
      raise ValueError(
        f"{folder}: expected a chat_template named 'default' in tokenizer_config.json, got "
        f"{', '.join(map(repr, named)) or 'none with a name'}"
      )
    source = named["default"]
  if source is None:
    raise FileNotFoundError(
      f"{folder} has no chat template: expected chat_template.jinja, a chat_template in "
      "tokenizer_config.json, or in a GGUF file tokenizer.chat_template. Take an "
      "instruction-tuned model, or write a chat_template.jinja"
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
    variables: further variables of this template, as `tools` or `enable_thinking`.
  Raises:
    ValueError: if a message has no role or content, or the template refuses the messages.
  """
  _check(messages)
  (text,), _ = _render(template, messages, variables, [Job(len(messages), add_generation_prompt)])
  return text


def chat_segments(
  template: ChatTemplate, messages: Sequence[Message], **variables: Any
) -> list[Segment]:
  """Returns the segments of `render_chat`'s text, each with whether the assistant wrote it.

  The arguments and errors are those of `chat_parts`.
  """
  parts = chat_parts(template, messages, **variables)
  return [segment for part in parts for segment in part]


def chat_parts(
  template: ChatTemplate, messages: Sequence[Message], **variables: Any
) -> list[list[Segment]]:
  """Returns the segments of `render_chat`'s text, in parts that end where a prompt ends.

  The first part is the prompt for the first answer; each other part begins with an answer. The
  assistant wrote the text in `{% generation %}` blocks. A template without them is rendered turn
  by turn: all that an assistant's message adds to the prompt for it is the assistant's, the end
  of the turn included.

  Args:
    messages, variables: as in `render_chat`.
  Raises:
    ValueError: as in `render_chat`, or if the prompt for an answer is not a prefix of the chat, or
      the template has no blocks and writes earlier turns differently from the last.
  """
  answers = _answers(messages)
  jobs = [Job(len(messages)), Job(len(messages), marked=True)]
  jobs += [Job(i, add_generation_prompt=True) for i in answers]
  jobs += [Job(i + 1) for i in answers]
  (whole, marked, *texts), has_generation = _render(template, messages, variables, jobs)
  prompts, turns = texts[: len(answers)], texts[len(answers) :]
  for i, prompt, turn in zip(answers, prompts, turns, strict=True):
    if not has_generation:
      _check_prompt(i, prompt, turn)
      _check_turn(i, turn, whole)
    _check_prompt(i, prompt, whole)
  ends = sorted({len(prompt) for prompt in prompts})
  if has_generation:
    spans = _after_prompts(_marked_spans(marked, whole), ends, whole)
  else:
    spans = [(len(p), len(t)) for p, t in zip(prompts, turns, strict=True)]
  cuts = [0, *ends, len(whole)]
  parts = [_segments(whole, start, stop, spans) for start, stop in itertools.pairwise(cuts)]
  return [part for part in parts if part]


def prompt_parts(
  template: ChatTemplate, messages: Sequence[Message], **variables: Any
) -> list[str]:
  """Returns the prompt for the assistant's next answer, in the same parts as `chat_parts`.

  Args:
    messages, variables: as in `render_chat`.
  Raises:
    ValueError: as in `render_chat`, or if the prompt for an earlier answer is not a prefix of it.
  """
  answers = _answers(messages)
  jobs = [Job(i, add_generation_prompt=True) for i in (*answers, len(messages))]
  (*prompts, whole), _ = _render(template, messages, variables, jobs)
  for i, prompt in zip(answers, prompts, strict=True):
    _check_prompt(i, prompt, whole)
  cuts = [0, *sorted({len(prompt) for prompt in prompts}), len(whole)]
  parts = [whole[start:stop] for start, stop in itertools.pairwise(cuts)]
  return [part for part in parts if part]


def text_after_answers(template: ChatTemplate) -> str:
  """Returns the text that a template writes after an answer, which ends the assistant's turn.

  It is that of a chat of a question and an answer, after a system message where the template
  demands one.

  Raises:
    ValueError: if the template does not render such chats, or not the answer as it is.
  """
  roles = ("system", "user", "assistant")
  messages = [{"role": role, "content": _PROBE.upper()} for role in roles]
  messages[-1]["content"] = _PROBE
  try:
    text = render_chat(template, messages[1:])
  except ValueError:
    text = render_chat(template, messages)
  _, answer, after = text.rpartition(_PROBE)
  if not answer:
    raise ValueError(f"the chat template does not write the answer {_PROBE!r} as it is: {text!r}")
  return after


def _render(
  template: ChatTemplate,
  messages: Sequence[Message],
  variables: Mapping[str, Any],
  jobs: Sequence[Job],
) -> tuple[list[str], bool]:
  names = {**template.special_tokens, **variables}
  today = template.today or datetime.now()
  rendering = render(template.source, today, names, messages, jobs)
  texts = []
  for job, text, error in zip(jobs, rendering.texts, rendering.errors, strict=True):
    if text is None:
      roles = ", ".join(message["role"] for message in messages[: job.num_messages])
      raise ValueError(f"the chat template refuses messages of the roles {roles:.200}: {error}")
    texts.append(text)
  return texts, rendering.has_generation


def _answers(messages: Sequence[Message]) -> list[int]:
  """Returns the numbers of the assistant's messages."""
  _check(messages)
  if messages[0]["role"] == "assistant":
    raise ValueError("expected a message before the assistant's first, which nothing prompts")
  return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _check(messages: Sequence[Message]) -> None:
  if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
    raise ValueError(f"expected a list of messages, got {type(messages).__name__}")
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


def _check_prompt(i: int, prompt: str, whole: str) -> None:
  if not whole.startswith(prompt):
    raise ValueError(
      f"message {i}: the chat does not begin with the prompt for it. {_difference(prompt, whole)}. "
      "The template writes chats differently from how it asks for answers, as one that leaves out "
      "their reasoning: with add_generation_prompt it must write exactly what it writes before an "
      "answer. Change the template, or give one turn at a time"
    )


def _check_turn(i: int, turn: str, whole: str) -> None:
  if not whole.startswith(turn):
    raise ValueError(
      f"message {i}: the chat up to it is not a prefix of the whole chat. "
      f"{_difference(turn, whole)}. The template writes earlier turns differently from the last: "
      "put {% generation %} and {% endgeneration %} around the assistant's text in it, or give "
      "one turn at a time"
    )


def _difference(start: str, whole: str) -> str:
  """Describes where a text first differs from the start that it should have."""
  pairs = enumerate(zip(start, whole, strict=False))
  place = next((i for i, (a, b) in pairs if a != b), min(len(start), len(whole)))
  begin = max(0, place - _SHOWN)
  texts = (repr(text[begin : place + _SHOWN]) for text in (start, whole))
  return "From character {} on, expected {}, got {}".format(begin, *texts)


def _marked_spans(marked: str, whole: str) -> list[tuple[int, int]]:
  """Returns the places in `whole` of the text that START and END surround in `marked`."""
  spans, length = [], 0
  parts = marked.split(START)
  for i, part in enumerate(parts):
    inside, *after = part.split(END)
    if len(after) != (i > 0):
      raise ValueError(
        "the chat template has a {% generation %} block within another, or a message holds one of "
        "the characters U+FDD0 and U+FDD1, which are not text"
      )
    if i > 0:
      spans.append((length, length + len(inside)))
    length += len(inside) + sum(map(len, after))
  if marked.replace(START, "").replace(END, "") != whole:
    raise ValueError(
      "the chat template changes the text of its {% generation %} blocks, or a message holds one "
      "of the characters U+FDD0 and U+FDD1, which are not text"
    )
  return spans


def _after_prompts(
  spans: list[tuple[int, int]], ends: Sequence[int], whole: str
) -> list[tuple[int, int]]:
  """Returns the spans without their parts in a prompt; each answer's first starts at its end."""
  for end, next_end in itertools.pairwise([*ends, len(whole)]):
    spans = [(end if start < end < stop else start, stop) for start, stop in spans]
    first = min((start for start, _ in spans if end <= start < next_end), default=end)
    if first != end:
      raise ValueError(
        f"the prompt for an answer ends with {whole[:end][-_SHOWN:]!r}, but the answer's "
        f"{{% generation %}} block begins only after {whole[end:first]!r}, which a model would "
        "not learn to write: put it into the block, or let the template write it with "
        "add_generation_prompt"
      )
  return spans


def _segments(whole: str, start: int, stop: int, spans: Sequence[tuple[int, int]]) -> list[Segment]:
  """Returns the segments of `whole[start:stop]`."""
  segments, last = [], start
  for span_start, span_stop in spans:
    if start <= span_start < stop:
      segments += [(whole[last:span_start], False), (whole[span_start:span_stop], True)]
      last = span_stop
  return [(text, flag) for text, flag in [*segments, (whole[last:stop], False)] if text]
