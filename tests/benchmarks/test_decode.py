"""The decoding benchmark runs, without transformers, which the tests do not install."""

import jax

from benchmarks import decode

from tests.tiny_e2e import tiny_folder


def test_the_benchmark_prints_its_table(capsys):
  before = jax.config.jax_default_matmul_precision
  few = ["--inputs", "3", "--beams", "2", "--max_new_tokens", "4", "--batches", "2"]
  try:
    with jax.numpy_rank_promotion("allow"):
      decode.main(["--model", str(tiny_folder()), *few, "--repeats", "1", "--alone"])
  finally:
    jax.config.update("jax_default_matmul_precision", before)
  row = next(
    line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("lora_jax ")
  )
  way, batch, _, _, ratio, steps, tokens = row
  assert (way, batch, ratio) == ("lora_jax", "2", "1.00")
  assert 2 <= int(steps) <= 8  # two batches
  assert 3 <= int(tokens) <= 12
