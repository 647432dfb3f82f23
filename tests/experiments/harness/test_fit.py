"""The training that experiments share: what it saves, keeps and reports for each method."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from experiments.configs import gpt2_e2e
from experiments.harness.config import read_config, replace_fields
from experiments.harness.fit import fit_run, initialize
from experiments.harness.methods import METHODS, adapt
from experiments.harness.optimizer import make_optimizer, run_optimizer
from experiments.harness.restore import restore_trained
from experiments.harness.workdir import write_json
from experiments.nlg.config import E2EConfig
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import make_mesh
from lora_jax.training.metrics_log import read_metrics

from tests.tiny_training import TARGET, batches, fresh_params, interrupted_at, model

CHANGES = {
  **{"lora.rank": 2, "lora.target": TARGET, "optimizer.warmup_steps": 2, "seed": 3},
  **{"fit.eval_every_steps": 2, "fit.checkpoint_every_steps": 9, "fit.log_every_steps": 1},
}


def config_of(workdir, **changes):
  config = read_config(E2EConfig, gpt2_e2e.get_config())
  return replace_fields(config, {**CHANGES, "workdir": str(workdir), **changes})


def fitted(config, **options):
  module, _ = model(num_layers=1)
  loss, params = adapt(config)(language_model_loss(module)), fresh_params(num_layers=1)
  data, valid = batches(), batches(20, None, epochs=1)
  return loss, fit_run(
    config,
    METHODS[config.method],
    loss,
    params,
    initialize(config, loss, params, data[0]),
    data,
    make_mesh(),
    examples="a few lines",
    eval_loss=loss,
    eval_batches=lambda: iter(valid),
    **options,
  )


@pytest.mark.parametrize(
  "method", ["lora", pytest.param("full_finetuning", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_kept_checkpoint_is_restored(tmp_path, method, keep, capsys):
  config = config_of(tmp_path, method=method, **{"fit.keep": keep})
  loss, trained = fitted(config, keep=keep)
  kept = trained.fitted.best if keep == "best" else trained.fitted.last
  assert trained.kept is kept
  assert (tmp_path / "adapter").exists() == METHODS[method].saves_adapter
  fields = trained.fields
  assert fields["num_train_steps"] == len(batches())
  assert f"{METHODS[method].label} in {tmp_path}: " in capsys.readouterr().out
  write_json(tmp_path / "result.json", fields | {"valid_loss": trained.loss})
  params = fresh_params(num_layers=1)
  initial = initialize(config, loss, params, batches()[0])
  assert fields["trainable_parameters"] == optax.tree.size(initial)
  stored, valid_loss = restore_trained(
    config, params, initial, make_mesh(), checkpoint=keep, saved=keep
  )
  assert valid_loss == trained.loss
  jax.tree.map(np.testing.assert_array_equal, stored, kept)


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora_plus", "lora_fa", "adalora", "relora", "chain_of_lora"])
def test_methods_with_an_optimizer_of_their_own_resume_to_the_same_bits(tmp_path, method):
  """At a checkpoint within a cycle, and at one between two: cycles have two steps."""
  ends = []
  for step in (None, 3, 4):
    checkpoints = {"fit.eval_every_steps": 4, "fit.checkpoint_every_steps": 3}
    config = config_of(tmp_path / str(step), method=method, **checkpoints)
    if step:
      with interrupted_at(step):
        fitted(config, num_train_steps=8)
    _, trained = fitted(config, num_train_steps=8)
    ends.append(trained.fitted.last)
  for end in ends[1:]:
    for leaf, expected in zip(jax.tree.leaves(end), jax.tree.leaves(ends[0]), strict=True):
      assert np.asarray(leaf).tobytes() == np.asarray(expected).tobytes()


def test_a_trained_base_replaces_the_original():
  base, trained = {"w": jnp.ones(2, "bfloat16")}, {"w": jnp.full(2, 1.001)}
  assert METHODS["lora"].remaining_base(base, trained) is base
  remaining = METHODS["full_finetuning"].remaining_base(base, trained)
  np.testing.assert_array_equal(remaining["w"], trained["w"].astype("bfloat16"))
  base = {"w": jnp.ones(2)}
  base["w"].delete()  # as training donates it
  assert METHODS["full_finetuning"].remaining_base(base, trained)["w"] is trained["w"]


def test_steps_and_the_learning_rate_follow_the_config(tmp_path):
  _, trained = fitted(config_of(tmp_path), num_train_steps=4)
  assert trained.fields["num_train_steps"] == 4
  lines = read_metrics(tmp_path / "metrics.jsonl")
  rates = [line["train/learning_rate"] for line in lines if "train/learning_rate" in line]
  assert rates == pytest.approx([0.0, 0.005, 0.01, 0.005])
  assert [line["step"] for line in lines if "valid/loss" in line] == [2, 4]


def test_the_row_of_lora_plus_is_the_librarys_optimizer():
  config = config_of("unused", method="lora_plus", **{"optimizer.clip_norm": 0.0})
  fn, params = (lambda p, x: x @ p["w"] + p["b"][None]), {"w": jnp.eye(4, 6), "b": jnp.ones(6)}
  lora = lj.LoraConfig(2, 4.0, "w", extra="b")
  tree = lj.lora(fn, lora).init(jax.random.key(0), params, jnp.ones((1, 4)))
  optimizer, schedule = run_optimizer(config, METHODS["lora_plus"], params, tree, 10)
  settings = config.optimizer

  def adamw(rate):
    decay = settings.weight_decay
    return optax.adamw(rate, settings.b1, settings.b2, settings.eps, weight_decay=decay)

  def trained(optimizer):
    @jax.jit
    def run(tree):
      state = optimizer.init(tree)
      for step in range(3):  # the first has a learning rate of 0
        grads = jax.tree.map(lambda x, step=step: jnp.sin(x + step), tree)
        updates, state = optimizer.update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
      return tree

    return run(tree)

  got = trained(optimizer), trained(lj.lora_plus(adamw, schedule))
  assert jnp.abs(got[0]["w"].lora_b).max() > 0
  jax.tree.map(lambda *x: np.testing.assert_allclose(*x, rtol=1e-5), *got)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules_start_with_the_warmup(schedule):
  config = config_of("unused", **{"optimizer.schedule": schedule}).optimizer
  _, rates = make_optimizer(config, 10)
  assert float(rates(0)) == 0
  assert float(rates(2)) == pytest.approx(0.01)
  assert float(rates(10)) == pytest.approx(0.01 if schedule == "constant" else 0.0)
