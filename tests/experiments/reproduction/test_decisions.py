"""Decisions on synthetic runs whose true differences are known."""

import numpy as np
import pytest

from experiments.comparison.statistics import Difference
from experiments.configs.paper import STUDIES
from experiments.reproduction import claims
from experiments.reproduction.claims import CLAIMS, Claim, Condition, Decided, Evidence, above
from experiments.reproduction.decisions import (
  Outcome,
  at_any_floor,
  at_floor,
  better,
  decide,
  decide_by_metric,
  decide_forgetting,
  equivalent,
  higher,
  joined,
  lower,
  metric_differences,
  on_par_or_better,
  worse,
)
from experiments.reproduction.plan import num_seeds
from lora_jax.metrics import coco, ngrams, ter
from lora_jax.metrics.segments import SegmentStatistics

INPUTS = 200
METEOR_ROWS = np.random.default_rng(0).integers(1, 9, (6, coco.NUM_STATISTICS)).astype(float)


def difference(low, high):
  return Difference((low + high) / 2, low, high, 0.01)


WITHIN, BELOW, ABOVE, WIDE = (
  difference(-0.01, 0.015),
  difference(-0.2, -0.1),
  difference(0.1, 0.2),
  difference(-0.1, 0.3),
)


@pytest.mark.parametrize(
  ("rule", "words"),
  [
    (on_par_or_better, ("holds", "holds", "fails", "cannot be told")),
    (equivalent, ("holds", "fails", "fails", "cannot be told")),
    (better, ("fails", "holds", "fails", "cannot be told")),
    (worse, ("fails", "fails", "holds", "cannot be told")),
    (higher, ("cannot be told", "fails", "holds", "cannot be told")),
    (lower, ("cannot be told", "holds", "fails", "cannot be told")),
  ],
)
def test_each_rule_reads_an_interval(rule, words):
  assert tuple(map(rule, (WITHIN, BELOW, ABOVE, WIDE))) == words


def test_a_claim_about_several_arms_needs_all_of_them():
  assert joined(["holds", "holds"]) == "holds"
  assert joined(["holds", "cannot be told"]) == "cannot be told"
  assert joined(["cannot be told", "fails", "holds"]) == "fails"


def runs(study, losses, *, spread=0.002, exact=None, wikipedia=None, status="finished"):
  """Returns the reported records of a study's arms, by their true losses in nats per token."""
  generator, by_input = np.random.default_rng(0), np.random.default_rng(1).normal(size=INPUTS)
  made = []
  for arm, loss in losses.items():
    for seed in range(1, 1 + num_seeds(STUDIES[study], STUDIES[study].arms[arm])):
      mean = loss + spread * generator.normal()
      right = generator.uniform(size=INPUTS) < (exact or {}).get(arm, 0.0)
      inputs = 20 * (mean + by_input) + 0.1 * generator.normal(size=INPUTS)
      made.append(
        {
          **{"study": study, "arm": arm, "kind": "reported", "seed": seed, "status": status},
          **{"input_losses": inputs.tolist(), "input_tokens": [20] * INPUTS, "rate": 1e-3},
          **{"valid_loss": mean, "wikipedia_loss": (wikipedia or {}).get(arm, 0.0) + spread * seed},
          "rows": {"exact": [[100.0 * x, 1.0] for x in right]},
          "scores": {"exact": 100 * right.mean()},
          "intervals": {"exact": [100 * right.mean() - 5, 100 * right.mean() + 5]},
        }
      )
  return made


@pytest.mark.parametrize(
  ("true", "spread", "word"),
  [(0.0, 0.002, "holds"), (0.2, 0.002, "fails"), (-0.2, 0.002, "holds"), (0.03, 0.1, None)],
)
def test_a_decision_finds_the_true_difference(true, spread, word):
  records = runs("rank", {"full": 1.5, "lora_r4": 1.5 + true}, spread=spread)
  outcome = decide(records, "rank", "full", ["lora_r4"], on_par_or_better)
  assert outcome.word == (word or "cannot be told")
  assert "lora_r4" in outcome.interval
  assert "nats/token" in outcome.interval


def test_one_arm_of_several_fails_a_claim():
  records = runs("weights", {"qv": 1.5, "q": 1.8, "k": 1.5})
  assert decide(records, "weights", "qv", ["q"], worse).word == "holds"
  assert decide(records, "weights", "qv", ["q", "k"], worse).word == "fails"


def test_missing_seeds_failed_runs_and_other_inputs_are_not_decided():
  records = runs("rank", {"full": 1.5, "lora_r4": 1.5})
  few = [r for r in records if (r["arm"], r["seed"]) != ("lora_r4", 3)]
  outcome = decide(few, "rank", "full", ["lora_r4"], on_par_or_better)
  assert outcome == Outcome("not run", "missing: lora_r4")
  failed = [*records[:-1], {**records[-1], "status": "failed"}]
  outcome = decide(failed, "rank", "full", ["lora_r4"], on_par_or_better)
  assert outcome == Outcome("cannot be told", "training failed: lora_r4")
  others = [*records[:-1], {**records[-1], "input_tokens": [21] * INPUTS}]
  with pytest.raises(ValueError, match="different inputs"):
    decide(others, "rank", "full", ["lora_r4"], on_par_or_better)


def test_a_score_decides_above_the_floor_only():
  losses = {"lora_r4": 1.5, "adapter_h_16": 1.5}
  records = runs("sizes", losses, exact={"lora_r4": 0.2, "adapter_h_16": 0.8})
  outcome = decide_by_metric(records, "sizes", "exact", "lora_r4", ["adapter_h_16"])
  assert outcome.word == "holds"
  floor = {"study": "sizes", "arm": "floor", "kind": "reported", "seed": 1, "status": "finished"}
  floor |= {"scores": {"exact": 30.0}, "intervals": {}}
  outcome = decide_by_metric([*records, floor], "sizes", "exact", "lora_r4", ["adapter_h_16"])
  assert outcome == Outcome("cannot be told", "at the floor: lora_r4")
  assert not at_floor(records[-1], "exact", 30.0)
  outcome = decide_by_metric(records, "sizes", "slots", "lora_r4", ["adapter_h_16"])
  assert outcome == Outcome("cannot be told", "without slots: lora_r4, adapter_h_16")


@pytest.mark.parametrize(
  ("metric", "statistics"),
  [
    ("bleu_unseen", ngrams.bleu),
    ("nist", ngrams.nist),
    (
      "meteor_seen",
      lambda texts, _: SegmentStatistics(METEOR_ROWS + len(texts[0]), coco.meteor_formula),
    ),
    ("mean_ter", ter.mean_ter),
  ],
)
def test_differences_of_a_metric_are_those_of_its_scores(metric, statistics):
  texts = [f"the cat number {i} sat on the mat" for i in range(6)]
  systems = {"full": texts, "lora": [text.replace("sat on", "is at") for text in texts]}
  measured = {
    arm: statistics(of_arm, [[text] for text in texts]) for arm, of_arm in systems.items()
  }
  made = {arm: [{"rows": {metric: x.rows.tolist()}}] * 2 for arm, x in measured.items()}
  (difference,) = metric_differences(made, metric, "full", ["lora"]).values()
  assert difference.difference == pytest.approx(
    measured["lora"].score() - measured["full"].score(), abs=1e-9
  )


def test_the_floor_of_an_error_rate_is_above():
  def record(arm, score, interval):
    scores = {"scores": {"mean_ter": score}, "intervals": {"mean_ter": interval}}
    return {"arm": arm, "status": "finished", **scores}

  runs = {
    "floor": [record("floor", 70.0, None)],
    "low": [record("low", 50.0, [45.0, 55.0])],
    "at": [record("at", 66.0, [60.0, 72.0])],
  }
  assert [at_any_floor(runs, arm, "mean_ter") for arm in ("low", "at")] == [False, True]
  del runs["floor"]
  assert not at_any_floor(runs, "at", "mean_ter")


def test_forgetting_is_decided_over_seeds():
  losses = {"full_batch8": 1.5, "lora_r16_batch8": 1.5}
  arms = ("after", "full_batch8", ["lora_r16_batch8"])
  less = {"full_batch8": 4.9, "lora_r16_batch8": 4.4}
  assert decide_forgetting(runs("after", losses, wikipedia=less), *arms).word == "holds"
  same = dict.fromkeys(less, 4.5)
  assert decide_forgetting(runs("after", losses, wikipedia=same), *arms).word == "fails"


def test_means_over_layers_are_compared_with_a_limit():
  values = np.random.default_rng(0).normal(0.6, 0.02, size=30)
  assert above(values, 0.5).word == "holds"
  assert above(values, 0.7).word == "fails"
  assert above(np.random.default_rng(0).normal(0.5, 0.2, size=30), 0.5).word == "cannot be told"


def test_the_ratio_of_learning_rates_is_known_to_a_decade():
  def at(lora, full):
    records = runs("after", {"full_batch8": 1.5, "lora_r16_batch8": 1.5})
    rates = {"full_batch8": full, "lora_r16_batch8": lora}
    return claims.rate_ratio(Evidence([{**r, "rate": rates[r["arm"]]} for r in records], None))

  assert at(1e-2, 1e-3).word == "holds"
  assert at(1e-2, 3e-3).word == "holds"
  assert at(1e-3, 1e-3).word == "fails"


def test_the_count_of_parameters_needs_no_run():
  outcome = claims.fewer_parameters(Evidence([], None))
  assert outcome.word == "holds"
  assert outcome.interval.startswith("9,251 times")


def test_every_arm_of_a_claim_has_two_planned_seeds(monkeypatch, tmp_path):
  """With one seed of one arm, intervals are three times as wide as the margin allows."""
  seeds = {}

  def count(records, study, *arms, **_):
    names = [name for of in arms if not callable(of) for name in ([of] if type(of) is str else of)]
    known = STUDIES[study].arms
    seeds.update({(study, name): num_seeds(STUDIES[study], known[name]) for name in names})
    return Outcome("not run")

  monkeypatch.setattr(claims, "decide", count)
  monkeypatch.setattr(claims, "decide_forgetting", count)
  monkeypatch.setattr(claims, "decide_by_metric", lambda r, s, metric, *arms: count(r, s, *arms))
  claims.decide_all(Evidence([], tmp_path))
  assert len(seeds) > 40
  assert not {arm for arm, number in seeds.items() if number < 2}


def test_a_verdict_is_that_of_the_first_condition_and_names_failures():
  conditions = tuple(Condition(words, "rank", lambda evidence: Outcome("holds")) for words in "ab")
  claim = Claim("x", "Table 0", conditions)
  assert Decided(claim, (Outcome("holds"), Outcome("fails"))).failures == "b"
  assert Decided(claim, (Outcome("holds"), Outcome("fails"))).word == "holds"
  none = Decided(claim, (Outcome("holds"), Outcome("cannot be told"))).failures
  assert none == "none was found in 1 of 2 conditions that were decided"
  assert Decided(claim, (Outcome("not run"),) * 2).failures == "not decided anywhere yet"


def test_every_condition_names_arms_that_its_study_has(tmp_path):
  for claim in CLAIMS:
    for condition in claim.conditions:
      outcome = condition.decide(Evidence([], tmp_path))
      assert outcome.word == ("holds" if condition.stage == "paper_shapes" else "not run")


@pytest.mark.parametrize(("true", "word"), [(0.1, "fails"), (-0.1, "holds"), (0.0, "holds")])
def test_scores_of_glue_are_compared_over_seeds(true, word):
  records = runs("glue_cola", {"full": -0.5, "lora_r8": -0.5 + true}, spread=0.001)
  outcome = decide(records, "glue_cola", "full", ["lora_r8"], on_par_or_better)
  assert outcome.word == word
  assert "over seeds only" in outcome.interval
