"""The records of the comparison's runs as JSON lines; each is checked when it is read."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from experiments.comparison.plan import FROZEN, STAGES
from experiments.configs.variants import ARMS
from experiments.harness.launch import RATE
from lora_jax import files
from lora_jax.fields import Within, read_value
from lora_jax.trees import closest_names

COSTS = "costs"  # a stage without runs
Record = dict[str, Any]

Number = Annotated[float, Within("(-inf, inf)")]
Count = Annotated[int, Within("[0, inf)")]
NAMES = {"arm": str, "base": Literal["embedded", "smollm2"]}
RUN = {"seed": int, "status": Literal["finished", "failed"], "settings": Mapping}
FINISHED = {"valid_loss": Number}
REPORTED = {"adapter_bytes": Count, "input_losses": tuple[Number], "input_tokens": tuple[Count]}
STEP = ("gflop", "step_megabytes", "step_seconds", "step_ratio")
MEASURED: dict[str, Any] = dict.fromkeys(STEP, Number)
OPTIONAL = {"parameters": Count, "train_seconds": Number, "wikipedia_loss": Number, "bleu": Number}


class _Fields(NamedTuple):
  """The fields of a record, with their types, and where it is in the file."""

  record: Record
  where: str

  def check(self, kinds: Mapping[str, Any]) -> None:
    for name, kind in kinds.items():
      if name not in self.record:
        raise ValueError(f"{self.where}: the record lacks the field {name!r}")
      read_value(kind, self.record[name], f"{self.where}: {name}")


def check_record(record: Any, where: str) -> Record:
  """Returns a record; raises ValueError if the page cannot be made from it.

  Args:
    record: any JSON value.
    where: its file and line.
  """
  if not isinstance(record, dict):
    raise ValueError(f"{where}: expected a run's record, got {str(record)[:60]!r}")
  fields = _Fields(record, where)
  fields.check({"stage": Literal[*STAGES, COSTS], **NAMES})  # pyright: ignore[reportInvalidTypeForm]
  stage, arm = record["stage"], record["arm"]
  if arm not in ARMS and arm != FROZEN:
    likely = ", ".join(closest_names(arm, ARMS))
    raise ValueError(f"{where}: there is no arm {arm!r}; did you mean {likely}?")
  if stage == COSTS:
    fields.check(MEASURED)
    return record
  if record["base"] != STAGES[stage]:
    raise ValueError(f"{where}: base must be {STAGES[stage]}, {stage}'s, got {record['base']!r}")
  fields.check(RUN)
  if arm != FROZEN:
    if RATE not in record["settings"]:
      raise ValueError(f"{where}: the record's settings lack {RATE!r}")
    read_value(Number, record["settings"][RATE], f"{where}: {RATE}")
  finished = record["status"] == "finished"
  is_reported = finished and stage in ("seeds", "smollm2") and arm != FROZEN
  fields.check(FINISHED if finished else {})
  fields.check(REPORTED if is_reported else {})
  fields.check({name: kind for name, kind in OPTIONAL.items() if name in record})
  if is_reported and len(record["input_losses"]) != len(record["input_tokens"]):
    raise ValueError(
      f"{where}: input_losses has {len(record['input_losses'])} numbers, and input_tokens "
      f"{len(record['input_tokens'])}: expected one of each for every input"
    )
  return record


def write_lines(path: Path, records: Iterable[Record]) -> None:
  """Writes records as JSON lines; a process that reads the file has the old or the new ones."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  temporary.write_text("".join(f"{json.dumps(record)}\n" for record in records), "utf-8")
  os.replace(temporary, path)


def read_lines(path: Path) -> list[Record]:
  """Returns the records of a file of JSON lines.

  Raises:
    FileNotFoundError: if there is none.
    ValueError: if there are no records, or a line is not one, naming it.
  """
  if not path.exists():
    raise FileNotFoundError(f"there is no file {path}: run python -m experiments.variants first")
  records = [
    check_record(files.parse_json(line, where), where) for where, line in files.read_lines(path)
  ]
  if not records:
    raise ValueError(f"{path} is empty: expected the records of runs, one a line")
  return records
