"""The equations of products by elements, of Kronecker products and of shards, as in formulas.py."""

from typing import Any

import numpy as np

from conformance.formulas import (
  LORA_ARRAYS,
  Array,
  Arrays,
  Formula,
  T,
  lora_gradients,
  merged_output,
)

# ---- HiRA ------------------------------------------------------------------------------------


def hira_weight(w: Array, p: Arrays, s: float) -> Array:
  return w + s * w * (p.lora_a @ p.lora_b)


HIRA = Formula(
  "W' = W + s W * (A B)",
  "Huang et al. 2025, HiRA: Parameter-Efficient Hadamard High-Rank Adaptation, ICLR, sec. 3",
  LORA_ARRAYS,
  merged_output(hira_weight),
  hira_weight,
  lambda w, p, s, g: lora_gradients(w, p, s, g * w),
)


# ---- LoHa ------------------------------------------------------------------------------------


def loha_weight(w: Array, p: Arrays, s: float) -> Array:
  return w + s * (p.a1 @ p.b1) * (p.a2 @ p.b2)


def loha_gradients(w: Array, p: Arrays, s: float, g: Array) -> dict[str, Array]:
  first, second = s * g * (p.a2 @ p.b2), s * g * (p.a1 @ p.b1)
  return {
    "a1": first @ T(p.b1),
    "b1": T(p.a1) @ first,
    "a2": second @ T(p.b2),
    "b2": T(p.a2) @ second,
  }


LOHA = Formula(
  "W' = W + s (A1 B1) * (A2 B2)",
  "Hyeon-Woo et al. 2021, arXiv 2108.06098, sec. 2.2; Yeh et al. 2023, arXiv 2309.14859, sec. 4",
  {
    "a1": "batch in rank",
    "b1": "batch rank out",
    "a2": "batch in rank",
    "b2": "batch rank out",
  },
  merged_output(loha_weight),
  loha_weight,
  loha_gradients,
)


# ---- LoKr ------------------------------------------------------------------------------------


def lokr_factors(p: Arrays) -> tuple[Array, Array]:
  """Returns (in1, out1) and (..., in2, out2), the second with the window of a convolution."""
  w1 = p.w1 if hasattr(p, "w1") else p.w1_a @ p.w1_b
  return w1, p.w2 if hasattr(p, "w2") else p.w2_a @ p.w2_b


def kron(w1: Array, w2: Array) -> Array:
  """Returns the Kronecker product over the last two axes; further axes of w2 are kept in front."""
  product = np.einsum("...ab,...cd->...acbd", w1, w2)
  *front, a, c, b, d = product.shape
  return product.reshape(*front, a * c, b * d)


def lokr_weight(w: Array, p: Arrays, s: float) -> Array:
  return w + s * kron(*lokr_factors(p)).reshape(w.shape)


def lokr_gradients(w: Array, p: Arrays, s: float, g: Array) -> dict[str, Array]:
  w1, w2 = lokr_factors(p)
  (a, b), (c, d) = w1.shape[-2:], w2.shape[-2:]
  g = s * g.reshape(*w2.shape[:-2], a, c, b, d)
  g1, g2 = np.einsum("...acbd,...cd->...ab", g, w2), np.einsum("...acbd,...ab->...cd", g, w1)
  g1 = g1.reshape(-1, *w1.shape).sum(0)  # over the window of a convolution
  first = {"w1": g1} if hasattr(p, "w1") else {"w1_a": g1 @ T(p.w1_b), "w1_b": T(p.w1_a) @ g1}
  second = {"w2": g2} if hasattr(p, "w2") else {"w2_a": g2 @ T(p.w2_b), "w2_b": T(p.w2_a) @ g2}
  return first | second


LOKR = Formula(
  "W' = W + s w1 (x) w2, the Kronecker product; w1 = w1_a w1_b or w2 = w2_a w2_b where factored",
  "Yeh et al. 2023, arXiv 2309.14859, sec. 4",
  {
    "w1": "batch in1 out1",
    "w2": "batch window in2 out2",
    "w1_a": "batch in1 rank",
    "w1_b": "batch rank out1",
    "w2_a": "batch in2 rank",
    "w2_b": "batch rank out2",
  },
  merged_output(lokr_weight),
  lokr_weight,
  lokr_gradients,
)


# ---- MiSS ------------------------------------------------------------------------------------


def tiled(d: Array, inputs: int, outputs: int) -> Array:
  """Repeats D (rank, width) over the weight: W'[i, o] gets D[i mod rank, o mod width]."""
  rank, width = d.shape[-2:]
  return d[..., np.arange(inputs) % rank, :][..., np.arange(outputs) % width]


def miss_weight(w: Array, p: Arrays, s: float) -> Array:
  return w + s * tiled(p.d, *w.shape[-2:])


def miss_output(x: Array, w: Array, p: Arrays, s: float, held: Any = None) -> Array:
  rank = p.d.shape[-2]
  padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % rank)]
  shards = np.pad(x, padding).reshape(*x.shape[:-1], -1, rank).sum(-2)
  return x @ w + s * shards @ tiled(p.d, rank, w.shape[-1])


def miss_gradients(w: Array, p: Arrays, s: float, g: Array) -> dict[str, Array]:
  rank, width = p.d.shape[-2:]
  total = np.zeros_like(p.d)
  for i in range(g.shape[-2]):
    for o in range(g.shape[-1]):
      total[..., i % rank, o % width] += s * g[..., i, o]
  return {"d": total}


MISS = Formula(
  "h = x W + s S D, S[j] = the sum of x over inputs j, j + rank, j + 2 rank, ...; "
  "mini: D (rank, width) repeated along the outputs",
  "Kang and Yin 2024, arXiv 2409.15371, sec. 3, in the order of PEFT 0.21 (tuners/miss/layer.py)",
  {"d": "batch rank width"},
  miss_output,
  miss_weight,
  miss_gradients,
)


# ---- MiSS bat --------------------------------------------------------------------------------


def bat_weight(w: Array, p: Arrays, s: float) -> Array:
  """Adds D^T (I + W) to each block of W, of rank inputs and outputs; D is that of its outputs."""
  w, rank = w.copy(), p.d.shape[-1]
  for i in range(w.shape[-2] // rank):
    for o in range(w.shape[-1] // rank):
      rows, columns = slice(i * rank, (i + 1) * rank), slice(o * rank, (o + 1) * rank)
      block = w[..., rows, columns]
      w[..., rows, columns] = block + s * T(p.d[..., o, :, :]) @ (np.eye(rank) + block)
  return w


def bat_gradients(w: Array, p: Arrays, s: float, g: Array) -> dict[str, Array]:
  rank, total = p.d.shape[-1], np.zeros_like(p.d)
  for i in range(w.shape[-2] // rank):
    for o in range(w.shape[-1] // rank):
      rows, columns = slice(i * rank, (i + 1) * rank), slice(o * rank, (o + 1) * rank)
      total[..., o, :, :] += s * (np.eye(rank) + w[..., rows, columns]) @ T(g[..., rows, columns])
  return {"d": total}


MISS_BAT = Formula(
  "W' = W + s D^T (I + W) for each block of rank inputs and rank outputs, with a D for the outputs",
  "Kang and Yin 2024, arXiv 2409.15371, sec. 3, as PEFT 0.21 (tuners/miss/layer.py) on (out, in)",
  {"d": "batch blocks rank rank2"},
  merged_output(bat_weight),
  bat_weight,
  bat_gradients,
)
