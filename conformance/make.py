"""Makes conformance/vectors, and checks every gradient by differences: python -m conformance.make

Without --out it writes the committed files. The draws are seeded; on one machine the bytes are the
same each time, on another one singular vectors may differ in the last digits.
"""

import argparse
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from conformance import formulas, starts, steps
from conformance.files import write
from conformance.formulas import Formula
from conformance.layers import CONV, LOOKUP, MATMUL, STACK, Layer, inputs, single

VECTORS = Path(__file__).parent / "vectors"
Tensors = dict[str, np.ndarray]
Cases = dict[str, dict[str, Any]]


class Vector:
  """The arrays of one file, by name, and its metadata."""

  def __init__(self, name: str, formula: Formula):
    self.name, self.formula = name, formula
    self.draw = np.random.default_rng(zlib.crc32(name.encode()))
    self.tensors: Tensors = {}
    self.cases: Cases = {}

  def add(self, case: str, **tensors: Any) -> None:
    """Adds arrays to a case; `__` in a name is a slash."""
    for name, tensor in tensors.items():
      array = np.asarray(tensor)
      dtype = array.dtype if array.dtype.kind in "ib" else np.float64
      self.tensors[f"{case}/{name.replace('__', '/')}"] = array.astype(dtype)

  def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
    return single(scale * self.draw.standard_normal(shape))

  def save(self, folder: Path) -> None:
    formula, variant = self.formula, self.name
    arrays = {
      name: {"axes": words, "trained": name not in formula.frozen}
      for name, words in formula.arrays.items()
    }
    metadata = {
      "format": "1",
      "variant": variant,
      "formula": formula.equation,
      "source": formula.source,
      "constant": formula.constant,
      "license": "Apache-2.0",
      "arrays": json.dumps(arrays, sort_keys=True),
      "cases": json.dumps(self.cases, sort_keys=True),
    }
    write(folder / f"{variant}.safetensors", self.tensors, metadata)


def check_gradients(
  loss: Callable[[SimpleNamespace], float], p: SimpleNamespace, gradients: Mapping[str, np.ndarray]
) -> None:
  """Compares gradients derived by hand with central differences, element by element."""
  for name, gradient in gradients.items():
    array, step = getattr(p, name), 1e-5
    estimate = np.zeros_like(array)
    for index in np.ndindex(array.shape):
      losses = []
      for sign in (1, -1):
        changed = array.copy()
        changed[index] += sign * step
        losses.append(loss(SimpleNamespace(**{**vars(p), name: changed})))
      estimate[index] = (losses[0] - losses[1]) / (2 * step)
    error = np.max(np.abs(estimate - gradient)) / np.max(np.abs(gradient))
    assert error < 1e-7, f"the gradient of {name} differs from central differences by {error:.2g}"


def add_layer(
  vector: Vector,
  case: str,
  layer: Layer,
  p: Mapping[str, np.ndarray],
  scaling: float,
  w: np.ndarray | None = None,
  bias: str = "",
  formula: Formula | None = None,
  **details: Any,
) -> None:
  """Adds a layer with given arrays: input, output, loss direction, gradients and merged weight.

  Args:
    vector: the file.
    case: its name in the file.
    layer: the kind and shape of the layer.
    p: the arrays of the variant, in the layer's own shape.
    scaling: a number.
    w: the frozen weight; drawn if None.
    bias: "added" to the layer's output, "scaled" with it by (IA)^3, or "" for none.
    formula: of this case, if not the file's.
    details: of the case, for the metadata.
  """
  formula = formula or vector.formula
  shape = (*layer.batch, *layer.inputs, *layer.outputs)
  w = vector.normal(*shape, scale=0.5) if w is None else w
  x = inputs(layer, vector.draw)
  rows, matrix = layer.rows(x), layer.matrix("batch in out", w)
  flat = {name: layer.matrix(formula.arrays[name], array) for name, array in p.items()}
  arrays = SimpleNamespace(**flat)
  beta = vector.normal(*layer.outputs) if bias else np.zeros(layer.outputs)

  def merged_bias(p: SimpleNamespace) -> np.ndarray:
    return beta * p.scale if bias == "scaled" else beta

  def output(p: SimpleNamespace) -> np.ndarray:
    return formula.output(rows, matrix, p, scaling, held=arrays) + merged_bias(p)

  out, merged = output(arrays), formula.weight(matrix, arrays, scaling)
  np.testing.assert_allclose(out, rows @ merged + merged_bias(arrays), rtol=1e-12, atol=1e-12)
  direction = vector.normal(*out.shape)
  gradients = formula.gradients(matrix, arrays, scaling, starts.T(rows) @ direction)
  if bias == "scaled":
    gradients["scale"] = gradients["scale"] + np.sum(direction * beta, axis=-2)
  check_gradients(lambda changed: float(np.sum(direction * output(changed))), arrays, gradients)

  layer_output = layer.output(x, out)
  vector.add(case, x=x, w=w, out=layer_output, direction=direction.reshape(layer_output.shape))
  vector.add(case, merged=merged.reshape(shape), scaling=scaling)
  vector.add(case, **{f"p__{name}": array for name, array in p.items()})
  vector.add(case, **{f"grad__{name}": g.reshape(p[name].shape) for name, g in gradients.items()})
  if bias:
    vector.add(case, bias=beta, merged_bias=merged_bias(arrays))
  vector.cases[case] = {"layer": layer.kind, "scaling": scaling, **details}


def drawn(vector: Vector, layer: Layer, formula: Formula, **sizes: int) -> Tensors:
  """Draws the arrays of a variant."""
  shapes = {name: layer.shape(words, sizes) for name, words in formula.arrays.items()}
  return {name: vector.normal(*shape, scale=0.5) for name, shape in shapes.items()}


# ---- one function per kind of variant --------------------------------------------------------


def plain(name: str, formula: Formula, layers: tuple[Layer, ...], scaling: float = 1.5) -> Vector:
  """A variant whose arrays are drawn, at rank 2, or 3 for the matrix."""
  vector = Vector(name, formula)
  for layer in layers:
    rank = 3 if layer is MATMUL else 2
    p = drawn(vector, layer, formula, rank=rank)
    details = {"rank": rank, "alpha": scaling * rank}
    add_layer(vector, layer.kind, layer, p, scaling, **details)
  return vector


def rslora() -> Vector:
  vector = Vector("rslora", formulas.RSLORA)
  for rank in (4, 9):
    p = drawn(vector, MATMUL, formulas.RSLORA, rank=rank)
    add_layer(vector, f"rank_{rank}", MATMUL, p, 6.0 / rank**0.5, rank=rank, alpha=6.0)
  return vector


def dora() -> Vector:
  vector = plain("dora", formulas.DORA, (MATMUL, CONV, LOOKUP, STACK))
  for layer in (MATMUL, CONV, LOOKUP, STACK):
    w = layer.matrix("batch in out", vector.tensors[f"{layer.kind}/w"])
    norms = formulas.column_norms(w).reshape(*layer.batch, *layer.outputs)
    vector.add(layer.kind, start__magnitude=norms)
  return vector


def qa_lora() -> Vector:
  vector, scaling = Vector("qa_lora", formulas.QA_LORA), 1.5
  for layer, size in ((MATMUL, 4), (CONV, 2), (STACK, 2)):
    groups = int(np.prod(layer.inputs)) // size
    p = drawn(vector, layer, formulas.QA_LORA, rank=2, groups=groups)
    details = {"rank": 2, "alpha": 3.0, "group_size": size}
    add_layer(vector, layer.kind, layer, p, scaling, **details)
  return vector


def from_weight(name: str, formula: Formula, start: Callable[..., starts.Pair]) -> Vector:
  """A variant that starts at a pair computed from the weight, and has moved from it."""
  vector, scaling, rank = Vector(name, formula), 1.5, 2
  for layer in (MATMUL, CONV, STACK):
    w = vector.normal(*layer.batch, *layer.inputs, *layer.outputs, scale=0.5)
    pair = start(layer.matrix("batch in out", w), rank, scaling)
    add_start(vector, layer, w, pair, scaling)
    a, b = (single(each) for each in pair)
    shapes = [layer.shape(words, {"rank": rank}) for words in formulas.LORA_ARRAYS.values()]
    p: Tensors = {"start_a": a.reshape(shapes[0]), "start_b": b.reshape(shapes[1])}
    p |= {"lora_a": p["start_a"] + vector.normal(*shapes[0], scale=0.1)}
    p |= {"lora_b": p["start_b"] + vector.normal(*shapes[1], scale=0.1)}
    details = {"rank": rank, "alpha": scaling * rank}
    add_layer(vector, layer.kind, layer, single_all(p), scaling, w=w, **details)
  return vector


def single_all(p: Mapping[str, np.ndarray]) -> Tensors:
  return {name: single(array) for name, array in p.items()}


def add_start(
  vector: Vector, layer: Layer, w: np.ndarray, pair: starts.Pair, scaling: float
) -> None:
  """Adds what is known of A0 and B0 whatever the signs of singular vectors."""
  a, b = pair
  delta = (scaling * a @ b).reshape(w.shape)
  vector.add(layer.kind, start__delta=delta, start__residual=w - delta)
  vector.add(
    layer.kind,
    start__norms_a=np.linalg.norm(a, axis=-2),
    start__norms_b=np.linalg.norm(b, axis=-1),
  )


def lora_xs() -> Vector:
  vector, scaling, rank = Vector("lora_xs", formulas.LORA_XS), 1.5, 2
  sizes = {"rank": rank, "rank2": rank}
  for layer in (MATMUL, CONV, STACK):
    w = vector.normal(*layer.batch, *layer.inputs, *layer.outputs, scale=0.5)
    pair = starts.lora_xs(layer.matrix("batch in out", w), rank, scaling)
    add_start(vector, layer, w, pair, 1.0)
    words = formulas.LORA_XS.arrays
    p = {"core": vector.normal(*layer.shape(words["core"], sizes), scale=0.5)}
    for name, array in zip(("lora_a", "lora_b"), pair, strict=True):
      p[name] = single(array).reshape(layer.shape(words[name], sizes))
    details = {"rank": rank, "alpha": scaling * rank}
    add_layer(vector, layer.kind, layer, p, scaling, w=w, **details)
  return vector


def loftq() -> Vector:
  formula = formulas.LORA._replace(
    equation="Q_t = q(W - A_t-1 B_t-1), A_t B_t = SVD_r(W - Q_t), t = 1 ... 5",
    source="Li et al. 2023, arXiv 2310.08659, algorithm 1",
    arrays={},
  )
  vector = Vector("loftq", formula)
  for bits in (4, 8):
    case, rank = f"uniform_{bits}_bits", 4
    w = vector.normal(24, 16, scale=0.5)
    sequence = starts.loftq(w, rank, 5, starts.uniform(bits))
    errors = [np.linalg.norm(w - q - ab) for q, ab in sequence]
    vector.add(case, w=w, out__errors=errors, out__first_error=np.linalg.norm(w - sequence[0][0]))
    for moment, (quantized, delta) in (("first", sequence[0]), ("last", sequence[-1])):
      vector.add(case, **{f"out__{moment}_quantized": quantized, f"out__{moment}_delta": delta})
    vector.cases[case] = {"rank": rank, "bits": bits, "steps": 5}
  return vector


def lokr() -> Vector:
  vector, formula, s = Vector("lokr", formulas.LOKR), formulas.LOKR, 1.5
  sizes = {"in1": 3, "out1": 2, "in2": 4, "out2": 5, "rank": 2}
  forms = {"none": ("w1", "w2"), "w2": ("w1", "w2_a", "w2_b")}
  forms["both"] = ("w1_a", "w1_b", "w2_a", "w2_b")
  settings = {"rank": 2, "alpha": 3.0}
  for case, names in forms.items():
    words = {name: formula.arrays[name].replace("window ", "") for name in names}
    p = {n: vector.normal(*MATMUL.shape(words[n], sizes), scale=0.5) for n in names}
    add_layer(vector, case, MATMUL, p, s, factor=3, decompose=case, **settings)
  p = {"w1": vector.normal(2, 2, scale=0.5), "w2": vector.normal(2, 2, 2, 3, scale=0.5)}
  add_layer(vector, "conv", CONV, p, s, factor=2, decompose="none", **settings)
  p = {"w1": vector.normal(3, 2, 2, scale=0.5), "w2": vector.normal(3, 4, 3, scale=0.5)}
  add_layer(vector, "stack", STACK, p, s, factor=2, decompose="none", **settings)
  return vector


def miss() -> Vector:
  vector = Vector("miss", formulas.MISS)
  cases = [("matmul", MATMUL, 4, 10), ("ragged", MATMUL, 5, 10), ("stack", STACK, 2, 6)]
  cases += [("mini", MATMUL, 4, 2), ("mini_ragged", MATMUL, 5, 5)]
  for case, layer, rank, width in cases:
    p = {"d": vector.normal(*layer.batch, rank, width, scale=0.5)}
    add_layer(vector, case, layer, p, 1.0, rank=rank, width=width)
  return vector


def vera() -> Vector:
  vector, rank = Vector("vera", formulas.VERA), 5
  shared = {"shared_a": vector.normal(12, rank), "shared_b": vector.normal(rank, 10)}
  layers = {"first": MATMUL, "second": MATMUL._replace(inputs=(7,), outputs=(9,)), "stack": STACK}
  for case, layer in layers.items():
    p = shared | {"lambda_d": vector.normal(*layer.batch, rank, scale=0.5)}
    p["lambda_b"] = vector.normal(*layer.batch, *layer.outputs, scale=0.5)
    add_layer(vector, case, layer, p, 1.0, rank=rank)
  return vector


def ia3() -> Vector:
  vector, feed_forward = Vector("ia3", formulas.IA3_OUT), formulas.IA3_IN

  def scales(*shape: int) -> Tensors:
    return {"scale": single(1 + vector.normal(*shape, scale=0.3))}

  add_layer(vector, "out", MATMUL, scales(10), 1.0, along="out")
  add_layer(vector, "out_bias", MATMUL, scales(10), 1.0, bias="scaled", along="out")
  add_layer(vector, "out_conv", CONV, scales(6), 1.0, along="out")
  add_layer(vector, "out_stack", STACK, scales(3, 6), 1.0, along="out")
  details = {"formula": feed_forward, "along": "in"}
  add_layer(vector, "in_bias", MATMUL, scales(12), 1.0, bias="added", **details)
  add_layer(vector, "in_stack", STACK, scales(3, 8), 1.0, **details)
  add_layer(vector, "in_conv", CONV, scales(4), 1.0, **details)
  return vector


def trainable_tokens() -> Vector:
  vector = Vector("trainable_tokens", formulas.TRAINABLE_TOKENS)
  indices = np.array([7, 2, 10])
  p = {"indices": indices, "rows": vector.normal(3, 8)}
  add_layer(vector, "lookup", LOOKUP, p, 1.0)
  w, x, rows = vector.normal(11, 8, scale=0.5), vector.normal(4, 8), vector.normal(3, 8)
  merged = formulas.tokens_weight(w, SimpleNamespace(indices=indices, rows=rows), 1.0)
  direction = vector.normal(4, 11)
  gradient = (direction.T @ x)[indices]
  check_gradients(
    lambda p: float(np.sum(direction * (x @ formulas.tokens_weight(w, p, 1.0).T))),
    SimpleNamespace(indices=indices, rows=rows),
    {"rows": gradient},
  )
  vector.add("head", x=x, w=w, p__indices=indices, p__rows=rows, out=x @ merged.T, merged=merged)
  vector.add("head", direction=direction, grad__rows=gradient, scaling=1.0)
  vector.cases["head"] = {"layer": "x @ w.T, the head tied to the embedding", "scaling": 1.0}
  return vector


def lora_fa() -> Vector:
  vector = plain("lora_fa", formulas.LORA_FA, (MATMUL, CONV, STACK))
  a, b = vector.tensors["matmul/p/lora_a"], vector.tensors["matmul/p/lora_b"]
  gradients = [vector.normal(*b.shape) for _ in range(3)]
  ready = [steps.preconditioned(g, a, 1.5) for g in gradients]
  after = steps.adamw(b, ready, 1e-2, 0.0, 1e-6)
  vector.add("steps", lora_a=a, lora_b=b, gradients=gradients, scaling=1.5)
  vector.add("steps", out__preconditioned=ready, out__lora_b=after)
  vector.cases["steps"] = {"optimizer": "AdamW", "learning_rate": 1e-2, "epsilon": 1e-6}
  return vector


def lora_plus() -> Vector:
  formula = formulas.LORA._replace(
    equation="A steps with rate eta, B with ratio * eta",
    source="Hayou et al. 2024, arXiv 2402.12354, sec. 4",
  )
  vector, rate, ratio = Vector("lora_plus", formula), 1e-2, 16.0
  pair = {"lora_a": vector.normal(6, 2), "lora_b": vector.normal(2, 5)}
  for case, count in (("sgd", 1), ("adamw", 3)):
    for name, values in pair.items():
      gradients = [vector.normal(*values.shape) for _ in range(count)]
      array_rate = rate * (ratio if name == "lora_b" else 1.0)
      if case == "sgd":
        after = steps.sgd(values, gradients, array_rate)
      else:
        after = steps.adamw(values, gradients, array_rate, 0.1, 1e-8)
      vector.add(case, **{name: values, f"gradients__{name}": gradients, f"out__{name}": after})
    vector.cases[case] = {"learning_rate": rate, "ratio": ratio, "steps": count}
  vector.cases["adamw"] |= {"weight_decay": 0.1, "epsilon": 1e-8}
  return vector


def adalora() -> Vector:
  vector = plain("adalora", formulas.ADALORA, (MATMUL, CONV, STACK))
  a, b = vector.normal(6, 3, scale=0.5), vector.normal(3, 5, scale=0.5)
  for name, value, gradients in (
    ("penalty", steps.penalty, steps.penalty_gradients),
    ("mean_norm", steps.mean_norm, steps.mean_norm_gradients),
  ):
    penalty_gradients: Tensors = dict(zip(("lora_a", "lora_b"), gradients(a, b), strict=True))
    check_gradients(
      lambda p, value=value: value(p.lora_a, p.lora_b),
      SimpleNamespace(lora_a=a, lora_b=b),
      penalty_gradients,
    )
    vector.add("penalty", **{"lora_a": a, "lora_b": b, f"out__{name}": value(a, b)})
    vector.add("penalty", **{f"grad__{name}__{array}": g for array, g in penalty_gradients.items()})
  add_allocation(vector)
  vector.cases["penalty"] = {"penalty": "eq. 4", "mean_norm": "the authors' code and PEFT"}
  return vector


def add_allocation(vector: Vector) -> None:
  """Adds AdaLoRA's importance of two weights over four steps, and the components that stay."""
  shapes = {"first": (6, 4, 5), "second": (7, 3, 4)}
  scores, count, betas = [], 4, (0.85, 0.75)
  for weight, (inner, rank, outer) in shapes.items():
    parts = {}
    for name, shape in (("lora_a", (inner, rank)), ("lora_e", (rank,)), ("lora_b", (rank, outer))):
      values = [vector.normal(*shape) for _ in range(count)]
      gradients = [vector.normal(*shape) for _ in range(count)]
      sensitivity, uncertainty = steps.smoothed(values, gradients, *betas)
      parts[name] = sensitivity * uncertainty
      vector.add("allocation", **{f"{weight}__values__{name}": values})
      vector.add("allocation", **{f"{weight}__gradients__{name}": gradients})
      vector.add("allocation", **{f"out__{weight}__sensitivity__{name}": sensitivity})
      vector.add("allocation", **{f"out__{weight}__uncertainty__{name}": uncertainty})
    scores.append(steps.importance(parts["lora_a"], parts["lora_e"], parts["lora_b"]))
    vector.add("allocation", **{f"out__{weight}__importance": scores[-1]})
  mask = steps.kept(np.concatenate(scores), 4)
  vector.add("allocation", out__first__kept=mask[:4], out__second__kept=mask[4:])
  schedule = {"first": 7, "last": 4, "warmup": 2, "final": 3, "total": 12}
  vector.add("allocation", out__budget=[steps.budget(step, **schedule) for step in range(13)])
  vector.cases["allocation"] = {"beta1": betas[0], "beta2": betas[1], "kept": 4, **schedule}


def relora() -> Vector:
  """Merges a pair and starts again: the second pair is trained on the merged weight."""
  formula = formulas.LORA._replace(
    equation="W1 = W + s A1 B1, then h = x W1 + s (x A2) B2",
    source="Lialin et al. 2023, arXiv 2307.05695, sec. 3; Chain of LoRA: arXiv 2401.04151, sec. 3",
  )
  vector, scaling = Vector("relora", formula), 1.5
  for layer in (MATMUL, STACK):
    w = vector.normal(*layer.batch, *layer.inputs, *layer.outputs, scale=0.5)
    first = drawn(vector, layer, formula, rank=2)
    merged = single(formulas.lora_weight(w, SimpleNamespace(**first), scaling))
    second = drawn(vector, layer, formula, rank=2)
    add_layer(vector, layer.kind, layer, second, scaling, w=merged, rank=2, alpha=3.0)
    vector.add(layer.kind, before__w=w, **{f"before__p__{n}": each for n, each in first.items()})
  return vector


def lora_ga() -> Vector:
  vector, gamma, scaling, rank = Vector("lora_ga", formulas.LORA_GA), 16.0, 1.5, 2
  w, gradient = vector.normal(12, 10, scale=0.5), vector.normal(12, 10)
  a, b = starts.lora_ga(gradient, rank, gamma)
  p = {"start_a": single(a), "start_b": single(b)}
  p |= {"lora_a": single(a + vector.normal(12, rank, scale=0.1))}
  p |= {"lora_b": single(b + vector.normal(rank, 10, scale=0.1))}
  details = {"rank": rank, "alpha": scaling * rank, "gamma": gamma}
  add_layer(vector, "matmul", MATMUL, p, scaling, w=w, **details)
  vector.add("matmul", start__gradient=gradient)
  vector.add("matmul", start__projection_a=a @ a.T, start__projection_b=b.T @ b)
  return vector


def eva() -> Vector:
  formula = formulas.LORA._replace(
    equation="A0 = V[:, :k] of the activations U S V^T, B0 = 0; k by the shares of the variance",
    source="Paischer et al. 2024, arXiv 2410.07170, sec. 3; centred as in PEFT 0.21",
  )
  vector, rank, rho = Vector("eva", formula), 3, 2.0
  decay = {"first": 0.5, "second": 0.8, "third": 0.95}
  activations = {}
  for i, (weight, base) in enumerate(decay.items()):
    width = 8 + i
    mixed = vector.normal(40, width) * base ** np.arange(width)
    turned = mixed @ np.linalg.qr(vector.normal(width, width))[0] + vector.normal(width)
    activations[weight] = single(turned)
  for case in ("centered", "uncentered"):
    directions = {k: starts.principal(x, case == "centered") for k, x in activations.items()}
    ranks = starts.redistributed([shares for _, shares in directions.values()], rank, rho)
    vector.add(case, out__ranks=ranks)
    for (weight, (vectors, shares)), k in zip(directions.items(), ranks, strict=True):
      most = round(rho * rank)
      vector.add(case, **{f"out__{weight}__shares": shares[:most]})
      vector.add(case, **{f"out__{weight}__projection": vectors[:k].T @ vectors[:k]})
    vector.cases[case] = {"rank": rank, "rho": rho, "weights": list(decay)}
  for weight, x in activations.items():
    vector.add("activations", **{weight: x})
  return vector


ALL: dict[str, Callable[[], Vector]] = {
  "lora": lambda: plain("lora", formulas.LORA, (MATMUL, CONV, LOOKUP, STACK)),
  "rslora": rslora,
  "lora_plus": lora_plus,
  "lora_fa": lora_fa,
  "dora": dora,
  "qa_lora": qa_lora,
  "pissa": lambda: from_weight("pissa", formulas.PISSA, starts.pissa),
  "olora": lambda: from_weight("olora", formulas.OLORA, starts.olora),
  "milora": lambda: from_weight("milora", formulas.MILORA, starts.milora),
  "lora_ga": lora_ga,
  "loftq": loftq,
  "eva": eva,
  "lora_xs": lora_xs,
  "vera": vera,
  "adalora": adalora,
  "relora": relora,
  "hira": lambda: plain("hira", formulas.HIRA, (MATMUL, CONV, LOOKUP, STACK)),
  "loha": lambda: plain("loha", formulas.LOHA, (MATMUL, CONV, LOOKUP, STACK)),
  "lokr": lokr,
  "miss": miss,
  "ia3": ia3,
  "trainable_tokens": trainable_tokens,
}
"""The vectors, in the order of the README."""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=Path, default=VECTORS, help="a folder")
  folder = parser.parse_args().out
  folder.mkdir(parents=True, exist_ok=True)
  for name, build in ALL.items():
    vector = build()
    assert vector.name == name
    vector.save(folder)
    print(f"{name}: {', '.join(vector.cases)}")


if __name__ == "__main__":
  main()
