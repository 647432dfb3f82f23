"""The notebooks run from the first cell to the last without a warning; their outputs are stored."""

import os
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from tests.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STRICT = "import warnings\nwarnings.simplefilter('error')"


def printed(cell):
  """Returns a cell's stdout and its last value."""
  parts = [output.text for output in cell.outputs if output.get("name") == "stdout"]
  values = [output.data["text/plain"] for output in cell.outputs if "data" in output]
  return "".join([*parts, *values])


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def executed(request, tmp_path_factory):
  """Returns a notebook as stored and as executed by this interpreter in an empty folder."""
  stored = nbformat.read(request.param, as_version=4)
  notebook = nbformat.read(request.param, as_version=4)
  notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
  folder = tmp_path_factory.mktemp("notebook")
  environment = dict(os.environ) | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
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
  return stored, notebook


def test_stored_outputs_are_of_the_same_cells(executed):
  stored, notebook = executed
  for before, after in zip(stored.cells, notebook.cells, strict=True):
    if before.cell_type == "code":
      assert bool(printed(before)) == bool(printed(after)), (
        f"run the notebook again:\n{before.source}"
      )
      if "lj.summary" in before.source:
        assert printed(before) == printed(after)


def test_the_quickstart_learns(executed):
  text = "\n".join(printed(cell) for cell in executed[1].cells if cell.cell_type == "code")
  losses = [float(line.split()[2]) for line in text.splitlines() if line.startswith("step ")]
  assert losses[-1] < losses[0] / 2
