"""Training by several processes: real ones, on this machine."""

import json
import re
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lora_jax.placement import gathered, host_copy, place
from lora_jax.training.mesh import local_rows, make_mesh, place_batch
from lora_jax.training.processes import first_message, from_first, is_first, wait_for_all

from tests import two_processes
from tests.kill_training import losses
from tests.two_processes import arrays


def test_two_processes_train_as_one(tmp_path):
  """Also shown in each of them: rows on other meshes, where a row is placed by both."""
  outputs = two_processes.run(tmp_path / "two", tmp_path / "cache")
  assert [code for code, _ in outputs] == [0, 0], outputs
  two_processes.train(tmp_path / "one", make_mesh(2, 2))
  expected = arrays(tmp_path / "one")
  for name, array in arrays(tmp_path / "two").items():
    np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6)
  pairs = zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True)
  for (step, *two), (expected_step, *one) in pairs:
    assert step == expected_step
    np.testing.assert_allclose(*([x or 0.0 for x in values] for values in (two, one)), rtol=1e-5)
  assert len([*tmp_path.glob("two/tensorboard/*")]) == 1


def test_damage_that_one_process_finds_is_an_error_in_all(tmp_path):
  command = [sys.executable, "-m", "tests.two_readers", str(tmp_path)]
  command += [f"--port={two_processes.free_port()}", "--process_id"]
  commands = [[*command, str(process)] for process in range(2)]
  outputs = two_processes.finish(two_processes.start(commands, 1, tmp_path / "cache"))
  assert [code for code, _ in outputs] == [0, 0], outputs
  # JAX may log after the result.
  results = [[line for line in text.splitlines() if line.startswith("{")] for _, text in outputs]
  first, second = (json.loads(lines[-1]) for lines in results)
  assert first == second
  for name, (error, *steps) in first.items():
    process = name[-1]
    folder = re.escape(f"{tmp_path / name}, copy of {process}")
    message = rf"process {process}: the checkpoint of step 2 in {folder} cannot be read \(\w+\)"
    assert re.fullmatch(message, error)
    assert steps == [1, 1]


def test_a_single_process_is_the_first_and_has_all_rows():
  mesh = make_mesh(2, 2)
  assert is_first()
  assert first_message("") == ""
  assert first_message("the disk is full") == "the disk is full"
  assert from_first(lambda: {"a": 1.5}) == {"a": 1.5}
  wait_for_all()
  assert local_rows(mesh, 8) == local_rows(mesh, 8, 2) == [*range(8)]
  with pytest.raises(ValueError, match=r"6 rows cannot be split over .* 4 devices"):
    local_rows(mesh, 6)
  rows = np.arange(24).reshape(8, 3)
  placed = place_batch(mesh, {"x": rows}, accumulation_steps=2)["x"]
  assert placed.sharding.spec == P(None, ("data", "fsdp"))
  np.testing.assert_array_equal(placed, rows.reshape(2, 4, 3))
  array = place(np.ones(4), jax.NamedSharding(mesh, P("fsdp")))
  assert gathered(array) is array
  np.testing.assert_array_equal(host_copy(array), np.ones(4))
