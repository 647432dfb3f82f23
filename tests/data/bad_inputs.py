"""Data and settings of batches that are refused."""

import json
import lzma
import math
import os
from functools import cache, partial

import numpy as np

from experiments.nlg import user_data
from lora_jax.data import batches, classification, corpus, jsonl, text
from lora_jax.data.sets import e2e, e2e_tfds, glue, glue_tfds, superglue
from lora_jax.models.text.tokenizer import load_tokenizer

from tests.bad_inputs import BadInput
from tests.tiny_e2e import EMBEDDED
from tests.tiny_tokenizer import tiny_tokenizer

PAIR = {"prompt": "a", "completion": "b"}
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
ROW = text.Example(*(np.array(values, np.int32) for values in ([1, 2, 3], [3, 4], [1, 2])))
LABELLED = classification.Example(np.ones(3, np.int32), np.zeros(3, np.int32), 1)
BOOLQ = {"question": "q", "passage": "p", "label": True, "idx": 0}


def file_row(name, read, content, *words, error=ValueError):
  """A file with this content: bytes, text or a value of JSON; `read` takes its path."""

  def call(folder):
    path = folder / "mine"
    if callable(content):
      content(path)
    else:
      plain = content if isinstance(content, str | bytes) else json.dumps(content)
      path.write_bytes(plain if isinstance(plain, bytes) else plain.encode())
    return read(path)

  return BadInput(name, call, words, error)


def lines_row(name, content, *words):
  return file_row(f"jsonl: {name}", jsonl.read_jsonl, content, "mine", *words)


def set_row(module, name, path, content, *words, error=ValueError, **options):
  """A folder with one file; the module reads it."""

  def call(folder):
    task, split, file = path
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
      content(folder / file)
    else:
      (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return module.read(*((task, split) if task else (split,)), folder=folder, **options)

  return BadInput(f"{module.__name__.rpartition('.')[2]}: {name}", call, words, error)


def e2e_row(name, content, *words, form="reference", **options):
  file = e2e.FILES[form]["valid"]
  return set_row(e2e, name, ("", "valid", file), content, file, *words, form=form, **options)


def glue_row(task, name, content, *words, **options):
  file = f"{glue.TASKS[task].folder}/train.tsv"
  options = {"any_size": True, **options}
  return set_row(glue, name, (task, "train", file), content, *(("train.tsv", *words)), **options)


def superglue_row(task, name, content, *words):
  file = f"{superglue.TASKS[task].folder}/train.jsonl"
  content = content if isinstance(content, str | bytes) else json.dumps(content)
  return set_row(
    superglue, name, (task, "train", file), content, "train.jsonl:1", *words, any_size=True
  )


def packed(name, *words, examples=(ROW,), make=batches.packed_batches, **settings):
  usual = {"batch_size": 2, "loss_length": 8, "seed": 0}
  usual |= {"row_lengths": [8]} if make is batches.padded_batches else {"row_length": 8}
  return BadInput(f"batches: {name}", lambda _: make(examples, **usual | settings), words)


padded = partial(packed, make=batches.padded_batches)


def bucketed(name, *words, examples=(LABELLED,), **settings):
  usual = {"batch_size": 2, "row_lengths": [8], "seed": 0}
  return BadInput(
    f"classification: {name}",
    lambda _: classification.bucketed_batches(examples, **usual | settings),
    words,
  )


def rows_row(name, *words, **settings):
  usual = {"batch_size": 2, "row_length": 4, "seed": 0}
  stream = np.arange(99, dtype=np.uint16)
  return BadInput(f"corpus: {name}", lambda _: corpus.Rows(stream, 0, **usual | settings), words)


@cache
def gpt2():
  return load_tokenizer(EMBEDDED)


@cache
def words():
  return tiny_tokenizer(["a b"])


def completions(prompt="a", completion="b", max_length=8, **options):
  record = jsonl.Completion("mine:1", prompt, completion)
  return jsonl.encode_completions(gpt2(), [record], 0, max_length, **options)


def documents(path):
  return list(corpus.documents([path.rename(path.with_suffix(".txt"))]))


def damaged(suffix, content):
  def read(folder):
    path = folder / f"a.txt{suffix}"
    path.write_bytes(content)
    return list(corpus.documents([path]))

  return read


def long_line(path):
  with path.open("wb") as file:
    file.truncate(2**26 + 2)


RTE = "index\tsentence1\tsentence2\tlabel\n"
STSB = "index\tsentence1\tsentence2\tscore\n"
SST2 = "sentence\tlabel\n"
CSV = "mr,ref\n"

ROWS = [
  # ---- a user's JSON lines
  BadInput(
    "jsonl: no file",
    lambda folder: jsonl.read_jsonl(folder / "mine"),
    ("mine does not exist",),
    FileNotFoundError,
  ),
  BadInput("jsonl: a bucket", lambda _: jsonl.read_jsonl("gs://b/mine"), ("gs://", "local path")),
  BadInput(
    "jsonl: a server", lambda _: jsonl.read_jsonl("https://b/x"), ("https://", "local path")
  ),
  lines_row("a folder", os.mkdir, "is a folder"),
  lines_row("a fifo", os.mkfifo, "is a fifo"),
  lines_row("a device", lambda path: path.symlink_to("/dev/zero"), "device"),
  lines_row("an empty file", b"", "has no lines"),
  lines_row("empty lines", b"\n \n\r\n", "has no lines"),
  lines_row("binary", bytes(range(256)), "mine:1", "NUL"),
  lines_row("UTF-16", json.dumps(PAIR).encode("utf-16"), "mine:1", "UTF-16"),
  lines_row("Latin-1", b'{"prompt": "\xe9", "completion": "b"}', "mine:1", "UTF-8", "0xe9"),
  lines_row("a line of 64 MiB", long_line, "mine:1", "64 MiB"),
  lines_row("an array over lines", b'[\n{"prompt": "a"}\n]', "mine:1 is not JSON"),
  lines_row("nested deeply", "[" * 10**5, "mine:1", "nested too deeply"),
  lines_row("a large integer", '{"prompt": ' + "9" * 10**4 + "}", "mine:1", "10000 digits"),
  lines_row("a key twice", '{"prompt": "a", "prompt": "b"}', "mine:1", "'prompt' occurs twice"),
  lines_row(
    "a key of a message twice",
    '{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}',
    *("mine:1", "'role' occurs twice"),
  ),
  lines_row("half of a surrogate pair", '{"prompt": "\\ud83d"}', "mine:1", "surrogate"),
  lines_row("half of one in a key", '{"\\udc00": 1}', "mine:1", "surrogate"),
  lines_row("a list", [1], "mine:1", "expected an object", "list"),
  lines_row("null", "null", "mine:1", "expected an object", "NoneType"),
  lines_row("another field", {**PAIR, "id": 1}, "mine:1", "id", "data.ignored_fields"),
  lines_row("no completion", {"prompt": "a"}, "mine:1", "prompt and completion", "got prompt"),
  lines_row("a number for a prompt", {**PAIR, "prompt": 1}, "mine:1: prompt", "text", "1"),
  lines_row("an empty completion", {**PAIR, "completion": ""}, "mine:1: completion", "''"),
  lines_row("a truth value", {**PAIR, "completion": True}, "mine:1: completion", "True"),
  lines_row("messages of text", {"messages": "a"}, "mine:1", "messages", "list"),
  lines_row("no messages", {"messages": []}, "mine:1", "one or more"),
  lines_row("a role that is a list", {"messages": [{**USER, "role": []}]}, "message 1", "[]"),
  lines_row("another role", {"messages": [{**USER, "role": "bot"}]}, "message 1", "'bot'"),
  lines_row("a content that is null", {"messages": [{**USER, "content": None}]}, "None"),
  lines_row("a message with a name", {"messages": [{**USER, "name": "x"}]}, "name, role"),
  lines_row("no answer", {"messages": [USER]}, "mine:1", "no message is the assistant's"),
  lines_row(
    "two formats", json.dumps(PAIR) + "\n" + json.dumps({"messages": [USER, ANSWER]}), "mine:2"
  ),
  # ---- tokens
  BadInput(
    "tokens: a word of a megabyte",
    lambda _: completions("a" * 10**6),
    ("mine:1", "1,000,001 characters", "128", "max_length = 8"),
  ),
  BadInput(
    "tokens: a prompt of a megabyte, truncated",
    lambda _: completions("a" * 10**6, truncate=True),
    ("mine:1", "1,000,001 characters"),
  ),
  BadInput("tokens: too many", lambda _: completions("a b c d e f g h"), ("mine:1", "8 tokens")),
  BadInput("tokens: none", lambda _: completions(max_length=0), ("mine:1", "max_length = 0")),
  BadInput(
    "tokens: E2E's word of a megabyte",
    lambda _: text.encode(gpt2(), [e2e.Record("a", "b" * 10**6)], 0, 64),
    ("record 0", "1,000,002 characters", "max_length = 64"),
  ),
  BadInput(
    "tokens: an end that is not in the vocabulary",
    lambda _: text.encode(gpt2(), [e2e.Record("a", "b")], 8192, 64),
    ("eos_id", "8192"),
  ),
  BadInput(
    "tokens: a classifier's short rows",
    lambda _: classification.encode(words(), [glue.Record("a", "b", 0)], 3),
    ("max_length 3",),
  ),
  BadInput(
    "tokens: end tokens of another type",
    lambda folder: (
      (folder / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}'),
      user_data.generation_end_ids(folder, 99),
    ),
    ("generation_config.json", "eos_token_id", "[0, 99)", "'</s>'"),
  ),
  BadInput(
    "tokens: end tokens out of the vocabulary",
    lambda folder: (
      (folder / "generation_config.json").write_text('{"eos_token_id": [1, 99]}'),
      user_data.generation_end_ids(folder, 99),
    ),
    ("eos_token_id", "[0, 99)", "[1, 99]"),
  ),
  # ---- E2E
  BadInput(
    "e2e: no folder",
    lambda folder: e2e.read("train", folder=folder / "none"),
    ("train.txt", "none"),
    FileNotFoundError,
  ),
  BadInput("e2e: a bucket", lambda _: e2e.read("train", folder="gs://b"), ("gs://", "local path")),
  BadInput("e2e: another split", lambda _: e2e.read("dev"), ("split", "valid", "'dev'")),
  BadInput("e2e: another format", lambda _: e2e.read("test", "csv"), ("form", "official", "'csv'")),
  BadInput(
    "e2e: the official training set",
    lambda _: e2e.read("train", "official"),
    ("trainset.csv is not embedded",),
    FileNotFoundError,
  ),
  e2e_row("a folder", os.mkdir, "is a folder"),
  e2e_row("a fifo", os.mkfifo, "is a fifo"),
  e2e_row("an empty file", b"", "at least one record"),
  e2e_row("a NUL byte", b"a||b\na\0||b", ":2", "NUL"),
  e2e_row("Latin-1", b"a||b\n\xe9||b", ":2", "UTF-8", "0xe9"),
  e2e_row("no bars", b"a||b\nab", ":2", "context||completion", "'ab'"),
  e2e_row("three parts", b"a||b||c", ":1", "'a||b||c'"),
  e2e_row("an empty text", b"a|| ", ":1", "context||completion"),
  e2e_row("another header", b"a,b\n", ":1", "mr,ref", "'a,b'", form="official"),
  e2e_row("a header alone", CSV.encode(), "at least one record", form="official"),
  e2e_row("three fields", CSV.encode() + b"a,b,c", ":2", "['a', 'b', 'c']", form="official"),
  e2e_row("an open quotation", CSV.encode() + b'"a,b', ":2", "mr,ref", form="official"),
  e2e_row("a NUL byte in a table", CSV.encode() + b"a\0,b", ":2", "NUL", form="official"),
  BadInput(
    "e2e_tfds: another config",
    lambda folder: e2e_tfds.E2E(config="csv", data_dir=folder),
    ("config", "official", "'csv'"),
  ),
  BadInput(
    "e2e_tfds: a bucket",
    lambda _: e2e_tfds.E2E(config="reference", data_dir="gs://b/x"),
    ("gs://", "local path"),
  ),
  BadInput(
    "e2e_tfds: the other format's download",
    lambda folder: e2e_tfds.E2E(source="download", data_dir=folder),
    ("only the official",),
  ),
  # ---- GLUE and SuperGLUE
  BadInput("glue: another task", lambda f: glue.read("ax", "test", f), ("task", "cola", "'ax'")),
  BadInput(
    "glue: another split", lambda f: glue.read("mnli", "test", f), ("test_matched", "'test'")
  ),
  BadInput("glue: a bucket", lambda _: glue.read("rte", "test", "s3://b"), ("s3://", "local path")),
  BadInput(
    "glue: no file", lambda f: glue.read("rte", "test", f), ("test.tsv", "RTE"), FileNotFoundError
  ),
  BadInput(
    "glue_tfds: another suite",
    lambda f: glue_tfds.load("rte", "test", f, suite="superglue"),
    ("suite", "super_glue", "'superglue'"),
  ),
  BadInput(
    "glue_tfds: no files",
    lambda f: glue_tfds.load("rte", "test", f, data_dir=f),
    ("RTE",),
    FileNotFoundError,
  ),
  BadInput(
    "glue_tfds: a bucket",
    lambda f: glue_tfds.load("rte", "test", "gs://b", data_dir=f),
    ("gs://", "local path"),
  ),
  glue_row("rte", "a folder", os.mkdir, "is a folder"),
  glue_row("rte", "a fifo", os.mkfifo, "is a fifo"),
  glue_row("rte", "an empty file", b"", "rows", "got 0"),
  glue_row("rte", "a header alone", RTE, "rows", "got 0"),
  glue_row("rte", "another header", "a\tb\n1\t2\n", ":1", "sentence1", "got a, b"),
  glue_row("rte", "a column twice", "label\t" + RTE + "0\t" * 4 + "0\n", ":1", "label", "twice"),
  glue_row("rte", "too few fields", RTE + "0\ta\tb\n", ":2", "4 fields", "got 3"),
  glue_row("rte", "a NUL byte", RTE + "0\ta\0\tb\tentailment\n", ":2", "NUL"),
  glue_row("rte", "Latin-1", RTE.encode() + b"0\t\xe9\tb\tentailment\n", ":2", "0xe9"),
  glue_row("rte", "another label", RTE + "0\ta\tb\t1\n", ":2", "entailment", "'1'"),
  glue_row("sst2", "a label out of range", SST2 + "a\t2\n", ":2", "0, 1", "'2'"),
  glue_row("sst2", "a negative label", SST2 + "a\t-1\n", ":2", "0, 1", "'-1'"),
  glue_row("stsb", "a score of NaN", STSB + "0\ta\tb\tnan\n", ":2", "0.0 to 5.0", "'nan'"),
  glue_row("stsb", "an infinite score", STSB + "0\ta\tb\tinf\n", ":2", "0.0 to 5.0", "'inf'"),
  glue_row("stsb", "a high score", STSB + "0\ta\tb\t5.1\n", ":2", "0.0 to 5.0", "'5.1'"),
  glue_row("stsb", "a score of words", STSB + "0\ta\tb\tx\n", ":2", "0.0 to 5.0", "'x'"),
  glue_row("stsb", "underscores", STSB + "0\ta\tb\t0_1\n", ":2", "0.0 to 5.0", "'0_1'"),
  glue_row(
    "rte", "an excerpt", RTE + "0\ta\tb\tentailment\n", "2,490 rows", "got 1", any_size=False
  ),
  BadInput("superglue: another task", lambda f: superglue.read("ax", "test", f), ("boolq", "'ax'")),
  BadInput(
    "superglue: another split", lambda f: superglue.read("cb", "dev", f), ("validation", "'dev'")
  ),
  BadInput(
    "superglue: no file",
    lambda f: superglue.read("cb", "test", f),
    ("test.jsonl", "CB"),
    FileNotFoundError,
  ),
  BadInput(
    "superglue: a bucket",
    lambda _: superglue.read("cb", "test", "gs://b"),
    ("gs://", "local path"),
  ),
  superglue_row("boolq", "not JSON", "{", "not JSON"),
  superglue_row("boolq", "a key twice", '{"idx": 0, "idx": 1}', "'idx' occurs twice"),
  superglue_row("boolq", "a list", [1], "JSON object"),
  superglue_row("boolq", "text", '"a"', "JSON object"),
  superglue_row("boolq", "nested deeply", "[" * 10**5, "nested too deeply"),
  superglue_row("boolq", "NUL bytes", b"\0", "NUL"),
  superglue_row("boolq", "a missing key", {"question": "q"}, "'passage'"),
  superglue_row("boolq", "a text for a label", {**BOOLQ, "label": "yes"}, "'yes'", "False, True"),
  superglue_row("boolq", "a label out of range", {**BOOLQ, "label": 2}, "label 2", "False, True"),
  superglue_row("boolq", "a label of null", {**BOOLQ, "label": None}, "None", "False, True"),
  superglue_row("boolq", "a list for a label", {**BOOLQ, "label": []}, "[]", "False, True"),
  superglue_row("boolq", "a number for a text", {**BOOLQ, "passage": 1}, "1", "text"),
  superglue_row("boolq", "an index of text", {**BOOLQ, "idx": "a"}, "idx", "'a'"),
  superglue_row(
    "wic",
    "a position of text",
    {**dict.fromkeys(("word", "sentence1", "sentence2"), "a"), "start1": "x"},
    *("start1", "'x'"),
  ),
  superglue_row("multirc", "a passage of text", {"passage": "a", "idx": 0}, "JSON object"),
  superglue_row(
    "record",
    "an entity outside the passage",
    {"passage": {"text": "abc", "entities": [{"start": 5, "end": 9}]}, "qas": [], "idx": 0},
    *("entity", "5", "9", "3 characters"),
  ),
  superglue_row(
    "record",
    "a negative position",
    {"passage": {"text": "abc", "entities": [{"start": -1, "end": 1}]}, "qas": [], "idx": 0},
    *("entity", "-1"),
  ),
  # ---- batches
  packed("no examples", "at least one example", examples=()),
  packed("a row of nothing", "row_length", "0", row_length=0),
  packed("a negative row", "row_length", "-8", row_length=-8),
  packed("a row of a fraction", "row_length", "8.5", row_length=8.5),
  packed("a row of truth", "row_length", "True", row_length=True),
  packed("a row of 10^8 tokens", "batch_size", "row_length", "100,000,000", row_length=10**8),
  packed("a row of 10^30 tokens", "row_length", row_length=10**30),
  packed("targets of nothing", "loss_length", "0", loss_length=0),
  packed("10^9 targets", "loss_length", "1,000,000,000", loss_length=10**9),
  packed("a short row", "row_length of at least 3", "got 2", row_length=2),
  packed("a batch of nothing", "batch_size", "0", batch_size=0),
  packed("a negative batch", "batch_size", "-1", batch_size=-1),
  packed("10^9 rows", "batch_size", "1,000,000,000", batch_size=10**9),
  packed("a batch of text", "batch_size", "'2'", batch_size="2"),
  packed("a negative seed", "seed", "-1", seed=-1),
  packed("a seed of text", "seed", "'a'", seed="a"),
  packed("no epochs", "num_epochs", "0", num_epochs=0),
  packed("10^9 epochs", "num_epochs", "1,000,000,000", num_epochs=10**9),
  packed("no rows of a batch", "local_rows", "[]", local_rows=[]),
  packed("rows in disorder", "local_rows", "ascending", "[1, 0]", local_rows=[1, 0]),
  packed("a row that is not there", "local_rows", "0..1", "[2]", local_rows=[2]),
  packed("a negative row of a batch", "local_rows", "[-1]", local_rows=[-1]),
  padded("no lengths", "row_lengths", row_lengths=[]),
  padded("a length of nothing", "row_lengths[1]", "0", row_lengths=[8, 0]),
  padded("a length of 10^8", "row_lengths", "100,000,000", row_lengths=[8, 10**8]),
  padded("a batch of nothing, padded", "batch_size", "0", batch_size=0),
  bucketed("no examples", "at least one example", examples=()),
  bucketed("no lengths", "row_lengths", row_lengths=[]),
  bucketed("a length of 10^8", "row_lengths", "100,000,000", row_lengths=[10**8]),
  bucketed("a short row", "row_length of at least 3", "got 2", row_lengths=[2]),
  bucketed("a batch of nothing", "batch_size", "0", batch_size=0),
  bucketed("a window of nothing", "window", "0", window=0),
  bucketed("no epochs", "num_epochs", "0", num_epochs=0),
  bucketed("a negative seed", "seed", "-1", seed=-1),
  bucketed(
    "a label of NaN", "label", "nan", examples=(LABELLED._replace(label=math.nan),), seed=None
  ),
  bucketed(
    "labels of two types", "label", "1.5", examples=(LABELLED, LABELLED._replace(label=1.5))
  ),
  # ---- plain text
  BadInput(
    "corpus: no files", lambda f: corpus.find_files(f), ("text files", "none"), FileNotFoundError
  ),
  BadInput("corpus: a bucket", lambda _: corpus.find_files("gs://b"), ("gs://", "local path")),
  file_row("corpus: a file for a folder", corpus.find_files, b"", "mine", "expected a folder"),
  file_row("corpus: a folder for a file", documents, os.mkdir, "mine.txt is a folder"),
  file_row("corpus: a fifo", documents, os.mkfifo, "mine.txt is a fifo"),
  file_row("corpus: a NUL byte", documents, b"a\nb\0", "mine.txt:2", "NUL"),
  file_row("corpus: Latin-1", documents, b"a\n\xe9", "mine.txt:2", "UTF-8"),
  BadInput("corpus: not xz", damaged(".xz", b"abc"), ("a.txt.xz is damaged",)),
  BadInput("corpus: not gzip", damaged(".gz", b"abc"), ("a.txt.gz is damaged",)),
  BadInput(
    "corpus: truncated", damaged(".xz", lzma.compress(b"a" * 99)[:-9]), ("a.txt.xz is dam",)
  ),
  BadInput("corpus: every of 1", lambda _: corpus.split(["a", "b"], 1), ("every", "2", "1")),
  BadInput("corpus: one document", lambda _: corpus.split(["a"], 2), ("at least 2", "got 1")),
  BadInput(
    "corpus: no vocabulary", lambda _: corpus.train_tokenizer(["a"], 0), ("vocab_size", "0")
  ),
  BadInput(
    "corpus: a large vocabulary",
    lambda _: corpus.train_tokenizer(["a"], 10**9),
    ("vocab_size", "65536", "1000000000"),
  ),
  BadInput(
    "corpus: a word of two megabytes",
    lambda _: corpus.encode_stream(gpt2(), ["a", "b " + "a" * 2 * 10**6], 0),
    ("document 1", "2,000,000 characters", "1,000,000"),
  ),
  BadInput(
    "corpus: an end that is not in the vocabulary",
    lambda _: corpus.encode_stream(gpt2(), ["a"], 8192),
    ("end_of_text", "8192"),
  ),
  rows_row("a row of nothing", "row_length", "0", row_length=0),
  rows_row("a batch of nothing", "batch_size", "0", batch_size=0),
  rows_row("a row of 10^8", "99", row_length=10**8, batch_size=1),
  rows_row("10^9 rows", "batch_size", "1,000,000,000", batch_size=10**9, seed=None),
  rows_row("a negative seed", "seed", "-1", seed=-1),
  rows_row("no batches", "num_batches", "0", num_batches=0),
]
