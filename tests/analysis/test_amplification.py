"""Table 7's norms: of planted directions, and of random ones by their exact mean."""

import numpy as np
import pytest

from lora_jax.analysis import (
  Subspaces,
  amplification,
  projected_norm,
  random_projected_norm,
)

from tests.analysis.test_subspace import orthonormal

D_IN, D_OUT = 12, 9
U, V = orthonormal(D_IN, D_IN, seed=1), orthonormal(D_OUT, D_OUT, seed=2)
WEIGHT = U[:, :D_OUT] * np.arange(9.0, 0, -1) @ V.T  # singular values 9, 8, ..., 1


def planted(first, scale):
  """Returns an adapter of rank 2 in some of the weight's directions, with equal values."""
  u, v = (x[None, :, first : first + 2] for x in (U, V))
  return Subspaces(("w",), u, v, u, v, np.full((1, 2), scale))


def test_an_adapter_in_the_weights_own_directions():
  row = amplification(WEIGHT[None], planted(5, 3.0))
  assert row.weight == pytest.approx(np.linalg.norm(WEIGHT))
  assert row.delta == pytest.approx(3 * 2**0.5)
  assert row.along_delta == pytest.approx((4**2 + 3**2) ** 0.5)
  assert row.along_weight == pytest.approx((9**2 + 8**2) ** 0.5)
  assert row.along_random == pytest.approx(2 * np.linalg.norm(WEIGHT) / (D_IN * D_OUT) ** 0.5)
  assert row.factor == pytest.approx(3 * 2**0.5 / 5)


def test_fewer_directions_leave_the_deltas_norm_as_it_is():
  row = amplification(WEIGHT[None], planted(0, 3.0), num_directions=1)
  assert row.along_delta == pytest.approx(9)
  assert row.along_weight == pytest.approx(9)
  assert row.delta == pytest.approx(3 * 2**0.5)


def test_the_mean_over_random_directions():
  """By 4,000 draws, within 3 %."""
  u, v = (orthonormal(d, 3, seed=seed, layers=(4000,)) for d, seed in ((D_IN, 3), (D_OUT, 4)))
  drawn = projected_norm(np.broadcast_to(WEIGHT, (4000, D_IN, D_OUT)), u, v)
  mean_square = np.square(drawn).mean() ** 0.5
  assert mean_square == pytest.approx(random_projected_norm(WEIGHT, 3), rel=0.03)


def test_bad_arguments():
  with pytest.raises(ValueError, match="num_directions=3 must be at most the adapter's rank, 2"):
    amplification(WEIGHT[None], planted(0, 1.0), num_directions=3)
  with pytest.raises(ValueError, match="num_directions"):
    amplification(WEIGHT[None], planted(0, 1.0), num_directions=0)
  with pytest.raises(ValueError, match=r"got \(12, 9\), \(9, 9\) and \(12, 12\)"):
    projected_norm(WEIGHT, V, U)
  with pytest.raises(ValueError, match="rank=10 must be at most 9 for a weight 12x9"):
    random_projected_norm(WEIGHT, 10)
