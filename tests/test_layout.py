"""Imports point downwards, runnable files are where they belong, and the core needs little."""

import ast
import re
import subprocess
import sys

import pytest

from tests.paths import ROOT

LAYERS = [  # each may import from those before it
  {
    "patterns",
    "trees",
    "axes",
    "placement",
    "extras",
    "fields",
    "files",
    "marks",
    "quantization",
    "slots",
  },
  {"adaptation", "transform"},
  {"adapters", "optimizer", "flax_nnx"},
  {"variants", "methods"},
  {"arithmetic"},
  {"training", "decoding", "interop", "analysis"},
]
INDEPENDENT = {"models", "data", "metrics", "assets"}  # import the bottom at most
MAY_IMPORT_BESIDE = {"interop": {"models"}}  # other packages' names for the tensors
FLOOR = {name: floor for floor, names in enumerate(LAYERS) for name in names}
EXPERIMENT_LAYERS = [
  {"harness"},
  {"nlg", "classification", "plan"},
  {"comparison", "shapes"},
  {"analysis"},
  {"reproduction"},
  {"(runnable)"},
]
EXPERIMENT_FLOOR = {name: floor for floor, names in enumerate(EXPERIMENT_LAYERS) for name in names}
DATA_SETS = ("webnlg", "dart", "wikisql", "samsum", "mnli_text", "e2e_reversed", "addition", "dial")
MAY_RUN = {  # commands that are many runs of another one, or runs on another data set
  "experiments/intrinsic_dimension.py": {"gpt2_e2e"},
  "experiments/paper.py": {"glue", "gpt2_e2e", "intrinsic_dimension", "subspaces"},
  "experiments/subspaces.py": {"gpt2_e2e"},
  "experiments/variants.py": {"gpt2_e2e"},
  **{f"experiments/{name}.py": {"gpt2_e2e"} for name in DATA_SETS},
}


def modules(package):
  folder = ROOT / package
  return [path for path in folder.rglob("*.py") if path != folder / "__init__.py"]


def relative(path):
  return str(path.relative_to(ROOT))


def imported(path, package):
  """Yields `(name, module)` of each import from a package: its first part, and all of it."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
      assert node.module is not None
      for alias in node.names:
        parts = [*node.module.split("."), alias.name]
        yield parts[1], ".".join(parts)
    elif isinstance(node, ast.Import):
      for alias in node.names:
        parts = alias.name.split(".")
        if parts[0] == package and len(parts) > 1:
          yield parts[1], alias.name


def part_of(path, package):
  return path.relative_to(ROOT / package).with_suffix("").parts[0]


@pytest.mark.parametrize("path", modules("lora_jax"), ids=relative)
def test_imports_point_downwards(path):
  part = part_of(path, "lora_jax")
  for other, _ in imported(path, "lora_jax"):
    if other == part or other in MAY_IMPORT_BESIDE.get(part, ()):
      continue
    if part in INDEPENDENT:
      assert other in LAYERS[0], f"{part} imports {other}"
    else:
      assert other in FLOOR, f"{part} imports {other}"
      assert FLOOR[other] <= FLOOR[part], f"{part} imports {other}"


@pytest.mark.parametrize(
  ("package", "users"),
  [("lora_jax", ("experiments", "benchmarks", "tests")), ("experiments", ("benchmarks", "tests"))],
)
def test_nothing_imports_its_users(package, users):
  for path in modules(package):
    names = [full for user in users for _, full in imported(path, user)]
    assert not names, f"{relative(path)} imports {names}"


def test_every_part_has_its_place():
  parts = {part_of(path, "lora_jax") for path in modules("lora_jax")}
  assert parts | {"assets"} == {*FLOOR, *INDEPENDENT}  # which has no module


def test_no_two_modules_import_each_other():
  for package in ("lora_jax", "experiments"):
    edges = {}
    for path in [*modules(package), ROOT / package / "__init__.py"]:
      name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
      edges[name] = {full for _, full in imported(path, package)}
    names = set(edges)
    edges = {
      name: {full if full in names else full.rpartition(".")[0] for full in uses} & names - {name}
      for name, uses in edges.items()
    }
    while leaves := [name for name, uses in edges.items() if not uses & edges.keys()]:
      for name in leaves:
        del edges[name]
    assert not edges, f"these import each other in a circle: {sorted(edges)}"


def is_runnable(path):
  return '__name__ == "__main__"' in path.read_text()


def runnable():
  return [path for path in (ROOT / "experiments").glob("*.py") if path.name != "__init__.py"]


@pytest.mark.parametrize("path", runnable(), ids=relative)
def test_an_experiment_says_its_command_its_time_and_what_to_expect(path):
  assert is_runnable(path), "experiments/*.py holds what can be run; parts belong in a folder"
  docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
  assert f"python -m experiments.{path.stem}" in docstring
  for heading in ("Time:", "Expect:"):
    assert re.search(rf"^{heading} \S", docstring, re.MULTILINE), f"no line {heading!r}"


@pytest.mark.parametrize("path", modules("experiments"), ids=relative)
def test_parts_of_experiments_are_not_runnable_and_import_downwards(path):
  folder = path.relative_to(ROOT / "experiments").parts
  part = folder[0] if len(folder) > 1 else "(runnable)"
  if part == "configs":
    return
  assert part in EXPERIMENT_FLOOR, f"{part} has no place"
  assert (part == "(runnable)") == is_runnable(path)
  for other, full in imported(path, "experiments"):
    if other == "configs" or other == part or other in MAY_RUN.get(relative(path), ()):
      continue
    other = other if other in EXPERIMENT_FLOOR else "(runnable)"
    assert EXPERIMENT_FLOOR[other] < EXPERIMENT_FLOOR[part], f"{relative(path)} imports {full}"


def test_the_core_imports_jax_optax_and_jaxtyping_only():
  code = (
    "import sys, jax, optax\n"
    "from jaxtyping import PyTree\n"  # which imports more of it
    "before = set(sys.modules)\n"
    "import lora_jax\n"
    "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))\n"
  )
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  loaded = {name for name in run.stdout.split() if name not in sys.stdlib_module_names}
  assert loaded - {"jax", "jaxlib"} == {"lora_jax"}


WITHOUT = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
  None if name == sys.argv[2] else find_spec(name, package)
)
sys.modules[sys.argv[2]] = None
exec(sys.argv[1])
"""


@pytest.mark.parametrize(
  ("code", "package"),
  [
    ("import lora_jax.models.zoo", "safetensors"),
    ("import lora_jax.models.text.tokenizer", "tokenizers"),
    ("from lora_jax.data.batches import as_grain; as_grain([])", "grain"),
    ("import experiments.report", "matplotlib"),
  ],
)
def test_without_the_extra_it_says_what_to_install(code, package):
  command = [sys.executable, "-c", WITHOUT, code, package]
  run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert run.returncode == 1
  assert f"needs {package}, which come with the extra 'experiments': pip install" in run.stderr


@pytest.mark.parametrize("package", ["tokenizers", "grain", "tqdm", "safetensors", "matplotlib"])
def test_models_and_losses_need_no_extra(package):
  code = "import lora_jax.models.llama, lora_jax.training.loop, lora_jax.training.step"
  command = [sys.executable, "-c", WITHOUT, code, package]
  assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT).returncode == 0


def test_no_private_jax_and_no_pickle():
  for path in modules("lora_jax"):
    text = path.read_text()
    assert "jax._src" not in text.replace("`jax._src`", ""), path
    assert "import pickle" not in text, path
