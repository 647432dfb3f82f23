"""Chat templates: the text is transformers', with the assistant's segments."""

import json
import shutil
from datetime import datetime

import numpy as np
import pytest

from lora_jax.data.jsonl import Rendered, encode_rendered
from lora_jax.models.text import rendering
from lora_jax.models.text.chat import (
  ChatTemplate,
  chat_parts,
  chat_segments,
  load_chat_template,
  prompt_parts,
  render_chat,
  text_after_answers,
)
from lora_jax.models.text.tokenizer import load_tokenizer

from tests.models.text.test_tokenizer import EMBEDDED

CHATML = """\
{%- for message in messages %}
  {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
CHATML_MARKED = """\
{%- for message in messages %}
  {{- '<|im_start|>' + message.role + '\\n' }}
  {%- if message.role == 'assistant' %}
    {%- generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}
  {%- else %}
    {{- message.content + '<|im_end|>' }}
  {%- endif %}
  {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}
{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{% set rest = messages[1:] %}
{% else %}
{% set system = '' %}
{% set rest = messages %}
{% endif %}
{% for message in rest %}
  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate user/assistant') }}
  {% endif %}
{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + (system if loop.first else '') }}
{{- message['content'].strip() + ' [/INST]' }}
{%- else %}
{{ ' ' + message['content'].strip() + ' ' + eos_token }}
{%- endif %}
{% endfor %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
  {%- set head = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' %}
  {{- head + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """\
{{- bos_token }}
{%- set ns = namespace(users=0) %}
{%- for message in messages %}
  {%- if message.role == 'system' %}{% continue %}{% endif %}
  {%- if message.role == 'user' %}
    {%- set ns.users = ns.users + 1 %}
    {%- if loop.last and tools %}{{- '[TOOLS]' + (tools | tojson) }}{% endif %}
    {{- '[INST] ' + message.content + '[/INST]' }}
  {%- elif message.role == 'assistant' %}
    {{- ' ' + message.content + eos_token }}
  {%- else %}
    {{- raise_exception('only system, user and assistant roles, not ' + message.role) }}
  {%- endif %}
{%- endfor %}
"""
FORGETFUL = """\
{%- for message in messages %}
  {%- if message.role == 'assistant' and not loop.last %}
    {{- '<a>' + message.content.split('</think>')[-1] + '</a>' }}
  {%- else %}
    {{- '<' + message.role[0] + '>' + message.content + '</' + message.role[0] + '>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<a>' }}{% endif %}
"""
TEMPLATES = {
  "chatml": CHATML,
  "chatml_marked": CHATML_MARKED,
  "llama2": LLAMA2,
  "llama3": LLAMA3,
  "mistral": MISTRAL,
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TURNS = [
  {"role": "user", "content": "Who wrote “Emma” & <why>?"},
  {"role": "assistant", "content": "Jane Austen.\nFor us."},
  {"role": "user", "content": "  When?  "},
  {"role": "assistant", "content": "1815 🙂"},
]
CHATS = [TURNS, TURNS[:2], [{"role": "system", "content": "Be brief."}, *TURNS]]


def template(name):
  return ChatTemplate(TEMPLATES[name], TOKENS)


ANSWERS = {
  "chatml": ["Jane Austen.\nFor us.<|im_end|>\n", "1815 🙂<|im_end|>\n"],
  "chatml_marked": ["Jane Austen.\nFor us.<|im_end|>", "1815 🙂<|im_end|>"],
  "llama2": [" Jane Austen.\nFor us. </s>", " 1815 🙂 </s>"],
  "llama3": ["Jane Austen.\nFor us.<|eot_id|>", "1815 🙂<|eot_id|>"],
  "mistral": [" Jane Austen.\nFor us.</s>", " 1815 🙂</s>"],
}


@pytest.mark.parametrize("messages", CHATS, ids=["two", "one", "system"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistants_segments(name, messages):
  segments = chat_segments(template(name), messages)
  assert "".join(text for text, _ in segments) == render_chat(template(name), messages)
  turns = sum(message["role"] == "assistant" for message in messages)
  assert [text for text, supervised in segments if supervised] == ANSWERS[name][:turns]


def test_the_text_itself():
  assert render_chat(template("llama2"), CHATS[2][:2], True) == (
    "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWho wrote “Emma” & <why>? [/INST]"
  )
  assert chat_segments(template("chatml"), TURNS[:2]) == [
    ("<|im_start|>user\nWho wrote “Emma” & <why>?<|im_end|>\n<|im_start|>assistant\n", False),
    ("Jane Austen.\nFor us.<|im_end|>\n", True),
  ]
  text = render_chat(template("mistral"), TURNS[:1], tools=[{"name": "<é>"}])
  assert text == '<s>[TOOLS][{"name": "<é>"}][INST] Who wrote “Emma” & <why>?[/INST]'


def test_a_chat_without_the_assistant_is_not_supervised():
  segments = chat_segments(template("chatml_marked"), TURNS[:1])
  assert [supervised for _, supervised in segments] == [False]


def test_blocks_in_a_macro_are_found():
  source = (
    "{% macro turn(m) %}[{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}]{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}"
  )
  template = ChatTemplate(source + "{% if add_generation_prompt %}[{% endif %}")
  segments = chat_segments(template, TURNS[:2])
  assert segments == [("[][", False), ("Jane Austen.\nFor us.", True), ("]", False)]
  with pytest.raises(ValueError, match=r"begins only after '\[', which a model would not learn"):
    chat_segments(ChatTemplate(source), TURNS[:2])


@pytest.mark.parametrize("messages", CHATS, ids=["two", "one", "system"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_each_answer_begins_where_the_prompt_for_it_ends(name, messages):
  parts = ["".join(text for text, _ in part) for part in chat_parts(template(name), messages)]
  answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
  for count, i in enumerate(answers, 1):
    prompt = render_chat(template(name), messages[:i], add_generation_prompt=True)
    assert "".join(prompt_parts(template(name), messages[:i])) == prompt
    assert prompt_parts(template(name), messages[:i]) == parts[:count]
    assert chat_parts(template(name), messages)[count][0][1]


def test_text_in_a_prompt_is_not_the_assistants():
  """A block may surround the head of the answer, too."""
  source = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}A: <think>"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: <think>{% endif %}"
  )
  messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
  assert chat_segments(ChatTemplate(source), messages) == [("Hi\nA: <think>", False), ("Yes", True)]


@pytest.mark.parametrize(
  ("name", "expected"),
  [("chatml", "<|im_end|>\n"), ("llama2", " </s>"), ("llama3", "<|eot_id|>"), ("mistral", "</s>")],
)
def test_the_text_after_an_answer(name, expected):
  assert text_after_answers(template(name)) == expected


def test_the_text_after_an_answer_of_special_templates():
  system = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
  turns = "{% for m in messages %}{{ m.content }}<e>{% endfor %}"
  assert text_after_answers(ChatTemplate(system + turns)) == "<e>"
  with pytest.raises(ValueError, match="does not write the answer 'lorem7ipsum' as it is"):
    text_after_answers(ChatTemplate(turns.replace("m.content", "m.content | upper")))


REPEAT = "{% set ns = namespace(x='ab', l=[]) %}{% for i in range(99) %}BODY{% endfor %}"
ENDLESS = {
  "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
  "power": "{{ 2 ** (10 ** 10) }}",
  "replace": "{{ ('a' * 10**6).replace('a', 'b' * 10**6) | length }}",
  "doubling": REPEAT.replace("BODY", "{% set ns.x = ns.x ~ ns.x %}") + "{{ ns.x }}",
  "nested lists": REPEAT.replace("BODY", "{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l }}",
  "macros": "{% macro a(n) %}{{ n and a(n - 1) ~ a(n - 1) }}{% endmacro %}{{ a(99) }}",
  "filters": "{{ 'a' | center(10**9) }}",
  "format": "{{ '{:1000000000d}'.format(1) }}",
  "output": "{{ 'a' * 10**7 }}b",
  "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_stopped(name, monkeypatch):
  monkeypatch.setattr(rendering, "SECONDS", 0.1)
  with pytest.raises(
    ValueError, match=r"did not end within|MemoryError|at most 10,000,000|Recursion|too large"
  ):
    render_chat(ChatTemplate(ENDLESS[name]), TURNS[:1])
  monkeypatch.undo()
  assert render_chat(template("chatml"), TURNS[:1]).startswith("<|im_start|>user")


def test_a_process_that_does_not_start_is_not_blamed_on_the_template(monkeypatch):
  rendering._stop()
  monkeypatch.setattr(rendering.sys, "executable", shutil.which("false"))
  with pytest.raises(RuntimeError, match="false could not start to render chat templates"):
    render_chat(template("chatml"), TURNS[:1])
  monkeypatch.undo()
  assert render_chat(template("chatml"), TURNS[:1])


def test_an_interrupted_rendering_leaves_no_answer_behind(monkeypatch):
  """The next request must not read the answer to the one before it."""

  render_chat(template("chatml"), TURNS[:1])
  assert rendering._child is not None
  process = rendering._child[1]

  def interrupted():
    raise KeyboardInterrupt

  monkeypatch.setattr(process.stdout, "readline", interrupted, raising=False)
  with pytest.raises(KeyboardInterrupt):
    render_chat(template("chatml"), TURNS[2:3])
  assert render_chat(template("chatml"), TURNS[:1]).startswith("<|im_start|>user\nWho")


@pytest.mark.parametrize("messages", CHATS, ids=["two", "one", "system"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_parity_with_transformers(name, messages):
  transformers = pytest.importorskip("transformers", reason="transformers is the reference here")
  tokenizer = load_tokenizer(EMBEDDED)
  peer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **TOKENS)
  peer.chat_template = TEMPLATES[name]
  for prompts in (False, True):
    chat = {"tokenize": False, "add_generation_prompt": prompts}
    text = render_chat(template(name), messages, add_generation_prompt=prompts)
    assert text == peer.apply_chat_template(messages, **chat)
  text = peer.apply_chat_template(messages, tokenize=False, tools=[{"name": "<é>"}])
  assert render_chat(template(name), messages, tools=[{"name": "<é>"}]) == text
  if "generation" in TEMPLATES[name].replace("add_generation_prompt", ""):
    both = peer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    parts = chat_parts(template(name), messages)
    (example,) = encode_rendered(tokenizer, [Rendered("", parts)], 999)
    learned = np.flatnonzero(both["assistant_masks"])
    assert example.tokens.tolist() == both["input_ids"][: learned[-1]]
    assert (example.target_index + 1).tolist() == learned.tolist()


def test_a_template_that_rewrites_earlier_turns_is_refused():
  messages = [TURNS[0], {"role": "assistant", "content": "<think>Hm</think>Austen"}, *TURNS[2:]]
  forgetful = ChatTemplate(FORGETFUL)
  assert chat_segments(forgetful, messages[:2])[1] == ("<think>Hm</think>Austen</a>", True)
  with pytest.raises(ValueError, match=r"message 1: the chat up to it .* Hm.*Austen|generation"):
    chat_segments(forgetful, messages)


@pytest.mark.parametrize(
  ("messages", "message"),
  [
    ([], "expected messages, got none"),
    ([{"content": "Hi"}], "message 0: expected a role of text, got None"),
    ([TURNS[0], {"role": "assistant"}], "message 1: expected a content of text, got None"),
    ([{"role": "user", "content": ["Hi"]}], r"message 0: expected a content of text, got \['Hi'\]"),
    (["Hi"], "message 0: expected role and content, got 'Hi'"),
    ([TURNS[0], TURNS[2]], "the roles user, user: .*roles must alternate user/assistant"),
    ([TURNS[1]], "expected a message before the assistant's first, which nothing prompts"),
    ("Hi", "expected a list of messages, got str"),
    (TURNS[0], "expected a list of messages, got dict"),
  ],
)
def test_bad_messages_are_refused_with_the_reason(messages, message):
  with pytest.raises(ValueError, match=message):
    chat_segments(template("llama2"), messages)


def test_an_assistant_that_nothing_prompts_is_refused():
  with pytest.raises(ValueError, match="expected a message before the assistant's first"):
    chat_segments(template("chatml"), TURNS[1:])


def test_the_marks_cannot_be_forged():
  with pytest.raises(ValueError, match=r"U\+FDD0|within another"):
    chat_segments(template("chatml_marked"), [{"role": "user", "content": "\ufdd0I wrote\ufdd1"}])


@pytest.mark.parametrize(
  "source",
  [
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception.__globals__.json }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ range(10**9) | list }}",
  ],
)
def test_a_template_stays_in_its_sandbox(source):
  with pytest.raises(ValueError, match="refuses messages of the roles user: "):
    render_chat(ChatTemplate(source), TURNS[:1])


def test_a_broken_template_is_named():
  with pytest.raises(ValueError, match="line 2 of the chat template: "):
    render_chat(ChatTemplate("{{ messages }}\n{% for %}"), TURNS)


def test_the_date_that_a_template_gets():
  source = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
  day = datetime(2024, 7, 26)
  assert render_chat(ChatTemplate(source, today=day), TURNS[:1]).startswith("26 Jul 2024")
  assert render_chat(ChatTemplate(source), TURNS[:1]).startswith(f"{datetime.now():%d %b %Y}")


def test_a_template_that_asks_for_reasoning_which_answers_lack_is_refused():
  source = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: <think>{% endif %}"
  )
  with pytest.raises(ValueError, match=r"message 1: .* expected '.*nt: <think>', got '.*nt: Jane"):
    chat_segments(ChatTemplate(source), TURNS[:2])


def test_folders(tmp_path):
  with pytest.raises(FileNotFoundError, match="has no chat template: expected chat_template"):
    load_chat_template(tmp_path)
  (tmp_path / "chat_template.jinja").write_text(MISTRAL, "utf-8")
  assert load_chat_template(tmp_path) == ChatTemplate(MISTRAL, {})
  (tmp_path / "chat_template.jinja").unlink()
  config = tmp_path / "tokenizer_config.json"
  config.write_text(json.dumps({"bos_token": None}))
  with pytest.raises(FileNotFoundError, match="has no chat template: expected chat_template"):
    load_chat_template(tmp_path)
  (tmp_path / "special_tokens_map.json").write_text('{"unk_token": "<unk>", "bos_token": "<x>"}')
  values = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
  config.write_text(json.dumps({**values, "chat_template": CHATML}))
  tokens = {**TOKENS, "unk_token": "<unk>"}
  assert load_chat_template(tmp_path) == ChatTemplate(CHATML, tokens)
  several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": LLAMA3}]
  config.write_text(json.dumps({**values, "chat_template": several}))
  assert load_chat_template(tmp_path) == ChatTemplate(LLAMA3, tokens)
  (tmp_path / "chat_template.jinja").write_text(MISTRAL, "utf-8")
  assert load_chat_template(tmp_path) == ChatTemplate(MISTRAL, tokens)
  config.write_text(json.dumps({"bos_token": "", "eos_token": "</s>", "unk_token": ""}))
  assert load_chat_template(tmp_path).special_tokens == {"eos_token": "</s>"}
  config.write_text('{"bos_token": 1}')
  with pytest.raises(ValueError, match="expected bos_token as text, got 1"):
    load_chat_template(tmp_path)
