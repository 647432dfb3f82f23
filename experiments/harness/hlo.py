"""The text of an HLO module, compiled or only partitioned: how often each instruction runs.

XLA's own `cost_analysis` counts a loop's body once, however often it runs, so that a scanned model
would seem almost free.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

NAME = r"%?([\w.$#-]+)"
COMPUTATION = re.compile(rf"^(ENTRY )?{NAME} \(.*\{{$")
INSTRUCTION = re.compile(rf"^\s+(?:ROOT )?{NAME} = (\(.*?\)|\w+\[\S*) [\w-]+\(")
ARRAY = re.compile(r"\w+\[([\d,]*)\]")
CALLED = re.compile(rf"(?:calls|to_apply|body|condition)={NAME}|branch_computations=\{{([^}}]*)\}}")
FUSED = re.compile(rf" fusion\(.*calls={NAME}")
WHILE = re.compile(rf" while\(.*condition={NAME}.* body={NAME}")
TRIPS = re.compile(r"known_trip_count\":\{\"n\":\"(\d+)\"")
COUNTER = re.compile(  # an operation on an integer
  rf"^\s+(?:ROOT )?{NAME} = \w+\[\]\S* (constant|add|get-tuple-element|compare)\(([^)]*)\)(.*)"
)
ROOT_TUPLE = re.compile(r"^\s+ROOT .* tuple\((.*?)\)")

Cost = Callable[[str, list[int], Mapping[str, list[int]]], float]
"""The cost of one instruction, from its line, its shape and the shapes of those before it."""


class Counting(NamedTuple):
  """The integers of a computation, from which the trips of a loop follow.

  Attributes:
    operations: operation, operands and attributes, by the name of the result.
    outputs: the names in the root's tuple.
  """

  operations: dict[str, tuple[str, list[str], str]]
  outputs: list[str]

  def constant(self, name: str) -> float:
    operation, operands, _ = self.operations.get(name, ("", [], ""))
    return float(operands[0]) if operation == "constant" else math.nan

  def place(self, name: str) -> str:
    """Returns the place of a value in the tuple of the loop's values, or "".

    Newer versions of XLA write an element of a tuple as `%tuple#1`, without an instruction.
    """
    if "#" in name:
      return f"index={name.rpartition('#')[2]}"
    operation, _, attributes = self.operations.get(name, ("", [], ""))
    return attributes if operation == "get-tuple-element" else ""

  def added(self, name: str, place: str) -> float:
    """Returns what is added to the value at a place of the loop's values; NaN if not a constant."""
    operation, operands, _ = self.operations.get(name, ("", [], ""))
    if operation == "add":
      return self.added(operands[0], place) + self.constant(operands[1])
    return 0.0 if self.place(name) == place else math.nan


def total_cost(text: str, cost: Cost, label: str) -> float:
  """Returns the sum of all instructions' costs, each multiplied by how often it runs.

  The trips of a loop are its `known_trip_count`, or, before XLA has found that, the limit in its
  condition over the step in its body, for a counter that starts at 0, as that of `scan` does.

  Args:
    text: of the module.
    cost: of one instruction.
    label: what has these costs, for the message.
  Raises:
    ValueError: if a loop with a cost has an unknown number of trips.
  """
  direct: dict[str, float] = {}
  calls: dict[str, list[tuple[str, str]]] = {}
  counting: dict[str, Counting] = {}
  entry = ""
  for name, line, instruction, shapes in _lines(text):
    if name not in direct:
      direct[name], calls[name], counting[name] = 0.0, [], Counting({}, [])
      entry = name if line.startswith("ENTRY ") else entry
    if instruction:
      direct[name] += cost(line, shapes[instruction], shapes)
    if counter := COUNTER.match(line):
      operands = re.findall(r"[\w.$#-]+", counter[3])
      place = re.match(r", (index=\d+|direction=\w+)", counter[4])
      counting[name].operations[counter[1]] = (counter[2], operands, place[1] if place else "")
    elif root := ROOT_TUPLE.match(line):
      counting[name].outputs.extend(re.findall(rf"{NAME}(?:,|$)", root[1]))
    calls[name] += [(inner, line) for inner in _called(line)]

  def total(name: str) -> float:
    inner = [(total(inner), line) for inner, line in calls[name]]
    return direct[name] + sum(cost * _times(line, counting) for cost, line in inner if cost)

  result = total(entry)
  if math.isnan(result):
    raise ValueError(f"a loop with {label} has no known trip count")
  return result


def instruction_costs(text: str, cost: Cost) -> dict[str, float]:
  """Returns the cost of each instruction: of a fusion, that of the instructions fused in it.

  Instructions that call computations in other ways, as loops, have only the cost of themselves.
  """
  direct: dict[str, float] = {}
  fused: dict[str, float] = {}  # of a computation
  fusions: dict[str, str] = {}
  for name, line, instruction, shapes in _lines(text):
    if instruction:
      direct[instruction] = cost(line, shapes[instruction], shapes)
      fused[name] = fused.get(name, 0.0) + direct[instruction]
      if called := FUSED.search(line):
        fusions[instruction] = called[1]
  return {name: ops + fused.get(fusions.get(name, ""), 0.0) for name, ops in direct.items()}


def _lines(text: str) -> Iterator[tuple[str, str, str, dict[str, list[int]]]]:
  """Yields the computation, the line, the name of its instruction or "", and the shapes so far.

  The shapes are those of the computation's instructions, by name.
  """
  computation, shapes = "", {}
  for line in text.splitlines():
    if header := COMPUTATION.match(line):
      computation, shapes = header[2], {}
    if not computation:
      continue
    name = ""
    if instruction := INSTRUCTION.match(line):
      name = instruction[1]
      elements = [numbers(sizes) for sizes in ARRAY.findall(instruction[2])]
      shapes[name] = elements[0] if elements else []
      shapes.update({f"{name}#{i}": shape for i, shape in enumerate(elements)})
    yield computation, line, name, shapes


def numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]


def _called(line: str) -> list[str]:
  """Returns the computations that an instruction calls."""
  names = []
  for called in CALLED.finditer(line):
    names += [called[1]] if called[1] else re.findall(NAME, called[2])
  return names


def _times(line: str, counting: Mapping[str, Counting]) -> float:
  """Returns how often an instruction calls each of its computations; NaN if that is unknown."""
  loop = WHILE.search(line)
  if not loop:
    return 1.0
  if trips := TRIPS.search(line):
    return float(trips[1])
  condition, body = counting[loop[1]], counting[loop[2]]
  compared = [x for x in condition.operations.values() if x[0] == "compare"]
  if len(compared) != 1 or compared[0][2] != "direction=LT":
    return math.nan
  counter, limit = compared[0][1]
  place = condition.place(counter)
  number = int(place.removeprefix("index=") or -1)
  if not 0 <= number < len(body.outputs):
    return math.nan
  step = body.added(body.outputs[number], place)
  return -(-condition.constant(limit) // step) if step > 0 else math.nan  # rounded up
