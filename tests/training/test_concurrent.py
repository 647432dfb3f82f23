"""Runs trained in one program: each equals the run alone, whatever the others are."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.training import concurrent
from lora_jax.training.concurrent import Run, fit_together
from lora_jax.training.loss import LossSum
from lora_jax.training.mesh import make_mesh
from lora_jax.training.step import TrainState, make_train_step, start
from lora_jax.trees import leaves_with_path

from tests.toy_models import mlp, mlp_example

PARAMS, _ = mlp_example({"up": (12, 16), "down": (16, 8)})
STEPS = 50
MESH = make_mesh()


@dataclasses.dataclass(frozen=True)
class Case:
  """One run: its config, its optimizer's settings and its seed."""

  rank: int
  alpha: float
  dropout: float
  learning_rate: float
  seed: int
  weight_decay: float = 0.01
  steps: int = STEPS

  @property
  def config(self) -> lj.LoraConfig:
    return lj.LoraConfig(self.rank, self.alpha, ["up", "down"], self.dropout)

  @property
  def rates(self) -> Any:
    return optax.linear_schedule(self.learning_rate, 0.0, STEPS)(jnp.arange(STEPS))


CASES = [
  Case(4, 8.0, 0.1, 1e-2, seed=0),
  Case(2, 8.0, 0.0, 3e-2, seed=1),
  Case(1, 3.0, 0.3, 1e-2, seed=2, weight_decay=0.1),
]


def loss_fn(params: Any, batch: Any, *, key: Any = None) -> LossSum:
  del key
  errors = (mlp(params, batch["x"]) - batch["y"]) ** 2
  return LossSum(jnp.sum(errors), jnp.sum(jnp.ones_like(errors)))


def batch_of(case: Case, step: int) -> dict[str, Any]:
  draw = np.random.default_rng([case.seed, step]).standard_normal
  return {"x": np.float32(draw((6, 12))), "y": np.float32(draw((6, 8)))}


def sgd(schedule: Any, weight_decay: Any) -> optax.GradientTransformation:
  decay = optax.add_decayed_weights(weight_decay)
  return optax.chain(optax.clip_by_global_norm(1.0), decay, optax.sgd(schedule))


def adamw(schedule: Any, weight_decay: Any) -> optax.GradientTransformation:
  return optax.adamw(schedule, weight_decay=weight_decay)


@functools.cache
def initial(rank: int, seed: int) -> tuple[Any, Any]:
  """Returns the key and the initial adapter of a run."""
  key, step_key = jax.random.split(jax.random.key(seed))
  method = lj.lora(loss_fn, lj.LoraConfig(rank, 1.0, ["up", "down"]))
  return step_key, jax.jit(method.init)(key, PARAMS, batch_of(Case(rank, 1.0, 0.0, 0.0, seed), 0))


def steps_of(case: Case, optimizer: Any, history: list[Any]) -> Any:
  """Yields the inputs of a run's steps, as `run_steps` does, and keeps its states and metrics."""
  step_key, trainable = initial(case.rank, case.seed)
  made = optimizer(case.rates.__getitem__, case.weight_decay)
  state, frozen, _ = start(PARAMS, trainable, made, step_key, MESH)
  for step in range(case.steps):
    state, metrics = yield state, frozen, batch_of(case, step)
    history.append((state, metrics))
    if not np.isfinite(metrics.loss):
      raise FloatingPointError(f"the loss of step {step + 1}")
  return state


@functools.cache
def alone(case: Case, optimizer: Any) -> list[Any]:
  """Returns the states and metrics of the ordinary run."""
  history: list[Any] = []
  steps = steps_of(case, optimizer, history)
  inputs = next(steps)
  ordinary = optimizer(lambda count: case.rates[count], case.weight_decay)
  step = make_train_step(lj.lora(loss_fn, case.config), ordinary, inputs[0])
  with contextlib.suppress(StopIteration):
    while True:
      state, frozen, batch = inputs
      inputs = steps.send(
        step(jax.tree.map(jnp.copy, state), frozen, batch)
      )  # it donates the state
  return history


def make_loss(settings: Any) -> lj.Adaptation:
  method = lj.lora(loss_fn, CASES[0].config)
  options = {"scaling": settings["scaling"], "dropout_rate": settings["dropout"]}
  return method._replace(apply=functools.partial(method.apply, **options))


def together(cases: Any, optimizer: Any, slots: int, **options: Any):
  """Returns the outcomes by name, and the histories in the order of the cases."""
  histories: list[list[Any]] = [[] for _ in cases]

  def opened(case: Case, history: list[Any]):
    settings = {
      "scaling": jnp.float32(case.alpha / case.rank),
      "dropout": jnp.float32(case.dropout),
      "weight_decay": jnp.float32(case.weight_decay),
      "rates": case.rates,
    }
    return settings, steps_of(case, optimizer, history)

  pairs = enumerate(zip(cases, histories, strict=True))
  runs = [Run(str(i), functools.partial(opened, *pair)) for i, pair in pairs]

  def make_optimizer(settings: Any) -> optax.GradientTransformation:
    return optimizer(lambda count: settings["rates"][count], settings["weight_decay"])

  outcomes = fit_together(runs, make_loss, make_optimizer, slots=slots, **options)
  return {outcome.name: outcome for outcome in outcomes}, histories


def assert_close(tree: Any, expected: Any, tolerance: float) -> None:
  pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True)
  for got, leaf in pairs:
    np.testing.assert_allclose(got, leaf, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def by_sgd():
  return together(CASES, sgd, 3)[1]


def test_parameters_by_sgd_equal_those_alone(by_sgd):
  for case, history in zip(CASES, by_sgd, strict=True):
    assert len(history) == STEPS
    for step in (0, STEPS - 1):
      (state, metrics), (expected, expected_metrics) = history[step], alone(case, sgd)[step]
      assert_close(state.part, expected.part, 1e-5)
      np.testing.assert_allclose(metrics, expected_metrics, rtol=1e-4)
      assert int(state.step) == int(expected.step) == step + 1


def test_losses_by_adamw_equal_those_alone(monkeypatch):
  taken = []
  take = concurrent._take
  monkeypatch.setattr(concurrent, "_take", lambda *args: taken.append(args[0]) or take(*args))
  _, histories = together(CASES, adamw, 3)
  for case, history in zip(CASES, histories, strict=True):
    losses, expected = (
      [float(metrics.loss) for _, metrics in steps] for steps in (history, alone(case, adamw))
    )
    assert len(expected) == STEPS
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert abs(losses[-1] - losses[0]) > 1e-2
  stacked = [tree for tree in taken if isinstance(tree, TrainState)][-1]  # all but the last donated
  check_padding(stacked)


def check_padding(stacked: TrainState) -> None:
  """Checks that the padding of factors and of their moments is still zero: ranks 4, 2 and 1."""
  seen = 0
  for path, leaf in leaves_with_path((stacked.part, stacked.opt_state)):
    if path.endswith("lora_a"):
      leaf = np.swapaxes(leaf, 1, 2)
    elif not path.endswith("lora_b"):
      continue
    seen += 1
    assert all(np.any(leaf[slot, rank - 1]) for slot, rank in enumerate((4, 2, 1)))
    assert not np.any(leaf[1, 2:])
    assert not np.any(leaf[2, 1:])
  assert seen == 3 * 4  # factors and two moments of two weights


def test_a_run_has_the_same_bits_in_another_slot(by_sgd):
  order = (2, 0, 1)
  _, histories = together([CASES[i] for i in order], sgd, 3)
  for i, history in zip(order, histories, strict=True):
    for (state, metrics), (expected, expected_metrics) in zip(history, by_sgd[i], strict=True):
      assert_close((state.part, metrics), (expected.part, expected_metrics), 0.0)


def test_runs_share_slots_and_end_alone():
  """Of four runs in two slots one diverges, one is stopped, and two end at their own steps."""
  cases = [
    dataclasses.replace(CASES[0], steps=6),
    dataclasses.replace(CASES[1], learning_rate=1e30, steps=6),
    dataclasses.replace(CASES[2], steps=3),
    dataclasses.replace(CASES[1], seed=7, steps=6),
  ]
  together_at = []

  def behind(names: Any) -> Any:
    together_at.append(tuple(names))
    return ["3"] if together_at.count(("3",)) == 2 else []

  outcomes, histories = together(cases, adamw, 2, behind=behind)
  assert set(outcomes) == {"0", "1", "2", "3"}
  assert isinstance(outcomes["1"].error, FloatingPointError)
  assert outcomes["3"].fitted is outcomes["3"].error is None
  lengths = [len(history) for history in histories]
  assert (lengths[0], lengths[2]) == (6, 3)
  assert 1 < lengths[1] < 6
  assert 0 < lengths[3] < 6
  assert ("0", "2") in together_at
  for i in (0, 2):
    last: Any = outcomes[str(i)].fitted
    assert last is not None
    assert int(last.step) == cases[i].steps
    assert_close(histories[i][1][0].part, alone(CASES[i], adamw)[1][0].part, 1e-5)


def test_batches_of_another_shape_are_refused(monkeypatch):
  def shorter(case: Case, step: int, make: Any = batch_of) -> Any:
    batch = make(case, step)
    return batch if case.seed else {name: x[:3] for name, x in batch.items()}

  monkeypatch.setattr(f"{__name__}.batch_of", shorter)
  with pytest.raises(ValueError, match=r"1 has batches of .*\(6, 12\).*and 0 of .*\(3, 12\)"):
    together(CASES, sgd, 3)
