"""The benchmark runs, and counts FLOPs within 1 % of hand-written LoRA."""

import os

import jax
import jax.numpy as jnp
import pytest

from benchmarks import transform

SMALL = [
  *("--layers", "2", "--width", "128", "--vocabulary", "96", "--batch", "2", "--length", "16"),
  *("--repeats", "2", "--traces", "1"),
]


@pytest.mark.parametrize(
  ("form", "ways"),
  [
    pytest.param("unrolled", transform.WAYS, marks=pytest.mark.long),
    pytest.param("scanned", transform.WAYS, marks=pytest.mark.long),
    pytest.param("mlp", ("hand", "lora_jax", "merged"), marks=pytest.mark.long),
  ],
)
def test_the_benchmark_prints_its_table_and_counts_equal_flops(form, ways, capsys, monkeypatch):
  monkeypatch.setattr(transform, "WAYS", ways)
  options = transform.parse([*SMALL, "--layers", "1", "--forms", form])
  with jax.numpy_rank_promotion("allow"):
    results = {form: transform.measure(options, form)}
  transform.print_table(results)
  lines = capsys.readouterr().out.splitlines()
  rows = [line.split() for line in lines if line.startswith(f"{form} ")]
  assert [row[1] for row in rows] == [*ways]
  gflop = {way: measured.counts["gflop"] for way, measured in results[form].items()}
  assert gflop["lora_jax"] == pytest.approx(gflop["hand"], rel=0.01)
  assert gflop["merged"] > 1.1 * gflop["hand"]  # the count can tell


def test_every_iteration_of_a_loop_is_counted_in_a_jaxpr():
  def fn(x, stack):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

  jaxpr = jax.make_jaxpr(fn)(jnp.ones((8, 16)), jnp.ones((3, 16, 16)))
  assert transform.jaxpr_flops(jaxpr) == 3 * 2 * 8 * 16 * 16


@pytest.mark.long
@pytest.mark.parametrize("forms", [["unrolled", "remat"], ["mlp"]])
def test_a_checkout_against_itself_has_a_row_of_ratios_per_model(forms, capsys):
  transform.main([*SMALL, "--against", os.path.relpath(transform.HERE), "--forms", ",".join(forms)])
  lines = capsys.readouterr().out.splitlines()
  agreements = [line for line in lines if "losses agree to" in line]
  assert [line.partition(":")[0] for line in agreements] == forms
  head, *rows = [line.split() for line in lines[lines.index("") + 1 :]]
  columns = ["gflop", "x", "temp_mb", "x", "step_ms", "x", "(quartiles)", "trace_s", "x"]
  assert head == ["form", *columns]
  assert [row[0] for row in rows] == forms
  for row in rows:
    assert (row[2], row[4]) == ("1.000", "1.000")
    low, high = map(float, row[7].strip("()").split("-"))
    assert 0 < low <= float(row[6]) <= high
    assert all(float(row[i]) > 0 for i in (1, 3, 5, 8, 9))


def test_a_comparison_measures_the_package_of_the_checkout_that_it_names(tmp_path):
  (tmp_path / "lora_jax").mkdir()
  (tmp_path / "lora_jax" / "__init__.py").write_text("raise ImportError('the other checkout')")
  options = transform.parse([*SMALL, "--against", str(tmp_path), "--forms", "mlp"])
  with pytest.raises(RuntimeError, match="worker ended at 'import'"):
    transform.compare(options)


def test_a_folder_without_the_package_is_refused(tmp_path, capsys):
  with pytest.raises(SystemExit):
    transform.parse(["--against", str(tmp_path)])
  assert "--against must be a checkout with lora_jax/ in it" in capsys.readouterr().err
