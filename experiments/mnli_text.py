"""MNLI as text, a subset of 10,000: two sentences to the word of a label.

    python -m experiments.mnli_text [--config=experiments/configs/mnli_text.py:VARIANT]

It trains, decodes and scores one row of a table.
The files are in data/mnli, or in `--config.data.source=FOLDER` (docs/data_sets.md).

Time: not run.
Expect: not run.
"""

from experiments.gpt2_e2e import run, trainings
from experiments.harness.launch import launch

if __name__ == "__main__":
  launch(run, "mnli_text.py", trainings=trainings)
