"""The vectors are what the NumPy formulas give, and share no code with the library."""

import ast
import json
import re
import sys

import numpy as np
import pytest
import safetensors.numpy

from conformance import make
from conformance.check import disagreements, read
from conformance.make import ALL, VECTORS

from tests.paths import ROOT

FOLDER = ROOT / "conformance"


@pytest.mark.parametrize("name", ALL)
def test_the_formulas_give_the_committed_vector(name, tmp_path):
  """`Vector.save` checks nothing; making the vector compares each gradient with differences."""
  ALL[name]().save(tmp_path)
  tensors, metadata = read(tmp_path / f"{name}.safetensors")
  committed, its_metadata = read(VECTORS / f"{name}.safetensors")
  assert metadata == its_metadata
  assert tensors.keys() == committed.keys()
  floats = {n: x for n, x in tensors.items() if x.dtype == np.float64}
  own = tuple(floats)
  assert disagreements(committed, floats, 1e-9, own) == []  # of another machine's singular vectors
  for other in tensors.keys() - floats.keys():
    np.testing.assert_array_equal(tensors[other], committed[other])


def test_a_vector_has_the_same_bytes_each_time(tmp_path):
  for folder in ("first", "second"):
    (tmp_path / folder).mkdir()
    ALL["pissa"]().save(tmp_path / folder)
  first, second = ((tmp_path / f / "pissa.safetensors").read_bytes() for f in ("first", "second"))
  assert first == second


def test_each_file_is_a_vector_and_in_the_readme():
  assert {path.name for path in VECTORS.iterdir()} == {f"{name}.safetensors" for name in ALL}
  table = (FOLDER / "README.md").read_text("utf-8").split("## Variants")[1]
  first_cells = re.findall(r"^\| (`.*?`) \|", table, flags=re.MULTILINE)
  assert [name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)] == list(ALL)


@pytest.mark.parametrize("name", ALL)
def test_others_read_it_by_safetensors(name):
  path = VECTORS / f"{name}.safetensors"
  tensors, metadata = read(path)
  others = safetensors.numpy.load_file(path)
  assert tensors.keys() == others.keys()
  for key, array in tensors.items():
    np.testing.assert_array_equal(array, others[key])
  assert metadata["format"] == "1"
  assert metadata["license"] == "Apache-2.0"
  assert {key.split("/")[0] for key in tensors} - {"activations"} == {
    *json.loads(metadata["cases"])
  }


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_it_needs_numpy_only(path):
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    for name in names:
      package = name.split(".")[0]
      assert package in ("numpy", "conformance") or package in sys.stdlib_module_names


def test_an_output_of_another_shape_or_name_is_reported():
  expected = {"matmul/out": np.ones((2, 3))}
  outputs = {"matmul/out": np.ones((3, 2)), "matmul/other": np.ones(1)}
  assert disagreements(expected, outputs) == [
    "matmul/out has shape (3, 2), expected (2, 3)",
    "matmul/other is not in the vector",
  ]
  assert disagreements(expected, {"matmul/out": np.full((2, 3), np.nan)}) != []


def test_missing_results_are_reported():
  vector = {f"{case}/{name}": np.ones(2) for case in ("matmul", "conv") for name in ("x", "out")}
  vector |= {"matmul/grad/lora_a": np.ones(2), "matmul/merged": np.ones(2)}
  outputs = {"matmul/out": np.ones(2)}
  missing = ["matmul/grad/lora_a is missing", "matmul/merged is missing"]
  assert disagreements(vector, outputs) == ["conv/out is missing", *missing]
  assert disagreements(vector, outputs, only="matmul/") == missing
  assert disagreements(vector, outputs, only=("matmul/out", "matmul/x")) == []
  for nothing in ("matmull/", (), "matmul/x"):
    with pytest.raises(ValueError, match=r"has no results .*; its cases are conv, matmul"):
      disagreements(vector, outputs, only=nothing)


@pytest.mark.parametrize("kept", [0, 3, 100, -1])
def test_a_damaged_file_is_named(kept, tmp_path):
  path = tmp_path / "lora.safetensors"
  path.write_bytes((VECTORS / path.name).read_bytes()[:kept])
  with pytest.raises(ValueError, match=re.escape(f"{path} is damaged, or not a vector: ")):
    read(path)


def test_a_file_in_place_of_the_folder_is_named(tmp_path, capsys):
  (tmp_path / "file").touch()
  with pytest.raises(SystemExit):
    make.main([f"--out={tmp_path}/file"])
  assert f"--out={tmp_path}/file must be a folder" in capsys.readouterr().err
