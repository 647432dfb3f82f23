"""Adapters and checkpoints that commit 306f88d wrote are read by today's code.

`tests/make_storage_golden.py` made them. On one machine a resumed run ends with the same bits; the
tolerance is for other CPUs.
"""

import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.training.checkpoint import Checkpoints, restore_adapter
from lora_jax.training.loss import LossSum
from lora_jax.trees import leaves_with_path

from tests import make_storage_golden as golden
from tests.toy_models import relative_difference

RTOL = 1e-5
MODELS = {
  "adapter": (golden.unrolled, golden.unrolled_params, golden.tokens, golden.ADAPTER),
  "stacked": (golden.scanned, golden.stacked_params, golden.inputs, golden.STACKED),
}
RUNS = {"run": "lora", "run_full": "full_finetuning"}


def loss(params, batch, *, key=None):
  return LossSum(*golden.squared_errors(params, batch, key))


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_gives_the_same_outputs(name):
  fn, make_params, make_inputs, config = MODELS[name]
  params, x = make_params(), make_inputs()
  lora = lj.lora(fn, lj.LoraConfig(**config))
  trainable = restore_adapter(golden.FOLDER / name, lora.init(jax.random.key(0), params, x))
  expected = load_file(golden.FOLDER / f"{name}.safetensors")["outputs"]
  assert np.abs(expected - fn(params, x)).max() > 0.1  # the adapter changes them
  for outputs in (lora.apply(params, trainable, x), fn(lora.merge(params, trainable), x)):
    assert relative_difference(outputs, expected) < RTOL


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, name):
  shutil.copytree(golden.FOLDER / name, tmp_path / "run")
  fitted = golden.fit_run(tmp_path / "run", RUNS[name], loss)
  assert fitted.tokens == golden.ROWS * (golden.STEPS - golden.INTERRUPTED_AT)
  expected = load_file(golden.FOLDER / f"{name}.safetensors")
  losses = expected.pop("losses")[golden.INTERRUPTED_AT :]
  np.testing.assert_allclose(golden.losses(tmp_path / "run"), losses, rtol=RTOL)
  last = dict(leaves_with_path(fitted.last))
  assert set(last) == set(expected)
  for path, leaf in last.items():
    assert relative_difference(leaf, expected[path]) < RTOL, path
  with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
    assert checkpoints.steps() == [golden.INTERRUPTED_AT, golden.STEPS]
