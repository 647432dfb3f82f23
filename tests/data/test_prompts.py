"""A prompt's tokens, as it is asked, are a prefix of the tokens that are trained on."""

import functools
import json
import lzma
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from lora_jax.data.jsonl import (
  Completion,
  Rendered,
  encode_chat_prompts,
  encode_completions,
  encode_prompts,
  encode_rendered,
)
from lora_jax.models.text.chat import ChatTemplate, chat_parts, prompt_parts, render_chat
from lora_jax.models.text.tokenizer import load_tokenizer

from tests.paths import GOLDEN
from tests.tiny_e2e import EMBEDDED

CONTENTS = (
  *(
    "Hello there",
    " Hello",
    "Hello ",
    "  two  spaces  ",
    "\nnew\n\nlines\n",
    "1,234.5",
    "é 🎉 日本",
  ),
  *("don't", "\\frac{1}", "<b>", "[x](y)", "\t tab", "a", ".", " ", "\n", "low rank of B", "::"),
)
HEADS = (
  "{r}: ",
  "{r}:",
  "{r}:\n",
  "{r}\n\n",
  "{r} ",
  "{r}\n ",
  "<s>{r}</s>",
  "<|endoftext|>{r}",
  "[{r}]\t",
)
TAILS = ("EOS\n", "EOS", "\n", " ", "\n\n", "EOS ", "")
REFUSALS = ("no separate token for a line break", "is supervised", "completion has no tokens")
TOKENIZERS = ("gpt2", "llama", "llama_legacy", "gemma", "deberta", "bert", "bert_cased", "roberta")


@functools.cache
def tokenizer_of(name):
  """Returns a tokenizer of one of the kinds: byte-level BPE, SentencePiece (3), WordPiece (2)."""
  if name == "gpt2":
    return load_tokenizer(EMBEDDED)
  folder = Path(tempfile.mkdtemp()) / name
  shutil.copytree(GOLDEN / "tokenizers" / name.removesuffix("_legacy"), folder)
  if name == "deberta":
    (folder / "spm.model").write_bytes(lzma.decompress((folder / "spm.model.xz").read_bytes()))
  if name == "llama_legacy":
    (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": True}))
  return load_tokenizer(folder)


def template_of(head, tail, marked):
  """Returns a template whose turns have the head and tail, with or without blocks."""
  head = "{{ " + json.dumps(head).replace("{r}", '" ~ (m.role if m else "assistant") ~ "') + " }}"
  turn = "{{ m.content ~ " + json.dumps(tail).replace("EOS", '" ~ eos_token ~ "') + " }}"
  if marked:
    blocks = "{% generation %}" + turn + "{% endgeneration %}"
    turn = "{% if m.role == 'assistant' %}" + blocks + "{% else %}" + turn + "{% endif %}"
  source = "{% for m in messages %}" + head + turn + "{% endfor %}"
  source += "{% if add_generation_prompt %}" + head + "{% endif %}"
  return ChatTemplate(source, {"eos_token": "</s>"})


def random_chat(choice):
  roles = ["system"] * choice.randrange(2) + ["user", "assistant"] * choice.randrange(1, 4)
  roles += ["assistant"] * choice.randrange(2)  # two answers in a row
  return [{"role": role, "content": choice.choice(CONTENTS)} for role in roles]


def whole_of(example):
  return [*example.tokens.tolist(), int(example.targets[-1])]


def check_prompts(tokenizer, template, messages):
  """Checks each answer; returns whether the tokens are those of the whole text."""
  (example,) = encode_rendered(tokenizer, [Rendered("chat", chat_parts(template, messages))], 10**4)
  whole, supervised = whole_of(example), set((example.target_index + 1).tolist())
  for i, message in enumerate(messages):
    if message["role"] == "assistant" and message["content"].strip():  # some drop white space
      (asked,) = encode_chat_prompts(tokenizer, [prompt_parts(template, messages[:i])])
      assert whole[: len(asked)] == asked
      assert len(asked) in supervised
  text = render_chat(template, messages)
  return whole == tokenizer.encode(text, add_special_tokens=False).ids[: len(whole)]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompts_of_random_chats_are_prefixes(name):
  choice, tokenizer = random.Random(0), tokenizer_of(name)
  as_whole, refused = [], 0
  for _ in range(60):
    template = template_of(choice.choice(HEADS), choice.choice(TAILS), choice.random() < 0.3)
    messages = random_chat(choice)
    try:
      as_whole.append(check_prompts(tokenizer, template, messages))
    except ValueError as error:
      if not any(reason in str(error) for reason in REFUSALS):
        raise
      refused += 1
  assert refused < 10, f"{refused} of 60 chats refused"
  assert any(as_whole)
  assert "bert" in name.removeprefix("ro") or not all(as_whole)  # its tokens join no white space


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompts_of_random_completions_are_prefixes(name):
  choice, tokenizer = random.Random(0), tokenizer_of(name)
  for _ in range(200):
    prompt = choice.choice(CONTENTS) + choice.choice(("", " ", "\n", ":", ": "))
    record = Completion("", prompt, choice.choice(CONTENTS))
    try:
      (example,) = encode_completions(tokenizer, [record], 1, 10**4)
    except ValueError as error:
      if not any(reason in str(error) for reason in REFUSALS):
        raise
      continue
    (asked,) = encode_prompts(tokenizer, [prompt], 1)
    assert whole_of(example)[: len(asked)] == asked
    assert example.target_index[0] == len(asked) - 1 or not asked


def test_a_prompt_that_ends_with_a_space():
  """Both as asked, and not joined to " Hello", as in the tokens of the whole text."""
  tokenizer, template = tokenizer_of("gpt2"), template_of("{r}: ", "\n", False)
  messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
  assert not check_prompts(tokenizer, template, messages)
  (example,) = encode_rendered(tokenizer, [Rendered("", chat_parts(template, messages))], 99)
  assert tokenizer.decode(example.targets.tolist()) == "Hello\n"
  assert tokenizer.decode(example.tokens[: example.target_index[0] + 1].tolist()).endswith(": ")


def test_a_truncated_chat_keeps_its_prompt():
  tokenizer, template = tokenizer_of("gpt2"), template_of("{r}: ", "\n", False)
  messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "word " * 10**5}]
  (asked,) = encode_chat_prompts(tokenizer, [prompt_parts(template, messages[:1])])
  rendered = [Rendered("f:1", chat_parts(template, messages))]
  (example,) = encode_rendered(tokenizer, rendered, 32, truncate=True)
  assert len(example.tokens) == 31
  assert example.tokens[: len(asked)].tolist() == asked
  with pytest.raises(
    ValueError, match=r"f:1: 500,\d+ characters, more than 128 for each of max_le"
  ):
    encode_rendered(tokenizer, rendered, 32)
  np.testing.assert_array_equal(np.diff(example.target_index), 1)
