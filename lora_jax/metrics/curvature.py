"""The largest eigenvalue of a loss's Hessian, its sharpness, from Hessian-vector products.

    H v = d/dt grad L(x + t v) at t = 0         forward over reverse; H is never materialized
    H Q = Q T + beta q e^T                      Lanczos: Q orthonormal, T tridiagonal

The largest eigenvalue of T, with eigenvector s, is at most that of H; H has an eigenvalue within
|beta s_last| of it. Rounding makes q lose its orthogonality to Q, which shows as copies of
eigenvalues in T, so each q is orthogonalized against all of Q, twice (Parlett 1998, "The Symmetric
Eigenvalue Problem", sec. 6.9 and 13). The products are Pearlmutter's (1994, "Fast Exact
Multiplication by the Hessian").
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, PyTree

from lora_jax.fields import Count, Within, read_value

Tolerance = Annotated[float, Within("(0, 1)")]


class Eigenpair(NamedTuple):
  """An eigenvalue of a symmetric matrix, as exact as `residual` says.

  Attributes:
    value: the eigenvalue; the matrix has one within `residual` of it.
    vector: the eigenvector, of norm 1.
    residual: norm of `matrix @ vector - value * vector`, computed from one more product.
    num_products: matrix-vector products computed, that one included.
  """

  value: float
  vector: Float[np.ndarray, " N"]
  residual: float
  num_products: int


def hessian_product(loss: Callable[..., Any], x: PyTree, v: PyTree, *args: Any) -> PyTree:
  """Returns `H v`, with the Hessian of `loss(x, *args)` with respect to `x`.

  Args:
    loss: a scalar function that has forward-mode derivatives, also of its gradient. A `custom_vjp`
      has none: models of the zoo need `attention="xla"`.
    x: a tree of float arrays.
    v: a tree like `x`.
    args: further arguments of the loss, such as a batch.
  """
  return jax.jvp(lambda x: jax.grad(loss)(x, *args), (x,), (v,))[1]


def largest_eigenvalue(
  product: Callable[[Float[np.ndarray, " N"]], Any],
  start: Float[np.ndarray, " N"],
  *,
  tolerance: float = 1e-3,
  max_products: int = 100,
) -> Eigenpair:
  """Returns the largest eigenvalue of a symmetric matrix, with its sign, by the Lanczos method.

  >>> pair = largest_eigenvalue(lambda v: np.array([-9.0, 1.0, 4.0]) * v, np.ones(3))
  >>> round(pair.value, 6)
  4.0

  Args:
    product: from a vector to its product with the matrix.
    start: a random vector. Its dtype is that of the vectors that are kept: `max_products` of them.
    tolerance: of the residual, relative to the eigenvalue. The eigenvalue itself is more exact: its
      error falls with the square of the residual.
    max_products: at most as many are computed, and one for the residual. Where they are too few,
      `residual` is larger than the tolerance.
  Raises:
    ValueError: if `start` is not a vector, or is zero or not finite.
    FloatingPointError: if a product is not finite.
  """
  tolerance = read_value(Tolerance, tolerance, "tolerance")
  steps = min(read_value(Count, max_products, "max_products"), start.size)
  length = float(np.linalg.norm(start))
  if start.ndim != 1 or not np.isfinite(length) or not length:
    raise ValueError(
      f"start must be a vector that is finite and not zero, got shape {start.shape}, norm {length}"
    )
  basis = np.empty((steps, start.size), start.dtype)
  diagonal, beside = list[float](), list[float]()
  vector = start / length
  for step in range(steps):
    basis[step] = vector
    image = _finite(product(vector), step)
    diagonal.append(float(vector @ image))
    for _ in range(2):
      image = image - basis[: step + 1].T @ (basis[: step + 1] @ image)
    beta = float(np.linalg.norm(image))
    values, vectors = np.linalg.eigh(_tridiagonal(diagonal, beside))
    # Where beta is 0 but for rounding, Q spans all that H makes of `start`.
    is_exact = beta <= np.finfo(start.dtype).eps * np.abs(values).max()
    if is_exact or beta * abs(vectors[-1, -1]) <= tolerance * abs(values[-1]):
      break
    beside.append(beta)
    vector = image / beta
  values, vectors = np.linalg.eigh(_tridiagonal(diagonal, beside))
  value = float(values[-1])
  vector = (vectors[:, -1] @ basis[: len(diagonal)]).astype(start.dtype)
  residual = np.linalg.norm(_finite(product(vector), len(diagonal)) - value * vector)
  return Eigenpair(value, vector, float(residual), len(diagonal) + 1)


def _tridiagonal(diagonal: list[float], beside: list[float]) -> Float[np.ndarray, "K K"]:
  off = beside[: len(diagonal) - 1]
  return np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)


def _finite(image: Any, step: int) -> Float[np.ndarray, " N"]:
  """Returns a product as an array; raises FloatingPointError if it is not finite."""
  image = np.asarray(image)
  if not np.isfinite(image).all():
    raise FloatingPointError(f"the matrix-vector product of step {step} is not finite")
  return image
