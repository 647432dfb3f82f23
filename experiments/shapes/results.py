"""Results at the paper's real shapes as files, which the table of claims of `paper` reads."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from lora_jax.fields import Count, Within, read_section
from lora_jax.files import read_json

Positive = Annotated[float, Within("(0, inf)")]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Way:
  """The times of one way to compute a pass, in seconds, a turn after another."""

  name: str
  seconds: tuple[Positive, ...]


@dataclasses.dataclass(frozen=True)
class TimedCase:
  """A row of `benchmarks.latency`: rows of tokens, widths of adapters, and the ways of a pass."""

  batch_size: Count
  length: Count
  lin_width: Count
  houlsby_width: Count
  ways: tuple[Way, ...]

  @property
  def sizes(self) -> tuple[int, int, int, int]:
    return self.batch_size, self.length, self.lin_width, self.houlsby_width


@dataclasses.dataclass(frozen=True)
class Latencies:
  """The file that `benchmarks.latency --save` writes; `scanned` tells whether layers are a loop."""

  model: str
  dtype: str
  device: str
  scanned: bool
  cases: tuple[TimedCase, ...] = ()

  @property
  def conditions(self) -> str:
    """What all cases have in common, in words."""
    layers = "scanned" if self.scanned else "unrolled"
    return f"{self.model}, {self.dtype}, {self.device}, {layers} layers"

  def with_case(self, case: TimedCase) -> "Latencies":
    """Returns the results with a case, which replaces an earlier one of the same sizes."""
    others = (other for other in self.cases if other.sizes != case.sizes)
    return dataclasses.replace(self, cases=(*others, case))


@dataclasses.dataclass(frozen=True)
class StepSizes:
  """A model and a method at its real size.

  Attributes:
    model, method: keys of `MODELS` and `METHODS`.
    checkpoint: of the trained parameters, at 2 bytes each, in bytes.
    memory: of a compiled train step, arguments and temporaries, in bytes.
    flops: of its matmuls, operations.
  """

  model: str
  method: str
  checkpoint: Count
  memory: Positive
  flops: Positive


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The file that `experiments.paper_shapes --save` writes."""

  batch: str
  steps: tuple[StepSizes, ...]


def save(path: Path, results: Any) -> None:
  """Writes results as JSON."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(dataclasses.asdict(results), indent=1) + "\n", "utf-8")


def read(kind: type[T], path: Path) -> T | None:
  """Returns the results in a file; None if there is none.

  Raises:
    ValueError: naming the file and the field, if it is not such a file.
  """
  if not path.exists():
    return None
  content = read_json(path)  # its errors name the file
  try:
    return read_section(kind, content)
  except ValueError as error:
    raise ValueError(
      f"{path}: {error}. If an earlier version wrote it, move it away, and rerun its command"
    ) from error
