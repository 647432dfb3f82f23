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


CORDA = PISSA._replace(
  equation=(
    "W' = (W - s A0 B0) + s A B, C W = U S V^T, A0 = C^-1 U_r sqrt(S_r / s), "
    "B0 = sqrt(S_r / s) V_r^T; C = X^T X over the mean of its diagonal + 0.01 I"
  ),
  source="Yang et al. 2024, arXiv 2406.05223, sec. 3; the damping is PEFT's (tuners/lora/corda.py)",
)


# ---- DyLoRA ----------------------------------------------------------------------------------


def dylora(b: int) -> Formula:
  """Returns LoRA truncated to its first b components."""

  def first(p: Arrays) -> Arrays:
    return Arrays(lora_a=p.lora_a[..., :b], lora_b=p.lora_b[..., :b, :])

  def scaling(p: Arrays, s: float) -> float:
    return s * p.lora_a.shape[-1] / b  # alpha / b

  def gradients(w: Array, p: Arrays, s: float, g: Array) -> dict[str, Array]:
    whole = {name: np.zeros_like(array) for name, array in vars(p).items()}
    part = lora_gradients(w, first(p), scaling(p, s), g)
    whole["lora_a"][..., :b], whole["lora_b"][..., :b, :] = part["lora_a"], part["lora_b"]
    return whole

  return LORA._replace(
    equation="h = x W + (alpha / b) (x A[:, :b]) B[:b] in a step of rank b",
    source="Valipour et al. 2022, arXiv 2210.07558",
    output=lambda x, w, p, s, held=None: lora_output(x, w, first(p), scaling(p, s)),
    weight=lambda w, p, s: lora_weight(w, first(p), scaling(p, s)),
    gradients=gradients,
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


# ---- LayerNorm tuning ------------------------------------------------------------------------


def normalized(x: Array, epsilon: float) -> Array:
  """Returns x minus its mean, over its standard deviation, along the last axis."""
  centered = x - x.mean(-1, keepdims=True)
  return centered / np.sqrt(np.mean(centered**2, axis=-1, keepdims=True) + epsilon)
