"""TER by hand, against sacrebleu's corpus score, and under resampling."""

import numpy as np
import pytest

from lora_jax.metrics.ter import mean_ter, ter

sacrebleu_ter = pytest.importorskip("sacrebleu.metrics.ter")


def test_edits_by_hand():
  cases = [  # hypothesis, references, edits, mean length
    ("a b c d", ["a b c d"], 0, 4),
    ("A b", ["a B"], 0, 2),  # lowercased
    ("a x c", ["a b c d"], 2, 4),  # a replaced and an inserted word
    ("c d a b", ["a b c d"], 1, 4),  # a shifted phrase
    ("", ["a b", "a b c d"], 2, 3),  # the closest reference, the mean length
    ("a b x y z", ["a b"], 3, 2),  # more than 100 %
  ]
  hypotheses, references, edits, lengths = map(list, zip(*cases, strict=True))
  statistics = ter(hypotheses, references)
  assert statistics.rows.tolist() == [list(row) for row in zip(edits, lengths, strict=True)]
  assert statistics.score() == pytest.approx(100 * sum(edits) / sum(lengths))
  shares = [0, 0, 2 / 4, 1 / 4, 1, 3 / 2]  # nothing of "" is in "a b", nor in "a b c d"
  assert mean_ter(hypotheses, references).score() == pytest.approx(100 * np.mean(shares))


def test_the_mean_takes_the_least_share_not_the_fewest_edits():
  references = [["a b", "a b c d e f g h"]]
  hypotheses = ["a c d e f g"]  # 5 edits to 2 words, 2 edits to 8
  assert mean_ter(hypotheses, references).score() == pytest.approx(100 * 2 / 8)
  hypotheses = ["x"]  # 2 edits to 2 words, 8 edits to 8
  assert ter(hypotheses, references).rows.tolist() == [[2, 5]]
  assert mean_ter(hypotheses, references).score() == 100


def corpus_ter(hypotheses, references):
  """sacrebleu's own corpus score; it takes references by column, None where one is missing."""
  width = max(map(len, references))
  columns = [[(texts + [None] * width)[i] for texts in references] for i in range(width)]
  return sacrebleu_ter.TER().corpus_score(hypotheses, columns).score


def test_a_corpus_and_its_resamples_score_as_in_sacrebleu():
  rng = np.random.default_rng(0)
  words = np.array(["a", "The", "the", "pub.", "in", ","])

  def text(length):
    return " ".join(rng.choice(words, size=length))

  references = [[text(rng.integers(2, 12)) for _ in range(rng.integers(1, 4))] for _ in range(8)]
  hypotheses = [text(rng.integers(0, 12)) for _ in references]
  statistics = ter(hypotheses, references)
  assert statistics.score() == pytest.approx(corpus_ter(hypotheses, references), rel=1e-12)
  counts = rng.multinomial(8, np.full(8, 1 / 8), size=5).astype(float)
  for row, got in zip(counts, statistics.resampled(counts), strict=True):
    chosen = np.repeat(np.arange(8), row.astype(int))
    expected = corpus_ter([hypotheses[i] for i in chosen], [references[i] for i in chosen])
    assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("function", [ter, mean_ter])
def test_texts_that_do_not_pair_up(function):
  with pytest.raises(ValueError, match="got 1 hypotheses for 2 segments"):
    function(["a"], [["a"], ["b"]])
