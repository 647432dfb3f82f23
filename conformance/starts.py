"""Initial values computed from the weight, its quantization, gradients or activations.

The signs of singular vectors are arbitrary. What a vector file holds of a start does not depend on
them: products of A and B, norms of their columns and rows, and projections A A^T.
"""

from collections.abc import Callable

import numpy as np

Array = np.ndarray
Pair = tuple[Array, Array]


def T(x: Array) -> Array:
  return np.swapaxes(x, -1, -2)


def pissa(w: Array, rank: int, s: float) -> Pair:
  """A0 = U_r sqrt(S_r / s), B0 = sqrt(S_r / s) V_r^T, of the largest singular values."""
  return singular_pair(w, slice(None, rank), s)


def milora(w: Array, rank: int, s: float) -> Pair:
  """As PiSSA, of the smallest singular values."""
  return singular_pair(w, slice(-rank, None), s)


def singular_pair(w: Array, part: slice, s: float) -> Pair:
  u, values, vt = np.linalg.svd(w, full_matrices=False)
  root = np.sqrt(values[..., part] / s)
  return u[..., :, part] * root[..., None, :], root[..., :, None] * vt[..., part, :]


def olora(w: Array, rank: int, s: float) -> Pair:
  """W^T = Q R: B0 is the first `rank` columns of Q, A0 the first rows of R; s does not enter."""
  q, r = np.linalg.qr(T(w))
  return T(r[..., :rank, :]), T(q[..., :, :rank])


def lora_xs(w: Array, rank: int, s: float) -> Pair:
  """A = U_r S_r, B = V_r^T; s does not enter."""
  u, values, vt = np.linalg.svd(w, full_matrices=False)
  return u[..., :rank] * values[..., None, :rank], vt[..., :rank, :]


def lora_ga(gradient: Array, rank: int, gamma: float) -> Pair:
  """A0 = c U[:, :r], B0 = c V[:, r:2r]^T of the gradient (in, out), c = out^(1/4) / sqrt(gamma)."""
  u, _, vt = np.linalg.svd(gradient, full_matrices=False)
  c = gradient.shape[-1] ** 0.25 / gamma**0.5
  return c * u[..., :rank], c * vt[..., rank : 2 * rank, :]


def corda(w: Array, x: Array, rank: int, s: float, last: bool) -> Pair:
  """C W = U S V^T, A0 = C^-1 U_r sqrt(S_r / s), B0 = sqrt(S_r / s) V_r^T; or the `last` r terms.

  C is x^T x divided by the mean of its diagonal, plus 0.01 I.
  """
  c = x.T @ x
  c = c / np.mean(np.diag(c)) + 0.01 * np.eye(len(c))
  a, b = singular_pair(c @ w, slice(-rank, None) if last else slice(None, rank), s)
  return np.linalg.solve(c, a), b


# ---- LoftQ (Li et al. 2023, arXiv 2310.08659, algorithm 1) -----------------------------------


def loftq(w: Array, rank: int, steps: int, quantize: Callable[[Array], Array]) -> list[Pair]:
  """Returns (Q_t, A_t B_t) for t = 1 ... steps: Q = q(W - A B), then A B = SVD_r(W - Q)."""
  product, sequence = np.zeros_like(w), []
  for _ in range(steps):
    quantized = quantize(w - product)
    a, b = singular_pair(w - quantized, slice(None, rank), 1.0)
    product = a @ b
    sequence.append((quantized, product))
  return sequence


def uniform(bits: int) -> Callable[[Array], Array]:
  """Rounds each output's weights to multiples of its largest magnitude / (2^(bits - 1) - 1)."""

  def quantize(w: Array) -> Array:
    step = np.max(np.abs(w), axis=-2, keepdims=True) / (2 ** (bits - 1) - 1)
    return step * np.round(w / step)

  return quantize


# ---- EVA (Paischer et al. 2024, arXiv 2410.07170) --------------------------------------------


def principal(x: Array, centered: bool) -> tuple[Array, Array]:
  """Returns the right singular vectors of activations (rows), and their shares of the variance."""
  x = x - x.mean(0) if centered else x
  _, values, vt = np.linalg.svd(x, full_matrices=False)
  return vt, values**2 / np.sum(values**2)


def redistributed(shares: list[Array], rank: int, rho: float) -> list[int]:
  """Gives rank * weights components to the largest shares, at most round(rho * rank) a weight."""
  most = round(rho * rank)
  ordered = sorted(
    ((share, i) for i, each in enumerate(shares) for share in each[:most]), reverse=True
  )
  chosen = [i for _, i in ordered[: rank * len(shares)]]
  return [chosen.count(i) for i in range(len(shares))]
