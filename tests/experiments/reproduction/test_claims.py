"""Decisions on the results of other commands: subspaces and the intrinsic dimension."""

import numpy as np
import pytest

from experiments.analysis.intrinsic import Curve
from experiments.analysis.subspaces.plan import planned_runs
from experiments.analysis.subspaces.runs import RANDOM_BASE, SHUFFLED, arrange
from experiments.configs.subspaces import TINY
from experiments.reproduction import claims
from experiments.reproduction.claims import (
  Evidence,
  amplifies,
  dimension_falls,
  first_directions,
  other_directions,
  shared_directions,
)

from tests.experiments.test_subspaces import made

EVIDENCE = Evidence([], None)


@pytest.fixture(scope="module")
def study():
  """Runs of random factors, which share nothing."""
  return arrange([made(run) for run in planned_runs("embedded", TINY)])


def test_random_directions_are_not_shared(study, monkeypatch):
  monkeypatch.setattr(claims, "_study", lambda *_: study)
  assert first_directions(EVIDENCE, "embedded", seeds=False).word == "fails"


def test_equal_directions_are_shared(study, monkeypatch):
  same = study._replace(low=study.high, second=study.high)
  monkeypatch.setattr(claims, "_study", lambda *_: same)
  outcome = first_directions(EVIDENCE, "embedded", seeds=False)
  assert outcome.word == "holds"
  assert "query: mean over 2 layers 1 [1, 1], limit 0.5" in outcome.interval
  assert "limit 0.0312" in first_directions(EVIDENCE, "embedded", seeds=True).interval  # 1 / 32
  assert first_directions(EVIDENCE, "embedded", seeds=True).word == "holds"


@pytest.mark.parametrize(("factor", "word"), [(0.1, "holds"), (10.0, "fails")])
def test_amplification_is_compared_with_each_null(study, monkeypatch, factor, word):
  """The null is the trained run on larger or smaller weights, which its directions then meet."""
  params = study.low.base.params
  scaled = {
    name: {"attn": {kind: {"kernel": leaf["kernel"] / factor} for kind, leaf in of["attn"].items()}}
    for name, of in params.items()
  }
  base = type(study.low.base)(params=scaled)
  null = study.low._replace(base=base)
  nulls = [run for run in study.nulls if (run.kind, run.rank) != (SHUFFLED, study.low.rank)]
  (of_kind,) = [run for run in study.nulls if (run.kind, run.rank) == (SHUFFLED, study.low.rank)]
  nulls.append(null._replace(config=of_kind.config))
  monkeypatch.setattr(claims, "_study", lambda *_: study._replace(nulls=nulls))
  outcome = amplifies(EVIDENCE, "embedded", SHUFFLED)
  assert outcome.word == word
  assert "log of the ratio" in outcome.interval
  assert amplifies(EVIDENCE, "embedded", RANDOM_BASE).word in ("holds", "fails", "cannot be told")


def test_seeds_share_more_directions_of_query(study, monkeypatch):
  same = study._replace(second=study.high)
  monkeypatch.setattr(claims, "_study", lambda *_: same)
  assert shared_directions(EVIDENCE, "embedded").word == "cannot be told"
  other = next(run for run in study.nulls if run.rank == study.high.rank).subspaces["value"]
  second = study.high._replace(subspaces={**study.high.subspaces, "value": other})
  monkeypatch.setattr(claims, "_study", lambda *_: study._replace(second=second))
  outcome = shared_directions(EVIDENCE, "embedded")
  assert outcome.word == "holds"
  assert outcome.interval.startswith("directions, query - value: mean over 2 layers ")


def test_directions_of_the_weight_are_repeated_or_not(study, monkeypatch):
  monkeypatch.setattr(claims, "_study", lambda *_: study)
  assert other_directions(EVIDENCE, "embedded").word == "holds"
  spaces = dict(study.low.subspaces)
  for kind in ("query", "value"):
    u, _, v = np.linalg.svd(study.low.weights(kind))
    rank = spaces[kind].values.shape[-1]
    spaces[kind] = spaces[kind]._replace(inputs=u[..., :rank], outputs=v.mT[..., :rank])
  repeating = study._replace(low=study.low._replace(subspaces=spaces))
  monkeypatch.setattr(claims, "_study", lambda *_: repeating)
  outcome = other_directions(EVIDENCE, "embedded")
  assert outcome.word == "fails"
  assert "query, 1 - ratio of norms: mean over 2 layers " in outcome.interval


def curve(base, d90):
  """Returns a curve that reaches 90 % of the gain at a dimension, or gains nothing (None)."""
  losses = {dim: {1.0: 1.0 if dim >= (d90 or 0) else 2.0} for dim in (100, 300, 1000, 3000)}
  return Curve(base, 3.0, 1.0 if d90 else 3.0, losses)


@pytest.mark.parametrize(
  ("shortest", "longest", "word", "bracket"),
  [
    (3000, 300, "holds", "above 1,000, at most 3,000"),
    (300, 3000, "fails", "above 100, at most 300"),
    (100, 3000, "fails", "at most 100"),
    (1000, 1000, "cannot be told", "above 300, at most 1,000"),
    (10_000, 3000, "holds", "above 3,000, the largest that was tried"),
    (None, 3000, "cannot be told", "not defined, as full fine-tuning gains nothing"),
  ],
)
def test_brackets_of_d90_decide(monkeypatch, tmp_path, shortest, longest, word, bracket):
  bases = ("0.2 M tokens", "2 M tokens", "20 M tokens")
  curves = [curve(base, d) for base, d in zip(bases, (shortest, 1000, longest), strict=True)]
  monkeypatch.setattr(claims, "read_curves", lambda *_: (curves, []))
  outcome = dimension_falls(Evidence([], tmp_path))
  assert outcome.word == word
  assert "one seed" in outcome.interval
  assert outcome.interval.startswith(f"0.2 M tokens: {bracket}; 20 M tokens: ")
  monkeypatch.setattr(claims, "read_curves", lambda *_: (curves, ["- 20 M tokens: 1 run"]))
  assert dimension_falls(Evidence([], tmp_path)).word == "not run"
