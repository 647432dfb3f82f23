"""DART 1.1.1: triples of tables to text.

    python -m experiments.dart [--config=experiments/configs/dart.py:VARIANT]

It trains, decodes and scores one row of a table. Without the training set,
`--config.data.name=dart_dev` is a check run on the development set, named DART-dev.
The files are in data/dart, or in `--config.data.source=FOLDER` (docs/data_sets.md).

Time: not run.
Expect: not run.
"""

from experiments.gpt2_e2e import run, trainings
from experiments.harness.launch import launch

if __name__ == "__main__":
  launch(run, "dart.py", trainings=trainings)
