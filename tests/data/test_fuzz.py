"""Readers of damaged files: each reads them, or raises an error that names the file, in time."""

import json
import random
import shutil
import time

import pytest

from lora_jax.data.jsonl import encode_prompts, read_jsonl
from lora_jax.data.sets import e2e, glue, superglue
from lora_jax.files import parse_json, read_text
from lora_jax.models.text import rendering
from lora_jax.models.text.chat import chat_parts, load_chat_template, text_after_answers
from lora_jax.models.text.tokenizer import load_tokenizer, read_special_tokens

from tests.paths import GOLDEN

TOKENIZERS = GOLDEN / "tokenizers"
SECONDS = 5.0  # of one file
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
CHAT = {"messages": TURNS}
WORDS = (
  *(b"null", b"true", b"-1", b"1e999", b"NaN", b"0.5", b"9" * 500, b"[]", b"{}", b'""', b'"a"'),
  *(b'"', b"{", b"}", b"[" * 2000, b"]", b",", b":", b"\\", b"\\ud800", b"\0", b"\xff", b"\n"),
  *(b"\t", b"\r\n", b"{%", b"%}", b"{{", b"}}", b"{% for i in range(9999) %}", b"{% endfor %}"),
  *(b"||", b"\xef\xbb\xbf", b"(a+)+$", b"a" * 5000, b" " * 5000),
)
TEMPLATE = (
  "{% macro turn(m) %}<|{{ m.role }}|>{{ m['content'] | trim }}{{ eos_token }}\n{% endmacro %}"
  "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
  "{% for m in messages %}{% set x = loop.index0 * 2 ** 3 %}{{ turn(m) ~ '-' * x }}{% endfor %}"
  "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def mutated(data, choice):
  """Returns bytes with one to four random changes."""
  for _ in range(choice.randint(1, 4)):
    start = choice.randrange(len(data) + 1)
    stop = min(len(data), start + choice.choice((0, 1, 2, 5, 20, 200)))
    kind = choice.randrange(6)
    if kind == 0:  # a byte
      data = data[:start] + bytes([choice.randrange(256)]) + data[start + 1 :]
    elif kind == 1:  # truncated
      data = data[:start]
    elif kind == 2:  # a part twice
      data = data[:stop] + data[start:stop] + data[stop:]
    elif kind == 3:  # a part left out
      data = data[:start] + data[stop:]
    else:  # a part that is replaced
      data = data[:start] + choice.choice(WORDS) + data[stop:]
  return data


def lines(*values):
  return "\n".join(map(json.dumps, values)).encode()


def used(tokenizer):
  """Returns a tokenizer's answer to a text."""
  ids = encode_prompts(tokenizer, ["low rank \N{GRINNING FACE} A"], 0)[0]
  return tokenizer.decode(ids)


def rendered(path):
  template = load_chat_template(path.parent)
  try:
    return chat_parts(template, TURNS), text_after_answers(template)
  except ValueError as error:  # the caller names the file of the conversation
    raise ValueError(f"{path}: {error}") from error


def of_folder(call):
  return lambda path: call(path.parent)


def set_of(module, task):
  return lambda path: module.read(task, "train", path.parent.parent, any_size=True)


GLUE = b"index\tsentence1\tsentence2\tscore\n" + b"0\tA b.\tC d\xc3\xa9.\t3.25\n" * 3
BOOLQ = {"question": "q", "passage": "p", "label": True, "idx": 0}
MULTIRC = {
  "idx": 0,
  "passage": {
    "text": "T",
    "questions": [{"question": "q", "idx": 0, "answers": [{"text": "a", "idx": 0, "label": 1}]}],
  },
}
RECORD = {
  "idx": 0,
  "passage": {"text": "A man", "entities": [{"start": 2, "end": 4}]},
  "qas": [{"query": "@placeholder", "idx": 0, "answers": [{"text": "man"}]}],
}
CONFIG = {
  **{"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "legacy": True},
  **{"add_bos_token": True, "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}}},
  **{"add_prefix_space": None, "chat_template": TEMPLATE},
}
READERS = {
  "json": ("a.json", lambda: lines(CONFIG), lambda path: parse_json(read_text(path), path)),
  "completions": (
    "a.jsonl",
    lambda: lines(*[{"prompt": "a\n", "completion": "b \u00e9"}] * 3),
    read_jsonl,
  ),
  "conversations": ("a.jsonl", lambda: lines(*[CHAT] * 3), read_jsonl),
  "e2e": (
    "train.txt",
    lambda: b"name : A | area : b||A is in b .\n" * 3,
    lambda path: e2e.read("train", folder=path.parent),
  ),
  "e2e, official": (
    "trainset.csv",
    lambda: b'mr,ref\n"name[A], area[b]","A is in ""b""."\n' * 2,
    lambda path: e2e.read("train", "official", path.parent),
  ),
  "glue": ("STS-B/train.tsv", lambda: GLUE, set_of(glue, "stsb")),
  "boolq": ("BoolQ/train.jsonl", lambda: lines(BOOLQ, BOOLQ), set_of(superglue, "boolq")),
  "multirc": ("MultiRC/train.jsonl", lambda: lines(MULTIRC), set_of(superglue, "multirc")),
  "record": ("ReCoRD/train.jsonl", lambda: lines(RECORD), set_of(superglue, "record")),
  "special tokens": (
    "tokenizer_config.json",
    lambda: lines(CONFIG),
    of_folder(read_special_tokens),
  ),
  "template": ("chat_template.jinja", TEMPLATE.encode, rendered),
  "template in a config": ("tokenizer_config.json", lambda: lines(CONFIG), rendered),
}
TOKENIZER_FILES = {
  "tokenizer.json": ("llama", None),
  "tokenizer.model": ("llama", "tokenizer.model"),
  "vocab.txt": ("bert", "vocab.txt"),
  "vocab.json": ("roberta", "vocab.json"),
  "merges.txt": ("roberta", "merges.txt"),
  "tokenizer_config.json": ("llama", CONFIG),
  "added_tokens.json": ("bert", {"<a>": 185, "<b>": 186}),
  "special_tokens_map.json": ("bert", {"unk_token": "[UNK]", "mask_token": {"content": "[MASK]"}}),
}


def check(path, data, read, folder):
  """Writes a file and reads it; returns whether it was read."""
  path.write_bytes(data)
  start = time.process_time()
  try:
    read(path)
    return True
  except (ValueError, FileNotFoundError) as error:
    if str(folder) not in str(error) and path.name not in str(error):
      raise AssertionError(f"the file is not named: {error}; it was {data[:500]!r}") from error
    return False
  except BaseException as error:
    raise AssertionError(f"{type(error).__name__}: {error}; it was {data[:500]!r}") from error
  finally:
    assert time.process_time() - start < SECONDS, data[:500]


@pytest.mark.long
@pytest.mark.parametrize("name", READERS)
def test_damaged_data_and_templates(name, tmp_path, monkeypatch):
  monkeypatch.setattr(rendering, "SECONDS", 0.5)
  file, content, read = READERS[name]
  path, choice = tmp_path / file, random.Random(0)
  path.parent.mkdir(exist_ok=True)
  assert check(path, content(), read, tmp_path)
  count = 300 if "template" in name else 1000
  was_read = [check(path, mutated(content(), choice), read, tmp_path) for _ in range(count)]
  assert 0 < sum(was_read) < count


@pytest.mark.long
@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_damaged_tokenizers(name, tmp_path):
  source, content = TOKENIZER_FILES[name]
  folder, choice = tmp_path / "model", random.Random(0)
  shutil.copytree(TOKENIZERS / source, folder)
  if isinstance(content, dict):
    data = json.dumps(content).encode()
  elif content is None:
    data = load_tokenizer(folder).to_str().encode()
    (folder / "tokenizer.model").unlink()
  else:
    data = (TOKENIZERS / source / content).read_bytes()

  def read(path):
    return used(load_tokenizer(path.parent))

  assert check(folder / name, data, read, folder)
  was_read = [check(folder / name, mutated(data, choice), read, folder) for _ in range(300)]
  assert 0 < sum(was_read) < 300
