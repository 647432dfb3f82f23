"""Records of measurements that were not made, for tests of the table and the command."""

from experiments.analysis.capacity import BITS, next_runs
from experiments.analysis.records import Planned
from experiments.analysis.sharpness import plan_sharpness
from experiments.configs.mechanism import FULL, THRESHOLDS

ORIGIN = {"seconds": 36.0, "device": "1 x cpu", "jax": "0.10", "commit": "0123456789ab"}
PARAMETERS = 1000


def made(planned, **result):
  return {**planned._asdict(), "status": "finished", **result, **ORIGIN}


def sharp(arm, value):
  (planned,) = plan_sharpness(FULL, [arm])
  shares = {"lora_a": 0.1, "lora_b": 0.9}
  start = {"sharpness": value, "residual": value / 100, "shares": shares}
  return made(planned, start=start, later={**start, "sharpness": 2 * value})


def intruding(arm, counts):
  """Returns a record for each seed: its intruders at the main threshold, of 20 vectors."""
  return [
    made(
      Planned("intruders", arm, {"run": f"{arm},seed={seed}", "run_seed": seed}),
      weights=2,
      intruders={str(threshold): count * threshold / 0.5 for threshold in THRESHOLDS},
      effective_rank=4.0,
      relative_change=0.25,
    )
    for seed, count in enumerate(counts, 1)
  ]


def remembering(arm, limit):
  """Returns the records of an arm that remembers all codes, up to a number of bits."""
  records = []
  while runs := next_runs(FULL, [arm], records):
    for planned in runs:
      bits = min(limit, planned.settings["pairs"] * BITS)
      fields = {"bits": bits, "nats": 1.0, "parameters": PARAMETERS}
      records.append(made(planned, **fields, bits_per_parameter=bits / PARAMETERS))
  return records
