"""Makes conformance/vectors, and checks every gradient by differences: python -m conformance.make

Without --out it writes the committed files. The draws are seeded; on one machine the bytes are the
same each time, on another one singular vectors may differ in the last digits.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from conformance import formulas, products, projections, starts, training
from conformance.formulas import Formula
from conformance.layers import CONV, LOOKUP, MATMUL, STACK, Layer, single
from conformance.vector import (
  Tensors,
  Vector,
  add_layer,
  check_gradients,
  drawn,
  plain,
  single_all,
)

VECTORS = Path(__file__).parent / "vectors"


# ---- one function per kind of variant --------------------------------------------------------


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
  vector, scaling, rank = Vector("lora_xs", projections.LORA_XS), 1.5, 2
  sizes = {"rank": rank, "rank2": rank}
  for layer in (MATMUL, CONV, STACK):
    w = vector.normal(*layer.batch, *layer.inputs, *layer.outputs, scale=0.5)
    pair = starts.lora_xs(layer.matrix("batch in out", w), rank, scaling)
    add_start(vector, layer, w, pair, 1.0)
    words = projections.LORA_XS.arrays
    p = {"core": vector.normal(*layer.shape(words["core"], sizes), scale=0.5)}
    for name, array in zip(("lora_a", "lora_b"), pair, strict=True):
      p[name] = single(array).reshape(layer.shape(words[name], sizes))
    details = {"rank": rank, "alpha": scaling * rank}
    add_layer(vector, layer.kind, layer, p, scaling, w=w, **details)
  return vector


def lokr() -> Vector:
  vector, formula, s = Vector("lokr", products.LOKR), products.LOKR, 1.5
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
  vector = Vector("miss", products.MISS)
  cases = [("matmul", MATMUL, 4, 10), ("ragged", MATMUL, 5, 10), ("stack", STACK, 2, 6)]
  cases += [("mini", MATMUL, 4, 2), ("mini_ragged", MATMUL, 5, 5)]
  for case, layer, rank, width in cases:
    p = {"d": vector.normal(*layer.batch, rank, width, scale=0.5)}
    add_layer(vector, case, layer, p, 1.0, rank=rank, width=width)
  return vector


def vera() -> Vector:
  vector, rank = Vector("vera", projections.VERA), 5
  shared = {"shared_a": vector.normal(12, rank), "shared_b": vector.normal(rank, 10)}
  layers = {"first": MATMUL, "second": MATMUL._replace(inputs=(7,), outputs=(9,)), "stack": STACK}
  for case, layer in layers.items():
    p = shared | {"lambda_d": vector.normal(*layer.batch, rank, scale=0.5)}
    p["lambda_b"] = vector.normal(*layer.batch, *layer.outputs, scale=0.5)
    add_layer(vector, case, layer, p, 1.0, rank=rank)
  return vector


SHARING = {"first": MATMUL._replace(inputs=(7,), outputs=(9,)), "second": MATMUL, "stack": STACK}
"""Layers of other shapes that share arrays."""


def rand_lora() -> Vector:
  vector, rank, scaling = Vector("rand_lora", projections.RAND_LORA), 3, 1.5
  shared = {"shared_a": vector.normal(10, rank), "shared_b": vector.normal(4, rank, 12)}
  for case, layer in SHARING.items():
    small = min(*layer.inputs, *layer.outputs)
    count = -(-small // rank)
    p = shared | {"lambdas": vector.normal(*layer.batch, count, rank, scale=0.5)}
    p["gammas"] = vector.normal(*layer.batch, count, small, scale=0.5)
    add_layer(vector, case, layer, p, scaling, rank=rank, alpha=scaling * rank)
  return vector


def uni_lora() -> Vector:
  vector, rank, scaling, length = Vector("uni_lora", projections.UNI_LORA), 2, 1.5, 13
  pairs: dict[str, Tensors] = {}
  for case, layer in SHARING.items():
    shapes = {n: layer.shape(formulas.LORA_ARRAYS[f"lora_{n}"], {"rank": rank}) for n in "ab"}
    pairs[case] = {f"index_{n}": vector.draw.integers(0, length, s) for n, s in shapes.items()}
  chosen = np.concatenate([index.ravel() for pair in pairs.values() for index in pair.values()])
  inverse_root = single(np.bincount(chosen, minlength=length) ** -0.5)
  shared = {"theta": vector.normal(length), "inverse_root": inverse_root}
  for case, layer in SHARING.items():
    p = shared | pairs[case]
    add_layer(vector, case, layer, p, scaling, rank=rank, alpha=scaling * rank)
  return vector


def tiny_lora() -> Vector:
  vector, rank, scaling, count = Vector("tiny_lora", projections.TINY_LORA), 2, 1.5, 4
  shared, sizes = {"v": vector.normal(count)}, {"rank": rank, "rank2": rank, "groups": count}
  words = projections.TINY_LORA.arrays
  for case, layer in SHARING.items():
    w = vector.normal(*layer.batch, *layer.inputs, *layer.outputs, scale=0.5)
    a, b = starts.lora_xs(w, rank, scaling)
    p = shared | {"projection": vector.normal(*layer.shape(words["projection"], sizes))}
    p |= {"lora_a": single(a), "lora_b": single(b)}
    add_layer(vector, case, layer, p, scaling, w=w, rank=rank, alpha=scaling * rank)
  return vector


def miss_bat() -> Vector:
  vector = Vector("miss_bat", products.MISS_BAT)
  for case, layer in {"matmul": MATMUL, "stack": STACK}.items():
    p = {"d": vector.normal(*layer.batch, layer.outputs[0] // 2, 2, 2, scale=0.5)}
    add_layer(vector, case, layer, p, 1.0, rank=2)
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


ALL: dict[str, Callable[[], Vector]] = {
  "lora": lambda: plain("lora", formulas.LORA, (MATMUL, CONV, LOOKUP, STACK)),
  "rslora": rslora,
  "lora_plus": training.lora_plus,
  "lora_fa": training.lora_fa,
  "dora": dora,
  "qa_lora": qa_lora,
  "pissa": lambda: from_weight("pissa", formulas.PISSA, starts.pissa),
  "olora": lambda: from_weight("olora", formulas.OLORA, starts.olora),
  "milora": lambda: from_weight("milora", formulas.MILORA, starts.milora),
  "lora_ga": training.lora_ga,
  "corda": training.corda,
  "loftq": training.loftq,
  "eva": training.eva,
  "lora_xs": lora_xs,
  "tiny_lora": tiny_lora,
  "vera": vera,
  "rand_lora": rand_lora,
  "uni_lora": uni_lora,
  "adalora": training.adalora,
  "relora": training.relora,
  "dylora": training.dylora,
  "hira": lambda: plain("hira", products.HIRA, (MATMUL, CONV, LOOKUP, STACK)),
  "loha": lambda: plain("loha", products.LOHA, (MATMUL, CONV, LOOKUP, STACK)),
  "lokr": lokr,
  "miss": miss,
  "miss_bat": miss_bat,
  "ia3": ia3,
  "trainable_tokens": trainable_tokens,
  "ln_tuning": training.ln_tuning,
}
"""The vectors, in the order of the README."""


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=Path, default=VECTORS, help="a folder")
  folder = parser.parse_args(arguments).out
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    parser.error(f"--out={folder} must be a folder that can be written: {error.strerror}")
  for name, build in ALL.items():
    vector = build()
    assert vector.name == name
    vector.save(folder)
    print(f"{name}: {', '.join(vector.cases)}")


if __name__ == "__main__":
  main()
