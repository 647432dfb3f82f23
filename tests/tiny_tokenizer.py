"""A word tokenizer with BERT's special tokens, made on the fly."""

import re

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def tiny_tokenizer(texts: list[str]) -> Tokenizer:
  """Returns a tokenizer of all words of some texts; ids follow the alphabet after 0 to 3."""
  words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())})
  vocabulary = {word: i for i, word in enumerate((*SPECIAL, *words))}
  tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
  tokenizer.normalizer = normalizers.Lowercase()
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]",
    pair="[CLS] $A [SEP] $B:1 [SEP]:1",
    special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
  )
  return tokenizer
