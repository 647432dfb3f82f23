"""Rows of statistics per segment, from which a metric's score and its resamples both follow."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class SegmentStatistics:
  """One metric's statistics of every segment; a corpus is scored by the sum of its rows.

  Attributes:
    rows: the statistics of each segment.
    formula: maps sums of rows, (..., statistics), to scores, (...).
  """

  rows: Float[np.ndarray, "segments statistics"]
  formula: Callable[[np.ndarray], np.ndarray]

  def score(self) -> float:
    """Returns the score of the corpus."""
    return float(self.formula(self.rows.sum(axis=0)))

  def resampled(
    self, counts: Float[np.ndarray, "resamples segments"]
  ) -> Float[np.ndarray, " resamples"]:
    """Returns the scores of corpora that hold segment `j` `counts[i, j]` times."""
    return self.formula(counts @ self.rows)


def check_pairs(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
  """Raises ValueError unless there is one hypothesis for each segment, and at least one segment."""
  if len(hypotheses) != len(references) or not references:
    raise ValueError(
      f"expected one hypothesis for each segment, and at least one segment; got {len(hypotheses)} "
      f"hypotheses for {len(references)} segments"
    )


def mean_of_segments(scores: Float[np.ndarray, " segments"]) -> SegmentStatistics:
  """Returns the statistics of a metric whose corpus score is the mean over segments."""
  rows = np.stack([scores, np.ones_like(scores)], axis=-1)
  return SegmentStatistics(rows, lambda sums: sums[..., 0] / sums[..., 1])
