"""Variants on the layer kinds: equal to the merged model, and to the base model at step 0."""

import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.adapters.delta import adapter_weights
from lora_jax.adapters.targets import array_leaves

from tests import toy_variants as toys
from tests.jaxprs import count_of_sizes
from tests.layer_kinds import KINDS, LayerKind, normal
from tests.transform.test_layer_kinds import assert_close, join, split_arrays

VARIANTS = {
  "dora": lj.DORA,
  "qa_lora": lj.qa_lora_variant(2),
  "vera": lj.VERA,
  "rand_lora": lj.RAND_LORA,
  "uni_lora": lj.uni_lora_variant(40),
  "tiny_lora": lj.tiny_lora_variant(5),
  "ia3": lj.IA3,
  "ia3_feedforward": lj.IA3_FEEDFORWARD,
  "trainable_tokens": lj.trainable_tokens_variant((0, 1, 2)),
  "lora_fa": lj.LORA_FA,
  "adalora": lj.ADALORA,
  "pissa": lj.PISSA,
  "olora": lj.OLORA,
  "milora": lj.MILORA,
  "lora_xs": lj.LORA_XS,
  "hira": lj.HIRA,
  "loha": lj.LOHA,
  "lokr": lj.LOKR,
  "lokr_whole": lj.lokr_variant(decompose="none"),
  "lokr_both": lj.lokr_variant(2, decompose="both"),
  "miss": lj.MISS,
  "miss_bat": lj.MISS_BAT,
  "miss_mini": lj.miss_mini_variant(1),
}
FORMS_W = {"hira", "lokr_whole", "lokr_both", "miss_bat", "rand_lora"}
"""Those that have arrays of the weight's size, on purpose."""
NOT_THE_BASE = {  # at step 0, to the bit
  "lora_xs": "R is drawn from N(0, 1e-5^2)",
  "uni_lora": "theta is drawn from U(-0.02, 0.02)",
}
TOYS = {  # equations that use more of the engine; a few kinds show it
  "gain_out": toys.GAIN_OUT,
  "scaled": toys.SCALED_VARIANT,
  "hadamard": toys.HADAMARD_VARIANT,
  "core": toys.CORE_VARIANT,
  "gain_in": toys.GAIN_IN,
}
ONE_PER_FAMILY = {  # of rules and of kinds of control flow; the others are `long`
  "Flax Linen: Einsum, fused QKV",
  "Flax Linen: Embed, tied to the head by attend",
  "Flax Linen: Conv, 2-d, strided",
  "Flax Linen: nn.remat with a policy, under nn.scan",
  "plain: w split into q, k, v",
  "plain: concatenated weights, one of them plain",
  "plain: ragged_dot over experts",
  "plain: w[ids], out of bounds filled, clipped, promised",
  "plain: flipped, padded, sliced",
  "mesh: shard_map, weight split over its inputs",
}
FEW = {"plain: ragged_dot over experts"}
SCANNED = "Flax Linen: nn.scan over layers"
FEW_OF = {  # where the equation uses no more of the engine than others do
  "qa_lora": FEW | {SCANNED},
  "hadamard": FEW | {SCANNED},
  "vera": FEW | {SCANNED},
  "rand_lora": {SCANNED},
  "uni_lora": FEW | {"mesh: shard_map, weight split over its inputs"},
  "tiny_lora": {SCANNED},
  "ia3": FEW,
  "ia3_feedforward": set(),
  "trainable_tokens": {"plain: w[ids], out of bounds filled, clipped, promised"},
  "lora_fa": FEW | {SCANNED},
  "adalora": FEW | {SCANNED},
  "pissa": FEW | {SCANNED},
  "olora": FEW,
  "milora": FEW,
  "lora_xs": FEW,
  "hira": {
    *(SCANNED, "plain: w[ids], out of bounds filled, clipped, promised"),
    "mesh: shard_map, weight split over its inputs",
  },
  "loha": FEW,
  "lokr": FEW,
  "lokr_whole": set(),
  "lokr_both": set(),
  "miss": FEW,
  "miss_bat": set(),
  "miss_mini": set(),
}
COMPILED_LOOPS = {  # without LLVM's optimizations, as here, tanh rounds otherwise in a fused loop
  "plain: weights stacked by jnp.stack, then scanned",
  "plain: stacked weights in a fori_loop",
  "plain: weights among a loop's carried values",
}
NNX_TIED = "Flax NNX: Embed, tied by attend"
CONVOLUTIONS = {str(kind) for kind in KINDS if "Conv" in kind.name}
NO_SIDE = "its gain is neither along the output's axes only nor along the input's"
OF_INPUTS = ("gain_in", "ia3_feedforward")
REFUSED = {  # along the inputs of a convolution's window, or joined along the outputs: no one side
  (variant, name): NO_SIDE
  for variant in OF_INPUTS
  for name in (*CONVOLUTIONS, "plain: concatenated weights, one of them plain")
} | {
  (variant, "plain: integer and boolean inputs"): "its gain is along the input, which is of int"
  for variant in OF_INPUTS
}
ODD_INPUTS = (  # which groups of 2 do not divide
  *("Flax Linen: DenseGeneral, several input axes", "Flax Linen: DenseGeneral, batch_dims"),
  *("Flax Linen: MultiHeadDotProductAttention", "Flax NNX: MultiHeadAttention"),
  *("Flax NNX: LinearGeneral", "plain: one matrix per token by indexing experts"),
  *("plain: one_hot @ w", "plain: broadcast to a stack, padded on two axes"),
  "plain: contracted over an axis that it is broadcast along",
  "plain: broadcast to a stack, looked up with out-of-bounds ids filled",
  *(CONVOLUTIONS - {"Flax Linen: Conv, grouped"}),
)
LOOKUPS = (
  *("Flax Linen: Embed", "Flax Linen: Embed, tied to the head by attend"),
  *("Flax NNX: Embed, tied by attend", "Equinox: Embedding, under vmap"),
  *("plain: w[ids]", "plain: w[ids], out of bounds filled, clipped, promised"),
  *("plain: w[ids] along the second axis, scaled", "plain: vmap over scalar ids"),
  "plain: single rows, added, broadcast and stacked",
  "plain: rows taken one by one in a scan",
)
REFUSED |= {
  ("qa_lora", name): "groups of 2 inputs must divide its input axis" for name in ODD_INPUTS
}
REFUSED |= {("qa_lora", name): "this weight's rows are looked up" for name in LOOKUPS}
REFUSED |= {
  ("trainable_tokens", name): "trainable tokens are rows that are looked up by their ids"
  for name in {str(kind) for kind in KINDS} - set(LOOKUPS)
}
BY_SIZE = {  # refused where the weight's sizes do not fit, as docs/variants.md shows
  "lokr_both": "is larger than the smaller side of W1",
  "miss_bat": "MiSS's bat needs a rank that divides",
}
ROUNDED = {
  (variant, "plain: bfloat16 input, float32 weight, by lax.dot_general"): 1e-2
  for variant in OF_INPUTS
}


def pairs():
  for name in VARIANTS | TOYS:
    short = FEW_OF.get(name, ONE_PER_FAMILY if name in VARIANTS else FEW)
    for kind in KINDS:
      marks = [] if str(kind) in short else [pytest.mark.long]
      yield pytest.param(name, kind, id=f"{name}-{kind}", marks=marks)


def test_the_families_are_kinds():
  assert {str(kind) for kind in KINDS} >= ONE_PER_FAMILY.union(FEW, *FEW_OF.values())


@functools.cache
def prepared(name: str, kind: LayerKind):
  case = kind.build()
  variant = (VARIANTS | TOYS)[name]
  config = lj.LoraConfig(case.rank, 3.0, case.target, rules=case.rules, variant=variant)
  adaptation = lj.lora(case.fn, config, opaque=case.opaque)
  return case, adaptation, adaptation.init(jax.random.key(0), case.params, *case.args)


def trained(trainable):
  """Splits off the arrays that are not trained."""
  mask = lj.trainable_mask({"base": None, "adapter": trainable})["adapter"]
  return lj.partition(trainable, mask)


def randomized(trainable):
  part, frozen = trained(trainable)
  leaves, structure = jax.tree.flatten(part)
  drawn = [leaf + normal(*leaf.shape, seed=100 + i, scale=0.3) for i, leaf in enumerate(leaves)]
  return lj.combine(jax.tree.unflatten(structure, drawn), frozen)


def check(name, kind):
  case, adaptation, start = prepared(name, kind)
  tolerance = ROUNDED.get((name, str(kind)), kind.tolerance)
  assert adapter_weights(start)
  arrays, rest = split_arrays(case.params)
  base = case.fn(case.params, *case.args)
  out = adaptation.apply(case.params, start, *case.args)
  if name in FORMS_W:  # there the matmul is compiled with a transposition of the weight before it
    base = jax.jit(lambda p, *a: case.fn(join(p, rest), *a))(arrays, *case.args)
    out = jax.jit(lambda p, *a: adaptation.apply(join(p, rest), start, *a))(arrays, *case.args)
  if name in NOT_THE_BASE:
    assert_close(out, base, 1e-3 + tolerance)
  elif str(kind) in COMPILED_LOOPS or (name, str(kind)) == ("lokr_whole", NNX_TIED):  # the same
    assert_close(out, base, 1e-6)
  else:
    np.testing.assert_array_equal(np.asarray(out), np.asarray(base))
  assert out.dtype == base.dtype

  part, frozen = trained(randomized(start))
  direction = normal(*base.shape, seed=9)

  @jax.jit
  def both(part):
    def factored(part):
      out = adaptation.apply(case.params, lj.combine(part, frozen), *case.args)
      return jnp.mean(direction * out), out

    def merged(part):
      plain = adaptation.merge(case.params, lj.combine(part, frozen))
      out = case.fn(plain, *case.args)
      return jnp.mean(direction * out), out

    return jax.grad(factored, has_aux=True)(part), jax.grad(merged, has_aux=True)(part)

  (got, out), (expected, expected_out) = both(part)
  assert float(jnp.abs(out - base).max()) > 10 * tolerance  # the adapter does something
  assert_close(out, expected_out, tolerance)
  for leaf, reference in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert float(jnp.abs(reference).max()) > 0
    assert_close(leaf, reference, tolerance)

  leaves = array_leaves(case.params)
  sizes = {math.prod(leaves[path][1].shape) for path in adapter_weights(start)}
  if name in FORMS_W:
    return
  before = jax.make_jaxpr(lambda p, *a: case.fn(join(p, rest), *a))(arrays, *case.args)
  after = jax.make_jaxpr(lambda p, t, *a: adaptation.apply(join(p, rest), t, *a))(
    arrays, start, *case.args
  )
  assert count_of_sizes(after, sizes) <= count_of_sizes(before, sizes)


@pytest.mark.parametrize(("name", "kind"), list(pairs()))
def test_a_variant_on_a_layer_kind(name, kind):
  reason = REFUSED.get((name, str(kind)))
  if reason is not None:
    with pytest.raises((lj.UnsupportedOperation, ValueError), match=reason):
      prepared(name, kind)
    return
  try:
    prepared(name, kind)
  except ValueError as error:
    if BY_SIZE.get(name, "not by size") not in str(error):
      raise
    return
  check(name, kind)


@pytest.mark.parametrize(
  "name",
  [
    name if name in ("ia3", "hira", "miss") else pytest.param(name, marks=pytest.mark.long)
    for name in VARIANTS
  ],
)
def test_a_variant_on_an_int8_base(name):
  """Its output is that of the merged dequantized weight, and step 0 that of the quantized base."""
  looks_up = name == "trainable_tokens"
  fn = (lambda p, x: p["w"][x]) if looks_up else (lambda p, x: x @ p["w"])
  x = jnp.asarray([0, 2, 5]) if looks_up else normal(3, 16, seed=1)
  weight = normal(16, 8, seed=2)
  params = lj.quantize({"w": weight}, "int8", "w")
  lora = lj.lora(fn, lj.LoraConfig(2, 4.0, "w", variant=VARIANTS[name]))

  @jax.jit
  def outputs(params):
    start = lora.init(jax.random.key(0), params, x)
    base, first = lj.dequantized(fn)(params, x), lora.apply(params, start, x)
    moved = randomized(start)
    merged = fn(lora.merge(lj.dequantize(params), moved), x)
    return base, first, lora.apply(params, moved, x), merged

  base, first, out, merged = outputs(params)
  assert_close(first, base, 1e-3 if name in NOT_THE_BASE else 1e-6)
  assert_close(out, merged, 1e-5)
  assert float(jnp.abs(out - base).max()) > 1e-2
  assert float(jnp.abs(base - fn({"w": weight}, x)).max()) > 1e-3  # it is rounded


WORDS = {"lora_a": "batch in rank", "lora_b": "batch rank out"}


def variant(**changes):
  settings = {
    "name": "thrice LoRA",
    "arrays": WORDS,
    "start": lambda key, site: toys.draw(key, site, WORDS),
    "weight": lambda w, p, scaling: w + 3 * scaling * (p.lora_a @ p.lora_b),
  }
  return lj.Variant(**settings | changes)


def adapted(variant):
  config = lj.LoraConfig(2, 2.0, "w", variant=variant)
  fn = lambda params, x: x @ params["w"]  # noqa: E731
  params, x = {"w": normal(6, 4)}, normal(3, 6)
  return fn, config, lj.lora(fn, config), params, x


def test_variants_with_the_same_arrays_are_told_apart():
  fn, config, thrice, params, x = adapted(variant())
  trainable = thrice.init(jax.random.key(0), params, x)
  plain = lj.LoraConfig(2, 2.0, "w")
  with pytest.raises(ValueError, match=r"w is thrice LoRA .*, the config's is LoRA"):
    lj.lora(fn, plain).apply(params, trainable, x)
  with pytest.raises(ValueError, match=r"w is adapted by thrice LoRA .*, and arithmetic of fac"):
    lj.weighted_sum([(config, trainable)], [1.0], params)
  arrays, axes = lj.pack(trainable)
  other = lj.lora(fn, plain).init(jax.random.key(0), params, x)
  with pytest.raises(ValueError, match=r"w is thrice LoRA .*, expected LoRA"):
    lj.unpack(arrays, axes, like=other)


LACKING = {  # variants whose arrays have no axis of inputs or none of outputs; a third weight's
  "MiSS": (lj.MISS, (5, 6), (9, 6)),
  "MiSS, mini": (lj.miss_mini_variant(2), (6, 4), (6, 6)),
  "(IA)^3": (lj.IA3_FEEDFORWARD, (6, 4), (6, 9)),
  "RandLoRA": (lj.RAND_LORA, (5, 6), (5, 8)),  # as many outputs as the other weight
  "VeRA": (lj.VERA, (5, 6), (7, 6)),
}


@pytest.mark.parametrize("name", LACKING)
def test_an_adapter_of_a_weight_of_another_shape_is_refused(name):
  """No array has the length of the axis that differs."""
  variant, shape, other = LACKING[name]
  fn = lambda params, x: x[:, : len(params["w"])] @ params["w"] + (x @ params["v"])[:, :1]  # noqa: E731
  lora = lj.lora(fn, lj.LoraConfig(2, 2.0, "[vw]", variant=variant))
  params, others = ({"v": jnp.ones((10, 10)), "w": jnp.ones(s)} for s in (shape, other))
  trainable, like = (
    jax.eval_shape(lora.init, jax.random.key(0), p, jnp.ones((3, 10))) for p in (params, others)
  )
  shapes = re.escape(str(other)), re.escape(str(shape))
  for fn in (lora.apply, lora.merge):
    arguments = (jnp.ones((3, 10)),) if fn == lora.apply else ()
    with pytest.raises(ValueError, match=rf"mis-shaped: w is {shapes[0]}, and its .* {shapes[1]}"):
      jax.eval_shape(fn, others, trainable, *arguments)
  arrays, axes = lj.pack(trainable)
  with pytest.raises(ValueError, match=rf"w is for .* of shape {shapes[1]}, expected {shapes[0]}"):
    lj.unpack(arrays, axes, like)
  older = json.loads(axes)
  for entry in older["leaves"].values():
    entry.pop("weight_shape", None)
  assert lj.unpack(arrays, json.dumps(older), trainable) == trainable
  jax.eval_shape(lora.merge, params, lj.unpack(arrays, json.dumps(older)))


def test_a_start_that_lacks_an_array_is_refused():
  *_, lora, params, x = adapted(variant(start=lambda key, site: {"lora_a": jnp.ones((6, 2))}))
  message = r"w: start of thrice LoRA .* gave lora_a, expected its arrays$"
  with pytest.raises(ValueError, match=message):
    lora.init(jax.random.key(0), params, x)


def test_a_term_is_added_before_the_gain():
  words = WORDS | {"gain": "batch out"}
  late = variant(
    arrays=words,
    start=lambda key, site: toys.draw(key, site, words),
    weight=lambda w, p, s: w * p.gain + s * (p.lora_a @ p.lora_b),
  )
  *_, lora, params, x = adapted(late)
  with pytest.raises(ValueError, match="a term is added before the gain"):
    lora.init(jax.random.key(0), params, x)


def test_no_two_arrays_are_one_buffer():
  """A step donates the trained arrays, and not the base model's."""
  words = {"first": "batch out", "second": "batch out", "copy": "batch in out"}

  def start(key, site):
    ones = jnp.ones(site.array_shape("batch out"))
    return {"first": ones, "second": ones, "copy": site.weight}

  *_, lora, params, x = adapted(
    variant(arrays=words, start=start, weight=lambda w, p, s: w * (p.first * p.second))
  )
  node = lora.init(jax.random.key(0), params, x)["w"]
  arrays = [*node.arrays.values(), params["w"]]
  assert len({array.unsafe_buffer_pointer() for array in arrays}) == 4
