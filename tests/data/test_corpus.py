"""Text becomes documents, a tokenizer, a stream, and rows that see one document each."""

import gzip
import itertools
import lzma

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.data import corpus
from lora_jax.data.sets import e2e
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.training.loss import language_model_loss

STREAM = np.array([0, 5, 6, 7, 0, 8, 9, 0, 4, 3, 2, 1, 0, 7], np.uint16)


@pytest.fixture(scope="module")
def texts():
  """Real sentences, the references of E2E."""
  return [record.completion for record in e2e.read("valid")[:2000]]


@pytest.fixture(scope="module")
def tokenizer(texts):
  return corpus.train_tokenizer(texts, 400)


def test_documents_come_from_all_kinds_of_files(tmp_path):
  (tmp_path / "a.txt").write_text("One.\nTwo.\n<|endoftext|>\nThree.\n<|endoftext|>\n", "utf-8")
  with lzma.open(tmp_path / "b.txt.xz", "wt", encoding="utf-8") as file:
    file.write("Vier\u2028 – five.")
  with gzip.open(tmp_path / "c.txt.gz", "wt", encoding="utf-8") as file:
    file.write("\n<|endoftext|>\n\nSix.\n")
  (tmp_path / "notes.md").write_text("no text")
  actual = list(corpus.documents(corpus.find_files(tmp_path)))
  assert actual == ["One.\nTwo.", "Three.", "Vier\u2028 – five.", "Six."]


def test_bad_files_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"expected text files .*found none"):
    corpus.find_files(tmp_path)
  bad = tmp_path / "bad.txt"
  bad.write_bytes(b"fine\n\xff\xfe\n")
  with pytest.raises(ValueError, match=r"bad\.txt:2: expected UTF-8"):
    list(corpus.documents([bad]))
  for name, packed in (("a.txt.xz", lzma.compress), ("a.txt.gz", gzip.compress)):
    path = tmp_path / name
    path.write_bytes(packed(np.random.default_rng(0).bytes(9999).hex().encode())[:-2000])
    with pytest.raises(ValueError, match=f"{name} is damaged after line"):
      list(corpus.documents([path]))
  packed = bytearray(gzip.compress(b"x" * 50, 9))
  packed[10] |= 0b110  # a kind of block that there is not
  (tmp_path / "a.txt.gz").write_bytes(packed)
  with pytest.raises(ValueError, match=r"a\.txt\.gz is damaged after line 0: .*invalid block type"):
    list(corpus.documents([tmp_path / "a.txt.gz"]))
  (tmp_path / "a.txt.xz").write_bytes(b"not xz")
  with pytest.raises(ValueError, match="is damaged after line 0"):
    list(corpus.documents([tmp_path / "a.txt.xz"]))


def test_every_nth_document_is_held_out():
  train, held_out = corpus.split((str(i) for i in range(10)), 4)
  assert held_out == ["3", "7"]
  assert sorted(train + held_out, key=int) == [str(i) for i in range(10)]
  with pytest.raises(ValueError, match=r"at least 4 documents, .* got 2"):
    corpus.split(["a", "b"], 4)
  with pytest.raises(ValueError, match=r"2 or more, .* got 1"):
    corpus.split(["a", "b"], 1)


def test_the_stream_decodes_to_the_documents(tokenizer, texts):
  texts = [*texts[:5], "any bytes: \u2603 \N{CJK UNIFIED IDEOGRAPH-4E2D}\n\n  spaces"]
  stream = corpus.encode_stream(tokenizer, texts, 0, batch_size=4)
  assert stream.dtype == np.uint16
  assert stream[0] == 0
  cuts = np.flatnonzero(stream == 0)
  parts = [stream[a + 1 : b].tolist() for a, b in itertools.pairwise(cuts)]
  assert [tokenizer.decode(part) for part in parts] == texts
  assert tokenizer.token_to_id(corpus.END_OF_TEXT) == 0
  assert tokenizer.get_vocab_size() == 400


def test_too_little_text_for_the_vocabulary_is_refused():
  with pytest.raises(ValueError, match="too few different words for a vocabulary of 999"):
    corpus.train_tokenizer(["a b c"], 999)


def test_rows_are_pieces_of_the_stream():
  rows = corpus.Rows(STREAM, 0, batch_size=3, row_length=4, seed=None)
  assert len(rows) == 1
  batch = rows[0]
  np.testing.assert_array_equal(batch["tokens"].ravel(), STREAM[:12])
  np.testing.assert_array_equal(batch["targets"].ravel(), STREAM[1:13])
  np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 2, 3]])
  np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1, 1], [1, 1, 1, 2], [1, 1, 1, 1]])
  assert batch["target_weights"].all()


def test_the_order_depends_on_seed_and_epoch_and_each_row_comes_once():
  stream = np.arange(1, 102, dtype=np.uint16)
  shape = {"batch_size": 5, "row_length": 4, "num_batches": 10}
  rows = corpus.Rows(stream, 0, seed=3, **shape)
  assert len(rows) == 10
  epochs = [
    np.concatenate([rows[i]["tokens"][:, 0] for i in part]) for part in (range(5), range(5, 10))
  ]
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), stream[:-1:4])
  assert (epochs[0] != epochs[1]).any()
  repeated = corpus.Rows(stream, 0, seed=3, **shape)
  np.testing.assert_array_equal(repeated[7]["tokens"], rows[7]["tokens"])
  assert (corpus.Rows(stream, 0, seed=4, **shape)[0]["tokens"] != rows[0]["tokens"]).any()
  with pytest.raises(IndexError):
    rows[10]
  with pytest.raises(ValueError, match="at least 401 tokens, for 4 rows of 100, got 101"):
    corpus.Rows(stream, 0, batch_size=4, row_length=100, seed=0)
  with pytest.raises(ValueError, match=r"batch_size must be .* got 0"):
    corpus.Rows(stream, 0, batch_size=0, row_length=100, seed=0)


def test_the_last_rows_count_only_where_the_order_is_the_streams():
  stream = np.arange(1, 31, dtype=np.uint16)  # 7 rows of 4
  assert len(corpus.Rows(stream, 0, batch_size=5, row_length=4, seed=1)) == 1
  rows = corpus.Rows(stream, 0, batch_size=5, row_length=4, seed=None)
  assert len(rows) == 2
  counted = [batch["tokens"][batch["target_weights"] > 0] for batch in (rows[0], rows[1])]
  np.testing.assert_array_equal(np.concatenate(counted), stream[:28])


@pytest.mark.parametrize("seed", [None, 1])
def test_a_process_builds_its_rows_of_the_whole_batch(seed):
  shape = {"batch_size": 4, "row_length": 2, "seed": seed}
  whole, part = corpus.Rows(STREAM, 0, **shape), corpus.Rows(STREAM, 0, local_rows=[1, 3], **shape)
  assert len(whole) == len(part)
  for i in range(len(whole)):
    for name, array in whole[i].items():
      np.testing.assert_array_equal(part[i][name], array[[1, 3]])


def test_the_loss_of_rows_is_that_of_the_documents():
  """Each piece of a document by itself, without segments."""
  config = GPT2Config(vocab_size=12, num_positions=8, embed_dim=16, num_layers=2, num_heads=2)
  model = GPT2(config)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
  rows = corpus.Rows(STREAM, 0, batch_size=3, row_length=4, seed=None)
  total = jax.jit(language_model_loss(model))(params, rows[0]).total
  pieces = ((0, 4), (4, 7), (7, 8), (8, 12))
  tokens = np.zeros((len(pieces), 4), np.int32)  # no token sees the padding after it
  for row, (start, stop) in zip(tokens, pieces, strict=True):
    row[: stop - start] = STREAM[start:stop]
  logs = jax.nn.log_softmax(jax.jit(lambda p, x: model.apply({"params": p}, x))(params, tokens))
  expected = -sum(
    np.asarray(log)[np.arange(stop - start), STREAM[start + 1 : stop + 1]].sum()
    for log, (start, stop) in zip(logs, pieces, strict=True)
  )
  np.testing.assert_allclose(total, expected, rtol=1e-5)
