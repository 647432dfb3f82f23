"""The losses of a finished run that its result does not have: by input, and on Wikipedia text."""

import functools
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PyTree

import lora_jax as lj
from experiments.harness.methods import adapt, find_method
from experiments.nlg.base import Base
from experiments.nlg.config import E2EConfig
from experiments.nlg.e2e import examples_of
from experiments.nlg.restore import load_run
from lora_jax.data import corpus
from lora_jax.data.batches import padded_batches
from lora_jax.data.text import Example
from lora_jax.models.parts.causal_lm import CausalLM
from lora_jax.training.loop import evaluate_loss
from lora_jax.training.loss import LossSum, language_model_loss
from lora_jax.training.mesh import make_mesh
from lora_jax.training.step import EvalStep, make_eval_step

LossFunction = Callable[[PyTree, PyTree], LossSum]
ROWS, ROW_LENGTH = 8, 256  # of the Wikipedia text
LENGTHS = 32  # tokens: rows of examples are padded to multiples of it


def measure_losses(folder: str | Path) -> dict[str, Any]:
  """Returns a finished run's losses by input, and its loss on Wikipedia text.

  Returns:
    `input_losses`, the sum of each validation example's token losses, nats; `input_tokens`, its
    supervised tokens; `wikipedia_loss`, nats per token.
  Raises:
    FileNotFoundError, ValueError: as `load_run`.
  """
  run = load_run(folder)
  examples = examples_of(run.config, run.base, "valid")
  losses = losses_by_input(run.base, run.params, examples, run.config)
  return {
    "input_losses": [round(float(loss), 4) for loss in losses],
    "input_tokens": [len(example.targets) for example in examples],
    "wikipedia_loss": wikipedia_loss(run.base, run.params, run.config),
  }


def losses_by_input(
  base: Base, params: PyTree, examples: list[Example], config: E2EConfig
) -> Float[np.ndarray, " inputs"]:
  """Returns the sum of each example's token losses, nats.

  Args:
    base: the base model of a run.
    params: as `served` returns them.
    examples: any, at least one.
    config: of the run.
  """
  if find_method(config.method).merges:
    of_rows = _row_losses(base.module)  # pyright: ignore[reportArgumentType]  Flax gives it a hash
  else:
    of_rows = _jitted_row_losses(_with_adapter(config, base))
  order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
  longest = max(len(example.tokens) for example in examples)
  batches = padded_batches(
    [examples[i] for i in order],
    batch_size=ROWS,
    row_lengths=[*range(LENGTHS, longest + LENGTHS, LENGTHS)],
    loss_length=max(len(example.targets) for example in examples),
    seed=None,
  )
  sums = np.concatenate([of_rows(params, batches[i]) for i in range(len(batches))])
  losses = np.empty(len(examples), sums.dtype)
  losses[order] = sums[: len(examples)]
  return losses


@functools.cache  # compiled once for all runs of a model
def _row_losses(module: CausalLM) -> Callable[[PyTree, PyTree], jax.Array]:
  """Returns the jitted function from params and a batch to the sums of its rows' losses, nats."""
  return _jitted_row_losses(language_model_loss(module))


def _with_adapter(config: E2EConfig, base: Base) -> LossFunction:
  """Returns the loss of a run whose adapter cannot be merged, from its served params."""
  adapted = adapt(config)(language_model_loss(base.module))

  def loss(params: PyTree, batch: PyTree) -> LossSum:
    return adapted.apply(params["base"], params["adapter"], batch)

  return loss


def _jitted_row_losses(loss: LossFunction) -> Callable[[PyTree, PyTree], jax.Array]:
  @jax.jit
  def of_rows(params: PyTree, batch: PyTree) -> jax.Array:
    def of_row(row: PyTree) -> jax.Array:
      return loss(params, jax.tree.map(lambda x: x[None], row)).total

    return jax.vmap(of_row)(batch)

  return of_rows


@functools.cache
def _mean_loss(module: CausalLM) -> EvalStep:
  return make_eval_step(lj.full_finetuning(language_model_loss(module)))


def wikipedia_loss(base: Base, params: PyTree, config: E2EConfig) -> float:
  """Returns the mean loss on 39 articles that the embedded base model was not trained on, nats.

  It is that of the adapted function. A prefix method changes nothing there: its slots are around
  prompts, and the articles have none.

  Args:
    base: the base model of a run.
    params: as `served` returns them.
    config: of the run.
  """
  files = [Path(str(resources.files("lora_jax") / "assets" / "wikipedia" / "held_out.txt.xz"))]
  stream = corpus.encode_stream(base.tokenizer, corpus.documents(files), base.end_of_text)
  length = min(ROW_LENGTH, base.model.num_positions)
  rows = corpus.Rows(stream, base.end_of_text, batch_size=ROWS, row_length=length, seed=None)
  mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  batches = (rows[i] for i in range(len(rows)))
  if find_method(config.method).merges:
    step = _mean_loss(base.module)  # pyright: ignore[reportArgumentType]
    return evaluate_loss(step, params, params, batches, mesh)
  step = make_eval_step(adapt(config)(language_model_loss(base.module)))
  return evaluate_loss(step, params["base"], params["adapter"], batches, mesh)


def folder_bytes(folder: Path) -> int | None:
  """Returns the bytes of all files in a folder; None if there is no folder."""
  if not folder.is_dir():
    return None
  return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
