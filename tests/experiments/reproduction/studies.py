"""Runs of small studies that were not trained: their files are those of the real writers."""

import dataclasses

import numpy as np

from experiments.configs import paper
from experiments.harness.config import read_config
from experiments.harness.workdir import run_once
from experiments.nlg.config import E2EConfig
from experiments.reproduction import plan, runs
from experiments.reproduction.plan import RATE_SEED, Planned, chosen_rates, losses_of, reported_runs

INPUTS = 40
TOKENS = [20] * INPUTS


def small(study, arms, **fields):
  """Returns a study with some of its arms."""
  chosen = {name: study.arms[name] for name in arms}
  return dataclasses.replace(study, arms=chosen, **fields)


def patched(monkeypatch, studies):
  """Replaces the studies of all modules that read them."""
  for name in list(paper.STUDIES):
    monkeypatch.delitem(paper.STUDIES, name)
  for name, study in studies.items():
    monkeypatch.setitem(paper.STUDIES, name, study)


def make_runs(monkeypatch, root, study, losses, scores=None):
  """Makes a study's runs: three learning rates of each arm, then its reported seeds.

  Args:
    monkeypatch: of pytest.
    root: the folder of all studies.
    study: the name.
    losses: each arm's mean loss, nats per token; NaN fails.
    scores: each arm's exact answers, percent.
  """
  scores = scores or {}
  by_input = np.random.default_rng(0).normal(size=INPUTS)

  def result_of(planned):
    generator = np.random.default_rng([planned.seed, len(planned.arm)])
    loss = losses[planned.arm]
    if not np.isfinite(loss):
      raise FloatingPointError("the loss is NaN")
    if planned.kind == "rates":  # the middle one is the best
      rates = plan.first_rates(paper.STUDIES[study], paper.STUDIES[study].arms[planned.arm], 3)
      loss += abs(rates.index(planned.rate) - 1)
    inputs = 20 * (loss + by_input / 4) + 0.05 * generator.normal(size=INPUTS)
    exact = scores.get(planned.arm)
    measured = {"input_losses": inputs.tolist(), "input_tokens": TOKENS, "rows": {}}
    values = {}
    if exact is not None:
      right = generator.uniform(size=INPUTS) * 100 < exact
      measured["rows"] = {"exact": [[100.0 * x, 1.0] for x in right]}
      values = {"exact": 100 * right.mean()}
    result = {
      **{"valid_loss": float(inputs.sum() / sum(TOKENS)), "scores": values, "seed": planned.seed},
      **{"trainable_parameters": 1000, "base_parameters": 10_000, "method": "lora"},
      **{"train_seconds": 36.0, "device": "1 x cpu", "commit": "0123456789ab"},
      "intervals": {name: [value - 5, value + 5] for name, value in values.items()},
    }
    return result, measured

  for_folder, measured_of = {}, {}

  def run(config):
    planned = for_folder[config.workdir]

    def make(workdir):
      result, measured_of[str(workdir)] = result_of(planned)
      return result

    return run_once(read_config(E2EConfig, config), make)

  monkeypatch.setattr(runs, "measure", lambda folder, study: measured_of[str(folder)])

  def do(planned):
    for_folder.update({str(root / p.study / p.name): p for p in planned})
    assert not runs.carry_out(planned, root, lambda study: run)

  do(plan.rate_runs(study, {}))
  rates = chosen_rates(study, losses_of(runs.collect(root), study))
  do(reported_runs(study, rates))


def planned(arm="lora_r1", kind="reported", rate=1e-3, seed=RATE_SEED, study="rank"):
  return Planned(study, arm, kind, rate, seed)
