"""Carries out planned runs, each in its folder, and collects their records.

Beside the files of every run (experiments/harness/workdir.py) a folder has

    failed.json     why its training failed, instead of result.json
    measured.json   its losses by input, and on Wikipedia text; of the reported runs
    planned.json    its stage and arm; written last
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.classification.config import GlueConfig
from experiments.comparison.lines import COSTS, Record
from experiments.comparison.losses import folder_bytes, measure_losses
from experiments.comparison.plan import FROZEN, STAGES, Planned, config_of
from experiments.comparison.sizes import trained_at_once
from experiments.configs import Config
from experiments.configs.variants import Sizes
from experiments.harness import sharing
from experiments.harness.attempt import FAILED, attempt
from experiments.harness.config import flat, read_config
from experiments.harness.sharing import PLANNED, Task
from experiments.harness.workdir import read_result, read_run, stored_config, write_json
from experiments.nlg.config import E2EConfig, Texts
from experiments.nlg.e2e import decoded_inputs, read_predictions
from lora_jax.files import read_json
from lora_jax.metrics import ngrams

MEASURED = "measured.json"
SETTINGS = (  # of a record
  *("lora.rank", "lora.alpha", "lora.target", "optimizer.learning_rate"),
  *("optimizer.weight_decay", "optimizer.warmup_share", "data.num_train_records"),
)


def carry_out(
  runs: Iterable[Planned], sizes: Sizes, root: Path, run: Callable[[Config], Mapping[str, Any]]
) -> list[str]:
  """Does runs that are not finished yet; returns the folders of those that could not be done.

  A run whose training is not finite has failed: that is a result, and it is not repeated. A run
  that was done with another config is an error. Several processes share the runs of a root: one
  that another process does now is waited for.

  Args:
    runs: planned runs.
    sizes: of the comparison.
    root: the folder of all runs.
    run: `experiments.gpt2_e2e.run`.
  Raises:
    ValueError: if a folder has a run with another config.
  """

  def task(planned: Planned) -> Task:
    folder = root / planned.stage / planned.name
    config = config_of(planned, sizes, str(folder))
    check = functools.partial(check_config, folder, config)
    return Task(folder, check, lambda: _do(planned, config, folder, run))

  return sharing.carry_out(map(task, runs))


def _do(
  planned: Planned, config: Config, folder: Path, run: Callable[[Config], Mapping[str, Any]]
) -> bool:
  """Does a run; returns whether it could be done. If not, the others are still worth doing."""
  print(f"[{planned.stage}] {folder}", flush=True)

  def do() -> str:
    result = run(config)
    if _is_measured(planned):
      write_json(folder / MEASURED, measure_losses(folder))
    return f"loss {result['valid_loss']:.4f} nats/token"

  if not attempt(folder, do):
    return False
  write_json(folder / PLANNED, {"stage": planned.stage, "arm": planned.arm})
  return True


def check_config(
  folder: Path, config: Config, kind: type[E2EConfig] | type[GlueConfig] = E2EConfig
) -> None:
  """Raises ValueError if a folder's run had another config, such as fewer examples.

  Args:
    folder: of a finished or failed run.
    config: the planned one.
    kind: of the run's experiment.
  """
  if read_run(kind, folder) != read_config(kind, config):
    raise ValueError(
      f"{folder} is a run with other settings than are planned now. Give another --root, or "
      "remove the folder to run it again"
    )


def _is_measured(planned: Planned) -> bool:
  return planned.arm == FROZEN or planned.stage in ("seeds", "smollm2")


def collect(root: Path) -> list[Record]:
  """Returns a record of each finished or failed run, by stage and name.

  A record of a run has its stage, arm, base model, status, settings and results. Its status is
  failed if the training was not finite, or ended with a loss above the base model's own; else
  finished. The costs of a train step are records of the stage costs.
  """
  records = [_record(path.parent) for path in sorted(root.glob(f"*/*/{PLANNED}"))]
  frozen = {r["base"]: r["valid_loss"] for r in records if r["arm"] == FROZEN}
  for record in records:
    limit = frozen.get(record["base"], math.inf)
    if record["status"] == "finished" and record["valid_loss"] > limit:
      record |= {"status": "failed", "reason": f"its loss is above the base model's, {limit:.3f}"}
  records.sort(key=lambda record: list(STAGES).index(record["stage"]))
  for base in dict.fromkeys(STAGES.values()):
    for arm, costs in read_costs(root, base).items():
      records.append({"stage": COSTS, "arm": arm, "base": base, **costs})
  return records


def read_costs(root: Path, base: str) -> dict[str, Any]:
  """Returns the costs of the arms' train steps on a base model, as far as they are measured."""
  path = costs_file(root, base)
  return read_json(path) if path.exists() else {}


def costs_file(root: Path, base: str) -> Path:
  """Returns the file of the costs on a base model."""
  return root / f"{COSTS}_{base}.json"


def _record(folder: Path) -> Record:
  planned = read_json(folder / PLANNED)
  settings, result = flat(stored_config(folder)), read_result(folder)
  record: Record = {
    **planned,
    "base": STAGES[planned["stage"]],
    "folder": folder.name,
    "method": settings["method"],
    "seed": settings["seed"],
    "status": "finished",
    "settings": {name: settings[name] for name in SETTINGS},
  }
  if result is None:
    return record | {"status": "failed", **read_json(folder / FAILED)}
  kept = ("valid_loss", "num_train_steps", "train_seconds", "train_tokens")
  record |= {name: result[name] for name in (*kept, "device", "jax", "commit") if name in result}
  record["parameters"] = trained_at_once(settings["method"], result["trainable_parameters"])
  float32 = 4 * result["trainable_parameters"]  # of a method that trains the base model itself
  record["adapter_bytes"] = folder_bytes(folder / "adapter") or float32
  if (folder / MEASURED).exists():
    record |= read_json(folder / MEASURED)
  if result.get("scores", {}).get("bleu") is not None:
    record |= {"bleu": result["scores"]["bleu"], "bleu_rows": _bleu_rows(folder, settings)}
  return record


def _bleu_rows(folder: Path, settings: Mapping[str, Any]) -> list[list[int]]:
  """Returns BLEU's statistics of each input, as `lora_jax.metrics.ngrams.bleu`'s rows."""
  data = Texts(settings["data.form"], settings["data.source"])
  groups = decoded_inputs(data, settings["decoding.split"], settings["decoding.num_inputs"])
  texts = read_predictions(folder, len(groups))
  rows = ngrams.bleu(texts, [group.references for group in groups]).rows
  return rows.astype(int).tolist()


def rate_losses(records: Iterable[Record], stage: str) -> dict[str, dict[float, float]]:
  """Returns the validation losses of a stage by arm and learning rate; infinite if failed."""
  losses: dict[str, dict[float, float]] = defaultdict(dict)
  for record in records:
    if record["stage"] == stage and record["arm"] != FROZEN:
      rate = record["settings"]["optimizer.learning_rate"]
      finished = record["status"] == "finished"
      losses[record["arm"]][rate] = record["valid_loss"] if finished else math.inf
  return losses
