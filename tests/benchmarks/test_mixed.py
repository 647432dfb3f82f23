"""The benchmark of mixed adapters: the text of a row is checked against its adapter alone."""

import pytest

from benchmarks import concurrent, mixed


def test_the_table_has_a_row_for_each_number_of_adapters(monkeypatch):
  monkeypatch.setattr(concurrent, "TINY", concurrent.TINY | {"num_layers": 1})
  options = mixed.parse(["--tiny", "--prompt", "2", "--new_tokens", "2", "--turns", "1"])
  base, one, each = mixed.measure(options, mixed.TINY_CASES[0])
  assert base[:3] == ["3", "0", "0"]
  assert one[:3] == ["3", "1", "1"]
  assert one[5] == "1.00 (1.00-1.00)"
  assert each[:3] == ["3", "3", "4"]


def test_the_layers_table_has_a_row_for_each_term():
  one, by_row, ragged = mixed.measure_layer(mixed.Layer(3, 2, 8, 2, 2), turns=1)
  assert one[0] == "one adapter"
  assert by_row[0] == "by_row"
  assert ragged[0] == "ragged_dot"


def test_texts_that_differ_stop_the_benchmark():
  mixed.check([1, 2], [1, 2])
  with pytest.raises(ValueError, match=r"\[1, 2\], and its adapter alone \[1, 3\]"):
    mixed.check([1, 2], [1, 3])
