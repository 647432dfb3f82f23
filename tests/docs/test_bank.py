"""docs/bank.md: its code runs, and the fields that it names are those of the code."""

import re

import numpy as np

import lora_jax as lj
from experiments.harness.concurrent import VARYING

from tests.docs.pages import code_blocks, page


def test_the_code_runs():
  names = {}
  exec(code_blocks(page("bank"))[0], names)
  before, after = np.asarray(names["before"]), np.asarray(names["after"])
  np.testing.assert_array_equal(after[2], before[1])
  np.testing.assert_array_equal(after[[0, 1, 3]], before[[0, 1, 3]])
  expected = names["fn"](names["params"], names["x"])
  np.testing.assert_allclose(before[3], expected, rtol=1e-5)
  assert names["apply"]._cache_size() == 1
  assert names["config"].rank == 8
  out = lj.lora(names["fn"], names["config"]).apply(names["params"], names["trainable"], names["x"])
  np.testing.assert_allclose(out, after[2], rtol=1e-5, atol=1e-5)


def test_the_fields_that_may_differ_are_those_of_the_code():
  rows = re.findall(r"^\| (.*) \| (.*) \|$", page("bank").split("may differ |")[1], re.MULTILINE)
  named = " ".join(name for row in rows for name in row)
  for field in VARYING:
    if field != "workdir":
      assert f"`{field.rpartition('.')[2]}`" in named or f"`{field}`" in named, field
