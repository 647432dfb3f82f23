"""How training changes a weight's singular vectors: intruder dimensions and effective rank.

An intruder dimension (Shuttleworth et al. 2024, arXiv 2410.21228, sec. 3) is a left singular vector
u of the trained weight, among those of the largest singular values, that resembles no singular
vector u_i of the weight before training:

    max_i |cos(u, u_i)| < threshold

A weight is (outputs, inputs) here, as in the paper and in PyTorch: pass the transpose of a kernel.
"""

from typing import Annotated

import numpy as np
from jaxtyping import Float

from lora_jax.fields import Count, Within, read_value

Cosine = Annotated[float, Within("[0, 1]")]


def similarities(
  before: Float[np.ndarray, "M N"], after: Float[np.ndarray, "M N"]
) -> Float[np.ndarray, " K"]:
  """Returns how well each singular vector of a trained weight is found in the weight before.

  Returns:
    For the K = min(M, N) left singular vectors of `after`, by falling singular value, the largest
    |cosine| with a left singular vector of `before`: 1 for one that training has left as it is.
  Raises:
    ValueError: if they are not matrices of one shape, or not finite.
  """
  before, after = (_matrix(weight, name) for weight, name in ((before, "before"), (after, "after")))
  if before.shape != after.shape:
    raise ValueError(
      f"before has the shape {before.shape}, after {after.shape}; expected one shape"
    )
  old, new = (np.linalg.svd(weight, full_matrices=False).U for weight in (before, after))
  return np.abs(new.T @ old).max(axis=1)


def count_intruders(
  cosines: Float[np.ndarray, " K"], *, num_vectors: int = 10, threshold: float = 0.5
) -> int:
  """Returns the number of intruder dimensions among the first singular vectors.

  >>> before, after = np.diag([3.0, 2.0, 1.0]), np.diag([3.0, 2.0, 9.0])
  >>> rotated = after + np.outer([0, 7, 7], [0, 7, 7])
  >>> count_intruders(similarities(before, after), num_vectors=1)
  0
  >>> count_intruders(similarities(before, rotated), num_vectors=1, threshold=0.8)
  1

  Args:
    cosines: as `similarities` returns them.
    num_vectors: the number of singular vectors that count, of the largest singular values.
    threshold: the |cosine| below which one is an intruder.
  """
  read_value(Count, num_vectors, "num_vectors")
  read_value(Cosine, threshold, "threshold")
  return int((cosines[:num_vectors] < threshold).sum())


def effective_rank(matrix: Float[np.ndarray, "M N"]) -> float:
  """Returns the exponential of the entropy of the singular values, as shares of their sum.

  Roy and Vetterli 2007, "The effective rank", eq. 4. It is 0 for a matrix of zeros.

  >>> round(effective_rank(np.diag([2.0, 2.0, 0.0])), 6)
  2.0

  Raises:
    ValueError: if it is not a matrix, or not finite.
  """
  values = np.linalg.svd(_matrix(matrix, "matrix"), compute_uv=False)
  if not values.any():
    return 0.0
  shares = values[values > 0] / values.sum()
  return float(np.exp(-(shares * np.log(shares)).sum()))


def _matrix(weight: Float[np.ndarray, "M N"], name: str) -> Float[np.ndarray, "M N"]:
  weight = np.asarray(weight, np.float64)
  if weight.ndim != 2:
    raise ValueError(f"{name} must be a matrix, got shape {weight.shape}")
  if not np.isfinite(weight).all():
    raise ValueError(f"{name} has values that are not finite")
  return weight
