"""Decides whether groups of runs differ from a control: by validation loss first, by BLEU second.

By loss, nats per token, from the losses of each input that `measure` writes to a run's folder:

    equivalent         the interval of the difference is within the margin
    better, worse      it is not, and excludes 0
    cannot be told     all others

By BLEU likewise, with a margin of its own; and where the smallest detectable difference exceeds
both that margin and the observed difference, it cannot be told. All intervals of a table hold
together with 95 % (statistics.py), so each further group makes them wider.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.comparison.losses import measure_losses
from experiments.comparison.statistics import Difference, Verdict, compare_losses, compare_sums
from experiments.configs.variants import MARGIN
from experiments.harness.runs import Run
from experiments.harness.table import aligned
from experiments.harness.workdir import LOSSES, write_json
from experiments.nlg.config import E2EConfig
from experiments.nlg.e2e import decoded_inputs, read_predictions
from experiments.nlg.groups import Group, texts_of
from lora_jax.files import read_json
from lora_jax.metrics.ngrams import bleu, bleu_formula

BLEU_MARGIN = 1.0  # of 100: our choice


def measure(runs: Sequence[Run]) -> str:
  """Measures the losses by input of runs that lack them; returns a sentence on those that failed.

  A run fails if its adapter was removed, or is in another folder.
  """
  failed = []
  for run in runs:
    is_e2e = run.settings.get("experiment") == E2EConfig.NAME and not run.method.is_floor
    if not is_e2e or (run.folder / LOSSES).exists():
      continue
    try:
      write_json(run.folder / LOSSES, measure_losses(run.folder))
    except (FileNotFoundError, ValueError) as error:
      failed.append(f"`{run.folder}` ({error})")
  return f"Losses by input could not be measured: {'; '.join(failed)}." if failed else ""


def decide(groups: Sequence[Group], against: str | Path | None = None) -> str:
  """Returns a section of the report; "" unless several groups have their losses by input.

  Args:
    groups: of one data set.
    against: a run of the control; None is the group with the smallest validation loss among LoRA
      and its variants.
  """
  measured = {
    group.label: [read_json(run.folder / LOSSES) for run in group.runs]
    for group in groups
    if all((run.folder / LOSSES).exists() for run in group.runs)
  }
  control = _control([group for group in groups if group.label in measured], against)
  if control is None or len(measured) < 2:
    return ""
  tokens = measured[control.label][0]["input_tokens"]
  arms = {
    label: np.array([run["input_losses"] for run in runs], float)
    for label, runs in measured.items()
    if all(run["input_tokens"] == tokens for run in runs)
  }
  compared = [group for group in groups if group.label in arms]
  parts = [f"## Decided against {control.label}"]
  if len(arms) < 2 or all(len(group.runs) < 2 for group in compared):
    parts.append(
      "Nothing can be told: no second group has the control's inputs, or none a second seed."
    )
  else:
    differences = compare_losses(arms, np.array(tokens, float), control.label)
    verdicts: dict[str, Verdict] = {label: d.verdict(MARGIN) for label, d in differences.items()}
    parts += [_table(compared, differences, verdicts, 3), _about_losses()]
    parts += _decided_by_bleu(compared, control)
  if left_out := [group.label for group in groups if group not in compared]:
    parts.append(f"Without losses on the same inputs (`--losses`): {'; '.join(left_out)}.")
  return "\n\n".join(parts)


def bleu_verdict(difference: Difference) -> Verdict:
  """Returns whether an arm's BLEU is equivalent to the control's, better or worse."""
  if difference.detectable > max(BLEU_MARGIN, abs(difference.difference)):
    return "cannot be told"
  value, low, high = difference.difference, difference.low, difference.high
  return Difference(-value, -high, -low, difference.detectable).verdict(BLEU_MARGIN)


def _control(groups: Sequence[Group], against: str | Path | None) -> Group | None:
  if against is None:
    low_rank = [group for group in groups if group.is_low_rank]
    return min(low_rank, key=lambda group: group.loss, default=None)
  path = Path(against).resolve()
  return next((g for g in groups if path in (run.folder.resolve() for run in g.runs)), None)


def _decided_by_bleu(groups: Sequence[Group], control: Group) -> list[str]:
  """Returns the table by BLEU of the groups that decoded the control's inputs, if any."""
  inputs = _inputs(control.first)
  rows = {
    group.label: _bleu_rows(group)
    for group in groups
    if all(run.value("bleu") is not None and _inputs(run) == inputs for run in group.runs)
  }
  several = any(len(values) > 1 for values in rows.values())
  if control.label not in rows or len(rows) < 2 or not several or inputs[0] != "e2e":
    return []
  differences = compare_sums(rows, bleu_formula, control.label)
  verdicts: dict[str, Verdict] = {label: bleu_verdict(d) for label, d in differences.items()}
  note = (
    f"By BLEU, with a margin of {BLEU_MARGIN:g}: larger is better, and it cannot be told where the "
    "smallest detectable difference exceeds both the margin and the observed difference."
  )
  return [_table(groups, differences, verdicts, 2), note]


def _inputs(run: Run) -> tuple[Any, ...]:
  """Returns the name of the data set that a run has decoded, and which inputs."""
  texts, settings = texts_of(run), run.settings
  name = "" if texts is None else texts.name
  return name, texts, settings["decoding.split"], settings["decoding.num_inputs"]


def _bleu_rows(group: Group) -> Float[np.ndarray, "seeds inputs counts"]:
  _, texts, split, count = _inputs(group.first)
  inputs = decoded_inputs(texts, split, count)
  references = [group.references for group in inputs]
  systems = [read_predictions(run.folder, len(inputs)) for run in group.runs]
  return np.stack([bleu(system, references).rows for system in systems])


def _table(
  groups: Sequence[Group],
  differences: Mapping[str, Difference],
  verdicts: Mapping[str, Verdict],
  digits: int,
) -> str:
  rows = [["run", "seeds", "difference", "95 % interval", "detectable", "verdict"]]
  for group in groups:
    if group.label in differences:
      d = differences[group.label]
      value, low, high = (f"{end:+.{digits}f}" for end in (d.difference, d.low, d.high))
      seeds, detectable = str(len(group.runs)), f"{d.detectable:.{digits}f}"
      rows.append(
        [group.label, seeds, value, f"[{low}, {high}]", detectable, verdicts[group.label]]
      )
  return aligned(rows)


def _about_losses() -> str:
  return (
    f"By validation loss, nats/token, with a margin of {MARGIN:g}. The intervals hold together, "
    "over seeds and inputs; `detectable` is the smallest true difference whose interval excludes 0 "
    "in 80 % of such experiments."
  )
