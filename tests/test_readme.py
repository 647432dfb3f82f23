"""What README and docs show is run: their code, their tables, their rule."""

import functools
import inspect
import re
import tomllib

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from lora_jax.transform import rules
from lora_jax.trees import leaves_with_path

from tests.layer_kinds import kernel_dot
from tests.paths import ROOT

README = (ROOT / "README.md").read_text()
DOCS = (ROOT / "docs" / "transform.md").read_text()


def code_blocks(text):
  return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@functools.cache
def readme_names():
  """Returns the names that the README's Python code defines, run from top to bottom."""
  names = {}
  for block in code_blocks(README):
    exec(block, names)
  return names


@functools.cache
def quickstart():
  names = {}
  exec(code_blocks(README)[0], names)
  return names


def test_the_quickstart_learns_and_merges():
  names = quickstart()
  before, after = names["loss"](names["params"]), names["loss"](names["merged"])
  assert after < before / 20
  adapted = names["lora"].apply(names["params"], names["adapter"])
  assert jnp.allclose(after, adapted, rtol=1e-4)


def test_the_readmes_tree_of_parameters_is_the_quickstarts():
  shown = re.search(
    r"^params, frozen +adapter, trainable\n(.*?)```", README, re.DOTALL | re.MULTILINE
  )
  assert shown is not None
  *rows, counts = shown[1].strip("\n").splitlines()
  params = dict(leaves_with_path(quickstart()["params"]))
  adapter = dict(leaves_with_path(quickstart()["adapter"]))
  expected = []
  for path, leaf in params.items():
    row = f"{path} {leaf.shape}"
    if f"{path}/lora_a" in adapter:
      a, b = (adapter[f"{path}/{name}"].shape for name in ("lora_a", "lora_b"))
      row += f" {path}/lora_a {a} lora_b {b}"
    expected.append(row)
  assert [" ".join(row.split()) for row in rows] == expected
  sizes = [sum(leaf.size for leaf in tree.values()) for tree in (params, adapter)]
  share = 100 * sizes[1] / sizes[0]
  assert (
    " ".join(counts.split()) == f"{sizes[0]:,} parameters {sizes[1]:,} parameters, {share:.1f} %"
  )


def test_the_rest_of_the_readmes_code_runs():
  names = readme_names()
  assert "lora_a" in lj.summary(names["params"], names["trainable"])
  assert names["out"].shape == (1, 128, 64)
  moments = {path for path, _ in leaves_with_path(names["state"])}
  assert any("lora_a" in path for path in moments)
  assert not any("base" in path for path in moments)


def test_the_first_screen_is_short():
  lines = README.split("## The idea")[0].splitlines()
  assert len(lines) <= 75  # with the quickstart's 25 lines of code


def test_the_readme_names_the_version():
  assert (
    f"version = {{{tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['version']}}}"
    in README
  )


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
