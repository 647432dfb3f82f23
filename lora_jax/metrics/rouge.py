"""ROUGE of summaries (Lin 2004), as SAMSum's results are reported."""

import importlib.util
from collections.abc import Sequence

import numpy as np

from lora_jax.metrics.nlg import check_hypotheses, check_references
from lora_jax.metrics.segments import SegmentStatistics, mean_of_segments

ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge(
  hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, SegmentStatistics]:
  """Returns ROUGE-1, ROUGE-2 and ROUGE-L, x 100: the mean of the segments' F1.

  The scores are those of Google's `rouge_score` with Porter's stemmer: of words in letters a to z
  and digits, without case. Of several references, each metric takes the best one. This is not the
  ROUGE-L of `coco.py`, which has other words and weighs recall higher.

  Args:
    hypotheses: one text for each input; it may be empty.
    references: for each input its references, at least one.
  Raises:
    ImportError: if rouge_score is missing, saying what to install.
    ValueError: if there are no inputs, they do not pair up, or a reference has no word.
  """
  check_references(references)
  check_hypotheses(hypotheses, references)
  if importlib.util.find_spec("rouge_score") is None:
    raise ImportError("rouge_score was not found; pip install lora-jax[metrics]")
  from rouge_score.rouge_scorer import RougeScorer

  scorer = RougeScorer(ROUGE, use_stemmer=True)
  scores = [
    scorer.score_multi(texts, hypothesis)
    for hypothesis, texts in zip(hypotheses, references, strict=True)
  ]
  return {
    name: mean_of_segments(100 * np.array([score[name].fmeasure for score in scores]))
    for name in ROUGE
  }
