"""Plain text for pretraining: documents from files, one stream of tokens, rows of a fixed length.

    documents    A B C / D E                    a line `<|endoftext|>` between them
    stream       # a b c # d e #                # is the end-of-text token: it starts and ends one
    rows of 4    # a b c | # d e #              tokens; their targets are the stream one further on
    segment_ids  1 1 1 1 | 1 1 1 2              a token sees its own document alone
    positions    0 1 2 3 | 0 1 2 0

A document that a row breaks goes on in another row with position 0.
"""

import gzip
import itertools
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt16

from lora_jax.data.batches import Batch
from lora_jax.extras import require

if TYPE_CHECKING:
  from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
OPEN: dict[str, Callable[..., Any]] = {".txt": open, ".xz": lzma.open, ".gz": gzip.open}


def find_files(folder: str | Path) -> list[Path]:
  """Returns the text files of a folder: `.txt`, `.txt.xz` and `.txt.gz`, by name.

  Raises:
    FileNotFoundError: if there are none.
  """
  files = sorted(
    path for suffix in ("", ".xz", ".gz") for path in Path(folder).glob(f"*.txt{suffix}")
  )
  if not files:
    raise FileNotFoundError(
      f"{folder}: expected text files (*.txt, *.txt.xz or *.txt.gz), found none"
    )
  return files


def documents(files: Iterable[Path]) -> Iterator[str]:
  """Yields the documents of text files, without what separates them.

  Raises:
    ValueError: if a file is damaged or not UTF-8, naming it and the line.
  """
  for path in files:
    lines: list[str] = []
    number = 0
    try:
      with OPEN[path.suffix](path, "rb") as file:
        for number, line in enumerate(file, 1):  # noqa: B007 (errors name it)
          if line.strip() != END_OF_TEXT.encode():
            lines.append(line.decode("utf-8"))
            continue
          yield from _joined(lines)
          lines = []
    except UnicodeDecodeError as error:
      raise ValueError(f"{path}:{number}: expected UTF-8 text, got {error}") from error
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
      raise ValueError(f"{path} is damaged after line {number}: {error}") from error
    yield from _joined(lines)


def _joined(lines: list[str]) -> Iterator[str]:
  text = "".join(lines).strip()
  if text:
    yield text


def split(texts: Iterable[str], every: int) -> tuple[list[str], list[str]]:
  """Returns the documents to train on, and each `every`-th, which is held out."""
  if every < 2:
    raise ValueError(f"expected every = 2 or more, one document in which is held out, got {every}")
  train: list[str] = []
  held_out: list[str] = []
  for number, text in enumerate(texts):
    (held_out if number % every == every - 1 else train).append(text)
  if not train or not held_out:
    raise ValueError(
      f"expected at least {every} documents, one in {every} of which is held out, got "
      f"{len(train) + len(held_out)}; a line {END_OF_TEXT} stands between two"
    )
  return train, held_out


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
  """Returns a byte-level BPE (GPT-2's kind) made from texts; token 0 is the end of text."""
  require("tokenizers")
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
      f"{tokenizer.get_vocab_size()} were made; give more text or a smaller vocab_size"
    )
  return tokenizer


def encode_stream(
  tokenizer: "Tokenizer", texts: Iterable[str], end_of_text: int, batch_size: int = 1000
) -> UInt16[np.ndarray, " N"]:
  """Returns documents as one stream of tokens: the end-of-text token first and after each."""
  if tokenizer.get_vocab_size() > 2**16:
    raise ValueError(
      f"expected a vocabulary of at most 65,536 tokens, got {tokenizer.get_vocab_size():,}"
    )
  parts, texts = [np.array([end_of_text], np.uint16)], iter(texts)
  while chunk := list(itertools.islice(texts, batch_size)):
    parts += [
      np.array([*encoding.ids, end_of_text], np.uint16)
      for encoding in tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
    ]
  return np.concatenate(parts)


class Rows:
  """Batches of a stream's rows, in an order that is a function of (seed, epoch) alone.

  What is left over at the end of the stream, less than a row, is not used.

  Args:
    stream: as `encode_stream` returns it.
    end_of_text: the token that starts a document.
    batch_size: B, rows.
    row_length: T, tokens.
    seed: of the order, another in each epoch, which leaves out rows that do not fill a batch.
      None keeps the stream's order, and fills the last batch up with rows of weight 0.
    num_batches: of all epochs; None is one epoch.
  Raises:
    ValueError: if the stream is too short for one batch.
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
  ):
    if batch_size < 1 or row_length < 1:
      raise ValueError(f"expected positive sizes, got {batch_size} rows of {row_length} tokens")
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
    self._epoch, self._order = -1, np.arange(self.num_rows)

  def __len__(self) -> int:
    return self._num_batches

  def __getitem__(self, index: int) -> Batch:
    """Returns the batch of that number: B rows, a target for each of their tokens."""
    if not 0 <= index < len(self):
      raise IndexError(f"batch {index} of {len(self)}")
    epoch, place = divmod(index, self.batches_per_epoch)
    rows = self._order_of(epoch)[place * self._batch_size : (place + 1) * self._batch_size]
    weights = np.zeros((self._batch_size, self._row_length), np.float32)
    weights[: len(rows)] = 1
    rows = np.pad(rows, (0, self._batch_size - len(rows)), mode="edge")
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
