"""The equations of variants with few parameters, whose large arrays are frozen or shared.

As in formulas.py. Arrays that all weights share are longer than most of them need: a weight takes
the first entries along each axis.
"""

from typing import Any

import numpy as np

from conformance.formulas import Array, Arrays, Formula, T, lora_output, lora_weight

# ---- LoRA-XS ---------------------------------------------------------------------------------


def lora_xs_output(x: Array, w: Array, p: Arrays, s: float, held: Any = None) -> Array:
  return x @ w + s * x @ p.lora_a @ p.core @ p.lora_b


def lora_xs_weight(w: Array, p: Arrays, s: float) -> Array:
  return w + s * p.lora_a @ p.core @ p.lora_b


LORA_XS = Formula(
  "h = x W + s x A R B, A = U_r S_r, B = V_r^T, W = U S V^T",
  "Bałazy et al. 2024, arXiv 2405.17604, sec. 3",
  {"lora_a": "batch in rank", "core": "batch rank rank2", "lora_b": "batch rank2 out"},
  lora_xs_output,
  lora_xs_weight,
  lambda w, p, s, g: {"core": s * T(p.lora_a) @ g @ T(p.lora_b)},
  frozen=("lora_a", "lora_b"),
)


# ---- VeRA ------------------------------------------------------------------------------------


def shared_pair(w: Array, p: Arrays) -> tuple[Array, Array]:
  """Returns the parts of the shared A and B that a weight uses: its first inputs and outputs."""
  return p.shared_a[: w.shape[-2]], p.shared_b[:, : w.shape[-1]]


def vera_output(x: Array, w: Array, p: Arrays, s: float, held: Any = None) -> Array:
  a, b = shared_pair(w, p)
  h = (x @ a) * p.lambda_d[..., None, :]
  return x @ w + s * (h @ b) * p.lambda_b[..., None, :]


def vera_weight(w: Array, p: Arrays, s: float) -> Array:
  a, b = shared_pair(w, p)
  return w + s * (a * p.lambda_d[..., None, :]) @ (b * p.lambda_b[..., None, :])


def vera_gradients(w: Array, p: Arrays, s: float, g: Array) -> dict[str, Array]:
  a, b = shared_pair(w, p)
  down, up = a * p.lambda_d[..., None, :], b * p.lambda_b[..., None, :]
  return {
    "lambda_d": s * np.sum(a * (g @ T(up)), axis=-2),
    "lambda_b": s * np.sum(b * (T(down) @ g), axis=-2),
  }


VERA = Formula(
  "h = x W + s ((x A) * d) B * b, A and B random and shared by all weights",
  "Kopiczko et al. 2023, arXiv 2310.11454, eq. 2",
  {
    "shared_a": "most_in rank",
    "shared_b": "rank most_out",
    "lambda_d": "batch rank",
    "lambda_b": "batch out",
  },
  vera_output,
  vera_weight,
  vera_gradients,
  frozen=("shared_a", "shared_b"),
)


# ---- RandLoRA --------------------------------------------------------------------------------


def wide(w: Array) -> bool:
  """Whether a weight has no more inputs than outputs; the others are transposed."""
  return w.shape[-2] <= w.shape[-1]


def bases(w: Array, p: Arrays) -> tuple[Array, list[Array]]:
  """Returns the parts of A, (small, rank), and of each B, (rank, large), that a weight uses."""
  small, large = sorted(w.shape[-2:])
  count = p.lambdas.shape[-2]
  return p.shared_a[:small], [b[:, :large] for b in p.shared_b[:count]]


def rand_lora_output(x: Array, w: Array, p: Arrays, s: float, held: Any = None) -> Array:
  (a, all_b), out = bases(w, p), x @ w
  for j, b in enumerate(all_b):
    lam, gamma = p.lambdas[..., j, None, :], p.gammas[..., j, None, :]
    if wide(w):
      out = out + s * (((x * gamma) @ a) * lam) @ b
    else:
      out = out + s * (((x @ b.T) * lam) @ a.T) * gamma
  return out


def rand_lora_weight(w: Array, p: Arrays, s: float) -> Array:
  a, all_b = bases(w, p)
  for j, b in enumerate(all_b):
    d = (p.gammas[..., j, :, None] * a * p.lambdas[..., j, None, :]) @ b
    w = w + s * (d if wide(w) else T(d))
  return w


def rand_lora_gradients(w: Array, p: Arrays, s: float, g: Array) -> dict[str, Array]:
  (a, all_b), g = bases(w, p), g if wide(w) else T(g)
  into_rank = [s * a * (g @ b.T) for b in all_b]
  lambdas = [(p.gammas[..., j, None, :] @ each)[..., 0, :] for j, each in enumerate(into_rank)]
  gammas = [(each @ p.lambdas[..., j, :, None])[..., 0] for j, each in enumerate(into_rank)]
  return {"lambdas": np.stack(lambdas, -2), "gammas": np.stack(gammas, -2)}


RAND_LORA = Formula(
  "h = x W + s sum over j of (((x * gamma_j) A) * lambda_j) B_j; "
  "((((x B_j^T) * lambda_j) A^T) * gamma_j) where W has more inputs than outputs",
  "Albert et al. 2025, arXiv 2502.00987",
  {
    "shared_a": "most_small rank",
    "shared_b": "most_bases rank most_large",
    "lambdas": "batch bases rank",
    "gammas": "batch bases small",
  },
  rand_lora_output,
  rand_lora_weight,
  rand_lora_gradients,
  frozen=("shared_a", "shared_b"),
)


# ---- Uni-LoRA --------------------------------------------------------------------------------


def elements(p: Arrays) -> Arrays:
  """Returns A and B, whose elements are those of the shared vector."""
  values = p.theta * p.inverse_root
  return Arrays(lora_a=values[p.index_a], lora_b=values[p.index_b])


def uni_lora_gradients(w: Array, p: Arrays, s: float, g: Array) -> dict[str, Array]:
  pair, theta = elements(p), np.zeros_like(p.theta)
  np.add.at(theta, p.index_a, s * g @ T(pair.lora_b))
  np.add.at(theta, p.index_b, s * T(pair.lora_a) @ g)
  return {"theta": theta * p.inverse_root}


UNI_LORA = Formula(
  "h = x W + s (x A) B, A = (theta * inverse_root)[index_a], B = (theta * inverse_root)[index_b]; "
  "inverse_root = 1 / sqrt(n), n how often an entry of theta is in all indices",
  "Li et al. 2025, arXiv 2506.00799",
  {
    "theta": "length",
    "inverse_root": "length",
    "index_a": "batch in rank",
    "index_b": "batch rank out",
  },
  lambda x, w, p, s, held=None: lora_output(x, w, elements(p), s),
  lambda w, p, s: lora_weight(w, elements(p), s),
  uni_lora_gradients,
  frozen=("inverse_root", "index_a", "index_b"),
)


# ---- TinyLoRA --------------------------------------------------------------------------------


def core(p: Arrays) -> Array:
  """Returns R, the sum of v[i] P[i]."""
  return np.einsum("u,...uij->...ij", p.v, p.projection)


def tiny_lora_output(x: Array, w: Array, p: Arrays, s: float, held: Any = None) -> Array:
  return x @ w + s * x @ p.lora_a @ core(p) @ p.lora_b


def tiny_lora_gradients(w: Array, p: Arrays, s: float, g: Array) -> dict[str, Array]:
  into_core = s * T(p.lora_a) @ g @ T(p.lora_b)
  each = np.einsum("...ij,...uij->...u", into_core, p.projection)
  return {"v": each.reshape(-1, len(p.v)).sum(0)}


TINY_LORA = Formula(
  "h = x W + s x A R B, R = sum over i of v_i P_i, A = U_r S_r, B = V_r^T, W = U S V^T",
  "Morris et al. 2026, arXiv 2602.04118",
  {
    "v": "groups",
    "lora_a": "batch in rank",
    "projection": "batch groups rank rank2",
    "lora_b": "batch rank2 out",
  },
  tiny_lora_output,
  lambda w, p, s: w + s * p.lora_a @ core(p) @ p.lora_b,
  tiny_lora_gradients,
  frozen=("lora_a", "projection", "lora_b"),
)
