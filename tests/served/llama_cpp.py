"""llama.cpp in a process of its own, which the tests ask for logits, greedy tokens and ids."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.paths import ROOT

FOLDER = ROOT / ".served"  # where `make test-served` installs the package node-llama-cpp
SCRIPT = Path(__file__).parent / "llama_cpp.mjs"


class Adapter(NamedTuple):
  """An adapter file and the number that llama.cpp multiplies it by."""

  path: Path
  scale: float = 1.0


class Step(NamedTuple):
  """A token that was generated, and the two likeliest with their probabilities."""

  token: int
  top: dict[int, float]


def missing() -> str:
  """Returns what the tests lack, or nothing."""
  if shutil.which("node") is None:
    return "no node; install node 20 or newer, then run make test-served"
  if not (FOLDER / "node_modules" / "node-llama-cpp").is_dir():
    return "no llama.cpp; make test-served installs it (the npm package node-llama-cpp, 85 MB)"
  return ""


class LlamaCpp:
  """A process of `llama_cpp.mjs`, which holds each model that it has loaded."""

  def __init__(self):
    self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, until `close`
    self._process = subprocess.Popen(
      ["node", SCRIPT, FOLDER],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._log,
      text=True,
    )

  def ask(self, **request: Any) -> dict[str, Any]:
    """Returns the answer to a request; `llama_cpp.mjs` lists them.

    Raises:
      RuntimeError: with llama.cpp's own words, if it refuses the request or ends.
    """
    assert self._process.stdin is not None
    assert self._process.stdout is not None
    self._process.stdin.write(json.dumps(request) + "\n")
    self._process.stdin.flush()
    line = self._process.stdout.readline()
    answer = json.loads(line) if line else {"error": f"llama.cpp ended: {self._process.wait()}"}
    if "error" in answer:
      self._log.seek(0)
      raise RuntimeError(f"{answer['error']}\n{self._log.read()[-2000:]}")
    return answer

  def logits(
    self, model: Path, tokens: Sequence[int], *adapters: Adapter, **options: Any
  ) -> np.ndarray:
    """Returns the logits (T, V) after each of the tokens."""
    return np.asarray(self._ask("logits", model, tokens, adapters, options)["logits"])

  def greedy(
    self, model: Path, tokens: Sequence[int], count: int, *adapters: Adapter, **options: Any
  ) -> list[Step]:
    """Returns up to `count` tokens, each the likeliest, up to the first of `stop`."""
    answer = self._ask("greedy", model, tokens, adapters, options | {"count": count})
    steps = zip(answer["tokens"], answer["top"], strict=True)
    return [Step(token, {int(i): p for i, p in top}) for token, top in steps]

  def _ask(
    self,
    what: str,
    model: Path,
    tokens: Sequence[int],
    adapters: Sequence[Adapter],
    options: dict[str, Any],
  ) -> dict[str, Any]:
    files = [{"filePath": str(adapter.path), "scale": adapter.scale} for adapter in adapters]
    tokens = [int(token) for token in tokens]
    return self.ask(do=what, model=str(model), tokens=tokens, adapters=files, **options)

  def close(self) -> None:
    self._process.kill()
    self._process.wait()
    for file in (self._process.stdin, self._process.stdout, self._log):
      assert file is not None
      file.close()
