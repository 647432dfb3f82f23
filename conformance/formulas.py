"""The variants' equations, written as in the papers, with their gradients derived by hand.

Weights are matrices (in, out), inputs rows (tokens, in); both may have a leading axis of layers.
A formula has three functions of the weight w, the arrays p and the scaling s:

    output(x, w, p, s)        the layer as the paper computes it
    weight(w, p, s)           the merged weight W'
    gradients(w, p, s, g)     the gradient of each trained array, for g = dL / dW'
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Arrays = SimpleNamespace


class Formula(NamedTuple):
  """One variant.

  Attributes:
    equation: of the layer or its weight, with `@` as the matmul and `*` by elements.
    source: the paper, and its arXiv number.
    arrays: the axes of each array, by name.
    frozen: the arrays that are not trained.
    constant: the trained arrays and parts that gradients do not reach, in words.
  """

  equation: str
  source: str
  arrays: Mapping[str, str]
  output: Callable[..., Array]
  weight: Callable[..., Array]
  gradients: Callable[..., dict[str, Array]]
  frozen: tuple[str, ...] = ()
  constant: str = ""


def T(x: Array) -> Array:
  return np.swapaxes(x, -1, -2)


def merged_output(weight: Callable[..., Array]) -> Callable[..., Array]:
  """Returns the output of a layer that is defined by its weight only."""
  return lambda x, w, p, s, held=None: x @ weight(w, p, s)


LORA_ARRAYS = {"lora_a": "batch in rank", "lora_b": "batch rank out"}


# ---- LoRA ------------------------------------------------------------------------------------


def lora_output(x: Array, w: Array, p: Arrays, s: float, held: Any = None) -> Array:
  return x @ w + s * (x @ p.lora_a) @ p.lora_b


def lora_weight(w: Array, p: Arrays, s: float) -> Array:
  return w + s * p.lora_a @ p.lora_b


def lora_gradients(w: Array, p: Arrays, s: float, g: Array) -> dict[str, Array]:
  return {"lora_a": s * g @ T(p.lora_b), "lora_b": s * T(p.lora_a) @ g}


LORA = Formula(
  "h = x W + s (x A) B, s = alpha / rank",
  "Hu et al. 2021, arXiv 2106.09685, sec. 4.1",
  LORA_ARRAYS,
  lora_output,
  lora_weight,
  lora_gradients,
)
RSLORA = LORA._replace(
  equation="h = x W + s (x A) B, s = alpha / sqrt(rank)",
  source="Kalajdzievski 2023, arXiv 2312.03732, sec. 3",
)
LORA_FA = LORA._replace(
  equation="h = x W + s (x A) B, A frozen",
  source="Zhang et al. 2023, arXiv 2308.03303, sec. 3",
  gradients=lambda w, p, s, g: {"lora_b": s * T(p.lora_a) @ g},
  frozen=("lora_a",),
)


# ---- DoRA ------------------------------------------------------------------------------------


def column_norms(w: Array) -> Array:
  return np.sqrt(np.sum(w**2, axis=-2, keepdims=True))


def dora_output(x: Array, w: Array, p: Arrays, s: float, held: Any = None) -> Array:
  norm = column_norms(lora_weight(w, held or p, s))  # a constant for gradients (sec. 4.3)
  return p.magnitude[..., None, :] / norm * lora_output(x, w, p, s)


def dora_weight(w: Array, p: Arrays, s: float) -> Array:
  v = lora_weight(w, p, s)
  return p.magnitude[..., None, :] * v / column_norms(v)


def dora_gradients(w: Array, p: Arrays, s: float, g: Array) -> dict[str, Array]:
  v = lora_weight(w, p, s)
  norm = column_norms(v)
  through = g * p.magnitude[..., None, :] / norm
  magnitude = np.sum(g * v / norm, axis=-2)
  return {**lora_gradients(w, p, s, through), "magnitude": magnitude}


DORA = Formula(
  "W' = m V / |V|, V = W + s A B, |V| the norm over the inputs of each output",
  "Liu et al. 2024, arXiv 2402.09353, eq. 5 and sec. 4.3",
  {**LORA_ARRAYS, "magnitude": "batch out"},
  dora_output,
  dora_weight,
  dora_gradients,
  constant="|V| is a constant for gradients",
)


# ---- QA-LoRA ---------------------------------------------------------------------------------


def pooled(x: Array, groups: int) -> Array:
  """Sums x over each group of consecutive inputs."""
  return x.reshape(*x.shape[:-1], groups, -1).sum(-1)


def qa_lora_output(x: Array, w: Array, p: Arrays, s: float, held: Any = None) -> Array:
  return x @ w + s * pooled(x, p.lora_a.shape[-2]) @ p.lora_a @ p.lora_b


def qa_lora_weight(w: Array, p: Arrays, s: float) -> Array:
  size = w.shape[-2] // p.lora_a.shape[-2]
  return w + s * np.repeat(p.lora_a, size, axis=-2) @ p.lora_b


def qa_lora_gradients(w: Array, p: Arrays, s: float, g: Array) -> dict[str, Array]:
  g = T(pooled(T(g), p.lora_a.shape[-2]))
  return lora_gradients(w, p, s, g)


QA_LORA = Formula(
  "h = x W + s pool(x) A B, pool the sum over each group of consecutive inputs",
  "Xu et al. 2023, arXiv 2309.14717, sec. 3.3 and algorithm 1",
  {"lora_a": "batch groups rank", "lora_b": "batch rank out"},
  qa_lora_output,
  qa_lora_weight,
  qa_lora_gradients,
)


# ---- PiSSA, OLoRA, MiLoRA, LoRA-GA: LoRA that starts at a pair taken from the frozen weight ---


def residual(w: Array, p: Arrays, s: float) -> Array:
  """Returns the frozen weight W - s A0 B0."""
  return w - s * p.start_a @ p.start_b


def moved(x: Array, w: Array, p: Arrays, s: float, held: Any = None) -> Array:
  return lora_output(x, residual(w, p, s), p, s)


def moved_weight(w: Array, p: Arrays, s: float) -> Array:
  return lora_weight(residual(w, p, s), p, s)


PISSA = Formula(
  "W' = (W - s A0 B0) + s A B, A0 = U_r sqrt(S_r / s), B0 = sqrt(S_r / s) V_r^T, W = U S V^T",
  "Meng et al. 2024, arXiv 2404.02948, sec. 3",
  {**LORA_ARRAYS, "start_a": "batch in rank", "start_b": "batch rank out"},
  moved,
  moved_weight,
  lora_gradients,
  frozen=("start_a", "start_b"),
)
MILORA = PISSA._replace(
  equation=PISSA.equation + "; U_r, S_r, V_r of the r smallest singular values",
  source="Wang et al. 2024, arXiv 2406.09044, sec. 3",
)
OLORA = PISSA._replace(
  equation="W' = (W - s A0 B0) + s A B, W^T = Q R, B0 = Q[:, :r]^T, A0 = R[:r]^T",
  source="Büyükakyüz 2024, arXiv 2406.01775, sec. 3",
)
LORA_GA = PISSA._replace(
  equation=(
    "W' = (W - s A0 B0) + s A B, dL/dW = U S V^T, A0 = c U[:, :r], B0 = c V[:, r:2r]^T, "
    "c = out^(1/4) / sqrt(gamma)"
  ),
  source="Wang et al. 2024, arXiv 2407.05000, sec. 3",
)


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


# ---- AdaLoRA ---------------------------------------------------------------------------------


def adalora_output(x: Array, w: Array, p: Arrays, s: float, held: Any = None) -> Array:
  return x @ w + s * ((x @ p.lora_a) * p.lora_e[..., None, :]) @ p.lora_b


def adalora_weight(w: Array, p: Arrays, s: float) -> Array:
  return w + s * (p.lora_a * p.lora_e[..., None, :]) @ p.lora_b


def adalora_gradients(w: Array, p: Arrays, s: float, g: Array) -> dict[str, Array]:
  into_rank = g @ T(p.lora_b)
  return {
    "lora_a": s * into_rank * p.lora_e[..., None, :],
    "lora_e": s * np.sum(p.lora_a * into_rank, axis=-2),
    "lora_b": s * T(p.lora_a * p.lora_e[..., None, :]) @ g,
  }


ADALORA = Formula(
  "h = x W + s ((x A) * E) B",
  "Zhang et al. 2023, arXiv 2303.10512, sec. 3.1",
  {**LORA_ARRAYS, "lora_e": "batch rank"},
  adalora_output,
  adalora_weight,
  adalora_gradients,
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


# ---- trainable tokens ------------------------------------------------------------------------


def tokens_weight(w: Array, p: Arrays, s: float) -> Array:
  w = w.copy()
  w[p.indices] = p.rows
  return w


TRAINABLE_TOKENS = Formula(
  "W' = W with the rows `indices` replaced by `rows`",
  "PEFT 0.21, tuners/trainable_tokens/layer.py",
  {"indices": "tokens", "rows": "tokens out"},
  merged_output(tokens_weight),
  tokens_weight,
  lambda w, p, s, g: {"rows": g[p.indices]},
  frozen=("indices",),
)


# ---- (IA)^3: scales, and the bias of the scaled output ---------------------------------------


def ia3_out_weight(w: Array, p: Arrays, s: float) -> Array:
  return w * p.scale[..., None, :]


def ia3_in_scale(w: Array, p: Arrays) -> Array:
  """Returns one scale for each input; of a convolution, one for all positions of the window."""
  return np.tile(p.scale, w.shape[-2] // p.scale.shape[-1])


def ia3_in_output(x: Array, w: Array, p: Arrays, s: float, held: Any = None) -> Array:
  return (x * ia3_in_scale(w, p)[..., None, :]) @ w


def ia3_in_weight(w: Array, p: Arrays, s: float) -> Array:
  return w * ia3_in_scale(w, p)[..., :, None]


def ia3_in_gradients(w: Array, p: Arrays, s: float, g: Array) -> dict[str, Array]:
  each = np.sum(g * w, axis=-1)
  channels = p.scale.shape[-1]
  return {"scale": each.reshape(*each.shape[:-1], -1, channels).sum(-2)}


IA3_OUT = Formula(
  "h = (x W + bias) * l on the keys and values",
  "Liu et al. 2022, arXiv 2205.05638, sec. 3.3",
  {"scale": "batch out"},
  lambda x, w, p, s, held=None: (x @ w) * p.scale[..., None, :],
  ia3_out_weight,
  lambda w, p, s, g: {"scale": np.sum(g * w, axis=-2)},
)
IA3_IN = IA3_OUT._replace(
  equation="h = (x * l) W + bias where the input is a feed-forward layer's activation",
  arrays={"scale": "batch channels"},
  output=ia3_in_output,
  weight=ia3_in_weight,
  gradients=ia3_in_gradients,
)
