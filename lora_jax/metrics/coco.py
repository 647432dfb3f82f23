"""METEOR, ROUGE-L and CIDEr on texts from the Penn Treebank tokenizer."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_jax.metrics.java import run_java
from lora_jax.metrics.segments import SegmentStatistics, check_pairs, mean_of_segments

# METEOR 1.5's parameters for English, task "rank" (Denkowski and Lavie 2014, table 1).
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.20, 0.60, 0.75
STAGE_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase
NUM_STATISTICS = 23


def tokenize_ptb(texts: Sequence[str]) -> list[str]:
  """Returns the texts lowercased, as Penn Treebank tokens without punctuation."""
  from pycocoevalcap.tokenizer import ptbtokenizer

  jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
  program = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
  options = ["-preserveLines", "-lowerCase", "-encoding", "utf-8"]
  lines = run_java([*program, *options], [" ".join(text.splitlines()) for text in texts])
  left_out = frozenset(ptbtokenizer.PUNCTUATIONS)
  return [" ".join(word for word in line.split() if word not in left_out) for line in lines]


def rouge_l(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> SegmentStatistics:
  """Returns ROUGE-L's statistics, x 100: the mean of the segments' scores.

  Args:
    hypotheses: texts from `tokenize_ptb`.
    references: for each hypothesis, texts from `tokenize_ptb`.
  """
  from pycocoevalcap.rouge.rouge import Rouge

  check_pairs(hypotheses, references)
  scores = [
    Rouge().calc_score([hypothesis], texts)
    for hypothesis, texts in zip(hypotheses, references, strict=True)
  ]
  return mean_of_segments(100 * np.array(scores, float))


def cider(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> SegmentStatistics:
  """Returns CIDEr's statistics: the mean of the segments' scores.

  The document frequencies are those of all `references`; a resample keeps them.

  Args:
    hypotheses: texts from `tokenize_ptb`.
    references: for each hypothesis, texts from `tokenize_ptb`.
  """
  from pycocoevalcap.cider.cider import Cider

  check_pairs(hypotheses, references)
  by_segment = dict(enumerate(map(list, references)))
  _, scores = Cider().compute_score(by_segment, {i: [text] for i, text in enumerate(hypotheses)})
  return mean_of_segments(np.array(scores, float))


def meteor(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> SegmentStatistics:
  """Returns METEOR's statistics, x 100: the jar's alignment of each segment.

  A row has pairs of statistics, of the hypothesis and of the reference: lengths, function words,
  content and function words matched in each of four stages; then chunks and words matched.

  Args:
    hypotheses: texts from `tokenize_ptb`.
    references: for each hypothesis, texts from `tokenize_ptb`; the best one counts.
  """
  from pycocoevalcap.meteor import meteor as package

  check_pairs(hypotheses, references)
  jar = Path(package.__file__).with_name(package.METEOR_JAR)
  lines = [
    " ||| ".join(["SCORE", *(text.replace("|||", " ") for text in [*texts, hypothesis])])
    for hypothesis, texts in zip(hypotheses, references, strict=True)
  ]
  answers = run_java(["-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"], lines)
  rows = np.array([answer.split() for answer in answers], float)
  if rows.shape[1:] != (NUM_STATISTICS,):
    raise RuntimeError(f"METEOR should give {NUM_STATISTICS} figures a segment: {answers[0]!r}")
  return SegmentStatistics(_without_perfect_chunks(rows), meteor_formula)


def meteor_by_system(
  systems: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> list[SegmentStatistics]:
  """Returns METEOR's statistics of several systems, with one start of the jar, which takes seconds.

  Args:
    systems: for each system, a text for each segment.
    references: as in `meteor`.
  """
  together = [text for hypotheses in systems for text in hypotheses]
  aligned = meteor(together, list(references) * len(systems))
  parts = np.split(aligned.rows, len(systems))
  return [dataclasses.replace(aligned, rows=rows) for rows in parts]


def _without_perfect_chunks(rows: np.ndarray) -> np.ndarray:
  """Sets the chunks of fully matched segments to zero: METEOR counts no break within them."""
  lengths, chunks, matched = rows[:, :2], rows[:, 20], rows[:, 21:]
  perfect = (matched == lengths).all(axis=1) & (chunks == 1)
  rows = rows.copy()
  rows[perfect, 20] = 0
  return rows


def meteor_formula(sums: np.ndarray) -> np.ndarray:
  """Denkowski and Lavie 2014, eqs. 1 to 4; the same figures as the jar's `EVAL`."""
  lengths, function_words = sums[..., 0:2], sums[..., 2:4]
  stages = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 2, 2)  # stage, kind of word, side
  content, function = np.moveaxis(np.einsum("s,...skt->...kt", STAGE_WEIGHTS, stages), -2, 0)
  weight = DELTA * (lengths - function_words) + (1 - DELTA) * function_words
  matched = DELTA * content + (1 - DELTA) * function
  share = matched / np.where(weight > 0, weight, 1)
  precision, recall = share[..., 0], share[..., 1]
  mean = ALPHA * precision + (1 - ALPHA) * recall
  f_mean = precision * recall / np.where(mean > 0, mean, 1)
  breaks = sums[..., 20] / np.maximum(sums[..., 21:].mean(axis=-1), 1)
  return 100 * f_mean * (1 - GAMMA * breaks**BETA)
