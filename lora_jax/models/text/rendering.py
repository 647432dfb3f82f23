"""Renders chat templates in a process of its own, which limits their time, memory and size.

A template is a program that comes with a model. Jinja's sandbox keeps it from files and modules,
but not from looping or growing without end, in a loop or in one call. So the templates run in a
child process, which the system stops: after `SECONDS` of processor time a request, or at `MEMORY`.

The child runs this file as a script. It only imports Jinja, so it starts in a tenth of a second;
one child serves all templates. Requests and answers are lines of JSON.
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

SECONDS = 10.0  # of processor time, for all renderings of one conversation
MEMORY = 2**29  # bytes, of the child
MAX_CHARACTERS = 10**7  # of one rendered text
READY = "ready\n"  # the child's first line
START, END = "\ufdd0", "\ufdd1"  # around an assistant's text; Unicode keeps both free of text

_lock = threading.Lock()
_child: tuple[int, subprocess.Popen[str]] | None = None  # the process that started it, and it


class Job(NamedTuple):
  """One rendering of a conversation.

  Attributes:
    num_messages: messages to render, from the first.
    add_generation_prompt: whether the text ends with the head of the assistant's next turn.
    marked: whether START and END surround the text of `{% generation %}` blocks.
  """

  num_messages: int
  add_generation_prompt: bool = False
  marked: bool = False


class Rendering(NamedTuple):
  """The texts of a request's jobs, or why there is none.

  Attributes:
    texts: None where the template refuses.
    errors: the reasons, None where there is a text.
    has_generation: whether the template has `{% generation %}` blocks.
  """

  texts: list[str | None]
  errors: list[str | None]
  has_generation: bool


def render(
  source: str,
  today: datetime,
  names: Mapping[str, Any],
  messages: Sequence[Mapping[str, Any]],
  jobs: Sequence[Job],
) -> Rendering:
  """Renders a template, for several parts of one conversation.

  Args:
    source: the template.
    today: the time that `strftime_now` formats.
    names: further variables, values of JSON.
    messages: the conversation, values of JSON.
    jobs: the renderings.
  Raises:
    ValueError: if the template has a syntax error, or exceeds the limits on time and memory.
  """
  try:
    request = json.dumps(
      [source, today.isoformat(), dict(names), [dict(m) for m in messages], jobs, SECONDS]
    )
  except (TypeError, ValueError, RecursionError) as error:
    raise ValueError(
      f"expected messages and variables of a chat template as values of JSON: {error}"
    ) from error
  answer = _ask(request)
  if answer is None:
    raise ValueError(
      f"the chat template did not end within {SECONDS:g} seconds and {MEMORY >> 20} MB; does it "
      "loop or grow without end?"
    )
  value = json.loads(answer)
  if isinstance(value, str):
    raise ValueError(value)
  return Rendering(*value)


def _ask(request: str) -> str | None:
  """Returns the child's answer, None if the system has stopped it."""
  global _child
  with _lock:
    if _child is None or _child[0] != os.getpid() or _child[1].poll() is not None:
      _child = os.getpid(), _start()
    process = _child[1]
    assert process.stdin is not None
    assert process.stdout is not None
    answer = ""
    try:
      process.stdin.write(request + "\n")
      process.stdin.flush()
      answer = process.stdout.readline()
    except BrokenPipeError:
      pass
    finally:  # also if interrupted, when the answer is still to come
      if not answer.endswith("\n"):
        _stop()
    return answer or None


def _start() -> subprocess.Popen[str]:
  """Returns a new child; `-P` keeps this folder's modules from hiding others of their name.

  Raises:
    RuntimeError: if it ends before it is ready, as without Jinja.
  """
  process = subprocess.Popen(
    [sys.executable, "-P", __file__],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    encoding="ascii",  # of JSON with its escapes
    start_new_session=True,  # Ctrl-C is the parent's
  )
  assert process.stdout is not None
  first = ""
  try:
    first = process.stdout.readline()
  finally:  # also if interrupted
    if first != READY:
      process.kill()
      process.communicate()
  if first != READY:
    raise RuntimeError(
      f"{sys.executable} could not start to render chat templates; its own error is above. It "
      "needs Jinja, as every Python with lora_jax's requirements has, on Linux or macOS"
    )
  return process


@atexit.register
def _stop() -> None:
  global _child
  if _child is not None and _child[0] == os.getpid():
    process = _child[1]
    process.kill()
    with contextlib.suppress(BrokenPipeError):
      process.communicate()
  _child = None


# ---- the child ---------------------------------------------------------------------------


def serve() -> None:
  """Answers requests until the parent closes the pipe."""
  import resource
  import signal

  import jinja2.ext
  import jinja2.sandbox  # noqa: F401 (before the clock starts)

  with contextlib.suppress(ValueError, OSError):  # macOS takes no such limit
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  print(READY, end="", flush=True)
  for line in sys.stdin:
    source, today, names, messages, jobs, seconds = json.loads(line)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # then SIGPROF ends the process
    try:
      answer: Any = _answer(source, today, names, messages, [Job(*job) for job in jobs])
    except ValueError as error:
      answer = str(error)
    text = json.dumps(answer)
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(text, flush=True)


def _answer(
  source: str, today: str, names: dict[str, Any], messages: list[Any], jobs: list[Job]
) -> Rendering:
  names = {"tools": None, "documents": None, **names}
  names["strftime_now"] = datetime.fromisoformat(today).strftime
  rendering = Rendering([], [], _compile(source, True).environment.has_generation)
  for job in jobs:
    text = reason = None
    try:
      text = _compile(source, job.marked).render(
        names
        | {
          "messages": messages[: job.num_messages],
          "add_generation_prompt": job.add_generation_prompt,
        }
      )
    except Exception as error:  # a template's own, Jinja's, or Python's of an operation in it
      reason = f"{type(error).__name__}: {error}"[:1000]
    if text is not None and len(text) > MAX_CHARACTERS:
      text, reason = None, f"a text of {len(text):,} characters; at most {MAX_CHARACTERS:,}"
    rendering.texts.append(text)
    rendering.errors.append(reason)
  return rendering


@lru_cache
def _compile(source: str, marked: bool) -> Any:
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
  except Exception as error:  # Python's compiler refuses what is nested too deeply
    raise ValueError(
      f"the chat template does not compile: {type(error).__name__}: {error}"
    ) from error


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


if __name__ == "__main__":
  serve()
