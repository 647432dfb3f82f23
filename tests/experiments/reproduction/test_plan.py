"""The planned runs: their configs, learning rates and seeds, and the table with its hours."""

import math

import pytest

from experiments.classification.config import GlueConfig
from experiments.configs.paper import MAX_ADDED_RATES, RATE_SEED, STUDIES
from experiments.harness.config import read_config
from experiments.harness.launch import RATE
from experiments.harness.methods import find_method
from experiments.nlg.config import E2EConfig
from experiments.reproduction import plan
from experiments.reproduction.plan import Planned, chosen_rates, config_of, rate_runs, reported_runs


@pytest.mark.parametrize("study", STUDIES)
def test_every_run_has_a_valid_config_in_which_each_field_has_an_effect(study):
  kind = GlueConfig if STUDIES[study].base == "minilm" else E2EConfig
  read = set()
  for name, arm in STUDIES[study].arms.items():
    rate = 1e-3 if plan.trains(arm) else None
    config = config_of(Planned(study, name, "reported", rate, 1), "runs/x")
    method = find_method(config.method, config.experiment)
    assert all(method.uses(field) for field in arm.changes)
    if config.method not in read:  # one of each method: reading takes milliseconds
      read_config(kind, config)
      read_config(kind, config_of(Planned(study, name, "rates", rate, 0), "runs/x", tiny=True))
      read.add(config.method)


def test_a_seed_is_never_reported_that_chose_a_learning_rate():
  assert all(RATE_SEED not in study.seeds for study in STUDIES.values())


def test_learning_rates_surround_the_default_of_the_method():
  study = STUDIES["rank"]
  assert plan.first_rates(study, study.arms["lora_r4"], 3) == [3e-3, 1e-2, 3e-2]
  assert plan.first_rates(study, study.arms["full"], 3) == [3e-4, 1e-3, 3e-3]


def rates_of(runs, arm="lora_r4"):
  return [run.rate for run in runs if run.arm == arm]


def test_learning_rates_are_added_until_the_best_is_bracketed():
  first = rate_runs("rank", {})
  assert rates_of(first) == [3e-3, 1e-2, 3e-2]
  assert not rates_of(first, "frozen")
  losses = {3e-3: 1.0, 1e-2: 1.1, 3e-2: 1.2}
  assert rates_of(rate_runs("rank", {"lora_r4": losses})) == [1e-3]
  assert "lora_r4" not in chosen_rates("rank", {"lora_r4": losses})
  losses |= {1e-3: 1.05}
  assert not rates_of(rate_runs("rank", {"lora_r4": losses}))
  assert chosen_rates("rank", {"lora_r4": losses}) == {"lora_r4": 3e-3}


def test_an_arm_that_never_trains_is_given_up():
  losses = {10.0**-i: math.inf for i in range(2, 2 + 3 + MAX_ADDED_RATES)}
  losses |= dict.fromkeys((3e-3, 1e-2, 3e-2), math.inf)
  assert not rates_of(rate_runs("rank", {"lora_r4": losses}))
  assert chosen_rates("rank", {"lora_r4": losses}) == {}


def test_a_learning_rate_of_an_earlier_sweep_is_taken():
  assert not rates_of(rate_runs("rank_smollm2", {}), "full")
  assert chosen_rates("rank_smollm2", {}) == {"full": STUDIES["rank_smollm2"].arms["full"].rate}


def test_the_first_seed_of_every_arm_comes_first():
  runs = reported_runs("rank", {"lora_r1": 1e-2, "lora_r4": 1e-2})
  assert [(run.arm, run.seed) for run in runs[:3]] == [
    ("lora_r1", 1),
    ("lora_r4", 1),
    ("frozen", 1),
  ]
  assert [run.seed for run in runs[3:]] == [2, 2, 3, 3]


def test_runs_of_one_seed_share_examples_and_order():
  rates = dict.fromkeys(STUDIES["sizes"].arms, 1e-3)
  fields = ("seed", "data", "fit", "model", "decoding")
  configs = [
    config_of(run, "") for run in reported_runs("sizes", rates) if run.seed == 2 and run.rate
  ]
  assert len(configs) > 10
  for config in configs:
    assert config[RATE.split(".")[0]].learning_rate == 1e-3
    assert all(config[name] == configs[0][name] for name in fields)


def test_equal_budgets_of_table_5():
  budgets = {
    name: arm.changes["lora.rank"] * len(name) for name, arm in STUDIES["weights"].arms.items()
  }
  assert set(budgets.values()) == {8}
