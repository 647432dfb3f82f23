"""BLEU and NIST by hand, their tokens, and their statistics under resampling."""

import math

import numpy as np
import pytest

from lora_jax.metrics import ngrams

AWKWARD = [
  "",
  "Plain words",
  "It's 3.50, or 1,000.5; not .5 nor 5.",
  "A 5-star, kid-friendly pub (2-3 miles)",
  "wait... what?! a/b *c* [d] {e} ~f `g` \\h",
  "Caf\u00e9 \u00a320 \u201cquoted\u201d \u2013 dash",
  "x&amp;y &lt;tag&gt; &quot;q&quot; & alone <skipped>",
  "hyphen-\nated and\nbroken  \t lines\u00a0with spaces ",
  "..,,--''!!",
]


def test_tokens_are_those_of_mteval():
  tokens = ngrams.tokenize_mteval("It's 3.50, or 1,000; a 5-star pub-bar (\u00a320)...")
  expected = "it's 3.50 , or 1,000 ; a 5 - star pub-bar ( \u00a320 ) . . ."
  assert tokens == expected.split(" ")


@pytest.mark.parametrize("text", AWKWARD)
def test_tokens_are_those_of_sacrebleu(text):
  bleu = pytest.importorskip("sacrebleu.metrics.bleu")
  tokenize = bleu.BLEU(lowercase=True, tokenize="13a").tokenizer
  assert ngrams.tokenize_mteval(text) == tokenize(text.lower()).split()


def test_nist_by_hand():
  references = [["a b", "a c a b"], ["a b"]]  # of 8 words, 4 are a, 3 are b, 1 is c
  hypotheses = ["a c", "b"]
  unigrams = (math.log2(8 / 4) + math.log2(8 / 1) + math.log2(8 / 3)) / 3
  bigrams = math.log2(4 / 1) / 1  # "a c"
  penalty = 0.5 ** ((math.log(3 / 5) / math.log(2 / 3)) ** 2)  # 3 tokens, 3 + 2 on average
  got = ngrams.nist(hypotheses, references).score()
  assert got == pytest.approx((unigrams + bigrams) * penalty, rel=1e-12)


def test_nist_clips_by_the_best_single_reference():
  references = [["a b a", "a c"]]
  weight = math.log2(5 / 3)  # of 5 words, 3 are a; two of them in one reference
  got = ngrams.nist(["a a a"], references).score()
  assert got == pytest.approx(2 * weight / 3, rel=1e-12)


def test_nist_has_no_reward_for_length():
  references = [["a b"]]
  long = ngrams.nist(["a b a b a b"], references).score()
  assert long == pytest.approx(2 * math.log2(2) / 6, rel=1e-12)


def test_bleu_by_hand():
  pytest.importorskip("sacrebleu")
  references = [["A b c d x", "q r s t u v w"], ["a b c d e f"]]
  hypotheses = ["a b c d e", "a b c d"]
  precisions = [8 / 9, 6 / 7, 4 / 5, 2 / 3]
  expected = 100 * math.prod(precisions) ** 0.25 * math.exp(1 - 11 / 9)
  assert ngrams.bleu(hypotheses, references).score() == pytest.approx(expected, rel=1e-12)


def corpus_bleu(hypotheses, references):
  """sacrebleu's own corpus score; it takes references by column, None where one is missing."""
  from sacrebleu.metrics.bleu import BLEU

  width = max(map(len, references))
  columns = [[(texts + [None] * width)[i] for texts in references] for i in range(width)]
  return BLEU(lowercase=True, smooth_method="none").corpus_score(hypotheses, columns).score


def test_resampled_bleu_is_that_of_the_resampled_texts():
  pytest.importorskip("sacrebleu")
  rng = np.random.default_rng(0)
  words = np.array(["a", "The", "the", "pub."])

  def text(length):
    return " ".join(rng.choice(words, size=length))

  references = [[text(rng.integers(3, 30)) for _ in range(rng.integers(1, 5))] for _ in range(12)]
  hypotheses = [text(rng.integers(0, 30)) for _ in references]
  statistics = ngrams.bleu(hypotheses, references)
  counts = rng.multinomial(12, np.full(12, 1 / 12), size=20).astype(float)
  for row, got in zip(counts, statistics.resampled(counts), strict=True):
    chosen = np.repeat(np.arange(12), row.astype(int))
    expected = corpus_bleu([hypotheses[i] for i in chosen], [references[i] for i in chosen])
    assert expected > 0
    assert got == pytest.approx(expected, rel=1e-9)


def test_texts_without_a_match_score_zero():
  references = [["a b c d e"], ["a b c d e"]]
  for hypotheses in (["", ""], ["x", ""], ["x y z u v", "..."]):
    assert ngrams.nist(hypotheses, references).score() == 0
  pytest.importorskip("sacrebleu")
  for hypotheses in (["", ""], ["x", ""], ["a b", "a b"]):
    assert ngrams.bleu(hypotheses, references).score() == 0
