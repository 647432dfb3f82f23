"""WebNLG 2017: triples to text, for categories with and without training examples.

    python -m experiments.webnlg [--config=experiments/configs/webnlg.py:VARIANT]

It trains, decodes the test set once, and scores all inputs, and seen and unseen categories.
The files are in data/webnlg, or in `--config.data.source=FOLDER` (docs/data_sets.md).

Time: not run.
Expect: not run.
"""

from experiments.gpt2_e2e import run, trainings
from experiments.harness.launch import launch

if __name__ == "__main__":
  launch(run, "webnlg.py", trainings=trainings)
