"""The pages about models of other packages: their code runs, and adapts them by LoRA."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.trees import leaves_with_path

from tests.docs.pages import code_blocks
from tests.paths import ROOT

PAGES = [
  pytest.param("equimo", marks=pytest.mark.long),
  "tunix",
  pytest.param("keras", marks=pytest.mark.long),
]


def is_near(value, expected):
  scale = jnp.abs(expected).max()
  return jnp.abs(value - expected).max() < 1e-4 * scale


@pytest.mark.filterwarnings("ignore")  # from other packages
@pytest.mark.parametrize("package", PAGES)
def test_a_page_about_models(package, capsys):
  pytest.importorskip(package, reason=f"docs/models_{package}.md is about {package}")
  text = (ROOT / "docs" / f"models_{package}.md").read_text()
  (code,) = code_blocks(text)
  assert len([line for line in code.splitlines() if line.strip()]) <= 38
  names = {}
  with jax.numpy_rank_promotion("allow"):
    exec(code, names)
    check_lora(names)
  shown = re.search(r"```text\n(.*?)```", text, flags=re.DOTALL)
  printed = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert shown is not None
  for line in shown.group(1).splitlines():
    assert line.split() in printed, line


def check_lora(names):
  fn, params, inputs, adapted = (names[name] for name in ("fn", "params", "inputs", "adapted"))
  base, apply = jax.jit(fn), jax.jit(adapted.apply)
  before = adapted.init(jax.random.key(2), params, inputs)
  plain = base(params, inputs)
  np.testing.assert_array_equal(apply(params, before, inputs), plain)
  paths = [path for path, _ in leaves_with_path(names["grads"])]
  assert paths
  assert {path.rsplit("/", 1)[1] for path in paths} == {"lora_a", "lora_b"}
  (first, _), (last, _) = names["step"](before), names["step"](names["trainable"])
  assert jnp.isfinite(last)
  assert last < 0.95 * first
  after = apply(params, names["trainable"], inputs)
  assert not is_near(after, plain)
  assert is_near(base(names["merged"], inputs), after)


def test_depthwise_kernels_of_keras_are_refused_by_name():
  keras = pytest.importorskip("keras")
  layer = keras.layers.DepthwiseConv2D(3)
  layer.build((1, 8, 8, 4))
  params = {variable.path: variable.value for variable in layer.trainable_variables}

  def fn(params, images):
    values = [params[variable.path] for variable in layer.trainable_variables]
    return layer.stateless_call(values, [], images)[0]

  adapted = lj.lora(fn, lj.LoraConfig(rank=1, alpha=1.0, target=".*/kernel"))
  with pytest.raises(lj.UnsupportedOperation, match=r"cannot adapt .*/kernel: "):
    adapted.init(jax.random.key(0), params, jnp.ones((1, 8, 8, 4)))
