"""The vectors of variants that start from data, or that change how LoRA is trained."""

from types import SimpleNamespace

import numpy as np

from conformance import formulas, starts, steps
from conformance.layers import CONV, MATMUL, STACK, single
from conformance.vector import (
  Tensors,
  Vector,
  add_layer,
  check_gradients,
  drawn,
  plain,
)

CORDA_MODES = ("instruction_previewed", "knowledge_preserved")


def corda() -> Vector:
  vector, scaling, rank = Vector("corda", formulas.CORDA), 1.5, 2
  w, activations = vector.normal(12, 10, scale=0.5), vector.normal(40, 12)
  activations = single(activations @ np.diag(0.8 ** np.arange(12)))
  for mode in CORDA_MODES:
    a, b = starts.corda(w, activations, rank, scaling, last=mode == CORDA_MODES[1])
    p = {"start_a": single(a), "start_b": single(b)}
    p |= {"lora_a": single(a + vector.normal(12, rank, scale=0.1))}
    p |= {"lora_b": single(b + vector.normal(rank, 10, scale=0.1))}
    details = {"rank": rank, "alpha": scaling * rank, "mode": mode}
    add_layer(vector, mode, MATMUL, p, scaling, w=w, **details)
    vector.add(mode, activations=activations)
    vector.add(mode, start__delta=scaling * a @ b, start__residual=w - scaling * a @ b)
  return vector


def dylora() -> Vector:
  vector, scaling, rank = Vector("dylora", formulas.dylora(1)), 1.5, 4
  for b in (1, 3, 4):
    p = drawn(vector, MATMUL, vector.formula, rank=rank)
    details = {"formula": formulas.dylora(b), "rank": rank, "alpha": scaling * rank, "b": b}
    add_layer(vector, f"first_{b}", MATMUL, p, scaling, **details)
  return vector


def ln_tuning() -> Vector:
  formula = formulas.LORA._replace(
    equation="h = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias; all else is frozen",
    source="Zhao et al. 2023, arXiv 2312.11420, sec. 3",
    arrays={"scale": "out", "bias": "out"},
  )
  vector, epsilon = Vector("ln_tuning", formula), 1e-5
  x, direction = vector.normal(5, 12), vector.normal(5, 12)
  p = {"scale": single(1 + vector.normal(12, scale=0.3)), "bias": vector.normal(12, scale=0.3)}
  arrays = SimpleNamespace(**p)
  normal = formulas.normalized(x, epsilon)
  gradients = {"scale": np.sum(direction * normal, axis=0), "bias": np.sum(direction, axis=0)}
  check_gradients(
    lambda p: float(np.sum(direction * (normal * p.scale + p.bias))), arrays, gradients
  )
  vector.add("layer_norm", x=x, direction=direction, out=normal * arrays.scale + arrays.bias)
  vector.add("layer_norm", **{f"p__{name}": array for name, array in p.items()})
  vector.add("layer_norm", **{f"grad__{name}": array for name, array in gradients.items()})
  vector.cases["layer_norm"] = {"layer": "layer_norm", "epsilon": epsilon}
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
  vector.add("matmul", gradient=gradient)
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
