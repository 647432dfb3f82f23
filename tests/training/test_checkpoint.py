"""Checkpoints: their content and retention; damage is noticed, and a full disk loses nothing."""

import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.training import checkpoint
from lora_jax.training.checkpoint import Checkpoints, DamagedCheckpoint, save_adapter

BASE = "0123456789abcdef"


def state(value=0.0):
  return {"w": jnp.full((64, 4), value) + jnp.arange(4.0)[None], "key": jax.random.key(int(value))}


def saved(folder, losses):
  """Writes a checkpoint for each step of `losses`."""
  with Checkpoints(folder) as checkpoints:
    for step, loss in losses.items():
      checkpoints.save(step, state(step), {"next": step}, BASE, loss)


def restored(folder):
  with Checkpoints(folder) as checkpoints:
    return checkpoints.restore_last(state(), BASE)


def test_a_saved_checkpoint_is_restored(tmp_path):
  saved(tmp_path, {3: 1.5})
  got = restored(tmp_path)
  assert (got.step, got.loss, got.data_state) == (3, 1.5, {"next": 3})
  np.testing.assert_array_equal(got.state["w"], state(3)["w"])
  assert got.state["key"] == jax.random.key(3)
  assert restored(tmp_path / "none") is None


def test_the_shapes_of_a_state_are_enough_to_read_it(tmp_path):
  """As of full fine-tuning, whose finished runs are read without initializing their training."""
  saved(tmp_path, {3: 1.5})
  shapes = {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    for name, leaf in state().items()
  }
  with Checkpoints(tmp_path) as checkpoints:
    got = checkpoints.restore(3, shapes, BASE).state
  np.testing.assert_array_equal(got["w"], state(3)["w"])
  assert got["key"] == jax.random.key(3)


def test_the_last_two_and_the_best_are_kept_across_sessions(tmp_path):
  saved(tmp_path, {1: 3.0, 2: 1.0, 3: None, 4: 2.0})
  saved(tmp_path, {5: None, 6: 1.0, 7: None})
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [2, 6, 7]
    best = checkpoints.restore_best(state(), BASE)
    assert (best.step, best.loss) == (2, 1.0)
    checkpoints.save(8, state(8), None, BASE, 0.5)
    checkpoints.save(9, state(9), None, BASE)
    assert checkpoints.steps() == [8, 9]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["8", "9"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
  saved(tmp_path, {1: 3.0})
  for name in ("2.orbax-checkpoint-tmp", "2.orbax-checkpoint-tmp-17", "1.removed"):
    shutil.copytree(tmp_path / "1", tmp_path / name)
  assert restored(tmp_path).step == 1
  assert [path.name for path in tmp_path.iterdir()] == ["1"]


def files(folder):
  """Returns a checkpoint's files by name, with a star for random parts."""
  names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
  return {
    str(name) if name.parent.name != "d" else f"{name.parent}/*": folder / name for name in names
  }


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


FAULTS = [
  *((truncate, name) for name in ("state/d/*", "state/manifest.ocdbt", "about/metadata")),
  *((truncate, name) for name in ("state/_METADATA", "_CHECKPOINT_METADATA")),
  *((Path.unlink, name) for name in ("state/d/*", "about/metadata", "state/manifest.ocdbt")),
  *((Path.unlink, name) for name in ("commit_success.txt", "state/commit_success.txt")),
  *((flip, name) for name in ("state/d/*", "about/metadata")),
]


@pytest.mark.parametrize(("damage", "name"), FAULTS, ids=lambda x: getattr(x, "__name__", x))
def test_a_damaged_checkpoint_is_set_aside(tmp_path, caplog, damage, name):
  saved(tmp_path, {1: 3.0, 2: 1.0})
  damage(files(tmp_path / "2")[name])
  got = restored(tmp_path)
  if got.step == 2:  # a file that restoring does not need: all that was saved is there
    assert name in ("_CHECKPOINT_METADATA", "commit_success.txt", "state/commit_success.txt")
    np.testing.assert_array_equal(got.state["w"], state(2)["w"])
    return
  assert got.step == 1
  assert "the checkpoint of step 2" in caplog.text
  assert "set aside as 2.damaged" in caplog.text
  np.testing.assert_array_equal(got.state["w"], state(1)["w"])
  assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.damaged"]
  saved(tmp_path, {2: 1.0})
  assert restored(tmp_path).step == 2


def test_flipped_bits_of_the_arrays_are_noticed(tmp_path):
  """A flipped bit anywhere in the array data is noticed, or changes nothing."""
  saved(tmp_path, {1: None})
  path = files(tmp_path / "1")["state/d/*"]
  whole = path.read_bytes()
  with Checkpoints(tmp_path) as checkpoints:
    for place in range(0, len(whole), max(1, len(whole) // 12)):
      data = bytearray(whole)
      data[place] ^= 4
      path.write_bytes(data)
      try:
        got = checkpoints.restore(1, state(), BASE)
      except DamagedCheckpoint:
        continue
      np.testing.assert_array_equal(got.state["w"], state(1)["w"])


def test_the_next_best_replaces_a_damaged_best(tmp_path, caplog):
  saved(tmp_path, {1: 1.0, 2: 3.0, 3: 2.0})
  truncate(files(tmp_path / "1")["state/d/*"])
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore_best(state(), BASE).step == 3
  assert "the checkpoint of step 1" in caplog.text
  saved(tmp_path, {4: None})
  truncate(files(tmp_path / "3")["about/metadata"])
  message = "no undamaged checkpoint"
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=message):
    checkpoints.restore_best(state(), BASE)


def test_if_all_checkpoints_are_damaged_an_error_says_so(tmp_path):
  saved(tmp_path, {1: 1.0, 2: 3.0})
  for step in "12":
    truncate(files(tmp_path / step)["about/metadata"])
  with pytest.raises(ValueError, match=r"all checkpoints in .* damaged .* starts from step 0"):
    restored(tmp_path)
  assert restored(tmp_path) is None


def test_another_base_and_another_state_are_refused(tmp_path):
  saved(tmp_path, {1: 1.0})
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match=f"model with fingerprint {BASE}, and this one has other"):
      checkpoints.restore_last(state(), "other")
    smaller = state() | {"w": jnp.zeros((64, 2))}
    with pytest.raises(
      ValueError, match=r"has another state: w: float32\[64, 4\], expected .*\[64, 2\]"
    ):
      checkpoints.restore_last(smaller, BASE)
    assert checkpoints.steps() == [1]


def test_a_renamed_checkpoint_is_set_aside(tmp_path, caplog):
  """Training would resume at a wrong step. Checkpoints without a stored step are still read."""
  saved(tmp_path, {1: 3.0, 2: 1.0})
  (tmp_path / "2").rename(tmp_path / "7")
  got = restored(tmp_path)
  assert got.step == 1
  assert "the checkpoint of step 7" in caplog.text
  assert "is that of step 2: its folder was renamed or copied" in caplog.text
  stored = files(tmp_path / "1")["about/metadata"]
  content = json.loads(stored.read_text())["content"]
  assert content.pop("step") == 1
  stored.write_text(json.dumps({"content": content, "digest": checkpoint._digest(content)}))
  assert restored(tmp_path).step == 1


def test_a_later_version_is_refused_and_not_set_aside(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint, "VERSION", 3)
  saved(tmp_path, {1: 1.0})
  monkeypatch.undo()
  with pytest.raises(ValueError, match=r"step 1 in .* has version 3; .* reads versions 1"):
    restored(tmp_path)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [1]


def test_a_full_disk_loses_nothing(tmp_path):
  """A process that can write small files only fails in the middle of its second checkpoint."""
  saved(tmp_path, {1: 1.0})
  code = (
    "import resource, sys, numpy as np, jax.numpy as jnp\n"
    "from lora_jax.training.checkpoint import Checkpoints\n"
    "noise = jnp.asarray(np.random.default_rng(0).standard_normal((64, 1024)), 'float32')\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))\n"
    "with Checkpoints(sys.argv[1]) as checkpoints:\n"
    "  checkpoints.save(2, {'w': noise}, None, 'base')\n"
  )
  # -B: Python puts a .pyc file that it could write in part alone in place of the whole one
  run = subprocess.run([sys.executable, "-B", "-c", code, tmp_path], capture_output=True, text=True)
  assert run.returncode == 1, run.stderr
  message = run.stderr.strip().splitlines()[-1]
  assert message.startswith("OSError: the checkpoint of step 2 could not be written to")
  assert "(File too large). Those of steps [1] are untouched. Make room" in message
  assert [path.name for path in tmp_path.iterdir()] == ["1"]  # before a next session tidies up
  assert restored(tmp_path).step == 1
  assert [path.name for path in tmp_path.iterdir()] == ["1"]
  assert json.loads((tmp_path / "1/about/metadata").read_text())["content"]["loss"] == 1.0


@pytest.fixture
def slow_threads(monkeypatch):
  """Makes saves fail while other threads still write, as Orbax's do."""
  threads = []

  def save(self, folder, args):
    temporary = folder.with_name(f"{folder.name}.orbax-checkpoint-tmp-0")
    end = time.monotonic() + 0.3

    def write():
      while time.monotonic() < end:
        with contextlib.suppress(OSError):
          (temporary / f"{time.monotonic()}").mkdir(parents=True)
        time.sleep(0.01)

    threads.append(threading.Thread(target=write))
    threads[-1].start()
    raise ValueError("put: No space left on device")

  monkeypatch.setattr(checkpoint.ocp.Checkpointer, "save", save)
  yield
  for thread in threads:
    thread.join()


def test_nothing_is_left_of_a_failed_save(tmp_path, slow_threads):
  message = r"could not be written to .*/a \(No space left on device\)\. Nothing is left of it\."
  with pytest.raises(OSError, match=message):
    save_adapter(tmp_path / "a", {"w": jnp.ones(2)})
  assert list(tmp_path.iterdir()) == []
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(OSError, match=r"No space left on"):
    checkpoints.save(1, state(), None, BASE)
  assert list(tmp_path.iterdir()) == []
