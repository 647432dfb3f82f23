"""The benchmark of formats: an adapter is lost in plain requantizing, and kept in the minima."""

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from benchmarks import quantization

KERNELS = [jnp.asarray(np.random.default_rng(0).normal(size=(512, 32)), jnp.float32)]


def test_a_row_of_each_table():
  name, bits, error, *times = quantization.format_row("Q4_1", KERNELS)
  assert (name, bits) == ("Q4_1", "5.000")
  assert 6 < float(error.rstrip("%")) < 10
  assert all(float(value) > 0 for value in times)
  kept, lost = (
    float(quantization.merge_row("Q4_1", variant, KERNELS)[2].rstrip("%"))
    for variant in (lj.QA_LORA, lj.LORA)
  )
  assert 0 < kept < 2 < 50 < lost
  assert quantization.table(["a", "b"], [["10", "2"]]) == " a  b\n10  2"


def test_a_negative_number_of_kernels_is_refused(capsys):
  with pytest.raises(SystemExit):
    quantization.main(["--kernels", "-5000"])
  assert "argument --kernels: expected 0 or more, got -5000" in capsys.readouterr().err
