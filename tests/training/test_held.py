"""An adapter's frozen arrays: in no checkpoint, written once, read by a resumed run."""

import dataclasses
import functools
import shutil
from pathlib import Path
from tempfile import mkdtemp

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.adapters.delta import adapter_weights
from lora_jax.training.checkpoint import restore_adapter, save_adapter
from lora_jax.training.held import FOLDER, read_held, write_held

from tests import tiny_training
from tests.tiny_training import interrupted_at, train

CONFIG = lj.LoraConfig(4, 8.0, tiny_training.TARGET, dropout=0.1)


@pytest.fixture
def dora(monkeypatch):
  monkeypatch.setattr(
    tiny_training, "method", lambda name: functools.partial(lj.dora, config=CONFIG)
  )


@functools.cache
def interrupted():
  """Returns the folder of a run of DoRA that was interrupted after step 4; needs `dora`."""
  folder = Path(mkdtemp(prefix="interrupted-"))
  with interrupted_at(4):
    train(folder)
  return folder


@pytest.fixture
def elsewhere(monkeypatch):
  """Returns a function that changes the rounding of |W|^2, as another machine would."""

  def change():
    start = lj.DORA.start

    def other_start(key, site):
      arrays = start(key, site)
      return arrays | {"norm_squared": arrays["norm_squared"] * 1.5}

    variant = lj.DORA._replace(start=other_start)
    config = dataclasses.replace(CONFIG, variant=variant)
    monkeypatch.setattr(
      tiny_training, "method", lambda name: functools.partial(lj.lora, config=config)
    )

  return change


def assert_same(got, expected):
  jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.usefixtures("dora")
def test_a_resumed_run_reads_the_frozen_arrays(tmp_path, elsewhere):
  whole = train(tmp_path / "whole")
  nodes = adapter_weights(whole.best)
  assert nodes
  assert all(node.norm_squared is not None for node in nodes.values())
  shutil.copytree(interrupted(), tmp_path / "run")
  (about,) = (tmp_path / "run" / "checkpoints" / "4" / "about").glob("metadata*")
  assert "magnitude" in about.read_text()
  assert "norm_squared" not in about.read_text()
  elsewhere()
  resumed = train(tmp_path / "run")
  assert_same(resumed.last, whole.last)
  assert_same(resumed.best, whole.best)
  save_adapter(tmp_path / "adapter", resumed.best)
  assert_same(restore_adapter(tmp_path / "adapter", whole.best), whole.best)


@pytest.mark.usefixtures("dora")
def test_lost_and_damaged_frozen_arrays_are_named(tmp_path, elsewhere):
  shutil.copytree(interrupted(), tmp_path / "run")
  held = tmp_path / "run" / FOLDER
  shutil.move(held, tmp_path / "moved")
  with pytest.raises(FileNotFoundError, match=f"{FOLDER} does not exist: the run's checkpoints"):
    train(tmp_path / "run")
  shutil.copytree(tmp_path / "moved", held)
  for path in (held / "arrays").rglob("d/*"):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
  with pytest.raises(ValueError, match=rf"{FOLDER} (is damaged|cannot be read)"):
    train(tmp_path / "run")


@pytest.mark.long
@pytest.mark.usefixtures("dora")
def test_a_new_run_in_an_old_folder_writes_its_own(tmp_path, elsewhere):
  expected = train(tmp_path / "run").last
  shutil.rmtree(tmp_path / "run" / "checkpoints")
  elsewhere()
  other = train(tmp_path / "run").last
  path, node = next(iter(adapter_weights(other).items()))
  held = adapter_weights(expected)[path].norm_squared
  np.testing.assert_allclose(node.norm_squared, 1.5 * held, rtol=1e-6)


def test_nothing_is_written_for_an_adapter_without_frozen_arrays(tmp_path):
  """Plain LoRA's part of the frozen tree has only None (`test_step.py`)."""
  write_held(tmp_path, {"w": None})
  assert not list(tmp_path.iterdir())
  assert read_held(tmp_path, {"w": None}) == {"w": None}


def test_frozen_and_trained_arrays_share_no_memory():
  """A step donates trained arrays, so that a shared one would be deleted."""
  words = {"a": "batch in rank", "a0": "batch in rank", "b": "batch rank out"}

  def start(key, site):
    a = jax.random.normal(key, site.array_shape(words["a"]))
    return {"a": a, "a0": a, "b": jnp.zeros(site.array_shape(words["b"]))}

  variant = lj.Variant(
    "start kept", words, start, lambda w, p, s: w + s * (p.a @ p.b) - s * (p.a0 @ p.b), ("a0",)
  )
  config = lj.LoraConfig(2, 2.0, "w", variant=variant)
  lora = lj.lora(lambda params, x: x @ params["w"], config)
  node = lora.init(jax.random.key(0), {"w": jnp.ones((6, 4))}, jnp.ones((3, 6)))["w"]
  assert node.a.unsafe_buffer_pointer() != node.a0.unsafe_buffer_pointer()
