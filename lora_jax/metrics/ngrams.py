"""BLEU and NIST: matches of n-grams after the tokenization of mteval-v13a, lowercased."""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from lora_jax.metrics.segments import SegmentStatistics, check_pairs

BLEU_ORDER = 4
NIST_ORDER = 5
NIST_BETA = -math.log(0.5) / math.log(1.5) ** 2  # a length ratio of 2/3 halves the score

SYMBOLS = "".join(sorted(set(string.punctuation) - set("'-.,")))
ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
SPLITS = (  # mteval-v13a's rules, in its order: each one sees the spaces of those before it
  (re.compile(f"([{re.escape(SYMBOLS)}])"), r" \1 "),
  (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
  (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
  (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)

Ngram = tuple[str, ...]


def tokenize_mteval(text: str) -> list[str]:
  """Splits a text into lowercased tokens as mteval-v13a does for Western languages.

  >>> tokenize_mteval("A 5-star pub (£3.50), isn't it?")
  ['a', '5', '-', 'star', 'pub', '(', '£3.50', ')', ',', "isn't", 'it', '?']
  """
  text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
  for entity, character in ENTITIES:
    text = text.replace(entity, character)
  text = f" {text.lower()} "
  for pattern, spaced in SPLITS:
    text = pattern.sub(spaced, text)
  return text.split()


def count_ngrams(tokens: Sequence[str], order: int) -> Counter[Ngram]:
  """Returns how often each n-gram of 1 to `order` tokens occurs."""
  return Counter(
    tuple(tokens[i : i + n]) for n in range(1, order + 1) for i in range(len(tokens) - n + 1)
  )


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> SegmentStatistics:
  """Returns BLEU's statistics, x 100: sacrebleu's of each segment, which add up to the corpus.

  A row holds the lengths of the hypothesis and of the closest reference, in tokens, the matches
  of n = 1 to 4, and the hypothesis's n-grams.
  """
  from sacrebleu.metrics.bleu import BLEU

  check_pairs(hypotheses, references)
  # The effective order, which sacrebleu asks for here, changes a segment's score, not its counts;
  # `force` silences a warning on texts that come tokenized, as the E2E files of the paper do.
  metric = BLEU(lowercase=True, smooth_method="none", effective_order=True, force=True)
  scores = [
    metric.sentence_score(hypothesis, list(texts))
    for hypothesis, texts in zip(hypotheses, references, strict=True)
  ]
  rows = [[score.sys_len, score.ref_len, *score.counts, *score.totals] for score in scores]
  return SegmentStatistics(np.array(rows, float), bleu_formula)


def bleu_formula(sums: np.ndarray) -> np.ndarray:
  """The geometric mean of the precisions times the brevity penalty; zero if one is zero."""
  length, reference_length = sums[..., 0], sums[..., 1]
  matches, total = np.split(sums[..., 2:], 2, axis=-1)
  with np.errstate(divide="ignore"):
    log_precision = np.log(matches / np.maximum(total, 1)).mean(axis=-1)
  log_brevity = np.minimum(0, 1 - reference_length / np.maximum(length, 1))
  return 100 * np.exp(log_precision + log_brevity)


def nist(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> SegmentStatistics:
  """Returns NIST's statistics (Doddington 2002, eq. 3, with mteval-v13a's length penalty).

      NIST = sum_n (information of the matched n-grams / number of n-grams) * penalty
      information(w1..wn) = log2(count(w1..wn-1) / count(w1..wn))    over all references
      penalty = exp(-beta * ln(min(1, length / mean reference length))^2)

  A row holds the matched information of n = 1 to 5, the hypothesis's n-grams, and the segment's
  mean reference length in tokens. A resample keeps the information of the full set.
  """
  check_pairs(hypotheses, references)
  references_counts = [
    [count_ngrams(tokenize_mteval(text), NIST_ORDER) for text in texts] for texts in references
  ]
  occurrences: Counter[Ngram] = Counter()
  for counts in (counts for segment in references_counts for counts in segment):
    occurrences.update(counts)
  occurrences[()] = _length(occurrences)
  rows = [
    _nist_row(count_ngrams(tokenize_mteval(hypothesis), NIST_ORDER), segment, occurrences)
    for hypothesis, segment in zip(hypotheses, references_counts, strict=True)
  ]
  return SegmentStatistics(np.array(rows, float), nist_formula)


def _length(counts: Counter[Ngram]) -> int:
  return sum(count for ngram, count in counts.items() if len(ngram) == 1)


def _nist_row(
  counts: Counter[Ngram], references: list[Counter[Ngram]], occurrences: Counter[Ngram]
) -> list[float]:
  information, total = [0.0] * NIST_ORDER, [0] * NIST_ORDER
  for ngram, count in counts.items():
    total[len(ngram) - 1] += count
    matches = min(count, max(reference[ngram] for reference in references))
    if matches:
      weight = math.log2(occurrences[ngram[:-1]] / occurrences[ngram])
      information[len(ngram) - 1] += matches * weight
  return [*information, *total, sum(map(_length, references)) / len(references)]


def nist_formula(sums: np.ndarray) -> np.ndarray:
  information, total = np.split(sums[..., :-1], 2, axis=-1)
  precision = (information / np.maximum(total, 1)).sum(axis=-1)
  with np.errstate(divide="ignore"):
    log_ratio = np.log(np.minimum(1, total[..., 0] / sums[..., -1]))
  return precision * np.exp(-NIST_BETA * log_ratio**2)
