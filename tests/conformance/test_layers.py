"""lora_jax agrees with the vectors: the output, gradients and merged weight of every layer."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import lora_jax as lj
from conformance.check import disagreements
from lora_jax.adapters.delta import adapter_weights
from lora_jax.variants.dylora import first_components

from tests.conformance.vectors import VECTORS, cases, vector

Case = Mapping[str, Any]


def matmul(params, x):
  out = x @ params["w"]
  return out + params["bias"][None] if "bias" in params else out


def conv(params, x):
  dims = ("NHWC", "HWIO", "NHWC")
  return lax.conv_general_dilated(x, params["w"], (1, 1), "VALID", dimension_numbers=dims)


def lookup(params, x):
  return params["w"][x]


def stack(params, x):
  return lax.scan(lambda carry, pair: (carry, pair[0] @ pair[1]), None, (x, params["w"]))[1]


LAYERS = {"matmul": matmul, "conv": conv, "lookup": lookup, "stack": stack}


@dataclasses.dataclass(frozen=True)
class Names:
  """How the library calls a variant of the vectors.

  Attributes:
    variant: returns the library's variant for a case.
    arrays: the library's name of an array by the vector's; the others have the same.
  """

  variant: Callable[[Case], lj.Variant]
  arrays: Mapping[str, str] = dataclasses.field(default_factory=dict)


INITIAL = {"start_a": "initial_a", "start_b": "initial_b"}


def miss(case: Case) -> lj.Variant:
  outputs = {"matmul": 10, "stack": 6}[case["layer"]]
  return lj.MISS if case["width"] == outputs else lj.miss_mini_variant(case["width"])


def ia3(case: Case) -> lj.Variant:
  return lj.IA3 if case["along"] == "out" else lj.IA3_FEEDFORWARD


VARIANTS = {
  "lora": Names(lambda case: lj.LORA),
  "rslora": Names(lambda case: lj.LORA),
  "relora": Names(lambda case: lj.LORA),
  "dora": Names(lambda case: lj.DORA),
  "qa_lora": Names(lambda case: lj.qa_lora_variant(case["group_size"])),
  "pissa": Names(lambda case: lj.PISSA, INITIAL),
  "olora": Names(lambda case: lj.OLORA, INITIAL),
  "milora": Names(lambda case: lj.MILORA, INITIAL),
  "lora_xs": Names(lambda case: lj.LORA_XS, {"core": "lora_r"}),
  "hira": Names(lambda case: lj.HIRA),
  "loha": Names(lambda case: lj.LOHA),
  "lokr": Names(lambda case: lj.lokr_variant(case["factor"], case["decompose"])),
  "miss": Names(miss, {"d": "shard"}),
  "lora_fa": Names(lambda case: lj.LORA_FA),
  "miss_bat": Names(lambda case: lj.MISS_BAT, {"d": "shard"}),
  "lora_ga": Names(lambda case: lj.LORA_GA, INITIAL),
  "corda": Names(lambda case: lj.CORDA, INITIAL),
  "dylora": Names(lambda case: lj.LORA),
  "adalora": Names(lambda case: lj.ADALORA),
  "ia3": Names(ia3, {"scale": "ia3_gain"}),
}
SHARED = {  # the variant, and by the library's names its arrays and those that weights share
  "vera": (
    lj.VERA,
    {"vera_d": "lambda_d", "vera_b": "lambda_b"},
    {"vera_in": "shared_a", "vera_out": "shared_b"},
  ),
  "rand_lora": (
    lj.RAND_LORA,
    {"rand_lambda": "lambdas", "rand_gamma": "gammas"},
    {"rand_a": "shared_a", "rand_b": "shared_b"},
  ),
  "uni_lora": (
    lj.uni_lora_variant(13),
    {"index_a": "index_a", "index_b": "index_b"},
    {"theta": "theta", "inverse_root": "inverse_root"},
  ),
  "tiny_lora": (
    lj.tiny_lora_variant(4),
    {name: name for name in ("lora_a", "projection", "lora_b")},
    {"tiny_v": "v"},
  ),
}
DIFFERENT = {
  ("lokr", "conv"): "W1 of lora_jax is along all input axes of a kernel, PEFT's along its channels"
}
"""Cases that lora_jax defines otherwise, and how."""
REFUSED = {
  ("ia3", "in_conv"): "its gain is neither along the output's axes only nor along the input"
}
"""Cases that lora_jax refuses: PEFT has one scale for each channel of a convolution's input."""


def prepared(name: str, case: str):
  """Returns an adaptation, its params, its trainable tree with the vector's arrays, and inputs."""
  tensors, details = vector(name)[0], cases(name)[case]
  names = VARIANTS[name]
  rank = details.get("rank", 1)  # where the paper has no alpha, it is the rank
  variant = names.variant(details)
  config = lj.LoraConfig(rank, details.get("alpha", float(rank)), "w", variant=variant)
  if name == "rslora":
    config = lj.rank_stabilized(config)
  fn = LAYERS[details["layer"]]
  params = {
    key: jnp.asarray(tensors[f"{case}/{key}"], jnp.float32)
    for key in ("w", "bias")
    if f"{case}/{key}" in tensors
  }
  x = jnp.asarray(tensors[f"{case}/x"])
  adaptation = starting = lj.lora(fn, config)
  if name in ("lora_ga", "corda"):  # which start from data, at arrays of PiSSA's shapes
    starting = lj.lora(fn, dataclasses.replace(config, variant=lj.PISSA))
  start = starting.init(jax.random.key(0), params, x)["w"]
  arrays = arrays_of(tensors, f"{case}/p/", names.arrays)
  arrays |= {key: value for key, value in start.arrays.items() if key not in arrays}
  shapes = {key: value.shape for key, value in arrays.items()}
  assert shapes == {key: value.shape for key, value in start.arrays.items()}
  node = lj.LoraWeight.from_arrays(arrays, variant.table, start.axes, start.layers)
  if name == "dylora":
    adaptation = truncated(adaptation, details["b"])
  return adaptation, params, {"w": node}, x


def truncated(adaptation: lj.Adaptation, b: int) -> lj.Adaptation:
  """Returns the adaptation of a step that has drawn a rank."""
  init, apply, merge = adaptation
  return lj.Adaptation(
    init,
    lambda params, trainable, x: apply(params, first_components(trainable, b), x),
    lambda params, trainable: merge(params, first_components(trainable, b)),
  )


def arrays_of(tensors, prefix: str, names: Mapping[str, str]) -> dict[str, jax.Array]:
  """Returns the arrays of a case by the library's names."""
  found = {n.removeprefix(prefix): each for n, each in tensors.items() if n.startswith(prefix)}
  return {names.get(n, n): jnp.asarray(each, jnp.float32) for n, each in found.items()}


def outputs(name: str, case: str) -> dict[str, jax.Array]:
  """Returns the library's results for a case, by the vector's names."""
  tensors = vector(name)[0]
  adaptation, params, trainable, x = prepared(name, case)
  direction = jnp.asarray(tensors[f"{case}/direction"], jnp.float32)

  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(trainable):
    out = adaptation.apply(params, trainable, x)
    return jnp.sum(direction * out), out

  (_, out), gradients = jax.jit(loss)(trainable)
  merged = adaptation.merge(params, trainable)
  results = {f"{case}/out": out, f"{case}/merged": merged["w"]}
  if "bias" in merged:
    results[f"{case}/merged_bias"] = merged["bias"]
  (node,) = adapter_weights(gradients).values()
  own = {theirs: ours for ours, theirs in VARIANTS[name].arrays.items()}
  trained = {spec.name for spec in node.table if not spec.frozen}
  return results | {f"{case}/grad/{own.get(n, n)}": node.arrays[n] for n in trained}


def layer_cases():
  for name in VECTORS:
    if name in (*SHARED, "trainable_tokens"):
      continue  # below
    for case, details in cases(name).items():
      if details.get("layer") in LAYERS:
        short = name == "lora" or details["layer"] == "matmul"  # other layers have the same weight
        marks = [] if short else [pytest.mark.long]
        yield pytest.param(name, case, id=f"{name}-{case}", marks=marks)


@pytest.mark.parametrize(("name", "case"), list(layer_cases()))
def test_a_layer_agrees_with_its_vector(name, case):
  if (name, case) in DIFFERENT:
    pytest.skip(DIFFERENT[name, case])
  if (name, case) in REFUSED:
    with pytest.raises(lj.UnsupportedOperation, match=REFUSED[name, case]):
      outputs(name, case)
    return
  own = tuple(f"{case}/{part}" for part in ("grad/", "out", "merged"))
  assert disagreements(vector(name)[0], outputs(name, case), only=own) == []


def test_the_arrays_of_a_vector_matter():
  """A changed array, scaling or weight is noticed: the comparison has teeth."""
  tensors = dict(vector("lora")[0])
  results = outputs("lora", "matmul")
  assert disagreements(tensors, results, only="matmul/") == []
  for changed in ("matmul/out", "matmul/grad/lora_a", "matmul/merged"):
    wrong = {**tensors, changed: tensors[changed] * np.float64(1.0001)}
    (line,) = disagreements(wrong, results, only="matmul/")
    assert line.startswith(f"{changed} differs by ")


@pytest.mark.parametrize(
  "name",
  [n if n in ("vera", "uni_lora") else pytest.param(n, marks=pytest.mark.long) for n in SHARED],
)
def test_arrays_are_shared_among_the_layers(name):
  tensors, details = dict(vector(name)[0]), cases(name)
  variant, own, shared = SHARED[name]

  def fn(params, inputs):
    layers = {case: LAYERS[each["layer"]] for case, each in details.items()}
    return {case: layers[case]({"w": params[case]}, inputs[case]) for case in details}

  def of_each(name):
    arrays = {case: jnp.asarray(tensors[f"{case}/{name}"]) for case in details}
    return jax.tree.map(lambda array: array.astype(jnp.float32), arrays)

  params, x, directions = of_each("w"), of_each("x"), of_each("direction")
  first = details["first"]
  config = lj.LoraConfig(first["rank"], first.get("alpha", 1.0), ".*", variant=variant)
  adaptation = lj.lora(fn, config)
  start = jax.eval_shape(adaptation.init, jax.random.key(0), params, x)
  arrays = {ours: of_each(f"p/{theirs}") for ours, theirs in (own | shared).items()}
  trainable = {case: start[case].replace(**{n: arrays[n][case] for n in own}) for case in details}
  node = start["lora_shared"][variant.name].replace(**{n: arrays[n]["first"] for n in shared})
  trainable["lora_shared"] = {variant.name: node}
  assert jax.tree.map(jnp.shape, trainable) == jax.tree.map(jnp.shape, start)

  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(trainable):
    out = adaptation.apply(params, trainable, x)
    return sum(jnp.sum(directions[case] * out[case]) for case in details), out

  (_, out), gradients = jax.jit(loss)(trainable)
  merged = adaptation.merge(params, trainable)
  results = {f"{case}/out": out[case] for case in details}
  results |= {f"{case}/merged": merged[case] for case in details}
  for ours, theirs in own.items():
    if ours not in variant.frozen:
      results |= {f"{case}/grad/{theirs}": gradients[case].arrays[ours] for case in details}
  for ours, theirs in shared.items():
    if ours not in variant.frozen:  # its gradient is the sum over the layers
      total = sum(tensors.pop(f"{case}/grad/{theirs}") for case in details)
      tensors |= {f"sum/grad/{theirs}": total}
      results |= {f"sum/grad/{theirs}": gradients["lora_shared"][variant.name].arrays[ours]}
  assert disagreements(tensors, results) == []


@pytest.mark.parametrize("case", ["lookup", "head"])
def test_trainable_tokens_are_trained_as_differences(case):
  """lora_jax trains the difference from the base model's rows, with the same gradient."""
  tensors = vector("trainable_tokens")[0]
  w, rows = (jnp.asarray(tensors[f"{case}/{n}"], jnp.float32) for n in ("w", "p/rows"))
  indices, x = (jnp.asarray(tensors[f"{case}/{n}"]) for n in ("p/indices", "x"))
  fn = lookup if case == "lookup" else lambda params, x: x @ params["w"].T
  variant = lj.trainable_tokens_variant([int(i) for i in indices])
  adaptation = lj.lora(fn, lj.LoraConfig(1, 1.0, "w", variant=variant))
  x = x if case == "lookup" else x.astype(jnp.float32)
  embedding = lj.lora(lookup, lj.LoraConfig(1, 1.0, "w", variant=variant))
  node = embedding.init(jax.random.key(0), {"w": w}, indices)["w"]
  trainable = {"w": node.replace(token_delta=rows - w[indices])}
  direction = jnp.asarray(tensors[f"{case}/direction"], jnp.float32)

  def loss(trainable):
    return jnp.sum(direction * adaptation.apply({"w": w}, trainable, x))

  mask = lj.trainable_mask({"base": None, "adapter": trainable})["adapter"]
  part, frozen = lj.partition(trainable, mask)
  gradient = jax.grad(lambda part: loss(lj.combine(part, frozen)))(part)["w"].token_delta
  results = {"out": adaptation.apply({"w": w}, trainable, x), "grad/rows": gradient}
  results["merged"] = embedding.merge({"w": w}, trainable)["w"]
  results = {f"{case}/{name}": array for name, array in results.items()}
  assert disagreements(tensors, results, only=f"{case}/") == []


def test_ln_tuning_trains_scales_and_biases_of_norms():
  tensors, case = vector("ln_tuning")[0], "layer_norm"
  x, direction, scale, bias = (
    jnp.asarray(tensors[f"{case}/{name}"], jnp.float32)
    for name in ("x", "direction", "p/scale", "p/bias")
  )
  norm = nn.LayerNorm(epsilon=cases("ln_tuning")[case]["epsilon"])

  def fn(params, x):
    return norm.apply({"params": params["ln_f"]}, x @ params["w"])

  adaptation = lj.ln_tuning(fn)
  params = {"w": jnp.eye(len(scale)), "ln_f": {"scale": jnp.ones(12), "bias": jnp.zeros(12)}}
  start = adaptation.init(jax.random.key(0), params, x)
  trainable = {"ln_f": {"scale": scale, "bias": bias}}
  assert jax.tree.structure(start) == jax.tree.structure(trainable)

  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(trainable):
    out = adaptation.apply(params, trainable, x)
    return jnp.sum(direction * out), out

  (_, out), gradients = loss(trainable)
  results = {f"{case}/grad/{name}": each for name, each in gradients["ln_f"].items()}
  assert disagreements(tensors, results | {f"{case}/out": out}) == []
