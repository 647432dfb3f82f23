"""Writes tests/golden/tokenizers with SentencePiece and transformers:

    python -m tests.make_tokenizer_golden

Each folder has a tokenizer in a format other than tokenizer.json; ids.json has the reference's ids
of TEXTS, and the texts that it decodes from them. The models are trained on the project's own
documents, so they are under its licence.
"""

import json
import lzma
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "tokenizers"
EMBEDDED = ROOT / "lora_jax" / "assets" / "gpt2"
TEXTS = [
  *("", " ", "  ", "\t", "\n", "\0", "▁", "Low-Rank Adaptation of any JAX function."),
  *("   three before", "three after   ", " a  b   c ", "a\tb\n\nc\r\nd", "a\0b"),
  *("        deep\n    in", "🙂 👩‍👩‍👧‍👦 family", "日本語のテキスト 한국어 नमस्ते", "مرحبا بالعالم"),
  *("é e\u0301 ﬁ ½ ① ㎏ Å ﷺ", "ÀÉÎÕÜ ß İ ı ǆ", "𝔘𝔫𝔦 \U0010ffff \ue000", " ▁ ▁a▁"),
  *("\ufeffa\u200bb\u200dc\u00a0d\u3000e\u2028f\x7f\x85", "====== ---------- ......"),
  *("x" * 120, "1234567890 3.14159", "Don't THEY'RE can't.", "<b>a  b</b>     c"),
  *("a<sep>b", "a <sep> b", "x <sep>", "<0x41> <unused>"),
]
"""Without control tokens, which are plain text to SentencePiece."""
MARKED = [
  *("<s>a</s>", "a <s> b", "<s> a<unk>", "a [MASK] b[SEP]", "[CLS]a [UNK]", "a <mask>b", "<pad>")
]
"""With them; the reference is only `transformers`."""
PAIRS = [["a first text", "and a second"], ["", "x"]]
SENTENCEPIECE: dict[str, dict[str, Any]] = {
  "llama": {
    **{"model_type": "bpe", "normalization_rule_name": "identity", "byte_fallback": True},
    **{"remove_extra_whitespaces": False, "split_digits": True, "vocab_size": 700},
    "allow_whitespace_only_pieces": True,
  },
  "gemma": {
    **{"model_type": "bpe", "normalization_rule_name": "identity", "byte_fallback": True},
    **{"remove_extra_whitespaces": False, "add_dummy_prefix": False, "vocab_size": 700},
    **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
    "user_defined_symbols": ["▁▁", "▁▁▁", "▁▁▁▁", "\n", "\n\n", "<sep>", "<b>", "</b>"],
  },
  "deberta": {
    **{"model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "vocab_size": 700},
    **{"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "user_defined_symbols": ["<sep>"]},
    **{"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"},
  },
}
BERT = {  # tokenizer_config.json of each
  "bert": {"do_lower_case": True},
  "bert_cased": {"do_lower_case": False},
  "bert_accents": {"do_lower_case": True, "strip_accents": False, "tokenize_chinese_chars": False},
}
BERT_WORDS = "low rank adaptation of any jax function by a transform text first second three before"


def write_json(path: Path, value: Any) -> None:
  path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", "utf-8")


def make_sentencepiece(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
  import sentencepiece

  folder.mkdir(parents=True, exist_ok=True)
  path = folder / ("spm.model" if folder.name == "deberta" else "tokenizer.model")
  texts = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("lora_jax/**/*.py")])
  lines = [line for text in texts for line in text.read_text("utf-8").splitlines()]
  sentencepiece.SentencePieceTrainer.train(  # pyright: ignore
    sentence_iterator=iter(lines), model_prefix=str(folder / "new"), num_threads=1, **options
  )
  (folder / "new.vocab").unlink()
  (folder / "new.model").rename(path)
  reference = sentencepiece.SentencePieceProcessor(model_file=str(path))  # pyright: ignore
  ids = reference.encode(TEXTS)
  decoded = reference.decode(ids)
  if folder.name == "deberta":  # most of it are tables of Unicode, which are the same in all
    path.with_suffix(".model.xz").write_bytes(lzma.compress(path.read_bytes(), preset=9))
    path.unlink()
  return {"ids": ids, "decoded": decoded}


def make_vocab(folder: Path, config: dict[str, Any]) -> None:
  """Writes a vocabulary of single characters, a few words and endings."""
  letters = sorted({letter for text in TEXTS for letter in text if letter.isprintable()} - {" "})
  lower = "do_lower_case" in config and config["do_lower_case"]
  words = [*BERT_WORDS.split(), "family", "don", "can", *([] if lower else ["Low", "Rank", "THEY"])]
  letters = [x for x in letters if not lower or x == x.lower()]
  tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)]
  tokens += [word for word in words if word not in tokens] + ["##ily", "##xx", "##tion"]
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", "utf-8")
  write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", **config})


def make_roberta(folder: Path) -> None:
  """Writes RoBERTa's tokens before those of the embedded base."""
  model = json.loads((EMBEDDED / "tokenizer.json").read_text("utf-8"))["model"]
  merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]][:300]
  merged = {pair.replace(" ", "") for pair in merges}
  tokens = [x for x in model["vocab"] if len(x) == 1 or x in merged]
  tokens = ["<s>", "<pad>", "</s>", "<unk>", *tokens, "<mask>"]
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
  (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
  write_json(folder / "config.json", {"model_type": "roberta"})


def by_transformers(folder: Path) -> dict[str, Any]:
  from transformers import BertTokenizer, RobertaTokenizer

  kind = RobertaTokenizer if folder.name == "roberta" else BertTokenizer
  peer = kind.from_pretrained(folder)
  texts = TEXTS + MARKED
  ids = [peer(text)["input_ids"] for text in texts]
  pairs = [peer(*pair, return_token_type_ids=True) for pair in PAIRS]
  return {
    "ids": ids,
    "decoded": [peer.decode(x, clean_up_tokenization_spaces=False) for x in ids],
    "pairs": [[pair["input_ids"], pair["token_type_ids"]] for pair in pairs],
  }


def main() -> None:
  results = {name: make_sentencepiece(GOLDEN / name, x) for name, x in SENTENCEPIECE.items()}
  for name, config in BERT.items():
    make_vocab(GOLDEN / name, config)
    results[name] = by_transformers(GOLDEN / name)
  make_roberta(GOLDEN / "roberta")
  results["roberta"] = by_transformers(GOLDEN / "roberta")
  lines = [f'"{name}": {json.dumps(values)}' for name, values in results.items()]
  (GOLDEN / "ids.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


if __name__ == "__main__":
  main()
