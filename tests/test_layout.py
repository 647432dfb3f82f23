"""Imports point downwards, and the core needs jax, optax and jaxtyping alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lora_jax

PACKAGE = Path(lora_jax.__file__).parent
LAYERS = [  # each may import from those before it
  {"trees", "products", "_compat", "initializers", "tracing"},
  {"factored", "adapter"},
  {"rules", "config", "sharding", "adaptation", "optimizer", "flax_nnx"},
  {"control_flow"},
  {"interpreter"},
  {"axes"},
  {"low_rank", "methods", "inspection", "arithmetic"},
  {"training", "decoding", "interop"},
]
ALONE = {"models", "data", "metrics", "assets"}  # import no other part, and none of these them
BESIDES = {"interop": {"models"}}  # which it has other packages' names of
PART = {name: i for i, names in enumerate(LAYERS) for name in names}


def modules():
  return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def imported(path):
  """Yields the parts of lora_jax that a module imports from."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_jax"):
      parts = node.module.split(".")
      yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
  part = path.relative_to(PACKAGE).with_suffix("").parts[0]
  for other in imported(path):
    if other != part and not (part in BESIDES and other in BESIDES[part]):
      assert part in PART, f"{part} imports {other}"
      assert other in PART, f"{part} imports {other}"
      assert PART[other] <= PART[part], f"{part} imports {other}"


def test_every_part_has_its_place():
  parts = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in modules()}
  assert parts == {*PART, *ALONE}


def test_the_core_imports_jax_optax_and_jaxtyping_only():
  code = (
    "import sys, jax, optax, jaxtyping\n"
    "before = set(sys.modules)\n"
    "import lora_jax\n"
    "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))\n"
  )
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  loaded = {name for name in run.stdout.split() if name not in sys.stdlib_module_names}
  assert loaded - {"jax", "jaxlib"} == {"lora_jax"}


def test_no_private_jax_and_no_pickle():
  for path in modules():
    text = path.read_text()
    assert "jax._src" not in text.replace("`jax._src`", ""), path
    assert "import pickle" not in text, path
