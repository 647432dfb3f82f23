"""The hypotheses on the paper's BLEU: each changes one field of today's code, on every base."""

from experiments.configs import discrepancy
from experiments.harness.config import flat, read_config
from experiments.harness.launch import sweep_runs
from experiments.nlg.config import E2EConfig


def test_each_hypothesis_changes_one_field_and_every_run_has_its_folder():
  for variant in ("mini", "medium"):
    config = discrepancy.get_config(variant)
    runs = sweep_runs(discrepancy, config, config, set())
    assert len({run.workdir for run in runs}) == len(discrepancy.HYPOTHESES) * 3
    before = flat(config)
    for i, run in enumerate(runs):
      read_config(E2EConfig, run)
      changed = {name for name, value in flat(run).items() if value != before[name]}
      assert len(changed - {"seed", "workdir"}) == (i % len(discrepancy.HYPOTHESES) > 0)
