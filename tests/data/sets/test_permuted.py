"""The distance dial: permutations of token ids that are nested in the percentage."""

import itertools

import numpy as np
import pytest

from lora_jax.data.sets.permuted import permutation

IDS = np.arange(1000)
KEPT = (0, 999)


@pytest.mark.parametrize(
  ("percent", "count"), [(0, 0), (0.1, 0), (10, 99), (50.5, 503), (100, 998)]
)
def test_this_share_of_the_ids_moves_and_no_id_is_lost(percent, count):
  ids = permutation(1000, percent, seed=0, kept=KEPT)
  assert ids.dtype == np.int32
  assert sorted(ids) == IDS.tolist()
  assert np.sum(ids != IDS) == count
  assert (ids[0], ids[999]) == KEPT


def test_more_percent_moves_the_same_ids_and_more():
  moved = [set(np.flatnonzero(permutation(1000, p, seed=3) != IDS)) for p in (5, 20, 80, 100)]
  assert all(a < b for a, b in itertools.pairwise(moved))
  few, many = permutation(1000, 5, seed=3), permutation(1000, 20, seed=3)
  assert np.sum((few != many) & (few != IDS)) == 1  # all but the last one go where they went


def test_a_seed_gives_the_same_permutation_and_another_seed_another():
  assert np.array_equal(permutation(1000, 30, seed=1), permutation(1000, 30, seed=1))
  assert np.mean(permutation(1000, 100, seed=1) == permutation(1000, 100, seed=2)) < 0.02
  assert permutation(8, 50, seed=0).tolist() == [0, 1, 3, 7, 4, 2, 6, 5]  # on every machine


def test_bad_settings_are_named():
  with pytest.raises(ValueError, match="percent"):
    permutation(10, 101, seed=0)
  with pytest.raises(ValueError, match="vocab_size"):
    permutation(0, 10, seed=0)
  with pytest.raises(ValueError, match="seed"):
    permutation(10, 10, seed=-1)
  with pytest.raises(ValueError, match="kept must be ids below vocab_size = 10, got 10"):
    permutation(10, 10, seed=0, kept=[10])
