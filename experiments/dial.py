"""A dial for the distance of a task: Wikipedia with a part of the vocabulary permuted.

    python -m experiments.dial [--config=experiments/configs/dial.py:VARIANT]

It trains and measures the validation loss; nothing is decoded.
It needs no files; `--config.data.source=FOLDER` takes text files.

Time: not run.
Expect: not run.
"""

from experiments.gpt2_e2e import run, trainings
from experiments.harness.launch import launch

if __name__ == "__main__":
  launch(run, "dial.py", trainings=trainings)
