"""GGUF files give llama.cpp's ids, templates and end tokens; `transformers` reads the same."""

import json
import os

import pytest

from lora_jax.models.checkpoints.pretrained import find_pretrained
from lora_jax.models.text.chat import load_chat_template, render_chat, text_after_answers
from lora_jax.models.text.gguf import gguf_text_files, read_model_json
from lora_jax.models.text.tokenizer import load_tokenizer, read_special_tokens, tokenizer_files

from tests.gguf_vocabularies import BYTE_LEVEL, NAMES, write_tiny, write_vocabulary
from tests.make_gguf_tokenizer_golden import FILE, TEXTS
from tests.real_lines import real_lines

EXPECTED = json.loads(FILE.read_text())
PREFIXED = ("<s>", "</s>", "<unk>", "▁")  # a space is put after the first three; the last is one
CHAT = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": " 日本?\r\n 12  é\u0301 🙂 <|endoftext|>"},
  {"role": "assistant", "content": "Yes."},
]


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_llama_cpp(name, tmp_path):
  tokenizer = load_tokenizer(write_vocabulary(name, tmp_path))
  assert len(TEXTS) == len(EXPECTED[name])
  for text, ids in zip(TEXTS, EXPECTED[name], strict=True):
    assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
    if name in BYTE_LEVEL or not any(token in text for token in PREFIXED):
      assert tokenizer.decode(ids, skip_special_tokens=False) == text


def generation(path):
  return read_model_json(path, "generation_config.json")


@pytest.mark.parametrize(
  ("model", "values", "tokens"),
  [
    ("gpt2", {}, ["ab"]),
    ("gpt2", {"pre": "llama-bpe"}, ["<s>", "ab"]),
    ("gpt2", {"pre": "llama-bpe", "add_bos_token": False}, ["ab"]),
    ("gpt2", {"add_bos_token": True, "add_eos_token": True}, ["<s>", "ab", "</s>"]),
    ("llama", {}, ["<s>", "▁ab"]),
    ("llama", {"bos_token_id": None, "eos_token_id": None}, ["<s>", "▁ab"]),
    ("llama", {"add_bos_token": False, "add_eos_token": True}, ["▁ab", "</s>"]),
    ("llama", {"add_bos_token": False, "add_space_prefix": False}, ["ab"]),
    ("llama", {"bos_token_id": 3}, ["a", "▁ab"]),
  ],
)
def test_tokens_around_a_text(model, values, tokens, tmp_path):
  assert load_tokenizer(write_tiny(tmp_path, model, **values)).encode("ab").tokens == tokens


def test_special_tokens_by_use(tmp_path):
  path = write_tiny(tmp_path, "gpt2", unknown_token_id=0, padding_token_id=2)
  expected = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
  assert read_special_tokens(path) == expected
  absent = dict.fromkeys(("bos_token_id", "eos_token_id"))
  (tmp_path / "without").mkdir()
  path = write_tiny(tmp_path / "without", "gpt2", **absent)
  assert read_special_tokens(path) == {}
  assert generation(path) == {"eos_token_id": 2}  # by its name
  (tmp_path / "defaults").mkdir()
  path = write_tiny(tmp_path / "defaults", "llama", **absent)  # of llama.cpp
  assert read_special_tokens(path) == {
    k: expected[k] for k in ("bos_token", "eos_token", "unk_token")
  }


def test_generation_ends_where_llama_cpp_ends_it(tmp_path):
  tokens = ["</s>", "<s>", "a", "<|eom_id|>", "<|end|>", "b", "<end>", "ab"]
  path = write_tiny(
    tmp_path,
    "gpt2",
    tokens=tokens,
    token_type=[3, 3, 1, 4, 1, 1, 3, 1],
    **{"eos_token_id": 0, "eot_token_id": 6, "bos_token_id": 1, "general.sampling.temp": 0.5},
    **{"general.sampling.top_k": 40, "general.sampling.penalty_repeat": 1.25},
  )
  assert generation(path) == {
    **{"bos_token_id": 1, "eos_token_id": [0, 6, 3, 4], "temperature": 0.5, "top_k": 40},
    **{"repetition_penalty": 1.25, "do_sample": True},
  }
  tokenizer = load_tokenizer(path)
  ids = tokenizer.encode("a<|end|>b<|eom_id|>").ids
  assert ids == [2, 4, 5, 3]  # control tokens, whatever their type
  assert tokenizer.decode(ids) == "ab"


def test_generation_ends_at_the_tokens_that_fill_in_code(tmp_path):
  """By their keys, or else by their names; one token of each use."""
  tokens = ["</s>", "a", "<fim_pad>", "<REPO>", "<reponame>", "b", "ab", "<sep>"]
  path = write_tiny(
    tmp_path,
    "gpt2",
    tokens=tokens,
    token_type=[3, 1, 1, 1, 1, 1, 1, 3],
    **{"eos_token_id": 0, "bos_token_id": None, "fim_rep_token_id": 4, "fim_sep_token_id": 7},
  )
  assert generation(path)["eos_token_id"] == [0, 2, 4, 7]
  assert load_tokenizer(path).encode("a<fim_pad>b<reponame>").ids == [1, 2, 5, 4]


def test_user_defined_tokens_are_text(tmp_path):
  tokens = ["</s>", "a", "<think>", "  ", "b", "ab"]
  path = write_tiny(
    tmp_path, "gpt2", tokens=tokens, token_type=[3, 1, 4, 4, 1, 1], bos_token_id=0, eos_token_id=0
  )
  tokenizer = load_tokenizer(path)
  ids = tokenizer.encode("a  <think></s>").ids
  assert ids == [1, 3, 2, 0]
  assert tokenizer.decode(ids) == "a  <think>"


@pytest.mark.parametrize("name", ["gpt-2", "llama"])
def test_the_files_in_a_folder_are_the_same_model(name, tmp_path):
  path, folder = write_vocabulary(name, tmp_path), tmp_path / "folder"
  folder.mkdir()
  for file, content in tokenizer_files(path).items():
    (folder / file).write_bytes(content)
  model, copied = load_tokenizer(path), load_tokenizer(folder)
  assert [model.encode(x).ids for x in TEXTS] == [copied.encode(x).ids for x in TEXTS]
  assert read_special_tokens(folder) == read_special_tokens(path)
  template = load_chat_template(path)
  assert template == load_chat_template(folder)
  assert text_after_answers(template) == "<|im_end|>\n"
  transformers = pytest.importorskip("transformers", reason="transformers is the reference here")
  peer = transformers.AutoTokenizer.from_pretrained(folder)
  assert [peer(x)["input_ids"] for x in TEXTS] == [model.encode(x).ids for x in TEXTS]
  text = peer.apply_chat_template(CHAT, tokenize=False)
  assert text == render_chat(template, CHAT)


@pytest.mark.parametrize(
  "values",
  [
    {"tokenizer.chat_template": "A"},
    {"tokenizer.chat_template": "A", "tokenizer.chat_template.tool_use": "T"},
    {"tokenizer.chat_template.tool_use": "T", "tokenizer.chat_template.default": "A"},
  ],
)
def test_the_default_template_is_taken(values, tmp_path):
  template = load_chat_template(write_tiny(tmp_path, "gpt2", bos_token_id=3, **values))
  assert template.source == "A"
  assert template.special_tokens == {"bos_token": "a", "eos_token": "</s>"}


def test_a_changed_file_is_read_again(tmp_path):
  path = write_tiny(tmp_path, "gpt2")
  first = gguf_text_files(path)
  assert gguf_text_files(path) is first
  path.unlink()
  write_tiny(tmp_path, "gpt2", eos_token_id=3)
  os.utime(path, ns=(0, 0))
  assert read_special_tokens(path)["eos_token"] == "a"


def test_every_row_of_the_embedding_has_a_token(tmp_path):
  """Unlike a folder's, whose table may be padded: a GGUF file names the padding too."""
  path = write_tiny(tmp_path, "gpt2")
  assert load_tokenizer(path, 6).get_vocab_size() == 6
  for rows in (5, 7, 64):
    with pytest.raises(
      ValueError, match=rf"the tokenizer has 6 tokens and the model {rows}, expec"
    ):
      load_tokenizer(path, rows)


# ---- transformers' own reading of the same file


@pytest.fixture(scope="module")
def lines():
  return real_lines()


def peers_tokenizer(path):
  """Returns transformers' own reading of a GGUF file."""
  transformers = pytest.importorskip("transformers", reason="transformers is the reference here")
  return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def assert_alike(tokenizer, peer, lines):
  ids = [x.ids for x in tokenizer.encode_batch(lines, add_special_tokens=False)]
  assert [peer(line, add_special_tokens=False)["input_ids"] for line in lines] == ids
  for token_ids in ids:
    expected = peer.decode(token_ids, clean_up_tokenization_spaces=False)
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == expected
  assert peer("a")["input_ids"] == tokenizer.encode("a").ids


def test_smollm2_is_read_as_transformers_reads_it(lines):
  """But for digits: it does not know `smollm`, which splits them off, so they are split for it."""
  from tokenizers import pre_tokenizers

  try:
    path = find_pretrained("smollm2")
  except FileNotFoundError as error:
    pytest.skip(str(error))
  peer, tokenizer = peers_tokenizer(path), load_tokenizer(path, 49152)
  assert len(lines) == 2000
  without = [line for line in lines if not any(letter.isnumeric() for letter in line)]
  assert len(without) > 500
  assert_alike(tokenizer, peer, without)
  backend = peer.backend_tokenizer
  digits = pre_tokenizers.Digits(individual_digits=True)
  backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
  assert_alike(tokenizer, peer, lines)
  template = load_chat_template(path)
  for chat, prompt in ((CHAT, False), (CHAT[:2], True), (CHAT[1:], False)):
    text = peer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    assert text == render_chat(template, chat, prompt)
    ids = peer.apply_chat_template(chat, add_generation_prompt=prompt)["input_ids"]
    assert tokenizer.encode(text, add_special_tokens=False).ids == ids


@pytest.mark.parametrize("name", ["gpt-2", "qwen2", "llama-bpe", "llama"])
def test_small_vocabularies_are_read_as_transformers_reads_them(name, lines, tmp_path):
  """Where it differs from llama.cpp, the ids are llama.cpp's; the lines here do not have these:

  - llama: a space at the start of a text or before a special token's, where it puts no other;
  - llama-bpe: words of the vocabulary that no merges give; a start token by default;
  - user-defined tokens with spaces, and an end of a turn whose type is that of a word.
  """
  path = write_vocabulary(name, tmp_path, add_bos_token=name == "llama")
  peer, tokenizer = peers_tokenizer(path), load_tokenizer(path)
  odd = ("<|im_end|>", "unmerged", "  x ", "🌈x", "<s>", "</s>", "<unk>")
  lines = [line for line in lines if not any(text in line for text in odd)]
  if name == "llama":
    lines = [line for line in lines if not line.startswith((" ", "▁"))]
  assert len(lines) > 1000
  assert_alike(tokenizer, peer, lines)
