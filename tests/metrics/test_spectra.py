"""Intruder dimensions of matrices made to have them, and effective ranks."""

import numpy as np
import pytest

from lora_jax.metrics.spectra import count_intruders, effective_rank, similarities

ROWS, COLUMNS = 24, 16


def weight(rows=ROWS, columns=COLUMNS):
  """Returns a matrix with distinct singular values 1, 2, ..., and its left singular vectors."""
  generator = np.random.default_rng(0)
  left, _ = np.linalg.qr(generator.normal(size=(rows, rows)))
  right, _ = np.linalg.qr(generator.normal(size=(columns, columns)))
  size = min(rows, columns)
  values = np.arange(size, 0, -1.0)
  return left[:, :size] * values @ right[:, :size].T, left


@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (COLUMNS, ROWS), (COLUMNS, COLUMNS)])
def test_an_unchanged_or_scaled_weight_has_none(shape):
  before, _ = weight(*shape)
  for after in (before, -3.0 * before):
    cosines = similarities(before, after)
    assert cosines == pytest.approx(np.ones(min(shape)))
    assert count_intruders(cosines, threshold=0.99) == 0


def test_a_planted_vector_is_one_intruder_and_only_among_the_first():
  before, left = weight()
  outside = left[:, COLUMNS]  # orthogonal to all singular vectors of `before`
  right = np.linalg.svd(before).Vh[3]
  planted = np.outer(outside, right)
  large, small = (
    similarities(before, before + 100 * planted),
    similarities(before, before + planted),
  )
  assert large[0] == pytest.approx(0.13, abs=0.01)  # 13 of the vector that it adds to
  assert (large[1:] > 0.9).all()
  assert count_intruders(large, num_vectors=1) == count_intruders(large) == 1
  assert count_intruders(large, threshold=0.1) == 0
  assert count_intruders(small) == 0


def test_a_strengthened_vector_is_none():
  before, _ = weight()
  left, values, right = np.linalg.svd(before, full_matrices=False)
  after = before + 100 * np.outer(left[:, 5], right[5])
  assert count_intruders(similarities(before, after), num_vectors=16, threshold=0.99) == 0
  assert values[5] == pytest.approx(11)


def test_a_mixture_of_two_counts_by_the_threshold():
  before, _ = weight()
  left, _, right = np.linalg.svd(before, full_matrices=False)
  after = before + 1000 * np.outer(left[:, 2] + left[:, 7], right[0])
  cosines = similarities(before, after)
  assert cosines[0] == pytest.approx(0.5**0.5, abs=0.01)
  assert count_intruders(cosines, num_vectors=1, threshold=0.6) == 0
  assert count_intruders(cosines, num_vectors=1, threshold=0.8) == 1


def test_effective_rank():
  assert effective_rank(np.diag([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3)
  assert effective_rank(np.outer([1.0, 2.0], [3.0, 4.0, 5.0])) == pytest.approx(1)
  assert effective_rank(np.diag([3.0, 1.0])) == pytest.approx(4 / 3**0.75)  # exp(entropy)
  assert effective_rank(np.zeros((2, 3))) == 0


def test_bad_arguments():
  matrix = np.eye(3)
  with pytest.raises(ValueError, match=r"before has the shape \(3, 3\), after \(3, 2\)"):
    similarities(matrix, matrix[:, :2])
  with pytest.raises(ValueError, match=r"before must be a matrix, got shape \(3,\)"):
    similarities(matrix[0], matrix)
  with pytest.raises(ValueError, match="after has values that are not finite"):
    similarities(matrix, matrix * np.nan)
  with pytest.raises(ValueError, match="matrix has values that are not finite"):
    effective_rank(np.full((2, 2), np.inf))
  with pytest.raises(ValueError, match="threshold"):
    count_intruders(np.ones(3), threshold=1.5)
  with pytest.raises(ValueError, match="num_vectors"):
    count_intruders(np.ones(3), num_vectors=0)
