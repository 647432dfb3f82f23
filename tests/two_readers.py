"""Two real processes that read checkpoints, each its own copy; one of the copies is damaged.

python -m tests.two_readers FOLDER --port 12345 --process_id 0
"""

import argparse
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lora_jax.placement import place
from lora_jax.training.checkpoint import Checkpoints, DamagedCheckpoint
from lora_jax.training.mesh import make_mesh

BASE = "0123456789abcdef"
DAMAGES = {  # the process, and the file that it lacks
  "about of 0": (0, "about/metadata"),
  "about of 1": (1, "about/metadata"),
  "arrays of 1": (1, "state/manifest.ocdbt"),
}


def results(folder: Path, process: int) -> dict[str, list[object]]:
  """Returns by damage the error of reading step 2, and the steps that are read instead."""
  sharding = jax.NamedSharding(make_mesh(data=2), P("data"))
  state = {"w": place(jnp.arange(4.0), sharding)}
  with Checkpoints(folder / "common") as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state, None, BASE, 1.0 / step)
  outcomes = {}
  for name, (damaged, file) in DAMAGES.items():
    copy = folder / f"{name}, copy of {process}"
    shutil.copytree(folder / "common", copy)
    if process == damaged:
      (copy / "2" / file).unlink()
    with Checkpoints(copy) as checkpoints:
      error = ""
      try:
        checkpoints.restore(2, state, BASE)
      except DamagedCheckpoint as raised:
        error = str(raised)
      best = checkpoints.restore_best(state, BASE).step
      last = checkpoints.restore_last(state, BASE)
      assert last is not None
    outcomes[name] = [error, best, last.step]
  return outcomes


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("folder", type=Path)
  parser.add_argument("--port", type=int, required=True)
  parser.add_argument("--process_id", type=int, required=True)
  options = parser.parse_args()
  jax.distributed.initialize(f"localhost:{options.port}", 2, options.process_id)
  print(json.dumps(results(options.folder, options.process_id)))
