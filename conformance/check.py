"""Compares an implementation's outputs with a vector.

from conformance.check import disagreements, read
tensors, metadata = read("conformance/vectors/lora.safetensors")
outputs = {"matmul/out": ..., "matmul/merged": ..., "matmul/grad/lora_a": ..., ...}
for line in disagreements(tensors, outputs, only="matmul/"): print(line)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conformance.files import read as read_file

RESULTS = ("out", "grad", "merged", "merged_bias", "start")
"""What follows the case's name in the name of a result: `CASE/out`, `CASE/grad/NAME`."""

TOLERANCE = 1e-5
"""For float32: the largest difference, as a share of the largest expected magnitude."""


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Returns the arrays of a vector by name, and its metadata.

  Raises:
    ValueError: if the file is not a vector, naming it.
  """
  return read_file(Path(path))


def results_of(expected: Mapping[str, np.ndarray], only: str | tuple[str, ...] = "") -> list[str]:
  """Returns the names of a vector's results; its other arrays are given.

  Args:
    expected: a vector.
    only: the first letters of names, one or several; "" is all.
  """
  return [name for name in expected if name.split("/")[1] in RESULTS and name.startswith(only)]


def disagreements(
  expected: Mapping[str, np.ndarray],
  outputs: Mapping[str, Any],
  tolerance: float = TOLERANCE,
  only: str | tuple[str, ...] = "",
) -> list[str]:
  """Returns one line for each result that is missing, differs, has another shape or is unknown.

  Args:
    expected: a vector.
    outputs: an implementation's, by the vector's names.
    tolerance: the largest difference, as a share of the largest expected magnitude.
    only: the results that may not be missing, by the first letters of their names: `"matmul/"`, if
      an implementation has no other layers. "" is all.
  Raises:
    ValueError: if the vector has no such results: nothing would be compared.
  """
  wanted = results_of(expected, only)
  if not wanted and not any(name.startswith(only) for name in outputs):
    cases = sorted({name.split("/")[0] for name in results_of(expected)})
    raise ValueError(f"the vector has no results {only!r}; its cases are {', '.join(cases)}")
  lines = [f"{name} is missing" for name in wanted if name not in outputs]
  for name, output in outputs.items():
    got = np.asarray(output)
    if name not in expected:
      lines.append(f"{name} is not in the vector")
    elif got.shape != expected[name].shape:
      lines.append(f"{name} has shape {got.shape}, expected {expected[name].shape}")
    else:
      want = expected[name].astype(np.float64)
      scale = max(float(np.max(np.abs(want), initial=0.0)), 1e-30)
      error = float(np.max(np.abs(got.astype(np.float64) - want), initial=0.0)) / scale
      if not error <= tolerance:
        lines.append(f"{name} differs by {error:.2g} of its largest value, allowed {tolerance:.2g}")
  return lines
