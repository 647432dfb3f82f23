"""The table of all arms, its figure, and the plan's hours."""

import re

import pytest

from experiments.analysis.figure import draw
from experiments.analysis.plan import MAX_HOURS, hours, plan, planned_rows
from experiments.analysis.summary import markdown, summarize
from experiments.comparison.plan import arms_of, first_rates
from experiments.configs.mechanism import FULL

from tests.docs.pages import page
from tests.experiments.analysis.records import BITS, intruding, remembering, sharp
from tests.experiments.comparison.records import record

ARMS = ["lora", "dora", "relora", "full_finetuning"]


def bracketed(arm, best):
  return [
    record("rates", arm, rate, 0, abs(rate - best)) for rate in first_rates(arm, "embedded", 4)
  ]


def records():
  made = [sharp("lora", 4.0), sharp("dora", 8.0), sharp("full_finetuning", 1.0)]
  made += [*intruding("lora", [6, 8]), *intruding("full_finetuning", [2])]
  return [*made, *remembering("lora", 50 * BITS), *remembering("dora", 1e9)]


def table_of(text):
  rows = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
  return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_the_table():
  rates = {arm: first_rates(arm, "embedded", 4)[1] for arm in ("lora", "full_finetuning")}
  compared = [r for arm, rate in rates.items() for r in bracketed(arm, rate)]
  compared += bracketed("dora", first_rates("dora", "embedded", 4)[0])  # at an end: unknown
  made = records()
  tried = bracketed("relora", first_rates("relora", "embedded", 4)[1])
  compared += tried[:3]  # the best may still be another
  text = markdown(FULL, summarize(FULL, ARMS, made, compared), made)
  table = table_of(text)
  lora, dora, whole = table["LoRA"], table["DoRA"], table["full fine-tuning"]
  assert lora["sharpness at the start"] == "4 ± 0.04"
  assert lora["after 10 steps"] == "8 ± 0.04"
  assert lora["mostly along"] == "lora_b 90 %"
  assert lora["best learning rate"] == f"{rates['lora']:g}"
  assert (lora["intruders"], lora["minus full fine-tuning's"]) == ("7.0 of 20", "+5.0")
  assert (whole["intruders"], whole["minus full fine-tuning's"]) == ("2.0 of 20", "+0.0")
  assert (lora["effective rank"], lora["change"]) == ("4.0", "0.250")
  assert (lora["bits"], lora["bits/parameter"]) == ("997", "1.00")
  assert (dora["bits"], dora["bits/parameter"]) == ("5,102+", "5.10")
  assert dora["best learning rate"] == dora["intruders"] == ""
  assert table["ReLoRA"]["best learning rate"] == ""
  assert whole["bits"] == table["ReLoRA"]["bits"] == ""
  assert (
    "- No bracketed learning rate yet (python -m experiments.variants --stage=rates): DoRA, ReL"
    in text
  )
  assert (
    "- Capacity not measured yet (python -m experiments.mechanism --measure=capacity): ReLoRA."
    in text
  )
  assert "their first cycle starts as LoRA does: ReLoRA." in text
  assert "Spearman" not in text  # of two arms
  assert f"{len(made)} measurements, {len(made) / 100:.2f} hours" in text


def test_sharper_arms_with_smaller_learning_rates_correlate_negatively():
  arms = ["lora", "dora", "pissa"]
  tried = first_rates("lora", "embedded", 6)
  compared = [
    record("rates", arm, rate, 0, abs(rate - best))
    for arm, best in zip(arms, tried[1:4], strict=True)
    for rate in tried
  ]
  made = [sharp("lora", 9.0), sharp("dora", 3.0), sharp("pissa", 1.0)]
  text = markdown(FULL, summarize(FULL, arms, made, compared), made)
  assert "best learning rate, over 3 arms: -1.00." in text


def test_the_figure_has_a_panel_for_each_measurement(tmp_path):
  path = tmp_path / "figure.png"
  with pytest.raises(ValueError, match="nothing to draw: no measurement is finished yet"):
    draw(path, FULL, summarize(FULL, ARMS, [], []))
  draw(path, FULL, summarize(FULL, ARMS, [sharp("lora", 4.0)], []))
  assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_the_figure_of_all(tmp_path):
  path = tmp_path / "figure.png"
  compared = bracketed("lora", first_rates("lora", "embedded", 4)[1])
  draw(path, FULL, summarize(FULL, ARMS, records(), compared))
  width = int.from_bytes(path.read_bytes()[16:20])
  assert width == 4 * 700


def test_all_measurements_fit_into_the_hours_on_two_cores():
  arms = arms_of("rates")
  assert 1 < hours(planned_rows(FULL, arms)) <= MAX_HOURS
  assert len(planned_rows(FULL, arms)) == 3


def test_the_page_has_the_plan():
  table = plan(FULL, arms_of("rates"))
  assert table in page("mechanism"), "paste the output of python -m experiments.mechanism --plan"
