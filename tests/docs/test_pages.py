"""The docs pages: their code runs, their tables are the code's, their links lead somewhere."""

import inspect
import re

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from lora_jax.transform import rules

from tests.docs.pages import DOCS, code_blocks, page
from tests.layer_kinds import kernel_dot
from tests.paths import ROOT
from tests.test_layout import LAYERS

PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def test_the_rule_on_the_page_is_the_rule():
  shown = next(block for block in code_blocks(page("transform")) if "def rev" in block)
  assert shown.strip() == inspect.getsource(rules.moving.rev).strip()
  assert len(shown.strip().splitlines()) <= 15
  assert rules.STRUCTURAL["rev"] is rules.moving.rev


def test_the_opaque_rule_on_the_page_runs():
  block = next(block for block in code_blocks(page("transform")) if "def rule" in block)
  config = lj.LoraConfig(rank=2, alpha=2.0, target="w")
  names = {"lora_jax": lj, "config": config, "fn": lambda p, x: kernel_dot(x, p["w"])}
  exec(block.replace("fp8_dot", "kernel_dot"), names)
  params, x = {"w": jnp.eye(8)}, jnp.ones((3, 8))
  trainable = jax.tree.map(lambda a: a + 0.1, names["lora"].init(jax.random.key(0), params, x))
  merged = names["lora"].merge(params, trainable)
  assert jnp.allclose(names["lora"].apply(params, trainable, x), x @ merged["w"], rtol=1e-5)


def test_the_page_on_several_adapters_runs():
  (block,) = code_blocks(page("arithmetic"))
  names = {}
  exec(block, names)
  (_, adapter), (_, second_adapter) = names["adapters"]
  first, second = (lj.lora(names["fn"], names[name]) for name in ("first", "second"))
  params, x, y = names["params"], names["x"], names["y"]
  assert jnp.allclose(y[0], first.apply(params, adapter, x), rtol=1e-5)
  assert jnp.allclose(y[1], second.apply(params, second_adapter, x), rtol=1e-5)
  assert 0 < names["errors"]["kernel"] < 1
  assert names["apply"]._cache_size() == 1


def test_the_picture_of_the_layers_has_every_module_of_the_bottom():
  (picture,) = re.findall(r"```\n(.*?)```", page("architecture"), flags=re.DOTALL)[:1]
  assert LAYERS[0] <= set(re.findall(r"\w+", picture))


def anchors(path):
  """Returns the anchors of a page's headings, as GitHub makes them."""
  text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
  headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
  for link in re.findall(r"\]\((?!http)([^)]+)\)", path.read_text("utf-8")):
    name, _, anchor = link.partition("#")
    target = path.parent / name if name else path
    assert target.exists(), link
    assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_to_notes_are_defined(path):
  text = path.read_text("utf-8")
  for name in re.findall(r"\]\[(\w+)\]", text):
    assert f"\n[{name}]: " in text
