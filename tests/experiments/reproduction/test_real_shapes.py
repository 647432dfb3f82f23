"""Decisions on latency, memory and checkpoints, from files of other commands."""

import dataclasses
import json

import pytest

from benchmarks import latency as benchmark
from experiments.reproduction.claims import CLAIMS, Evidence
from experiments.reproduction.real_shapes import (
  ADAPTERS,
  BASE,
  LATENCY,
  MERGED,
  SHAPES,
  Shape,
  fewer_operations,
  latency,
  latency_rows,
  less_memory,
  more_latency,
  same_latency,
  smaller_checkpoint,
)
from experiments.shapes.page import step_sizes
from experiments.shapes.results import Latencies, Sizes, TimedCase, Way, save
from experiments.shapes.steps import Cost

NOISE = (0.99, 1.0, 1.01, 1.0, 0.995, 1.005, 1.0)
BASE_TIMES = (1.0, 2.0, 1.0, 4.0, 1.0, 1.0, 3.0)  # other work slows all ways of a turn


def timed(**factors):
  """Returns a file's contents: ways that take so many times the base model's time."""
  ways = [Way(BASE, BASE_TIMES)] + [
    Way(name, tuple(t * factor * x for t, x in zip(BASE_TIMES, NOISE, strict=True)))
    for name, factor in factors.items()
  ]
  return Latencies("medium", "float32", "cpu", False, (TimedCase(16, 256, 224, 112, tuple(ways)),))


@pytest.mark.parametrize(
  ("factor", "same", "more"),
  [(1.0, "holds", "fails"), (1.1, "fails", "holds"), (1.02, "cannot be told", "cannot be told")],
)
def test_an_interval_of_ratios_decides(factor, same, more, tmp_path):
  save(tmp_path / LATENCY, timed(**{MERGED: factor}))
  shape = Shape(16, 256)
  outcome = latency(tmp_path, shape, [MERGED], same_latency)
  assert outcome.word == same
  assert outcome.interval.startswith(f"merged LoRA {factor:.3f} [")
  assert outcome.interval.endswith(
    "(times the base model, limit 1.02; medium, float32, cpu, unrolled layers)"
  )
  assert latency(tmp_path, shape, [MERGED], more_latency).word == more


def test_several_ways_must_all_agree(tmp_path):
  save(tmp_path / LATENCY, timed(Adapter_L=1.1, Adapter_H=1.0))
  assert latency(tmp_path, Shape(16, 256), ADAPTERS, more_latency).word == "fails"


def test_a_case_of_other_widths_or_another_model_is_not_run(tmp_path):
  assert latency(tmp_path, Shape(16, 256), [MERGED], same_latency).word == "not run"
  save(tmp_path / LATENCY, timed(**{MERGED: 1.0}))
  outcome = latency(tmp_path, Shape(16, 256, 10, 10), [MERGED], same_latency)
  assert (outcome.word, outcome.interval) == (
    "not run",
    "missing: latency.json, the case 16 x 256",
  )
  with pytest.raises(ValueError, match=r"16 x 256 needs the same number of turns .* 7 of base"):
    latency(tmp_path, Shape(16, 256), ADAPTERS, same_latency)
  text = (tmp_path / LATENCY).read_text().replace("medium", "tiny")
  (tmp_path / LATENCY).write_text(text)
  outcome = latency(tmp_path, Shape(16, 256), [MERGED], same_latency)
  assert "GPT-2 M; latency.json has tiny" in outcome.interval
  earlier = dataclasses.asdict(timed(**{MERGED: 1.0}))
  del earlier["scanned"]  # files without it may have times of either kind
  (tmp_path / LATENCY).write_text(json.dumps(earlier))
  with pytest.raises(ValueError, match=r"latency\.json: the config lacks the field 'scanned'"):
    latency(tmp_path, Shape(16, 256), [MERGED], same_latency)
  (tmp_path / LATENCY).write_text("{")
  with pytest.raises(ValueError, match="JSON") as error:
    latency(tmp_path, Shape(16, 256), [MERGED], same_latency)
  assert str(error.value).count(LATENCY) == 1
  (tmp_path / LATENCY).write_text(json.dumps({"model": "medium"}))
  with pytest.raises(ValueError, match=r"latency\.json: the config lacks the field 'dtype'"):
    latency(tmp_path, Shape(16, 256), [MERGED], same_latency)


def test_table_1_has_the_ratios_of_all_cases(tmp_path):
  assert len(latency_rows(tmp_path)) == 1
  factors = {MERGED: 1.0, "LoRA": 1.1, "Adapter_L": 1.2, "Adapter_H": 1.3}
  save(tmp_path / LATENCY, timed(**factors))
  head, row = latency_rows(tmp_path)
  cells = dict(zip(head, row, strict=True))
  assert (cells["batch x tokens"], cells["base, ms"]) == ("16 x 256", "1000.0")
  for way, factor in factors.items():
    assert cells[f"{way}, x"].startswith(f"{factor:.3f} [")
  assert cells["status"] == "real shape, medium, float32, cpu, unrolled layers"


def test_the_cases_are_those_of_the_benchmark():
  (merged,) = (claim for claim in CLAIMS if claim.text == "Merged, LoRA adds no latency")
  cases = {tuple(case) for name in ("cpu", "table1") for case in benchmark.CASES[name]}
  words = {f"GPT-2 M's shape, {Shape(*case)} tokens" for case in cases}
  assert {condition.words for condition in merged.conditions} == words
  assert {benchmark.BASE, benchmark.MERGED, benchmark.LIN, benchmark.HOULSBY} == {
    BASE,
    MERGED,
    *ADAPTERS,
  }


def test_memory_and_checkpoints_are_ratios_of_saved_sizes(tmp_path):
  assert less_memory(tmp_path, "GPT-2 M").interval == "missing: shapes.json, GPT-2 M"
  costs = {"GPT-2 M": {"FT": Cost(5e9, 1e9, 3e12), "LoRA": Cost(1e9, 0.5e9, 2e12)}}
  save(tmp_path / SHAPES, Sizes("1 x 128 tokens", tuple(step_sizes(costs))))
  outcome = less_memory(tmp_path, "GPT-2 M")
  assert (outcome.word, outcome.interval.split(",")[0]) == ("holds", "4.00 times")
  outcome = smaller_checkpoint(tmp_path, "GPT-2 M")
  assert (outcome.word, outcome.interval.split(" ")[0]) == ("fails", "902")  # 354.8 M / 0.39 M
  outcome = fewer_operations(tmp_path, "GPT-2 M")
  assert (outcome.word, outcome.interval.split(",")[0]) == (
    *("holds", "1.50 times fewer operations in matmuls"),
  )
  assert (
    less_memory(tmp_path, "GPT-3").word == fewer_operations(tmp_path, "GPT-3").word == "not run"
  )
  claims = [claim for claim in CLAIMS if claim.evidence.startswith("Abstract and section 4.2")]
  assert [c.decide(Evidence([], tmp_path)).word for c in claims[0].conditions] == [
    *("not run", "holds", "not run")
  ]
