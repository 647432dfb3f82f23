"""The notebooks run from the first cell to the last without a warning; their outputs are stored."""

import os
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from lora_jax.models.checkpoints.pretrained import find_pretrained

from tests.paths import ROOT
from tests.tiny_gguf import write_tiny_smollm2

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LESS_WORK = {  # in the sources, for `make test`
  "quickstart": {
    'e2e.read("train")[::100]': 'e2e.read("train")[::2000]',
    '"max_new_tokens": 40': '"max_new_tokens": 4',
    '"num_train_records": 200, "num_valid_records": 20': (
      '"num_train_records": 12, "num_valid_records": 4'
    ),
  },
  "gguf": {
    'load_causal_lm("smollm2"': 'load_causal_lm("model.gguf"',  # a small random one
    'e2e.read("train")[::420]': 'e2e.read("train")[::4200]',
    "max_new_tokens=40": "max_new_tokens=4",
  },
  "subspaces": {'e2e.read("train")[::150]': 'e2e.read("train")[::2000]'},
}
LEARNED = {"quickstart": 0.5, "gguf": 0.7, "subspaces": 0.7}  # last loss over the first, at most
FAST_COMPILATION = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # of LLVM
)
STRICT = "import warnings\nwarnings.simplefilter('error')"


def printed(cell):
  """Returns a cell's stdout and its last value."""
  parts = [output.text for output in cell.outputs if output.get("name") == "stdout"]
  values = [output.data["text/plain"] for output in cell.outputs if "data" in output]
  return "".join([*parts, *values])


def execute(notebook, folder, flags=""):
  """Runs the cells in an empty folder with this interpreter; their outputs are in the notebook."""
  notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
  environment = dict(os.environ) | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
  client = NotebookClient(
    notebook,
    timeout=300,
    coalesce_streams=True,
    kernel_name="python3",
    resources={"metadata": {"path": str(folder)}},
  )
  client.create_kernel_manager()
  client.km.kernel_spec.argv[0] = sys.executable
  client.execute(env=environment)
  notebook.cells.pop(0)


def assert_the_same_cells_print(stored, notebook):
  for before, after in zip(stored.cells, notebook.cells, strict=True):
    if before.cell_type == "code":
      assert bool(printed(before)) == bool(printed(after)), (
        f"run the notebook again:\n{before.source}"
      )


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_on_less_data(path, tmp_path):
  stored, notebook = (nbformat.read(path, as_version=4) for _ in range(2))
  for source, replacement in LESS_WORK[path.stem].items():
    (cell,) = [cell for cell in notebook.cells if source in cell.source]
    cell.source = cell.source.replace(source, replacement)
  if path.stem == "gguf":
    write_tiny_smollm2(tmp_path)
  execute(notebook, tmp_path, FAST_COMPILATION)
  assert_the_same_cells_print(stored, notebook)


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def executed(request, tmp_path_factory):
  """Returns a notebook's name, and the notebook as stored and as executed here.

  Skips it if its model is not cached.
  """
  if request.param.stem == "gguf":
    try:
      find_pretrained("smollm2")
    except FileNotFoundError as error:
      pytest.skip(str(error))
  stored, notebook = (nbformat.read(request.param, as_version=4) for _ in range(2))
  execute(notebook, tmp_path_factory.mktemp("notebook"))
  return request.param.stem, stored, notebook


@pytest.mark.long
def test_stored_outputs_are_of_the_same_cells(executed):
  _, stored, notebook = executed
  assert_the_same_cells_print(stored, notebook)
  for before, after in zip(stored.cells, notebook.cells, strict=True):
    if "lj.summary" in before.source:
      assert printed(before) == printed(after)


@pytest.mark.long
def test_it_learns(executed):
  name, _, notebook = executed
  text = "\n".join(printed(cell) for cell in notebook.cells if cell.cell_type == "code")
  losses = [float(line.split()[2]) for line in text.splitlines() if line.startswith("step ")]
  assert losses[-1] < LEARNED[name] * losses[0]
