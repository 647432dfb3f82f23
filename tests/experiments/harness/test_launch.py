"""From the command line to a run's folder: one process, one config, and plain errors."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments.configs import gpt2_e2e
from experiments.harness.config import read_config, replace_fields
from experiments.harness.launch import apply
from experiments.harness.workdir import commit, open_workdir, read_result, read_run, write_json
from experiments.nlg.config import E2EConfig, TemplateConfig

from tests.paths import ROOT

EXPERIMENT = """
import ctypes
import os
import signal
import threading
import time

import experiments.harness.launch
from experiments.harness.config import read_config
from experiments.harness.launch import launch
from experiments.harness.workdir import open_workdir, write_json
from experiments.nlg.config import E2EConfig

experiments.harness.launch.keep_freed_memory = lambda: print("memory is kept")

def run(config):
  config = read_config(E2EConfig, config)
  with open_workdir(config) as workdir:
    if config.lora.rank == 3:
      raise ValueError("rank 3 is bad")
    if config.lora.rank == 5:
      int("a bug")
    if config.lora.rank == 7:
      import logging
      logging.getLogger("lora_jax.training").warning("a checkpoint is damaged")
    if config.lora.rank == 9:
      (workdir / "nothere").read_text()
    if config.lora.rank in (11, 12, 13):  # signals, the last one where Python cannot react
      number = signal.SIGINT if config.lora.rank == 11 else signal.SIGTERM
      if config.lora.rank == 13:
        (workdir / "checkpoints" / "6").mkdir(parents=True)
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        ctypes.CDLL(None).usleep(10**7)
        ctypes.CDLL(None).usleep(10**7)
      os.kill(os.getpid(), number)
      os.kill(os.getpid(), number)
      time.sleep(10)
    print("ran", config.lora.rank, workdir)
    print("learning rate", config.optimizer.learning_rate)
    write_json(workdir / "result.json", {"rank": config.lora.rank})
  return {}

if __name__ == "__main__":
  launch(run, "gpt2_e2e.py")
"""


FORKS = """
import json, os, runpy, signal, sys, traceback
import experiments.harness.launch, experiments.harness.workdir, experiments.nlg.config

def run(arguments):
  sys.argv = ["small.py", *arguments]
  sys.orig_argv = [sys.executable, "-m", "experiments.small", *arguments]
  try:
    runpy.run_module("experiments.small", run_name="__main__", alter_sys=True)
  except SystemExit as error:
    if isinstance(error.code, str):
      print(error.code, file=sys.stderr)
    return error.code if isinstance(error.code, int) else int(error.code is not None)
  except BaseException:
    traceback.print_exc()
    return 1
  return 0

for line in sys.stdin:
  request = json.loads(line)
  process = os.fork()
  if not process:
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    os.environ.update(request["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell has it ignored
    code = run(request["arguments"])
    sys.stdout.flush()
    os._exit(code)
  print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
  """A folder with the package `experiments` and a small experiment in it."""
  folder = tmp_path_factory.mktemp("package")
  (folder / "experiments").mkdir()
  for name in ("__init__.py", "harness", "nlg", "configs"):
    (folder / "experiments" / name).symlink_to(ROOT / "experiments" / name)
  (folder / "experiments" / "small.py").write_text(EXPERIMENT)
  sweeps = {
    "ranks": "({'lora.rank': rank} for rank in (1, 3, 2, 4))",
    "full": "[{'method': 'full_finetuning'}]",
    "methods": """[
      {'seed': 1},
      {'method': 'full_finetuning'},
      {'method': 'full_finetuning', 'optimizer.learning_rate': 0.5},
    ]""",
  }
  for name, sweep in sweeps.items():
    (folder / f"{name}.py").write_text(
      "from experiments.configs.gpt2_e2e import get_config\n\n"
      f"def sweep(config):\n  return {sweep}\n"
    )
  return folder


@pytest.fixture(scope="module")
def forking(package):
  """A process that has imported everything and forks for each command."""
  environment = os.environ | {"PYTHONSAFEPATH": "", "PYTHONPATH": f"{package}:{ROOT}"}
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
  command = [sys.executable, "-c", FORKS]
  with subprocess.Popen(command, cwd=package, env=environment, **pipes) as process:
    yield process
    process.stdin.close()


@pytest.fixture
def launched(package, forking):
  """Runs the small experiment in a process of its own; returns what it wrote."""

  def launch(*arguments, code=0, **environment):
    output = package / "output"
    request = {"arguments": arguments, "environment": environment, "output": str(output)}
    forking.stdin.write(json.dumps(request) + "\n")
    forking.stdin.flush()
    returned = int(forking.stdout.readline())
    assert returned == code, output.read_text()
    return output.read_text()

  return launch


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--config.lora.rnk=8", "error: the config has no field 'lora.rnk'; did you mean lora.rank,"),
    ("--config=experiments/configs/gpt2_e2e.py:midi", "error: variant must be one of mini, small"),
    ("--config=nothere.py", "error: there is no config file 'nothere.py'; expected --config=FILE"),
    (f"--config={ROOT}/README.md", "README.md is not a Python file; expected --config=FILE.py"),
    ("--config=experiments/configs/__init__.py", "has no function get_config(); expected"),
    ("--config=experiments/configs/finetune.py:x", "has no variants, got 'x'; expected --config=e"),
    ("--config.lora.rank=four", "flag --config.lora.rank=four: invalid literal for int()"),
    ("--config.lora.rank=4.5", "flag --config.lora.rank=4.5: invalid literal for int()"),
    ("rubbish", "unexpected arguments rubbish; see --help"),
    ("--config.lora.rank=3", "error: rank 3 is bad\n"),
    ("--config.lora.rank=9", "error: [Errno 2] No such file or directory"),
  ],
)
def test_mistakes_end_with_a_message(launched, argument, message):
  written = launched(argument, code=1)
  assert message in written
  assert "Traceback" not in written


@pytest.mark.parametrize(("kept", "platforms"), [(True, "cpu"), (False, "cpu"), (True, "")])
def test_memory_is_kept_on_cpus_where_the_config_says_so(package, launched, kept, platforms):
  if not platforms:  # as where a GPU's plugin is installed
    (package / "libtpu").mkdir()
  flags = (f"--config.keep_freed_memory={kept}", "--config.lora.rank=2")
  written = launched(*flags, JAX_PLATFORMS=platforms)
  assert ("memory is kept" in written) == (kept and platforms == "cpu")


def test_bugs_keep_their_traceback(launched):
  written = launched("--config.lora.rank=5", code=1)
  assert "Traceback" in written
  assert 'int("a bug")' in written
  written = launched("--config.lora.rank=3", "--traceback", code=1)
  assert "Traceback" in written


@pytest.mark.parametrize(("rank", "code"), [(11, 130), (12, 143), (13, 143)])
def test_a_signal_ends_with_one_line(launched, rank, code):
  """The line names the last checkpoint, and the command to resume, as typed."""
  arguments = (f"--config.lora.rank={rank}", f"--config.workdir=a folder/{rank}")
  written = launched(*arguments, code=code)
  kept = f"no checkpoint was saved in a folder/{rank} yet"
  if rank == 13:
    kept = f"a folder/{rank} is saved up to step 6 (a folder/{rank}/checkpoints/6)"
  command = f"{sys.executable} -m experiments.small {arguments[0]} '{arguments[1]}'"
  assert written.splitlines() == [
    "memory is kept",  # from before the run
    f"interrupted: {kept}. To resume: {command}",
  ]


def test_the_folder_is_named_by_what_the_flags_change(launched):
  assert "ran 7 runs/gpt2_e2e/mini,lora.rank=7\n" in launched("--config.lora.rank=7")
  written = launched(
    "--config.lora.rank=7", "--config.lora.target=.*/kernel", "--config.workdir=own"
  )
  assert "ran 7 own\n" in written
  assert "WARNING: a checkpoint is damaged" in written
  written = launched(
    "--config=experiments/configs/gpt2_e2e.py:small", "--config.lora.target=.*/kernel"
  )
  assert "ran 4 runs/gpt2_e2e/small,lora.target=" in written


def test_a_sweep_continues_after_a_failure_and_skips_finished_runs(launched):
  arguments = ("--sweep", "--config=ranks.py", "--config.workdir=ranks")
  written = launched(*arguments, "--sweep_shard=1/2", code=1)  # ranks 3 and 4
  assert "failed: rank 3 is bad" in written
  assert "ran 4 ranks/lora.rank=4" in written
  assert "error: 1 of 2 runs failed: ranks/lora.rank=3" in written
  assert "Traceback" not in written
  written = launched(*arguments, code=1)
  assert written.count("finished before") == 1
  assert "ran 1 " in written
  assert "ran 2 " in written
  written = launched(*arguments, "--config.seed=5", code=1)
  assert "belongs to a run with another config: seed=110 there, 5 now" in written
  written = launched("--sweep", "--sweep_shard=2/2", code=1)
  assert "error: --sweep_shard must be i/n with 0 <= i < n, got '2/2'" in written


def test_a_method_has_its_own_learning_rate_unless_one_is_named(package, launched):
  rate = "--config.optimizer.learning_rate"
  written = launched("--config.method=full_finetuning")
  assert written.count("optimizer.learning_rate=0.001, the default for full fine-tuning\n") == 1
  assert "runs/gpt2_e2e/mini,method=full_finetuning\nlearning rate 0.001\n" in written
  folder = package / "runs" / "gpt2_e2e" / "mini,method=full_finetuning"
  assert json.loads((folder / "config.json").read_text())["optimizer"]["learning_rate"] == 0.001
  written = launched("--config.method=full_finetuning", f"{rate}=0.01")
  assert "method=full_finetuning,optimizer.learning_rate=0.01\nlearning rate 0.01\n" in written
  assert "the default for" not in written
  assert "learning rate 0.01\n" in launched("--config.lora.rank=2")


def test_a_changed_field_that_the_method_ignores_is_an_error(launched):
  arguments = ("--config.method=full_finetuning", "--config.lora.rank=8")
  message = "error: lora.rank=8 has no effect with method=full_finetuning: leave it out, or choose"
  assert message in launched(*arguments, code=1)
  arguments = ("--config.method=frozen_base", "--config.optimizer.weight_decay=0.5")
  assert "optimizer.weight_decay=0.5 has no effect" in launched(*arguments, code=1)
  assert message in launched(
    "--sweep", "--config=ranks.py", "--config.method=full_finetuning", code=1
  ).replace("rank=1 ", "rank=8 ")
  arguments = ("--sweep", "--config=methods.py", "--config.workdir=methods")
  written = launched(*arguments, "--config.lora.rank=2")  # LoRA's run uses it
  assert [line for line in written.splitlines() if line.startswith("learning rate")] == [
    "learning rate 0.01",
    "learning rate 0.001",
    "learning rate 0.5",
  ]
  written = launched("--sweep", "--config=full.py", "--config.lora.rank=2", code=1)
  assert "error: lora.rank=2 has no effect with method=full_finetuning" in written
  assert ", frozen_base, floor, got 'dora_plus'" in launched("--config.method=dora_plus", code=1)


def test_apply_changes_a_copy():
  config = gpt2_e2e.get_config()
  assert apply(config, {"lora.rank": 2}).lora.rank == 2
  assert config.lora.rank == 16
  with pytest.raises(ValueError, match=r"no field 'lora.rnk'; did you mean lora\.rank"):
    apply(config, {"lora.rnk": 2})
  with pytest.raises(ValueError, match="does not fit the config"):
    apply(config, {"lora.rank": "two"})


def config(workdir, **fields):
  return replace_fields(
    read_config(E2EConfig, gpt2_e2e.get_config()), {"workdir": str(workdir), "seed": 1, **fields}
  )


@pytest.mark.parametrize("left", ["checkpoints", "adapter", "peft", "base", "model"])
def test_trained_files_belong_to_their_config(tmp_path, left):
  """Otherwise the next run would keep the old adapter instead of writing its own."""
  with open_workdir(config(tmp_path)) as workdir:
    (workdir / left).mkdir()
  with (
    pytest.raises(ValueError, match="another config: seed=1 there, 2 now"),
    open_workdir(config(tmp_path, seed=2)),
  ):
    pass


def test_a_folder_belongs_to_one_config(tmp_path):
  with open_workdir(config(tmp_path / "run")) as workdir:
    write_json(workdir / "result.json", {"loss": 0.5})
  (tmp_path / "run").rename(tmp_path / "moved")
  with open_workdir(config(tmp_path / "moved")) as workdir:
    assert read_result(workdir) == {"loss": 0.5}
    assert read_run(E2EConfig, workdir) == config(workdir)
  message = "another config: lora.rank=16 there, 8 now, seed=1 there, 2 now. Give another"
  other = replace_fields(config(tmp_path / "moved", seed=2), {"lora.rank": 8})
  with pytest.raises(ValueError, match=message), open_workdir(other):
    pass
  assert sorted(p.name for p in workdir.iterdir()) == [".lock", "config.json", "result.json"]
  assert read_result(tmp_path) is None
  with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
    read_run(E2EConfig, tmp_path)


HOLDER = """
import sys, time
from experiments.harness.workdir import open_workdir
from experiments.nlg.config import TemplateConfig
with open_workdir(TemplateConfig(workdir=sys.argv[1])):
  print("open", flush=True)
  time.sleep(60)
"""


def test_a_folder_belongs_to_one_process_until_it_dies(tmp_path):
  process = subprocess.Popen(
    [sys.executable, "-c", HOLDER, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  with process:
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    held = TemplateConfig(workdir=str(tmp_path))
    message = "is in use by another process"
    with pytest.raises(RuntimeError, match=message), open_workdir(held):
      pass
    process.send_signal(signal.SIGKILL)
  with open_workdir(held):
    pass


WRITER = """
import sys
from pathlib import Path
from experiments.harness.workdir import write_json
print("begun", flush=True)
for i in range(10**9):
  write_json(Path(sys.argv[1]), {"numbers": [i] * 2000})
"""


def test_json_is_written_whole_or_not_at_all(tmp_path):
  path = tmp_path / "result.json"
  process = subprocess.Popen(
    [sys.executable, "-c", WRITER, path], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  with process:
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.3)
    process.kill()
  assert len(json.loads(path.read_text())["numbers"]) == 2000


def test_the_commit_is_that_of_this_repository():
  run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
  assert commit().rstrip("+") == run.stdout[:12]
