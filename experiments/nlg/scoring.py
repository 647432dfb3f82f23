"""Texts of the E2E inputs, written to a run's folder and scored."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_jax.data.sets import e2e
from lora_jax.metrics import intervals, measure


def score_texts(texts: Sequence[str], groups: Sequence[e2e.Group], folder: Path) -> dict[str, Any]:
  """Writes predictions.txt and returns what `result.json` holds about the scores.

  Args:
    texts: one for each input.
    groups: the inputs with their references.
    folder: of the run.
  """
  (folder / "predictions.txt").write_text("".join(f"{line}\n" for line in texts), "utf-8")
  print("scoring ...", flush=True)
  begun = time.perf_counter()
  measured = measure([texts], [group.references for group in groups])[0]
  return {
    "num_inputs": len(groups),
    "scores": dataclasses.asdict(measured.scores()),
    "intervals": {
      name: None if interval is None else [interval.low, interval.high]
      for name, interval in intervals(measured).items()
    },
    "score_seconds": time.perf_counter() - begun,
  }
