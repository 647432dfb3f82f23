"""TER, the translation edit rate (Snover et al. 2006), by sacrebleu's counts of Tercom's edits.

    TER = edits that turn the hypothesis into a reference / words of the reference

An edit inserts, deletes or replaces a word, or shifts a phrase; the reference that needs the fewest
counts. Lower is better, and more than 100 % is possible. There are two scores of a corpus:

| function   | a corpus' score                                         | defined by            |
|------------|---------------------------------------------------------|-----------------------|
| `ter`      | all edits / sum of the segments' mean reference lengths | Tercom, sacrebleu     |
| `mean_ter` | mean over segments of their least edits / length        | the script of WebNLG, |
|            |                                                         | in Hu et al.'s tables |
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from lora_jax.metrics.segments import SegmentStatistics, check_pairs, mean_of_segments


def ter(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> SegmentStatistics:
  """Returns TER's statistics, x 100: those of sacrebleu's corpus score.

  A row holds the edits to the closest reference and the mean length of the references in words.
  Words are what white space separates, lowercased.

  Args:
    hypotheses: one text for each segment.
    references: for each segment its references, each with a word.
  """
  counts = [_counts(hypothesis, texts) for hypothesis, texts in _pairs(hypotheses, references)]
  rows = [[edits.min(), lengths.mean()] for edits, lengths in counts]
  return SegmentStatistics(np.array(rows), lambda sums: 100 * sums[..., 0] / sums[..., 1])


def mean_ter(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> SegmentStatistics:
  """Returns the statistics of the segments' mean TER, x 100; arguments as in `ter`."""
  counts = [_counts(hypothesis, texts) for hypothesis, texts in _pairs(hypotheses, references)]
  return mean_of_segments(np.array([100 * (edits / lengths).min() for edits, lengths in counts]))


def _pairs(
  hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> list[tuple[str, Sequence[str]]]:
  check_pairs(hypotheses, references)
  return list(zip(hypotheses, references, strict=True))


def _counts(hypothesis: str, references: Sequence[str]) -> Float[np.ndarray, "2 references"]:
  """Returns the edits to each reference, and the length of each."""
  return np.array([_edits(hypothesis, text) for text in references], float).T


@functools.lru_cache(maxsize=2**16)
def _edits(hypothesis: str, reference: str) -> tuple[float, float]:
  from sacrebleu.metrics.ter import TER

  score = TER().sentence_score(hypothesis, [reference])
  return score.num_edits, score.ref_length
