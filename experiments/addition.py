"""Addition of numbers of four digits, by exact match.

    python -m experiments.addition [--config=experiments/configs/addition.py:VARIANT]

It trains, decodes and scores one row of a table.
It needs no files.

Time: not run.
Expect: not run.
"""

from experiments.gpt2_e2e import run, trainings
from experiments.harness.launch import launch

if __name__ == "__main__":
  launch(run, "addition.py", trainings=trainings)
