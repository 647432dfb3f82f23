"""The zoo's marks: absent from the compiled program, whatever is saved for the backward pass."""

import dataclasses
import sys

import jax
import pytest

from lora_jax.models.parts.causal_lm import shapes_of
from lora_jax.models.parts.fields import REMAT_POLICIES

from tests.experiments.harness.test_methods import MODELS


def lowered(family, scan_layers, remat):
  """Returns the program of a value and its gradients as text."""
  module, _ = MODELS[family]
  config = dataclasses.replace(module.config, scan_layers=scan_layers, remat=remat)
  module = module.clone(config=config)
  params, tokens = shapes_of(module), jax.ShapeDtypeStruct((2, 4), "int32")

  def value(params, tokens):
    return module.apply({"params": params}, tokens).sum()

  return jax.jit(jax.value_and_grad(value)).lower(params, tokens).as_text()


# In Llama's norms the backward pass reads a layer's input, of which everything_saveable saves the
# marked value too: one more (B, T, D) for each layer. No other policy saves marked values.
CASES = [
  (family, scan_layers, remat)
  for family in ("gpt2", "llama", "mixture", "bert", "deberta")
  for scan_layers in (False, True)
  for remat in (None, *REMAT_POLICIES)
  if remat != "everything_saveable" or family not in ("llama", "mixture")
]
SHORT = ("gpt2", True, "everything_saveable")


@pytest.mark.parametrize(
  ("family", "scan_layers", "remat"),
  [pytest.param(*case, marks=() if case == SHORT else pytest.mark.long) for case in CASES],
)
def test_the_program_is_that_of_a_model_without_marks(family, scan_layers, remat, monkeypatch):
  case = family, scan_layers, remat
  marked = lowered(*case)
  places = [m for name, m in sys.modules.items() if name.startswith("lora_jax.models.")]
  marking = [place for place in places if hasattr(place, "checkpoint_name")]
  for place in marking:
    monkeypatch.setattr(place, "checkpoint_name", lambda x, name: x)
  assert lowered(*case) == marked
  if case == SHORT:  # the comparison sees a change at a mark
    monkeypatch.setattr(marking[0], "checkpoint_name", lambda x, name: 2 * x)
    assert lowered(*case) != marked
