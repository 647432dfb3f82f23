"""The page of `experiments.paper_shapes`: counts, checkpoints, memory and compiled steps."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import optax

from experiments.harness.table import aligned
from experiments.shapes.models import MODELS, num_weights, trainable_shapes
from experiments.shapes.results import StepSizes
from experiments.shapes.rows import ROWS, Row, lora_of, reading
from experiments.shapes.steps import METHODS, Cost

TABLES = {
  "Table 2: GLUE": ("2",),
  "Tables 3, 13 and 14: E2E, DART and WebNLG": ("3", "13", "14"),
  "Tables 4 and 15: WikiSQL, MNLI and SAMSum": ("4", "15"),
}
STATUS = "real shape"
RANKS = {  # of LoRA on q and v, as in Tables 2 and 3, and in section 4.2 for GPT-3
  **{"GPT-2 M": 4, "GPT-2 L": 4, "RoBERTa base": 8, "RoBERTa large": 8},
  **{"DeBERTa XXL": 16, "GPT-3": 4},
}
COUNT_HEADS = ("model, method", "trained", "formula", "printed", "printed is", "MB", "MB, 16 bits")
MEMORY_HEADS = ("model, method", "trained", "weights", "gradients", "Adam", "sum", "with 16 bits")
STEP_HEADS = ("model, method", "arguments", "temporaries", "sum", "x", "TFLOP", "x", "status")


def page(command: str, costs: Mapping[str, Mapping[str, Cost]], rows_and_length: str) -> str:
  """Returns the page, as Markdown.

  Args:
    command: that makes it.
    costs: of compiled steps by model and method, `FT` and `LoRA`.
    rows_and_length: of the steps' batch, in words.
  """
  counts = {row.name: row.trained for row in ROWS}
  parts = [_head(command), "## Trained parameters", _counts_text()]
  for title, tables in TABLES.items():
    rows = [row for row in ROWS if set(row.printed) & set(tables)]
    parts += [f"### {title}", counts_table(rows, counts), _notes(rows)]
  parts += ["## Checkpoints", _checkpoints(), "## Memory of training", memory_table()]
  parts += ["## Compiled train steps", steps_table(costs, rows_and_length)]
  return "\n\n".join(part for part in parts if part) + "\n"


def _head(command: str) -> str:
  return f"""# The paper's tables at their real shapes

    {command}

makes this page. Its numbers have the status *{STATUS}*: the models of Hu et al. 2021 (arXiv
2106.09685v2) at their sizes, without weights; nothing is trained. What was not computed is
*not run*."""


def _counts_text() -> str:
  return f"""Each count (*{STATUS}*) is that of the arrays that the method's `init` makes, by
`jax.eval_shape`; it equals the formula of the paper's section 5.1 in every row. V and P are the
vocabulary and the positions, k the adapted matrices of a layer; the other symbols are the paper's.
A classification head is counted in full fine-tuning only, as in the paper. Where the paper gives no
size, it is the one whose count is the nearest to the print. The last columns are the size of a
checkpoint of the trained parameters, in 10^6 bytes, in float32 and in 16 bits.

`printed is` tells how the printed number is the count: rounded, cut off, or in units of 2^20;
*differs* has a note below the table."""


def counts_table(rows: Sequence[Row], counts: Mapping[str, int]) -> str:
  """Returns the table of some rows' counts, beside the printed ones."""
  cells: list[Sequence[str]] = [COUNT_HEADS]
  for row in rows:
    count = counts[row.name]
    printed = list(dict.fromkeys(row.printed.values()))
    readings = [reading(text, count) or "differs" for text in printed]
    cells.append(
      (
        row.name,
        f"{count:,}",
        row.formula if row.value == count else f"{row.formula} = {row.value:,}",
        ", ".join(printed),
        ", ".join(dict.fromkeys(readings)),
        f"{4 * count / 1e6:,.1f}",
        f"{2 * count / 1e6:,.1f}",
      )
    )
  return aligned(cells)


def _notes(rows: Iterable[Row]) -> str:
  notes: dict[str, list[str]] = {}
  for row in rows:
    if row.note is not None:
      notes.setdefault(row.note.text, []).append(row.name)
  return "\n".join(f"- {'; '.join(labels)}: {text}." for text, labels in notes.items())


def _checkpoints() -> str:
  weights, trained = num_weights(MODELS["GPT-3"]), _lora_row("GPT-3").trained
  megabytes, mebibytes = 2 * trained / 1e6, 2 * trained / 2**20
  return f"""The paper (section 4.2) gives 350 GB for a checkpoint of GPT-3, 35 MB for that of LoRA
with r = 4 on q and v, and a ratio of about 10,000. At 2 bytes a parameter these are
{2 * weights / 1e9:.1f} GB and {megabytes:.1f} MB ({mebibytes:.1f} MiB), a ratio of
{weights / trained:,.0f} (*{STATUS}*)."""


def _lora_row(model: str) -> Row:
  """Returns LoRA on q and v at the rank of `RANKS`."""
  rank = RANKS[model]
  return Row(model, f"LoRA, qv, r = {rank}", lora_of("qv", rank), "", 0, {})


def memory_table() -> str:
  """Returns the memory of weights, gradients and Adam's state, by model and method."""
  cells: list[Sequence[str]] = [MEMORY_HEADS]
  for model in MODELS:
    lora = _lora_row(model)
    full = next(row for row in ROWS if row.model == model and row.label == "FT")
    full = full._replace(has_head=False)
    for row in (full, lora):
      trainable = trainable_shapes(row.config, row.method)
      trained, weights = row.trained, num_weights(row.config)
      state = _bytes(jax.eval_shape(optax.adam(1e-3).init, trainable))
      frozen = 0 if row is full else weights
      total = 4 * frozen + 8 * trained + state
      narrow = total - 2 * frozen if frozen else None
      cells.append(
        (
          f"{model}, {row.label}",
          f"{trained:,}",
          _gigabytes(4 * (frozen + trained)),
          _gigabytes(4 * trained),
          _gigabytes(state),
          _gigabytes(total),
          "" if narrow is None else _gigabytes(narrow),
        )
      )
  return f"""GB, 10^9 bytes, without activations and without a head (*{STATUS}*). Weights, gradients
and Adam's two moments are float32. In the last column the frozen weights have 16 bits, and what is
trained stays float32.

{aligned(cells)}

The paper (section 4.2) gives 1.2 TB for full fine-tuning of GPT-3 and 350 GB for LoRA, and does not
say in which precision."""


def _bytes(tree: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _gigabytes(number: float) -> str:
  return f"{number / 1e9:,.4f}" if number < 1e8 else f"{number / 1e9:,.2f}"


def step_sizes(costs: Mapping[str, Mapping[str, Cost]]) -> Iterator[StepSizes]:
  """Yields the sizes of models and methods whose steps were compiled."""
  for model, of_methods in costs.items():
    trained = {"FT": num_weights(MODELS[model]), "LoRA": _lora_row(model).trained}
    for method, cost in of_methods.items():
      memory = float(cost.arguments + cost.temporaries)
      yield StepSizes(model, method, 2 * trained[method], memory, float(cost.flops))


def steps_table(costs: Mapping[str, Mapping[str, Cost]], rows_and_length: str) -> str:
  """Returns the costs of compiled steps, by model and method."""
  cells: list[Sequence[str]] = [STEP_HEADS]
  for model in MODELS:
    for method in METHODS:
      label = f"{model}, {method}" + (f", r = {RANKS[model]}" if method == "LoRA" else "")
      if model not in costs:
        cells.append((label, *[""] * (len(STEP_HEADS) - 2), "not run"))
        continue
      cost, full = costs[model][method], costs[model]["FT"]
      memory, full_memory = (c.arguments + c.temporaries for c in (cost, full))
      cells.append(
        (
          label,
          _gigabytes(cost.arguments),
          _gigabytes(cost.temporaries),
          _gigabytes(memory),
          f"{memory / full_memory:.3f}",
          f"{cost.flops / 1e12:.3f}",
          f"{cost.flops / full.flops:.3f}",
          STATUS,
        )
      )
  return f"""One step with AdamW, {rows_and_length}, compiled for a CPU by XLA but not executed;
float32, layers scanned and recomputed in the backward pass. GB of the step's arguments (weights,
optimizer, batch) and of its temporaries (activations, gradients); TFLOP, 10^12 operations in its
matmuls, each iteration of a loop counted; x, the ratio to full fine-tuning.

{aligned(cells)}"""
