"""SentencePiece models give SentencePiece's own ids and texts, and only whole ones are read."""

import json
import lzma
import shutil
from itertools import islice
from pathlib import Path

import pytest

from lora_jax.models.text.sentencepiece import _fields
from lora_jax.models.text.tokenizer import load_tokenizer

from tests.make_tokenizer_golden import GOLDEN, TEXTS
from tests.paths import SHARED

FOUND = json.loads((GOLDEN / "ids.json").read_text("utf-8"))
DEVELOPMENT = SHARED / "data"  # not everyone has it
NAMES = ["llama", "gemma", "deberta"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Folders of the golden models; DeBERTa's is unpacked."""
  folder = Path(shutil.copytree(GOLDEN, tmp_path_factory.mktemp("golden") / "tokenizers"))
  packed = folder / "deberta" / "spm.model.xz"
  packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
  return folder


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_texts_are_sentencepieces(name, folders):
  tokenizer, expected = load_tokenizer(folders / name), FOUND[name]
  unknown = tokenizer.token_to_id("[UNK]" if name == "deberta" else "<unk>")
  assert len(expected["ids"]) == len(TEXTS)
  for text, ids, decoded in zip(TEXTS, expected["ids"], expected["decoded"], strict=True):
    assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
    if unknown not in ids and text != " ▁ ▁a▁":  # shown as ⁇ ; and several spaces at the start
      assert tokenizer.decode(ids) == decoded
  assert [x.ids for x in tokenizer.encode_batch(TEXTS, add_special_tokens=False)] == expected["ids"]


def test_the_tokenizer_can_be_saved(folders, tmp_path):
  for name in NAMES:
    tokenizer = load_tokenizer(folders / name)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert [loaded.encode(x).ids for x in TEXTS] == [tokenizer.encode(x).ids for x in TEXTS]


def test_control_tokens(folders, tmp_path):
  llama = load_tokenizer(folders / "llama")
  plain = llama.encode("a low rank", add_special_tokens=False).ids
  assert llama.encode("a low rank").ids == [1, *plain]
  text = "<s>a low rank</s>"
  without_space = llama.encode(text, add_special_tokens=False)
  assert without_space.tokens[:2] == ["<s>", "a"]
  assert llama.decode(without_space.ids, skip_special_tokens=False) == text
  shutil.copytree(folders / "llama", tmp_path / "legacy")
  config = tmp_path / "legacy" / "tokenizer_config.json"
  config.write_text('{"legacy": true, "add_bos_token": false, "add_eos_token": true}')
  assert load_tokenizer(config.parent).encode("<s>a low rank").ids == [1, *plain, 2]
  config.write_text('{"add_prefix_space": false, "bos_token": "</s>"}')
  assert load_tokenizer(config.parent).encode("a").tokens == ["</s>", "a"]


def test_deberta_has_berts_tokens_and_a_mask(folders):
  deberta = load_tokenizer(folders / "deberta", 1024)
  pair = deberta.encode("a rank", "of B")
  assert [token for token in pair.tokens if token.startswith("[")] == ["[CLS]", "[SEP]", "[SEP]"]
  assert pair.type_ids == sorted(pair.type_ids)
  assert set(pair.type_ids) == {0, 1}
  masked = deberta.encode("a [MASK] of", add_special_tokens=False)
  assert masked.tokens == ["▁a", "[MASK]", "▁of"]
  assert masked.ids[1] == 700


@pytest.mark.parametrize("name", ["llama/tokenizer.model", "deberta/spm.model"])
def test_a_truncated_model_is_refused(name, folders, tmp_path):
  whole = (folders / name).read_bytes()
  path = tmp_path / Path(name).name
  tables = 100 if name.startswith("llama") else 250_000  # after the pieces
  for size in [0, 1, 2, 100, len(whole) // 50, len(whole) - tables, len(whole) - 1]:
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=f"{path.name} is truncated or not a SentencePiece model"):
      load_tokenizer(tmp_path)


@pytest.mark.parametrize(
  "content", [b"{}", b"not a model", b"\x80\x04\x95pickle", b"\n\x02\x08\x01"]
)
def test_a_foreign_file_is_refused(content, tmp_path):
  (tmp_path / "tokenizer.model").write_bytes(content)
  with pytest.raises(ValueError, match="is truncated or not a SentencePiece model"):
    load_tokenizer(tmp_path)


def varint(value):
  return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number, value):
  if isinstance(value, int):
    return varint(number << 3) + varint(value)
  return varint(number << 3 | 2) + varint(len(value)) + value


def changed(whole, number, change):
  """Returns a model with fields added to one of its parts, which count instead of those there."""
  return b"".join(field(i, value + change if i == number else value) for i, value in _fields(whole))


@pytest.mark.parametrize(
  ("number", "change", "message"),
  [
    (2, field(3, 3), r"the algorithm 3, expected Unigram \(1\) or BPE \(2\)"),
    (2, field(24, 1), "spaces after words instead of before"),
    (3, field(5, 0), "spaces as they are in its pieces"),
    (1, field(3, 5), "0 pieces for the unknown, expected one; 0 pieces for bytes.*unused pieces"),
    (1, field(1, b"x"), "two pieces of the same text"),
    (1, field(1, b""), "a piece without text"),
    (1, field(1, b"x" * 1001), "a piece of more than 1000 characters"),
    (1, b"\x15\x00\x00\xc0\x7f", "a score that is not finite"),
  ],
)
def test_models_of_other_kinds_are_refused(number, change, message, folders, tmp_path):
  whole = (folders / "llama" / "tokenizer.model").read_bytes()
  (tmp_path / "tokenizer.model").write_bytes(changed(whole, number, b""))
  load_tokenizer(tmp_path)
  (tmp_path / "tokenizer.model").write_bytes(changed(whole, number, change))
  with pytest.raises(ValueError, match=message):
    load_tokenizer(tmp_path)


def test_llamas_own_model_on_wikipedia(tmp_path):
  sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is the reference here")
  path, shards = DEVELOPMENT / "vocab" / "llama" / "tokenizer.model", DEVELOPMENT / "text"
  if not (path.is_file() and shards.is_dir()):
    pytest.skip("Llama's tokenizer and texts of Wikipedia are not beside this checkout")
  with lzma.open(next(shards.glob("*.xz")), "rt", encoding="utf-8") as file:
    texts = [line.rstrip("\n") for line in islice(file, 5000)]
  shutil.copy(path, tmp_path)
  tokenizer = load_tokenizer(tmp_path, 32000)
  reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
  ids = reference.encode(texts)
  assert [x.ids for x in tokenizer.encode_batch(texts, add_special_tokens=False)] == ids
  assert tokenizer.decode_batch(ids) == reference.decode(ids)
