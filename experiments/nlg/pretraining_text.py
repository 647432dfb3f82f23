"""The text that a base is pretrained on: its tokenizer and its tokens, made once for all runs."""

import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.harness.workdir import file_digest, write_json
from experiments.nlg.config import PretrainConfig
from lora_jax.data import corpus

END_OF_TEXT_ID = 0


class Text(NamedTuple):
  """Prepared text: streams of tokens, and the UTF-8 bytes of the held-out documents."""

  folder: Path
  train: np.ndarray
  held_out: np.ndarray
  held_out_bytes: int
  files: list[str]


def prepare(config: PretrainConfig) -> Text:
  """Makes the tokenizer and the tokens of the text, or finds those that another run has made.

  Their folder is `text-<hash of the files and settings>` in `config.data.prepared`.
  """
  files = corpus.find_files(config.data.folder)
  about = {
    "files": [f"{path.name}, {path.stat().st_size:,} bytes" for path in files],
    "digests": [file_digest(path) for path in files],
    "vocab_size": config.data.vocab_size,
    "held_out_every": config.data.held_out_every,
  }
  root = Path(config.data.prepared)
  folder = root / f"text-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]}"
  if not folder.exists():
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".text-") as name:
      _prepare(files, about, Path(name) / "text")
      if not folder.exists():  # another run may have been faster
        (Path(name) / "text").rename(folder)
  about = json.loads((folder / "about.json").read_text("utf-8"))
  train, held_out = (np.load(folder / f"{name}.npy", "r") for name in ("train", "held_out"))
  return Text(folder, train, held_out, about["held_out_bytes"], about["files"])


def _prepare(files: list[Path], about: dict[str, Any], folder: Path) -> None:
  start = time.perf_counter()
  print(f"making a vocabulary of {about['vocab_size']:,} from {len(files)} files ...", flush=True)
  train, held_out = corpus.split(corpus.documents(files), about["held_out_every"])
  tokenizer = corpus.train_tokenizer(train[:: max(1, len(train) // 20_000)], about["vocab_size"])
  folder.mkdir()
  tokenizer.save(str(folder / "tokenizer.json"))
  for name, texts in (("train", train), ("held_out", held_out)):
    np.save(folder / f"{name}.npy", corpus.encode_stream(tokenizer, texts, END_OF_TEXT_ID))
  held_out_bytes = sum(len(text.encode("utf-8")) for text in held_out)
  write_json(folder / "about.json", about | {"held_out_bytes": held_out_bytes})
  print(f"done in {time.perf_counter() - start:.0f} s", flush=True)
