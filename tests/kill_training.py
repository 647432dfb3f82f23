"""Kills a run at random moments; its adapter must equal an undisturbed run's bit for bit.

    python -m tests.kill_training --kills 20

Both runs are the real command, each in its own process. After each `SIGKILL` the same command
starts again. One kill in five comes during the start of the process, the others shortly after a
random step, most of them while a checkpoint is written, which takes longer than a step.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from lora_jax.training.metrics_log import read_metrics

from tests.paths import ROOT
from tests.tiny_e2e import tiny_folder

STEPS = 24


def command(workdir: Path, model: Path) -> list[str]:
  """Returns a run's command: LoRA with dropout on real lines, a checkpoint every two steps."""
  fields = {
    "workdir": workdir,
    "model.folder": model,
    "lora.rank": 4,
    "lora.dropout": 0.1,
    "data.num_train_records": 250,
    "data.num_valid_records": 20,
    "data.batch_size": 4,
    "fit.num_train_steps": STEPS,
    "fit.eval_every_steps": 3,
    "fit.checkpoint_every_steps": 2,
    "fit.log_every_steps": 1,
    "decoding.num_inputs": 0,
  }
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  return [sys.executable, "-m", "experiments.gpt2_e2e", *flags]


def start(arguments: list[str], log: Path, cache: Path) -> subprocess.Popen[bytes]:
  """Starts a process whose output goes to `log`; compiled programs are kept in `cache`."""
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  with log.open("wb") as file:
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=file, stderr=file)


def last_step(log: Path) -> int:
  """Returns the last step that a process has reported."""
  steps = re.findall(r"^step ([\d,]+) of", log.read_text("utf-8"), re.MULTILINE)
  return int(steps[-1].replace(",", "")) if steps else 0


def wait_until(process: subprocess.Popen[bytes], step: int, log: Path) -> None:
  """Waits for a process to report a step."""
  while last_step(log) < step:
    if process.poll() is not None:
      raise RuntimeError(f"the run ended, {process.returncode}:\n{log.read_text('utf-8')}")
    time.sleep(0.002)


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
  if process.wait() != 0:
    raise RuntimeError(f"the run failed, {process.returncode}:\n{log.read_text('utf-8')}")


def kill_once(
  process: subprocess.Popen[bytes], draw: random.Random, step: int | None, startup: float, log: Path
) -> str:
  """Kills a process, after a step or in its first seconds; returns when that was."""
  if step is None:
    started, seconds = time.perf_counter(), draw.uniform(0, startup)
    while time.perf_counter() < started + seconds and not last_step(log):
      time.sleep(0.01)
    when = f"{time.perf_counter() - started:.1f} s after its start"
  else:
    wait_until(process, step, log)
    time.sleep(draw.uniform(0, 0.25))
    when = f"after step {last_step(log)}"
  if process.poll() is not None:
    raise RuntimeError(f"the run ended before it was killed:\n{log.read_text('utf-8')}")
  process.kill()
  process.wait()
  return when


def arrays(workdir: Path) -> dict[str, np.ndarray]:
  """Returns the arrays of a run's adapter."""
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
    args = ocp.args.Composite(arrays=ocp.args.StandardRestore())
    return checkpointer.restore(workdir / "adapter", args=args)["arrays"]


def losses(workdir: Path) -> list[tuple[int, float | None, float | None]]:
  """Returns the steps and losses of every line of a run's log."""
  lines = read_metrics(workdir / "metrics.jsonl")
  return [(line["step"], line.get("train/loss"), line.get("valid/loss")) for line in lines]


def compare(disturbed: Path, undisturbed: Path) -> int:
  """Checks that two runs ended with the same bits; returns the adapter's size in bytes."""
  got, expected = arrays(disturbed), arrays(undisturbed)
  assert got.keys() == expected.keys()
  for name, array in expected.items():
    assert np.asarray(got[name]).tobytes() == np.asarray(array).tobytes(), name
  size = sum(np.asarray(array).nbytes for array in expected.values())
  assert losses(disturbed) == losses(undisturbed)
  results = [
    json.loads((folder / "result.json").read_text()) for folder in (disturbed, undisturbed)
  ]
  for name in ("best_step", "valid_loss", "last_valid_loss"):
    assert results[0][name] == results[1][name], name
  return size


def main(kills: int, seed: int, folder: Path) -> None:
  """Runs, kills and compares in a folder."""
  draw, model = random.Random(seed), tiny_folder()
  started = time.perf_counter()
  undisturbed, disturbed, log = folder / "undisturbed", folder / "disturbed", folder / "log"
  process = start(command(undisturbed, model), log, folder / "cache")
  wait_until(process, 1, log)
  startup = time.perf_counter() - started
  finish(process, log)
  print(f"undisturbed: {STEPS} steps in {time.perf_counter() - started:.0f} s", flush=True)

  at_start = -(-kills // 5)
  steps: list[int | None] = sorted(draw.randint(1, STEPS - 4) for _ in range(kills - at_start))
  for _ in range(at_start):
    steps.insert(draw.randint(0, len(steps)), None)
  unfinished = 0
  for number, step in enumerate(steps, 1):
    process = start(command(disturbed, model), log, folder / "cache")
    when = kill_once(process, draw, step, startup, log)
    checkpoints = disturbed / "checkpoints"
    left = [path.name for path in checkpoints.glob("*") if not path.name.isdecimal()]
    unfinished += bool(left)
    print(f"kill {number:2}: {when}{', while writing a checkpoint' if left else ''}", flush=True)
  finish(start(command(disturbed, model), log, folder / "cache"), log)
  size = compare(disturbed, undisturbed)
  print(
    f"{kills} kills, {unfinished} of them while a checkpoint was written or removed, in "
    f"{time.perf_counter() - started:.0f} s: the adapter's {size:,} bytes, its best step and the "
    "log of losses are the undisturbed run's"
  )


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  temporary = Path(tempfile.mkdtemp(prefix="kill-training-"))
  main(options.kills, options.seed, temporary)
  shutil.rmtree(temporary)
