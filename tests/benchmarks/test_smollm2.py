"""The benchmark of SmolLM2: ratios between rows of different batches."""

import pytest

from benchmarks import smollm2


def test_packed_rows_are_compared_with_padded_ones_per_token():
  packed = smollm2.Row(0.0, "", ours=[(2.0, 4.0)], peer=[(9.0, 9.0)], tokens=[1000])
  padded = smollm2.Row(0.0, "", ours=[(9.0, 9.0)], peer=[(4.0, 6.0)], tokens=[800])
  assert smollm2.packed_to_padded(packed, padded, 0) == pytest.approx(0.4)
  assert smollm2.packed_to_padded(packed, padded, 1) == pytest.approx(4 / 7.5)


def test_all_test_inputs_can_be_decoded(capsys):
  contexts = smollm2.decoded_contexts()
  assert len(contexts) == len(set(contexts)) == 630 == smollm2.LIMITS["beam_inputs"]
  for flag in ("--beam_inputs=631", "--greedy_inputs=0", "--repeats=-1"):
    with pytest.raises(SystemExit):
      smollm2.parse([flag])
  assert "argument --beam_inputs: expected 1 to 630, got 631" in capsys.readouterr().err
