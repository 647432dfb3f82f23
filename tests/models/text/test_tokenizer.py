"""Tokenizers of Hugging Face folders: all formats alike, and only those that fit the model."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import processors

import lora_jax
from lora_jax.models.text.tokenizer import end_of_text_id, load_tokenizer

from tests.make_tokenizer_golden import GOLDEN, MARKED, PAIRS
from tests.make_tokenizer_golden import TEXTS as ODD_TEXTS
from tests.paths import SHARED

EMBEDDED = Path(lora_jax.__file__).parent / "assets" / "gpt2"
DEVELOPMENT = SHARED / "data"  # not everyone has it
TEXTS = [
  "name : Alimentum | area : city centre | family friendly : no||There is a place in the city "
  "centre , Alimentum , that is not family - friendly . ",
  "name : The Phoenix | Type : pub | price : less than £20",
  " Café  Adriatic\n\tserves “fish & chips”, don't they've? 日本 🍜 1,234.50",
  "<|endoftext|>It ends<|endoftext|> here.",
  "",
]


def split_files(source: Path, folder: Path) -> Path:
  """Writes a tokenizer.json's vocabulary and merges as the two older files."""
  model = json.loads((source / "tokenizer.json").read_text("utf-8"))["model"]
  merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
  folder.mkdir()
  (folder / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
  (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
  return folder


def assert_alike(first, second, texts):
  assert first.get_vocab() == second.get_vocab()
  assert end_of_text_id(first) == end_of_text_id(second)
  for text in texts:
    ids = first.encode(text).ids
    assert ids == second.encode(text).ids
    assert first.decode(ids, skip_special_tokens=False) == text
    assert second.decode(ids, skip_special_tokens=False) == text


def test_vocabulary_and_merges_are_the_same_tokenizer(tmp_path):
  split = split_files(EMBEDDED, tmp_path / "split")
  assert_alike(load_tokenizer(EMBEDDED, 8192), load_tokenizer(split, 8192), TEXTS)


@pytest.mark.long
def test_gpt2s_own_files_are_the_same_tokenizer_on_e2e_lines(tmp_path):
  files, lines = DEVELOPMENT / "vocab" / "gpt2", DEVELOPMENT / "e2e" / "valid.txt"
  if not (files.is_dir() and lines.is_file()):
    pytest.skip("the original files of GPT-2 and E2E are not beside this checkout")
  shutil.copy(files / "encoder.json", tmp_path / "vocab.json")
  shutil.copy(files / "vocab.bpe", tmp_path / "merges.txt")
  first, second = load_tokenizer(files, 50257), load_tokenizer(tmp_path, 50257)
  assert end_of_text_id(first) == 50256
  assert_alike(first, second, [*TEXTS, *lines.read_text("utf-8").splitlines()])


def test_a_large_table_may_be_padded_by_a_twentieth(tmp_path):
  """As DeepSeek's, of 102,400 rows for 100,015 tokens."""
  vocab = {f"t{i}": i for i in range(100_015)}
  model = {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"}
  empty = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
  text = json.dumps({"version": "1.0", "added_tokens": [], **empty, "model": model})
  (tmp_path / "tokenizer.json").write_text(text)
  assert load_tokenizer(tmp_path, 102_400).get_vocab_size() == 100_015
  with pytest.raises(ValueError, match="do not belong together"):
    load_tokenizer(tmp_path, 106_000)


@pytest.mark.parametrize("marked", [False, True])
def test_only_tokenizer_json_says_which_tokens_are_put_around_a_text(marked, tmp_path):
  """Not tokenizer_config.json, which transformers does not ask either, since version 5."""
  tokenizer = load_tokenizer(EMBEDDED)
  if marked:
    tokenizer.post_processor = processors.TemplateProcessing(
      single="$A <|endoftext|>", pair="$A $B:1", special_tokens=[("<|endoftext|>", 0)]
    )
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  special = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
  written = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": not marked, **special}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(written))
  expected = [*tokenizer.encode("low rank", add_special_tokens=False).ids, *[0] * marked]
  assert load_tokenizer(tmp_path).encode("low rank").ids == expected
  transformers = pytest.importorskip("transformers", reason="transformers is the reference here")
  assert transformers.AutoTokenizer.from_pretrained(tmp_path).encode("low rank") == expected


@pytest.mark.parametrize("vocab_size", [8192, 8320, 9215])
def test_a_models_table_may_be_padded(vocab_size):
  assert load_tokenizer(EMBEDDED, vocab_size).get_vocab_size() == 8192


@pytest.mark.parametrize("vocab_size", [8191, 64, 9216, 50257])
def test_a_tokenizer_of_another_model_is_refused(vocab_size):
  message = f"the tokenizer has 8,192 tokens and the model {vocab_size:,}; they do not belong"
  with pytest.raises(ValueError, match=message):
    load_tokenizer(EMBEDDED, vocab_size)


def test_missing_and_broken_tokenizers_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"holds no tokenizer: expected tokenizer\.json"):
    load_tokenizer(tmp_path)
  folder = split_files(EMBEDDED, tmp_path / "split")
  (folder / "merges.txt").write_text("#version: 0.2\nnot merges of this vocabulary\n")
  with pytest.raises(ValueError, match="split: the tokenizer is broken, in "):
    load_tokenizer(folder)
  (folder / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match="split: the tokenizer is broken, in "):
    load_tokenizer(folder)


def test_a_tokenizer_must_know_the_end_of_text(tmp_path):
  folder = split_files(EMBEDDED, tmp_path / "split")
  vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
  vocab["<|end|>"] = vocab.pop("<|endoftext|>")
  (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
  with pytest.raises(ValueError, match=r"has no token '<\|endoftext\|>'"):
    end_of_text_id(load_tokenizer(folder, 8192))


@pytest.mark.parametrize("name", ["bert", "bert_cased", "bert_accents", "roberta"])
def test_encoders_ids_and_texts_are_those_of_transformers(name):
  expected = json.loads((GOLDEN / "ids.json").read_text("utf-8"))[name]
  tokenizer = load_tokenizer(GOLDEN / name)
  texts = ODD_TEXTS + MARKED
  assert len(texts) == len(expected["ids"])
  for text, ids, decoded in zip(texts, expected["ids"], expected["decoded"], strict=True):
    assert tokenizer.encode(text).ids == ids, text
    assert tokenizer.decode(ids, skip_special_tokens=False) == decoded
  for pair, (ids, types) in zip(PAIRS, expected["pairs"], strict=True):
    encoding = tokenizer.encode(*pair)
    assert (encoding.ids, encoding.type_ids) == (ids, types)


@pytest.mark.parametrize(
  "name", ["bert-base-uncased-vocab.txt", "bert-base-cased-vocab.txt", "roberta"]
)
def test_published_vocabularies_are_read_as_transformers_reads_them(name, tmp_path):
  transformers = pytest.importorskip("transformers", reason="transformers is the reference here")
  vocab = DEVELOPMENT / "vocab"
  if not vocab.is_dir():
    pytest.skip("the published vocabularies are not beside this checkout")
  if name == "roberta":
    shutil.copy(vocab / "roberta" / "vocab.derived.json", tmp_path / "vocab.json")
    shutil.copy(vocab / "gpt2" / "vocab.bpe", tmp_path / "merges.txt")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    kind = transformers.RobertaTokenizer
  else:
    shutil.copy(vocab / "bert" / name, tmp_path / "vocab.txt")
    lower = json.dumps({"do_lower_case": "uncased" in name})
    (tmp_path / "tokenizer_config.json").write_text(lower)
    kind = transformers.BertTokenizer
  peer, tokenizer = kind.from_pretrained(tmp_path), load_tokenizer(tmp_path)
  lines = (DEVELOPMENT / "e2e" / "valid.txt").read_text("utf-8").splitlines()
  lines += [*ODD_TEXTS, *MARKED, *Path(__file__).read_text("utf-8").splitlines()]
  expected = [peer(line)["input_ids"] for line in lines]
  assert [encoding.ids for encoding in tokenizer.encode_batch(lines)] == expected


def test_a_cased_vocabulary_must_say_so(tmp_path):
  shutil.copy(GOLDEN / "bert_cased" / "vocab.txt", tmp_path)
  with pytest.raises(ValueError, match=r"vocab.txt has upper-case letters.*do_lower_case"):
    load_tokenizer(tmp_path)
  shutil.copy(GOLDEN / "bert" / "vocab.txt", tmp_path)
  assert load_tokenizer(tmp_path).encode("Low RANK", add_special_tokens=False).tokens == [
    *("low", "rank")
  ]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda text: text.replace("[SEP]\n", ""), r"sep_token '\[SEP\]' is not in the vocabulary"),
    (lambda text: text + "[SEP]\n", "vocab.txt: 1 tokens occur twice"),
  ],
)
def test_broken_word_vocabularies_are_refused(change, message, tmp_path):
  text = (GOLDEN / "bert" / "vocab.txt").read_text("utf-8")
  (tmp_path / "vocab.txt").write_text(change(text), "utf-8")
  with pytest.raises(ValueError, match=message):
    load_tokenizer(tmp_path)
  (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
  with pytest.raises(ValueError, match=r"vocab.txt is not text in UTF-8"):
    load_tokenizer(tmp_path)


def test_added_tokens_have_their_ids(tmp_path):
  folder = Path(shutil.copytree(GOLDEN / "bert", tmp_path / "bert"))
  size = load_tokenizer(folder).get_vocab_size()
  (folder / "added_tokens.json").write_text(json.dumps({"<b>": size + 1, "<a>": size}))
  tokenizer = load_tokenizer(folder)
  assert tokenizer.encode("low <a> rank<b>", add_special_tokens=False).tokens == [
    *("low", "<a>", "rank", "<b>")
  ]
  config = {"added_tokens_decoder": {size: {"content": "<pad>", "special": True, "lstrip": True}}}
  (folder / "added_tokens.json").unlink()
  (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<pad>"}))
  tokenizer = load_tokenizer(folder)
  assert tokenizer.encode("low <pad>", add_special_tokens=False).ids[-1] == size
  assert tokenizer.decode([size]) == ""
  (folder / "added_tokens.json").write_text(json.dumps({"<a>": size + 2}))
  (folder / "tokenizer_config.json").unlink()
  with pytest.raises(ValueError, match=f"the added token '<a>' has id {size}, not {size + 2}"):
    load_tokenizer(folder)
