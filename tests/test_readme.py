"""What README and docs show is run: their code, their tables, their rule."""

import inspect
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

import lora_jax as lj
from lora_jax.transform import rules

from tests.layer_kinds import kernel_dot, markdown
from tests.paths import ROOT

README = (ROOT / "README.md").read_text()
DOCS = (ROOT / "docs" / "transform.md").read_text()


def code_blocks(text):
  return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_the_readmes_examples_run():
  names = {"jax": jax, "jnp": jnp, "optax": optax, "nn": nn, "nnx": nnx, "lj": lj}
  names |= {"key": jax.random.key(0), "x": jnp.ones((5, 64))}
  blocks = code_blocks(README)
  assert [len(block.strip().splitlines()) for block in blocks[:2]] == [6, 6]
  for block in blocks:
    exec(block, names)
  assert "lora_a" in lj.summary(names["params"], names["trainable"])
  assert jax.tree.structure(names["merged"]) == jax.tree.structure(names["params"])


def test_the_readmes_table_is_the_tests_table():
  table = README.split("<!-- layer kinds -->")[1].split("<!-- /layer kinds -->")[0]
  assert table.strip() == markdown(), "run `python -m tests.layer_kinds` and paste its output"


def test_the_readmes_tree_is_the_tree():
  named = re.findall(r"^((?:lora_jax|experiments|benchmarks)/\S*)", README, flags=re.MULTILINE)
  assert len(named) > 10
  for path in named:
    assert (ROOT / path).exists(), path


def test_the_rule_in_the_docs_is_the_rule():
  shown = next(block for block in code_blocks(DOCS) if "def rev" in block)
  assert shown.strip() == inspect.getsource(rules.moving.rev).strip()
  assert len(shown.strip().splitlines()) <= 15
  assert rules.STRUCTURAL["rev"] is rules.moving.rev


def test_the_opaque_rule_in_the_docs_runs():
  block = next(block for block in code_blocks(DOCS) if "def rule" in block)
  config = lj.LoraConfig(rank=2, alpha=2.0, target="w")
  names = {"lora_jax": lj, "config": config, "fn": lambda p, x: kernel_dot(x, p["w"])}
  exec(block.replace("fp8_dot", "kernel_dot"), names)
  params, x = {"w": jnp.eye(8)}, jnp.ones((3, 8))
  trainable = jax.tree.map(lambda a: a + 0.1, names["lora"].init(jax.random.key(0), params, x))
  merged = names["lora"].merge(params, trainable)
  assert jnp.allclose(names["lora"].apply(params, trainable, x), x @ merged["w"], rtol=1e-5)


def test_the_page_on_several_adapters_runs():
  (block,) = code_blocks((ROOT / "docs" / "arithmetic.md").read_text())
  names = {}
  exec(block, names)
  (_, one), (_, other) = names["adapters"]
  first, second = (lj.lora(names["fn"], names[name]) for name in ("first", "second"))
  assert jnp.allclose(names["y"][0], first.apply(names["params"], one, names["x"]), rtol=1e-5)
  assert jnp.allclose(names["y"][1], second.apply(names["params"], other, names["x"]), rtol=1e-5)
  assert 0 < names["errors"]["kernel"] < 1
  assert names["apply"]._cache_size() == 1


PAGES = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("text", PAGES)
def test_links_lead_somewhere(text):
  for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
    assert (ROOT / link).exists() or (ROOT / "docs" / link).exists(), link
