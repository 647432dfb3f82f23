"""Tokenizers of Hugging Face folders: both forms alike, and only those that fit the model."""

import json
import shutil
from pathlib import Path

import pytest

import lora_jax
from lora_jax.models.hub import end_of_text_id, load_tokenizer

EMBEDDED = Path(lora_jax.__file__).parent / "assets" / "gpt2"
DEVELOPMENT = Path(__file__).parents[2] / "shared" / "data"  # not everyone has it
TEXTS = [
  "name : Alimentum | area : city centre | family friendly : no||There is a place in the city "
  "centre , Alimentum , that is not family - friendly . ",
  "name : The Phoenix | Type : pub | price : less than £20",
  " Café  Adriatic\n\tserves “fish & chips”, don't they've? 日本 🍜 1,234.50",
  "<|endoftext|>It ends<|endoftext|> here.",
  "",
]


def split_form(source: Path, folder: Path) -> Path:
  """Writes a tokenizer.json's vocabulary and merges as the two older files."""
  model = json.loads((source / "tokenizer.json").read_text("utf-8"))["model"]
  merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
  folder.mkdir()
  (folder / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
  (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
  return folder


def assert_alike(one, other, texts):
  assert one.get_vocab() == other.get_vocab()
  assert end_of_text_id(one) == end_of_text_id(other)
  for text in texts:
    ids = one.encode(text).ids
    assert ids == other.encode(text).ids
    assert one.decode(ids, skip_special_tokens=False) == text
    assert other.decode(ids, skip_special_tokens=False) == text


def test_vocabulary_and_merges_are_the_same_tokenizer(tmp_path):
  split = split_form(EMBEDDED, tmp_path / "split")
  assert_alike(load_tokenizer(EMBEDDED, 4096), load_tokenizer(split, 4096), TEXTS)


def test_gpt2s_own_files_are_the_same_tokenizer_on_e2e_lines(tmp_path):
  files, lines = DEVELOPMENT / "vocab" / "gpt2", DEVELOPMENT / "e2e" / "valid.txt"
  if not (files.is_dir() and lines.is_file()):
    pytest.skip("the original files of GPT-2 and E2E are not beside this checkout")
  shutil.copy(files / "encoder.json", tmp_path / "vocab.json")
  shutil.copy(files / "vocab.bpe", tmp_path / "merges.txt")
  one, other = load_tokenizer(files, 50257), load_tokenizer(tmp_path, 50257)
  assert end_of_text_id(one) == 50256
  assert_alike(one, other, [*TEXTS, *lines.read_text("utf-8").splitlines()])


@pytest.mark.parametrize("vocab_size", [4096, 4224, 5119])
def test_a_models_table_may_be_padded(vocab_size):
  assert load_tokenizer(EMBEDDED, vocab_size).get_vocab_size() == 4096


@pytest.mark.parametrize("vocab_size", [4095, 64, 5120, 50257])
def test_a_tokenizer_of_another_model_is_refused(vocab_size):
  message = f"the tokenizer has 4,096 tokens and the model {vocab_size:,}; they do not belong"
  with pytest.raises(ValueError, match=message):
    load_tokenizer(EMBEDDED, vocab_size)


def test_missing_and_broken_tokenizers_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"holds no tokenizer: expected tokenizer\.json"):
    load_tokenizer(tmp_path)
  folder = split_form(EMBEDDED, tmp_path / "split")
  (folder / "merges.txt").write_text("#version: 0.2\nnot merges of this vocabulary\n")
  with pytest.raises(ValueError, match="split: the tokenizer's files are broken"):
    load_tokenizer(folder)
  (folder / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match="split: the tokenizer's files are broken"):
    load_tokenizer(folder)


def test_a_tokenizer_must_know_the_end_of_text(tmp_path):
  folder = split_form(EMBEDDED, tmp_path / "split")
  vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
  vocab["<|end|>"] = vocab.pop("<|endoftext|>")
  (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
  with pytest.raises(ValueError, match=r"has no token '<\|endoftext\|>'"):
    end_of_text_id(load_tokenizer(folder, 4096))
