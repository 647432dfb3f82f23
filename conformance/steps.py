"""Rules of training: steps of LoRA+ and LoRA-FA, AdaLoRA's budget, merging and restarting."""

import numpy as np

Array = np.ndarray


# ---- LoRA+ (Hayou et al. 2024, arXiv 2402.12354, sec. 4) -------------------------------------


def sgd(values: Array, gradients: list[Array], rate: float) -> Array:
  for gradient in gradients:
    values = values - rate * gradient
  return values


def adamw(
  values: Array, gradients: list[Array], rate: float, decay: float, epsilon: float
) -> Array:
  """AdamW (arXiv 1711.05101, algorithm 2) with beta1 0.9 and beta2 0.999."""
  first = second = np.zeros_like(values)
  for step, gradient in enumerate(gradients, 1):
    first = 0.9 * first + 0.1 * gradient
    second = 0.999 * second + 0.001 * gradient**2
    update = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + epsilon)
    values = values - rate * (update + decay * values)
  return values


# ---- LoRA-FA's preconditioner (arXiv 2308.03303; PEFT 0.21, optimizers/lorafa.py) ------------


def preconditioned(gradient: Array, a: Array, s: float) -> Array:
  """Returns (A^T A + 1e-8)^-1 g / s^2: then A times it is g's nearest approximation of dL/dW."""
  gram = a.T @ a + 1e-8 * np.eye(a.shape[1])
  return np.linalg.solve(gram, gradient) / s**2


# ---- AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) -------------------------------------------


def penalty(a: Array, b: Array) -> float:
  """R(A, B) = |A^T A - I|^2 + |B B^T - I|^2, squared Frobenius norms (eq. 4)."""
  identity = np.eye(a.shape[1])
  return float(np.sum((a.T @ a - identity) ** 2) + np.sum((b @ b.T - identity) ** 2))


def penalty_gradients(a: Array, b: Array) -> tuple[Array, Array]:
  identity = np.eye(a.shape[1])
  return 4 * a @ (a.T @ a - identity), 4 * (b @ b.T - identity) @ b


def mean_norm(a: Array, b: Array) -> float:
  """(|A^T A - I| + |B B^T - I|) / 2: the penalty of the authors' code and of PEFT, not squared."""
  identity = np.eye(a.shape[1])
  return float(np.linalg.norm(a.T @ a - identity) + np.linalg.norm(b @ b.T - identity)) / 2


def mean_norm_gradients(a: Array, b: Array) -> tuple[Array, Array]:
  identity = np.eye(a.shape[1])
  left, right = a.T @ a - identity, b @ b.T - identity
  return a @ left / np.linalg.norm(left), right @ b / np.linalg.norm(right)


def smoothed(
  values: list[Array], gradients: list[Array], beta1: float, beta2: float
) -> tuple[Array, Array]:
  """Returns the sensitivity |w g| and its uncertainty, both smoothed over the steps (eq. 8-10)."""
  sensitivity = uncertainty = np.zeros_like(values[0])
  for value, gradient in zip(values, gradients, strict=True):
    now = np.abs(value * gradient)
    sensitivity = beta1 * sensitivity + (1 - beta1) * now
    uncertainty = beta2 * uncertainty + (1 - beta2) * np.abs(now - sensitivity)
  return sensitivity, uncertainty


def importance(a: Array, e: Array, b: Array) -> Array:
  """Combines the scores of A (in, rank), E (rank) and B (rank, out): eq. 7, (rank,)."""
  return e + a.mean(0) + b.mean(1)


def budget(step: int, first: int, last: int, warmup: int, final: int, total: int) -> int:
  """Returns the number of components at a step: a cubic decrease (eq. 12), rounded down."""
  if step <= warmup:
    return first
  if step > total - final:
    return last
  left = 1 - (step - warmup) / (total - final - warmup)
  return int((first - last) * left**3 + last)


def kept(scores: Array, count: int) -> Array:
  """Returns which components are among the `count` most important."""
  order = np.argsort(-scores, kind="stable")
  mask = np.zeros(len(scores), bool)
  mask[order[:count]] = True
  return mask
