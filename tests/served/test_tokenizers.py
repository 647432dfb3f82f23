"""Tokenizers of GGUF files give the ids, the texts and the end tokens of llama.cpp itself."""

import pytest

from lora_jax.models.checkpoints.pretrained import find_pretrained
from lora_jax.models.text.tokenizer import load_tokenizer

from tests.gguf_vocabularies import BYTE_LEVEL, NAMES, write_vocabulary
from tests.real_lines import real_lines

pytestmark = pytest.mark.served


@pytest.mark.parametrize("name", ["smollm2", *NAMES])
def test_real_lines_have_llama_cpps_ids(name, llama_cpp, tmp_path):
  if name == "smollm2":
    try:
      path = find_pretrained(name)
    except FileNotFoundError as error:
      pytest.skip(str(error))
  else:
    path = write_vocabulary(name, tmp_path)
  lines, tokenizer = real_lines(), load_tokenizer(path)
  answer = llama_cpp.ask(do="tokenize", model=str(path), texts=lines, special=True)
  ids = [encoding.ids for encoding in tokenizer.encode_batch(lines, add_special_tokens=False)]
  assert len(lines) == 2000
  assert ids == answer["tokens"]
  if name not in BYTE_LEVEL or name in ("smollm", "qwen2"):  # to others it removes spaces again
    texts = llama_cpp.ask(do="detokenize", model=str(path), tokens=ids)["texts"]
    assert tokenizer.decode_batch(ids, skip_special_tokens=False) == texts
