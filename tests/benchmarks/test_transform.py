"""The benchmark runs, and what it counts holds: FLOPs within 1 % of hand-written LoRA."""

import jax
import pytest

from benchmarks import transform

SMALL = [
  *("--layers", "2", "--width", "128", "--vocabulary", "96", "--batch", "2", "--length", "16"),
  *("--repeats", "2", "--traces", "1"),
]


@pytest.mark.parametrize("form", [pytest.param("unrolled", marks=pytest.mark.long), "scanned"])
def test_the_benchmark_prints_its_table_and_counts_equal_flops(form, capsys):
  options = transform.parse([*SMALL, "--forms", form])
  with jax.numpy_rank_promotion("allow"):
    results = {form: transform.measure(options, form)}
  transform.print_table(results)
  lines = capsys.readouterr().out.splitlines()
  rows = [line.split() for line in lines if line.startswith(f"{form} ")]
  assert [row[1] for row in rows if row[0] == form] == ["hand", "lora_jax", "merged", "full"]
  gflop = {way: measured.counts["gflop"] for way, measured in results[form].items()}
  assert gflop["lora_jax"] == pytest.approx(gflop["hand"], rel=0.01)
  assert gflop["merged"] > 1.1 * gflop["hand"]  # the count can tell
