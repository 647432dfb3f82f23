"""Does runs of an experiment one after another, each in its folder."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from experiments.configs import Config
from experiments.harness.attempt import attempt, has_failed


def do_runs(configs: Iterable[Config], run: Callable[[Config], Mapping[str, Any]]) -> list[str]:
  """Does the runs that are not finished; returns the folders of those that could not be done.

  A run whose training is not finite has failed: that is a result, and it is not repeated.

  Args:
    configs: of the runs, each with its workdir.
    run: such as `experiments.gpt2_e2e.run`, which resumes an interrupted run and repeats no
      finished one.
  """
  broken = []
  for config in configs:
    print(config.workdir, flush=True)
    if has_failed(config.workdir):
      print("  failed before", flush=True)
      continue
    if not attempt(config.workdir, lambda config=config: _loss(run(config))):
      broken.append(config.workdir)
  return broken


def _loss(result: Mapping[str, Any]) -> str:
  return f"loss {result['valid_loss']:.4f} nats/token"
