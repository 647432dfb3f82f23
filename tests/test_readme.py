"""The README: its code runs, its tree of parameters and its folders are the real ones."""

import functools
import re
import tomllib

import jax.numpy as jnp

import lora_jax as lj
from lora_jax.trees import leaves_with_path

from tests.docs.pages import code_blocks, page
from tests.paths import ROOT

README = (ROOT / "README.md").read_text()


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


def test_the_claim_on_peft_is_the_tables():
  table = re.search(r"^\| adapter .*?\n\n", page("parity"), re.DOTALL | re.MULTILINE)
  claim = re.search(r"\[(\d+) PEFT adapters\].* at most (\de-\d)", README)
  assert table is not None
  assert claim is not None
  rows = [[cell.strip() for cell in row.split("|")] for row in table[0].splitlines()[2:] if row]
  differences = [float(row[column]) for row in rows for column in (3, 4, 6, 7)]
  assert (len(rows), max(differences)) == (int(claim[1]), float(claim[2]))


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
