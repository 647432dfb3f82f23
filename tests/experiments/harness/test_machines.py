"""Processes that do a run together; those that need two real ones are long."""

import json
import re
import sys

import pytest

from experiments import gpt2_e2e as experiment
from experiments.configs import gpt2_e2e
from experiments.harness.config import Distributed, flat, read_config, replace_fields
from experiments.harness.workdir import open_workdir
from experiments.nlg.config import E2EConfig

from tests import two_processes
from tests.kill_training import losses
from tests.tiny_e2e import tiny_config
from tests.two_processes import arrays


@pytest.mark.parametrize(
  "fields",
  [
    {"coordinator_address": "localhost"},
    {"coordinator_address": "localhost:"},
    {"num_processes": 2},
    {"process_id": 0},
  ],
)
def test_a_job_needs_the_address_of_process_0(fields):
  address = repr(fields.get("coordinator_address", ""))
  message = rf"coordinator_address must be HOST:PORT of process 0, or auto; got {address}"
  with pytest.raises(ValueError, match=message):
    Distributed(**fields)


def test_a_run_does_not_depend_on_the_processes_that_do_it(tmp_path):
  config = read_config(E2EConfig, gpt2_e2e.get_config("mini"))
  config = replace_fields(config, {"workdir": str(tmp_path)})
  with open_workdir(config):
    assert "distributed" not in json.loads((tmp_path / "config.json").read_text())
  with pytest.raises(ValueError, match=r"in Python, call experiments\.harness\.machines\.join"):
    replace_fields(config, {"distributed.coordinator_address": "auto"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with the run of two processes that nothing happened to, and compiled programs."""
  folder = tmp_path_factory.mktemp("machines")
  assert [code for code, _ in two_processes.run(folder / "undisturbed", folder / "cache")] == [0, 0]
  return folder


def assert_resumes(workdir, folder):
  """Resumes a run; it ends with the bits of the undisturbed one."""
  outputs = two_processes.run(workdir, folder / "cache")
  assert [code for code, _ in outputs] == [0, 0], outputs
  got, expected = arrays(workdir), arrays(folder / "undisturbed")
  assert {name: got[name].tobytes() for name in got} == {
    name: expected[name].tobytes() for name in expected
  }


@pytest.mark.long
def test_a_killed_process_ends_the_others_and_the_run_resumes_to_the_same_bits(tmp_path, folder):
  (first, text), (second, _) = two_processes.run(tmp_path, folder / "cache", "", "kill")
  assert second == -9
  assert first, text  # after 100 seconds without a heartbeat, by JAX
  assert_resumes(tmp_path, folder)
  assert losses(tmp_path) == losses(folder / "undisturbed")


@pytest.mark.long
def test_a_sigterm_of_one_process_stops_all_at_the_same_step(tmp_path, folder):
  """Then one that comes before the first step of the resumed run, as while that is compiled."""
  stops = []
  for event in ("terminate", "terminate before a step"):
    outputs = two_processes.run(tmp_path, folder / "cache", "", event)
    assert [code for code, _ in outputs] == [143, 143], outputs
    steps = [re.search(r"interrupted: .* is saved up to step (\d)", text) for _, text in outputs]
    assert steps[0]
    assert steps[1]
    assert steps[0][1] == steps[1][1]
    assert (tmp_path / "checkpoints" / steps[0][1]).is_dir()
    stops.append(int(steps[0][1]))
  assert stops[1] == stops[0] + 1
  assert_resumes(tmp_path, folder)


@pytest.mark.long
@pytest.mark.parametrize(
  ("events", "message"),
  [
    (("", "error"), "process 1: .*an example that only this process reads is damaged"),
    (("error", ""), "process 0: .*an example that only this process reads is damaged"),
    (("nan", "nan"), "process [01]: error: the loss of step 2: nan; training has stopped"),
  ],
)
def test_an_error_of_one_process_ends_all_with_its_message(events, message, tmp_path, folder):
  for code, text in two_processes.run(tmp_path, folder / "cache", *events):
    assert code == 1
    assert re.search(message, text, re.DOTALL), text


def command(config):
  """Returns the command of a run of `experiments.gpt2_e2e`, with a flag for each changed field."""
  default, fields = flat(gpt2_e2e.get_config("mini")), flat(config)
  changed = {name: value for name, value in fields.items() if default[name] != value}
  flags = [f"--config.{name}={value}" for name, value in changed.items()]
  return [sys.executable, "-m", "experiments.gpt2_e2e", *flags]


@pytest.mark.long
def test_two_processes_do_an_experiment_to_its_result(tmp_path):
  """The command of docs/scale.md: training, decoding and scores, as one process has them."""
  config = tiny_config(tmp_path / "two")
  config.fit.num_train_steps, config.mesh.data = 4, 2
  address = f"localhost:{two_processes.free_port()}"
  flags = [
    f"--config.distributed.{name}={value}"
    for name, value in {"coordinator_address": address, "num_processes": 2}.items()
  ]
  commands = [[*command(config), *flags, f"--config.distributed.process_id={i}"] for i in (0, 1)]
  outputs = two_processes.finish(two_processes.start(commands, 1, tmp_path / "cache"))
  assert [code for code, _ in outputs] == [0, 0], outputs
  result = json.loads((tmp_path / "two" / "result.json").read_text())
  config.workdir, config.mesh.data = str(tmp_path / "one"), 1
  expected = experiment.run(config)
  assert result["valid_loss"] == pytest.approx(expected["valid_loss"], rel=1e-5)
  assert result["scores"] == expected["scores"]


JOIN = """
import jax, sys
from experiments.harness.config import Distributed
from experiments.harness.machines import join
join(Distributed("auto"))
print(f"process {jax.process_index()} of {jax.process_count()}", file=sys.stderr)
"""


@pytest.mark.long
def test_processes_that_slurm_starts_are_detected(monkeypatch, tmp_path):
  """By the variables that srun sets for each of its tasks."""
  shared = {"JOB_ID": "7", "STEP_NODELIST": "localhost", "STEP_NUM_NODES": "1", "NTASKS": "2"}
  for name, value in shared.items():
    monkeypatch.setenv(f"SLURM_{name}", value)
  monkeypatch.setenv("JAX_COORDINATOR_PORT", str(two_processes.free_port()))
  processes = []
  for i in "01":
    monkeypatch.setenv("SLURM_PROCID", i)
    monkeypatch.setenv("SLURM_LOCALID", i)
    processes += two_processes.start([[sys.executable, "-c", JOIN]], 1, tmp_path)
  outputs = two_processes.finish(processes)
  assert [code for code, _ in outputs] == [0, 0], outputs
  for i, (_, text) in enumerate(outputs):
    assert f"process {i} of 2" in text
