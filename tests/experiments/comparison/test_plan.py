"""The plan: learning rates until bracketed, equal draws, ranks of equal size, at most 20 hours."""

import math

import pytest

from experiments.comparison import plan as plans
from experiments.comparison.plan import (
  CONTROL,
  RATE,
  best_rate,
  bracketed,
  config_of,
  draw_runs,
  draws,
  hours,
  next_rate,
  on_grid,
  plan,
  planned_rows,
  rate_runs,
  reported_runs,
  size_of,
  stage_table,
)
from experiments.comparison.sizes import Size, match_rank
from experiments.configs import gpu_queue, variants
from experiments.configs.variants import (
  ARMS,
  BEST_KNOWN,
  FULL,
  MAX_ADDED_RATES,
  RANK,
  TINY,
  WITH_BLEU,
)
from experiments.harness.config import read_config
from experiments.harness.launch import apply
from experiments.harness.methods import find_method
from experiments.nlg.config import E2EConfig
from experiments.nlg.tokens import with_token_ids

from tests.docs.pages import page
from tests.tiny_e2e import tiny_folder

CHOSEN = ("dora", "full_finetuning")
WIDTH, LAYERS = 32, 2


@pytest.fixture(scope="module", autouse=True)
def tiny_base():
  """The plan of a tiny model, whose layers have the shares of the embedded one's."""

  def get_config(base):
    config = variants.get_config(base)
    config.model.folder = str(tiny_folder())
    return config

  plans.size_of.cache_clear()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plans, "get_config", get_config)
    yield
  plans.size_of.cache_clear()


def test_all_runs_fit_into_20_hours_on_two_cores():
  rows = planned_rows(FULL)
  assert 10 < hours(rows) <= 20
  assert [row.stage for row in rows] == [*plans.STAGES, "smollm2"]
  assert {row.stage: row.runs for row in rows[:2]} == {
    "rates": 4.5 * len(ARMS),
    "seeds": 3 * len(ARMS),
  }
  assert rows[-2].runs + rows[-1].runs == 3 * len(WITH_BLEU) + len(BEST_KNOWN) - len(WITH_BLEU)
  assert set(WITH_BLEU) < set(BEST_KNOWN) < set(ARMS)


def test_sizes_are_those_of_lora_of_rank_4():
  linear = LAYERS * (4 * (WIDTH + WIDTH) + 2 * (WIDTH + 4 * WIDTH))
  assert size_of(CONTROL, "embedded") == Size(RANK, RANK * linear, True)
  dora = size_of("dora", "embedded")
  outputs = LAYERS * (4 * WIDTH + 4 * WIDTH + WIDTH)
  assert dora.parameters == 3 * linear + outputs
  assert not dora.is_matched
  assert dora.reason == "no rank fits: rank 3 has -12.5 %, rank 4 has +12.5 %"
  assert size_of("relora", "embedded")[:3] == (RANK, RANK * linear, True)  # of one cycle
  assert size_of("lora_rank1_v", "embedded")[:3] == (1, LAYERS * 2 * WIDTH, False)
  full = size_of("full_finetuning", "embedded")
  assert full[:3] == (
    None,
    WIDTH * (8192 + 256) + LAYERS * (12 * WIDTH**2 + 13 * WIDTH) + 64,
    False,
  )


@pytest.mark.parametrize(
  ("parameters", "wanted", "expected"),
  [
    (lambda rank: 10 * rank, 100, Size(10, 100, True)),
    (lambda rank: 36 * rank**2, 110_592, Size(55, 108_900, True)),  # LoRA-XS
    (lambda rank: 200 * rank, 100, Size(1, 200, False, "no rank fits: rank 1 has +100.0 %, ...")),
    (lambda rank: 30 + 10 * rank, 100, Size(7, 100, True)),
    (lambda rank: 12 + 480 // rank, 100, Size(5, 108, False, "no rank fits: rank 5")),  # shrinks
    (lambda rank: 1200 // rank, 103, Size(12, 100, True)),
  ],
)
def test_the_rank_with_the_wanted_parameters(parameters, wanted, expected):
  size = match_rank(parameters, wanted, 0.05)
  assert size[:3] == expected[:3]
  assert size.reason[:20] == expected.reason[:20]


def test_the_tokens_are_those_of_the_embedded_model():
  config = apply(variants.get_config(), {"method": "lora", "lora.tokens": tuple(variants.TOKENS)})
  ids = with_token_ids(read_config(E2EConfig, config)).lora.tokens
  assert ids == tuple(variants.TOKENS.values())


def test_the_size_of_trained_tokens_is_their_own():
  assert size_of("trainable_tokens", "embedded") == Size(None, 9 * WIDTH, False, "its own size")


def test_a_rank_too_large_for_the_model_ends_the_search():
  def count(rank):
    if rank > 64:
      raise ValueError("rank is larger than min(in, out)")
    return 100 + rank

  size = match_rank(count, 1000, 0.05)
  assert size == Size(64, 164, False, "no rank fits: rank 64 has -83.6 %")
  with pytest.raises(ValueError, match="rank is larger"):
    match_rank(lambda rank: count(100), 1000, 0.05)


def test_parameters_that_stop_growing_end_the_search():
  size = match_rank(lambda rank: 100 * min(rank, 24), 5000, 0.05)
  assert size == Size(32, 2400, False, "no rank fits: rank 32 has -52.0 %")


def until_bracketed(loss, arms=("lora",)):
  """Runs the stage with a known loss; returns the losses by arm and rate."""
  losses = {}
  while runs := rate_runs("rates", FULL, losses, arms):
    for run in runs:
      losses.setdefault(run.arm, {})[run.rate] = loss(run.arm, run.rate)
  return losses


@pytest.mark.parametrize("optimum", [1e-5, 1e-4, 3e-3, 1e-2, 1.0])
def test_learning_rates_are_moved_until_the_best_is_inside(optimum):
  (losses,) = until_bracketed(lambda arm, rate: abs(math.log(rate / optimum))).values()
  best = best_rate(losses)
  assert best == pytest.approx(optimum)
  assert min(losses) < best < max(losses)
  assert len(losses) >= FULL.rate_points["embedded"]
  steps = sorted(losses)
  assert steps == [on_grid(steps[0], step) for step in range(len(steps))]  # half a decade apart


def test_a_failed_rate_is_an_upper_end():
  losses = until_bracketed(lambda arm, rate: math.inf if rate > 1e-2 else 1 - rate)["lora"]
  assert best_rate(losses) == 1e-2
  assert max(losses) == 3e-2


def test_rates_that_all_fail_move_down_and_end():
  assert next_rate({1e-3: math.inf, 3e-3: math.inf}) == 3e-4
  by_arm = {"lora": lambda rate: abs(math.log(rate / 3e-3)), "dora": lambda rate: math.inf}
  losses = until_bracketed(lambda arm, rate: by_arm[arm](rate), ("dora",))
  assert len(losses["dora"]) == FULL.rate_points["embedded"] + MAX_ADDED_RATES
  assert min(losses["dora"]) == 1e-6
  assert bracketed("rates", FULL, losses, ("dora",)) == ["lora"]
  assert bracketed("rates", FULL, {"lora": {1e-3: 2.0, 3e-3: 1.0, 1e-2: 2.0}}) == []  # of four


def test_every_arm_starts_with_as_many_rates_around_its_methods_default():
  runs = rate_runs("rates", FULL, {}, CHOSEN)
  by_arm = {arm: [run.rate for run in runs if run.arm == arm] for arm in (CONTROL, *CHOSEN)}
  assert {len(rates) for rates in by_arm.values()} == {4}
  assert by_arm["lora"] == [1e-3, 3e-3, 1e-2, 3e-2]
  assert by_arm["full_finetuning"] == [1e-4, 3e-4, 1e-3, 3e-3]
  assert {run.changes["seed"] for run in runs}.isdisjoint(FULL.seeds)


def test_the_reported_runs_have_the_first_seed_first():
  rates = dict.fromkeys((CONTROL, *CHOSEN), 1e-2)
  runs = reported_runs("seeds", FULL, rates, CHOSEN)
  assert [run.changes["seed"] for run in runs] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
  assert {run.changes["data.num_train_records"] for run in runs} == {4000}
  assert not any("decoding.num_inputs" in run.changes for run in runs)
  assert len({run.name for run in runs}) == len(runs)


def test_alpha_over_rank_is_held():
  rates = dict.fromkeys((CONTROL, *CHOSEN), 1e-2)
  for run in reported_runs("seeds", FULL, rates, ("dora", "lora_rank1_v")):
    assert run.changes["lora.alpha"] == 2 * run.changes["lora.rank"]
  full = reported_runs("seeds", FULL, rates, CHOSEN)[-1]
  assert not any(name.startswith("lora.") for name in full.changes)  # it has no effect there


def test_draws_are_the_same_for_every_arm():
  drawn = list(draws(12))
  assert drawn[:3] == list(draws(3))
  assert all(0.1 <= draw.rate <= 10 and 0.25 <= draw.scaling <= 16 for draw in drawn)
  runs = draw_runs(FULL, CHOSEN)
  assert len(runs) == 12 * 3
  by_arm = {arm: [run for run in runs if run.arm == arm] for arm in (CONTROL, *CHOSEN)}
  for lora, full in zip(by_arm[CONTROL], by_arm["full_finetuning"], strict=True):
    assert lora.rate == pytest.approx(10 * full.rate, rel=0.01)  # as their defaults
    name = "optimizer.weight_decay"
    assert lora.changes[name] == full.changes[name]
  assert len({run.name for run in runs}) == len(runs)


def test_every_run_has_a_config(tmp_path):
  rates = dict.fromkeys((CONTROL, *CHOSEN), 1e-2)
  frozen = plans.frozen_run("rates")
  stages = (rate_runs("rates", FULL, {}, CHOSEN), reported_runs("seeds", FULL, rates, CHOSEN))
  for run in [frozen, *(run for runs in stages for run in runs), *draw_runs(FULL, CHOSEN)]:
    config = read_config(E2EConfig, config_of(run, FULL, str(tmp_path / run.name)))
    assert config.method == run.changes["method"]
    assert config.data.num_valid_records == 500
    assert all(find_method(config.method).uses(name) for name in run.changes)
    if RATE in run.changes:
      assert config.optimizer.learning_rate == run.rate


def test_a_chosen_arm_must_exist():
  with pytest.raises(ValueError, match=r"the arms must be of lora, dora.*got 'lorra'"):
    rate_runs("rates", FULL, {}, ["lorra"])


def test_the_printed_plan_has_hours_and_sizes(monkeypatch):
  monkeypatch.setattr(plans, "ARMS", {arm: ARMS[arm] for arm in (CONTROL, *CHOSEN)})
  text = plan(TINY)
  assert "| all " in text
  assert "rank 3 has -12.5 %" in text


def test_the_gpu_queue_has_the_variants_whose_rates_are_known(monkeypatch, capsys):
  assert list(gpu_queue.variant_runs()) == []
  monkeypatch.setattr(variants, "BEST", {"lora": 1e-3, "dora": 3e-3, "pissa": None})
  runs = list(gpu_queue.variant_runs())
  assert len(runs) == 2 * len(gpu_queue.SEEDS)
  assert runs[1] == {
    **{"method": "dora", "lora.rank": 3, "lora.alpha": 6.0, "seed": 1},
    **{"optimizer.learning_rate": 3e-3, "optimizer.warmup_share": 0.1},
  }
  assert capsys.readouterr().out.endswith("learning rates are not known yet: pissa\n")


def test_the_page_has_the_plan():
  assert stage_table(FULL) in page("variants_comparison")
