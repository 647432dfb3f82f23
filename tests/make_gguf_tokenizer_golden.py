"""Writes llama.cpp's ids of TEXTS by the vocabularies of `tests/gguf_vocabularies.py`.

    python -m tests.make_gguf_tokenizer_golden      needs llama.cpp: run `make test-served` first

The file is tests/golden/tokenizers/gguf.json.
"""

import json
import tempfile
from pathlib import Path

from tests.gguf_vocabularies import NAMES, write_vocabulary
from tests.make_tokenizer_golden import MARKED
from tests.make_tokenizer_golden import TEXTS as ODD_TEXTS
from tests.paths import GOLDEN

FILE = GOLDEN / "tokenizers" / "gguf.json"
TEXTS = [
  *ODD_TEXTS,
  *MARKED,
  *(
    "\r\n\r\n a\r\n  b \r\n",
    "a \t \n  b\n\n\n   c   ",
    "क्षत्रिय ज़ि १२३४५",
    "ภาษาไทย ๑๒๓",
    "ａｂｃ１２３",
  ),
  *("a\u0308\u0323 Z\u0351\u036b", "👩🏽‍🚀🏳️‍🌈 🇩🇪", "Ⅷ ½²³ ¼ ٣٤٥ 一二三", "'S 'LL don'T I'M 'ſ"),
  *("   12  345   6789 1 2", "\u00a0\u2003\u3000x\u00a0 y", "$1,234.56 +42% #tag @me", "𐍈𐎠𒀀"),
  *("<|im_start|>user\nHi <|im_end|>\n<|endoftext|> <|im_start|", "a<|im_end|><|im_end|>  b"),
  *("a  x b<think> <unk>[PAD9]", "unmerged\n🌈x 🌈x", "İIıi ẞß"),
]


def main() -> None:
  from tests.served.llama_cpp import LlamaCpp

  llama_cpp, ids = LlamaCpp(), {}
  with tempfile.TemporaryDirectory() as folder:
    for name in NAMES:
      model = str(write_vocabulary(name, Path(folder)))
      answer = llama_cpp.ask(do="tokenize", model=model, texts=TEXTS, special=True)
      ids[name] = answer["tokens"]
  llama_cpp.close()
  FILE.write_text(json.dumps(ids, separators=(",", ":")).replace("]],", "]],\n") + "\n")


if __name__ == "__main__":
  main()
