"""Plain text for pretraining: documents from files, one stream of tokens, rows of a fixed length.

    documents    A B C / D E                    a line `<|endoftext|>` between them
    stream       # a b c # d e #                # is the end-of-text token: it starts and ends one
    rows of 4    # a b c | # d e #              tokens; their targets are the stream one further on
    segment_ids  1 1 1 1 | 1 1 1 2              a token sees only its own document
    positions    0 1 2 3 | 0 1 2 0

A document that a row breaks continues in another row at position 0.
"""

import gzip
import itertools
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from jaxtyping import UInt16

from lora_jax.data.batches import Batch, check_sizes, read_local_rows
from lora_jax.extras import require
from lora_jax.fields import Count, Within, read_value
from lora_jax.files import local_path, regular_file

if TYPE_CHECKING:
  from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
MAX_WORD = 10**6  # characters without white space, which take seconds to encode
VocabSize = Annotated[int, Within("[257, 65536]")]  # of bytes and the end of text, at least
OPEN: dict[str, Callable[..., Any]] = {".txt": open, ".xz": lzma.open, ".gz": gzip.open}


def find_files(folder: str | Path) -> list[Path]:
  """Returns the text files of a folder: `.txt`, `.txt.xz` and `.txt.gz`, by name.

  Raises:
    FileNotFoundError: if there are none.
    ValueError: if it is not a folder.
  """
  folder = local_path(folder)
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"{folder} is a file, expected a folder of text files")
  files = sorted(path for suffix in ("", ".xz", ".gz") for path in folder.glob(f"*.txt{suffix}"))
  if not files:
    raise FileNotFoundError(
      f"{folder}: expected text files (*.txt, *.txt.xz or *.txt.gz), found none"
    )
  return files


def documents(files: Iterable[Path]) -> Iterator[str]:
  """Yields the documents of text files, without the lines that separate them.

  Raises:
    ValueError: if a file is damaged or not text in UTF-8, naming it and the line.
  """
  for path in map(regular_file, files):
    lines: list[str] = []
    number = 0
    try:
      with OPEN[path.suffix](path, "rb") as file:
        for number, line in enumerate(file, 1):
          if b"\0" in line:
            raise ValueError(f"{path}:{number}: expected UTF-8, got a NUL byte")
          if line.strip() != END_OF_TEXT.encode():
            lines.append(line.decode("utf-8"))
            continue
          yield from _joined(lines)
          lines = []
    except UnicodeDecodeError as error:
      byte = error.object[error.start]
      raise ValueError(f"{path}:{number}: expected UTF-8, got byte 0x{byte:02x}") from error
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
      raise ValueError(f"{path} is damaged after line {number}: {error}") from error
    yield from _joined(lines)


def _joined(lines: list[str]) -> Iterator[str]:
  text = "".join(lines).strip()
  if text:
    yield text


def split(texts: Iterable[str], every: int) -> tuple[list[str], list[str]]:
  """Returns the documents to train on, and every `every`-th, which is held out."""
  if every < 2:
    raise ValueError(f"expected every = 2 or more, one document in which is held out, got {every}")
  train: list[str] = []
  held_out: list[str] = []
  for number, text in enumerate(texts):
    (held_out if number % every == every - 1 else train).append(text)
  if not train or not held_out:
    raise ValueError(
      f"expected at least {every} documents, one in {every} of which is held out, got "
      f"{len(train) + len(held_out)}; a line {END_OF_TEXT} separates two"
    )
  return train, held_out


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
  """Returns a byte-level BPE (GPT-2's kind) trained on texts; token 0 is the end of text."""
  require("tokenizers")
  read_value(VocabSize, vocab_size, "vocab_size")
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
  tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END_OF_TEXT],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  if tokenizer.get_vocab_size() != vocab_size:
    raise ValueError(
      f"the text has too few different words for a vocabulary of {vocab_size}, only "
      f"{tokenizer.get_vocab_size()} tokens; give more text or a smaller vocab_size"
    )
  return tokenizer


def encode_stream(
  tokenizer: "Tokenizer", texts: Iterable[str], end_of_text: int, batch_size: int = 1000
) -> UInt16[np.ndarray, " N"]:
  """Returns documents as one stream of tokens: the end-of-text token first and after each.

  Raises:
    ValueError: if the vocabulary does not fit, or a document has a word of a million characters.
  """
  size = tokenizer.get_vocab_size()
  if size > 2**16:
    raise ValueError(f"expected a vocabulary of at most 65,536 tokens, got {size:,}")
  if not 0 <= end_of_text < size:
    raise ValueError(f"expected an end_of_text below the vocabulary's {size}, got {end_of_text}")
  parts, texts = [np.array([end_of_text], np.uint16)], iter(texts)
  for first in itertools.count(step=batch_size):
    chunk = list(itertools.islice(texts, batch_size))
    if not chunk:
      break
    for i, text in enumerate(chunk):
      if len(text) > MAX_WORD and (longest := max(map(len, text.split()))) > MAX_WORD:
        raise ValueError(
          f"document {first + i}: a word of {longest:,} characters without white space; expected "
          f"text, with at most {MAX_WORD:,}"
        )
    parts += [
      np.array([*encoding.ids, end_of_text], np.uint16)
      for encoding in tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
    ]
  return np.concatenate(parts)


class Rows:
  """Batches of a stream's rows, in an order that is a function of (seed, epoch).

  The end of the stream that does not fill a row is not used.

  Args:
    stream: as in `encode_stream`.
    end_of_text: the token that starts a document.
    batch_size: B, rows.
    row_length: T, tokens.
    seed: of the order, another in each epoch, which leaves out rows that do not fill a batch.
      None keeps the stream's order, and fills the last batch up with rows of weight 0.
    num_batches: of all epochs; None is one epoch.
    local_rows: as in `lora_jax.data.batches.packed_batches`.
  Raises:
    ValueError: if the stream is too short for one batch, or a size is out of range.
  """

  def __init__(
    self,
    stream: UInt16[np.ndarray, " N"],
    end_of_text: int,
    *,
    batch_size: int,
    row_length: int,
    seed: int | None,
    num_batches: int | None = None,
    local_rows: Sequence[int] | None = None,
  ):
    read_value(Count, row_length, "row_length")
    read_value(Count | None, num_batches, "num_batches")
    check_sizes(1, batch_size=batch_size, row_lengths=[row_length], seed=seed, num_epochs=1)
    self.num_rows = (len(stream) - 1) // row_length
    needed = 1 if seed is None else batch_size
    if self.num_rows < needed:
      raise ValueError(
        f"expected text of at least {needed * row_length + 1:,} tokens, for {needed} rows of "
        f"{row_length}, got {len(stream):,}"
      )
    self.batches_per_epoch = -(-(self.num_rows - needed + 1) // batch_size)
    self._num_batches = self.batches_per_epoch if num_batches is None else num_batches
    self._stream, self._end_of_text, self._seed = stream, end_of_text, seed
    self._batch_size, self._row_length = batch_size, row_length
    self._local_rows = list(read_local_rows(local_rows, batch_size))
    self._epoch, self._order = -1, np.arange(self.num_rows)

  def __len__(self) -> int:
    return self._num_batches

  def __getitem__(self, index: int) -> Batch:
    """Returns the batch of that number, or this process's rows; each token has a target."""
    if not 0 <= index < len(self):
      raise IndexError(f"batch {index} of {len(self)}")
    epoch, place = divmod(index, self.batches_per_epoch)
    rows = self._order_of(epoch)[place * self._batch_size : (place + 1) * self._batch_size]
    weights = np.zeros((self._batch_size, self._row_length), np.float32)
    weights[: len(rows)] = 1
    rows = np.pad(rows, (0, self._batch_size - len(rows)), mode="edge")
    rows, weights = rows[self._local_rows], weights[self._local_rows]
    places = rows[:, None] * self._row_length + np.arange(self._row_length + 1)
    tokens = self._stream[places].astype(np.int32)
    tokens, targets = tokens[:, :-1], tokens[:, 1:]
    starts = tokens == self._end_of_text
    starts[:, 0] = True
    column = np.broadcast_to(np.arange(self._row_length, dtype=np.int32), tokens.shape)
    return Batch(
      tokens=tokens,
      positions=column - np.maximum.accumulate(np.where(starts, column, 0), axis=1),
      segment_ids=np.cumsum(starts, axis=1, dtype=np.int32),
      target_index=column.copy(),
      targets=targets,
      target_weights=weights,
    )

  def _order_of(self, epoch: int) -> np.ndarray:
    if self._seed is not None and epoch != self._epoch:
      self._order = np.random.default_rng([self._seed, epoch]).permutation(self.num_rows)
      self._epoch = epoch
    return self._order
