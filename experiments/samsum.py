"""SAMSum: chats to summaries, by ROUGE.

    python -m experiments.samsum [--config=experiments/configs/samsum.py:VARIANT]

It trains, decodes and scores one row of a table.
The files are in data/samsum, or in `--config.data.source=FOLDER` (docs/data_sets.md).

Time: not run.
Expect: not run.
"""

from experiments.gpt2_e2e import run, trainings
from experiments.harness.launch import launch

if __name__ == "__main__":
  launch(run, "samsum.py", trainings=trainings)
