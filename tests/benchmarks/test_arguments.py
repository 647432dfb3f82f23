"""Numbers that a benchmark cannot use are refused before anything is loaded."""

import pytest

from benchmarks import concurrent, mixed, scanned_base


@pytest.mark.parametrize(
  ("parse", "arguments", "message"),
  [
    (concurrent.parse, ["--runs", "2", "0"], "--runs: must be an integer of at least 1, got '0'"),
    (concurrent.parse, ["--runs=-1"], "--runs: must be an integer of at least 1, got '-1'"),
    (concurrent.parse, ["--length", "0"], "--length: must be an integer of at least 1, got '0'"),
    (concurrent.parse, ["--turns=-1"], "--turns: must be an integer of at least 0, got '-1'"),
    (mixed.parse, ["--new_tokens", "0"], "--new_tokens: must be an integer of at least 1, got '0'"),
    (mixed.parse, ["--turns", "many"], "--turns: must be an integer of at least 1, got 'many'"),
    (scanned_base.parse, ["--num_adapters", "0"], "--num_adapters: must be an integer of at least"),
  ],
)
def test_a_number_below_its_bound_is_refused(parse, arguments, message, capsys):
  with pytest.raises(SystemExit):
    parse(arguments)
  assert message in capsys.readouterr().err
