"""A short run of `python -m tests.kill_training`."""

import pytest

from tests import kill_training


@pytest.mark.long
def test_a_run_that_is_killed_three_times_ends_with_the_same_bits(tmp_path, capsys):
  kill_training.main(kills=3, seed=1, folder=tmp_path)
  assert "3 kills" in capsys.readouterr().out
