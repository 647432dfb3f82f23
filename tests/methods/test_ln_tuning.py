"""LayerNorm tuning: the normalizations of each model, and PEFT's logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.trees import leaves_with_path, matches

from tests import make_shared_golden as golden
from tests import parity
from tests.experiments.harness.test_methods import MODELS
from tests.toy_models import relative_difference

KEY = jax.random.key(0)


@pytest.mark.parametrize("family", MODELS)
def test_it_trains_the_normalizations_and_nothing_else(family):
  module, _ = MODELS[family]
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = jax.eval_shape(module.init, KEY, tokens)["params"]
  chosen = [path for path, _ in leaves_with_path(params) if matches(lj.NORMS, path)]
  scales = [path for path, _ in leaves_with_path(params) if path.endswith("/scale")]
  folders = {path.rpartition("/")[0] for path in scales}
  of_them = [path for path, _ in leaves_with_path(params) if path.rpartition("/")[0] in folders]
  assert chosen == of_them
  layers = 1 if family == "gpt2_scanned" else 2
  others = {"deberta": 2}.get(family, 1)  # the last, or those of the embeddings
  assert len(scales) == 2 * layers + others


def test_a_model_without_any_is_refused():
  fn = lambda params, x: x @ params["w"]  # noqa: E731
  with pytest.raises(ValueError, match="matches none of the 1 leaves"):
    lj.ln_tuning(fn).init(KEY, {"w": jnp.ones((3, 3))}, jnp.ones((1, 3)))


@pytest.mark.long  # in CI tests/interop/peft/test_variants.py reads such an adapter
def test_the_logits_are_pefts():
  base, _, _ = golden.ADAPTERS["ln_tuning"]
  arrays = load_file(golden.GOLDEN / "ln_tuning.safetensors")
  family = parity.family_of(base)
  model_config, params = family.load(golden.MODELS / base)
  fn, inputs = parity.function(base, model_config), parity.inputs_of(base)
  tuned = lj.ln_tuning(fn)
  start = tuned.init(KEY, params, *inputs)
  names = {"weight": "scale", "bias": "bias"}
  trainable = jax.tree.map(lambda x: x, start)
  for name, array in arrays.items():
    if name != "logits":
      *parts, _, kind = name.split(".")
      place = trainable[f"h_{parts[-2]}"][parts[-1]] if "h" in parts else trainable[parts[-1]]
      place[names[kind]] = jnp.asarray(array)
  moved = jax.tree.map(lambda a, b: bool((a != b).all()), trainable, start)
  assert all(jax.tree.leaves(moved))
  out = jax.jit(tuned.apply)(params, trainable, *inputs)
  assert relative_difference(out, arrays["logits"]) < 1e-5
  np.testing.assert_array_equal(
    fn(tuned.merge(params, trainable), *inputs), tuned.apply(params, trainable, *inputs)
  )
