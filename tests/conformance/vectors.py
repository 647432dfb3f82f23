"""The committed vectors, read once."""

import functools
import json
from typing import Any

import numpy as np

from conformance.check import read
from conformance.make import VECTORS as FOLDER

VECTORS = sorted(path.stem for path in FOLDER.glob("*.safetensors"))


@functools.cache
def vector(name: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Returns the arrays and the metadata of a vector."""
  return read(FOLDER / f"{name}.safetensors")


def cases(name: str) -> dict[str, dict[str, Any]]:
  """Returns the settings of each case."""
  return json.loads(vector(name)[1]["cases"])
