"""Intruder dimensions of the comparison's trained weights, from its runs on disk."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.analysis.records import Planned, Record
from experiments.configs.mechanism import MAIN_THRESHOLD, NUM_VECTORS, THRESHOLDS
from experiments.harness.config import ALL_LINEAR
from experiments.nlg.restore import load_run
from lora_jax.metrics.spectra import count_intruders, effective_rank, similarities
from lora_jax.trees import leaves_with_path, select

STAGE = "seeds"  # of the comparison, whose runs are read


def plan_intruders(records: Iterable[Record], arms: Sequence[str]) -> list[Planned]:
  """Returns a measurement of each finished run, which its loss tells from another in its folder.

  Args:
    records: the comparison's, as `experiments.comparison.runs.collect` returns them.
    arms: of the runs.
  """
  return [
    Planned(
      "intruders",
      record["arm"],
      {
        "run": record["folder"],
        "run_seed": record["seed"],
        "run_loss": record["valid_loss"],
      },
    )
    for record in records
    if record["stage"] == STAGE and record["arm"] in arms and record["status"] == "finished"
  ]


def measure_intruders(planned: Planned, runs: Path) -> dict[str, Any]:
  """Returns how a run has changed the base model's linear weights.

  Args:
    planned: the measurement.
    runs: the comparison's folder.
  Returns:
    `weights`: the number of weights that have changed. Of these: `intruders`, their sum by
    threshold; `by_weight`, the intruders at the main threshold; means of `effective_rank` and of
    `relative_change`, the Frobenius norm of the change over that of the weight.
  Raises:
    FileNotFoundError, ValueError: as `load_run`.
  """
  run = load_run(runs / STAGE / planned.settings["run"])
  before, after = dict(leaves_with_path(run.base.params)), dict(leaves_with_path(run.params))
  intruders, by_weight = dict.fromkeys(map(str, THRESHOLDS), 0), {}
  ranks, changes = [], []
  for path in select(ALL_LINEAR, before, "the pattern of linear weights"):
    old, new = (np.asarray(tree[path], np.float64).T for tree in (before, after))
    if (old == new).all():
      continue
    cosines = similarities(old, new)
    for threshold in THRESHOLDS:
      count = count_intruders(cosines, num_vectors=NUM_VECTORS, threshold=threshold)
      intruders[str(threshold)] += count
      if threshold == MAIN_THRESHOLD:
        by_weight[path] = count
    ranks.append(effective_rank(new - old))
    changes.append(np.linalg.norm(new - old) / np.linalg.norm(old))
  return {
    "weights": len(by_weight),
    "intruders": intruders,
    "by_weight": by_weight,
    "effective_rank": float(np.mean(ranks)) if ranks else 0.0,
    "relative_change": float(np.mean(changes)) if changes else 0.0,
  }
