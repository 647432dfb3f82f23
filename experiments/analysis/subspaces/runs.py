"""Reads the adapters of finished runs, and finds out what they are compared for."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, PyTree

import lora_jax as lj
from experiments.configs.subspaces import ROUNDING
from experiments.harness.methods import METHODS, find_method, lora_config
from experiments.harness.workdir import read_finished, read_run
from experiments.nlg.base import Base, load_base
from experiments.nlg.config import E2EConfig
from experiments.nlg.restore import load_adapter
from experiments.nlg.rounding import rounded
from lora_jax.adapters.delta import adapter_weights
from lora_jax.analysis import Subspaces, adapted_matrices, subspaces
from lora_jax.trees import matches

KINDS = ("query", "value", "out")  # of weights; figures show the first two, as the paper does
TRAINED, SHUFFLED, RANDOM_BASE = "trained", "shuffled completions", "random base"
Matrices = Float[np.ndarray, "layers d_in d_out"]


class Trained(NamedTuple):
  """A finished run.

  Attributes:
    folder: of the run.
    config: of the run.
    result: the content of its `result.json`.
    adapter: its trained tree, as plain LoRA.
    base: the base model.
    subspaces: of the adapter, by kind of weight, as far as the run adapts it.
  """

  folder: Path
  config: E2EConfig
  result: dict[str, Any]
  adapter: PyTree
  base: Base
  subspaces: dict[str, Subspaces]

  @property
  def rank(self) -> int:
    return self.config.lora.rank

  @property
  def kind(self) -> str:
    """How it was trained: `trained`, or as a null on shuffled completions or random weights."""
    if self.config.model.start == "random":
      return RANDOM_BASE
    return SHUFFLED if self.config.data.shuffled_completions else TRAINED

  def weights(self, kind: str) -> Matrices:
    """Returns the base model's weights of a kind, as matrices of inputs times outputs."""
    return adapted_matrices(self.base.params, self.adapter, pattern_of(kind))

  def rounding_errors(self, kind: str) -> Matrices:
    """Returns what rounding to 4 bits adds to the weights of a kind."""
    params = rounded(lj.dequantize(self.base.params), ROUNDING)
    return adapted_matrices(params, self.adapter, pattern_of(kind)) - self.weights(kind)


def pattern_of(kind: str) -> str:
  """Returns the pattern of the paths of a kind of weight."""
  return rf".*/attn/{kind}/kernel"


def load_runs(folders: Sequence[str | Path]) -> list[Trained]:
  """Loads finished runs; those on one base model share its weights.

  Raises:
    FileNotFoundError: if a folder is not a run's, or its adapter is missing.
    ValueError: if a run is not finished, its adapter is not plain LoRA nor exactly convertible to
      it, or it adapts neither query nor value.
  """
  bases: dict[Any, Base] = {}
  return [_load(folder, bases) for folder in folders]


def _load(folder: str | Path, bases: dict[Any, Base]) -> Trained:
  config, result = read_run(E2EConfig, folder), read_finished(folder)
  if not find_method(config.method).has_servers:
    known = ", ".join(name for name, method in METHODS.items() if method.has_servers)
    raise ValueError(
      f"{folder} is a run of method={config.method}, which has no low-rank factors; expected one "
      f"of {known}"
    )
  seed = config.seed if config.model.start == "random" else None
  key = (config.model, config.data.prompt, config.mesh, seed)
  if key not in bases:
    bases[key] = load_base(config, config.mesh.make())
  base = bases[key]
  lora, trained = lj.to_lora(lora_config(config), load_adapter(config, base), base.params)
  paths = adapter_weights(trained)
  adapted = [kind for kind in KINDS if any(matches(pattern_of(kind), path) for path in paths)]
  if not {*adapted} & {*KINDS[:2]}:
    raise ValueError(
      f"{folder} adapts neither {pattern_of('query')} nor {pattern_of('value')}, whose subspaces "
      f"are compared; its lora.target is {config.lora.target!r}"
    )
  spaces = {kind: subspaces(lora, trained, base.params, pattern_of(kind)) for kind in adapted}
  return Trained(Path(folder), config, result, trained, base, spaces)


class Study(NamedTuple):
  """Runs by what they are compared for.

  Attributes:
    high: the run of the largest rank and the first seed.
    low: of the smallest rank and the same seed.
    second: of the largest rank and another seed.
    nulls: of the first seed, with shuffled completions, and on random weights.
    unused: the others.
  """

  high: Trained
  low: Trained | None
  second: Trained | None
  nulls: list[Trained]
  unused: list[Trained]

  @property
  def rows(self) -> list[Trained]:
    """The runs of Table 7, by rank."""
    real = [self.high] if self.low is None else [self.low, self.high]
    return sorted([*real, *self.nulls], key=lambda run: run.rank)


def arrange(runs: Sequence[Trained]) -> Study:
  """Finds out by their configs what runs are compared for.

  Raises:
    ValueError: if none is trained on its own completions, two have one rank, seed and kind of
      training, or they adapt different base models or layers.
  """
  places: dict[Any, Trained] = {}
  for run in runs:
    other = places.setdefault((run.kind, run.rank, run.config.seed), run)
    if other is not run:
      raise ValueError(
        f"{other.folder} and {run.folder} have one rank, seed and kind of training ({run.kind}); "
        "leave out one of them"
      )
  real = [run for run in runs if run.kind == TRAINED]
  if not real:
    raise ValueError(
      "all runs are nulls, on random weights or shuffled completions; add one without these"
    )
  real.sort(key=lambda run: (-run.rank, run.config.seed))
  high = real[0]
  for run in runs:
    if run.kind != RANDOM_BASE and run.result["base"] != high.result["base"]:
      raise ValueError(f"{high.folder} and {run.folder} adapt different base models; expected one")
    for kind in run.subspaces.keys() & high.subspaces.keys():
      if _layers(run, kind) != _layers(high, kind):
        raise ValueError(
          f"{high.folder} and {run.folder} adapt {kind} in different layers; expected the same ones"
        )
  seed = high.config.seed
  smaller = [run for run in real if run.rank < high.rank and run.config.seed == seed]
  low = smaller[-1] if smaller else None
  second = next((run for run in real[1:] if run.rank == high.rank), None)
  nulls = [run for run in runs if run.kind != TRAINED and run.config.seed == seed]
  used = [high, low, second, *nulls]
  return Study(high, low, second, nulls, [r for r in runs if not any(r is run for run in used)])


def _layers(run: Trained, kind: str) -> list[list[str]]:
  """Returns the numbers of the layers that a run adapts, scanned or not."""
  return [re.findall(r"\d+", name) for name in run.subspaces[kind].names]
