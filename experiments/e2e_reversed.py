"""E2E reversed: texts to slots, by exact match and by slot.

    python -m experiments.e2e_reversed [--config=experiments/configs/e2e_reversed.py:VARIANT]

It trains, decodes and scores one row of a table.
It needs no files.

Time: not run.
Expect: not run.
"""

from experiments.gpt2_e2e import run, trainings
from experiments.harness.launch import launch

if __name__ == "__main__":
  launch(run, "e2e_reversed.py", trainings=trainings)
