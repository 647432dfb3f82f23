"""Lines of real text, of many scripts, that tokenizers are compared on."""

import csv
import lzma

import pytest

from tests.make_gguf_tokenizer_golden import TEXTS
from tests.paths import ROOT, SHARED

EXAMPLES = SHARED / "data"  # not everyone has it


def real_lines() -> list[str]:
  """Returns 2,000 lines: 1,200 of Wikipedia with letters of other scripts, others, code, chats.

  Skips the test where the texts are missing.
  """
  if not EXAMPLES.is_dir():
    pytest.skip("the texts are not beside this checkout")
  foreign: list[str] = []
  others: list[str] = []
  with lzma.open(EXAMPLES / "text" / "enwiki2021-shard00.txt.xz", "rt", encoding="utf-8") as file:
    while len(foreign) < 1200:
      line = file.readline().rstrip("\n")
      (foreign if sum(ord(letter) > 0x24F for letter in line) >= 3 else others).append(line)
  sources = (path.read_bytes().decode() for path in sorted((ROOT / "lora_jax").rglob("*.py")))
  code = [line for text in sources for line in text.splitlines(keepends=True)]
  e2e = (EXAMPLES / "e2e" / "valid.txt").read_text("utf-8").splitlines()
  with (EXAMPLES / "samsum" / "test.csv").open(encoding="utf-8", newline="") as file:
    chats = [row["dialogue"] for row in csv.DictReader(file)]  # several lines each, with emoji
  chosen = [*foreign, *others[:250], *code[1000:1250], *e2e[:100], *chats[:200]]
  return [*chosen[: 2000 - len(TEXTS)], *TEXTS]
