"""Quantized base weights in the engine: as if dequantized, and never kept dequantized."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lj
from lora_jax.adapters.delta import adapter_weights
from lora_jax.models.llama.model import Llama, LlamaConfig
from lora_jax.quantization.formats import FORMATS
from lora_jax.quantization.leaf import Quantized, is_quantized
from lora_jax.trees import replace_leaves, weights_with_path

from tests.layer_kinds import KINDS, normal
from tests.transform.test_layer_kinds import assert_close, prepared
from tests.variants.test_variants import ONE_PER_FAMILY, randomized, trained

KIND_AND_AXIS = [
  pytest.param(kind, axis, id=f"{kind}, axis {axis}", marks=() if is_short else pytest.mark.long)
  for kind in KINDS
  for axis in (-1, -2)
  for is_short in [axis == -2 and str(kind) in ONE_PER_FAMILY]
]
LAYERS = [False, pytest.param(True, marks=pytest.mark.long)]
WEIGHTS = r"(f32|bf16)\[(2,)?(32,64|64,32|32,16|16,32|32,96|96,32|160,32|32,160)\]"


def quantized(leaf, axis):
  """Returns a weight in int8, which fits axes of any size."""
  values = jnp.moveaxis(leaf, axis, -1).astype(jnp.float32)
  return Quantized(FORMATS["int8"].quantize(values), "int8", axis, leaf.dtype)


def quantized_params(params, paths, axis=-1):
  leaves = dict(weights_with_path(params))
  return replace_leaves(params, {path: quantized(leaves[path], axis) for path in paths})


@pytest.mark.parametrize(("kind", "axis"), KIND_AND_AXIS)
def test_outputs_and_gradients_equal_the_dequantized_models(kind, axis):
  case, adaptation, trainable = prepared(kind)
  trainable = randomized(trainable)
  paths = adapter_weights(trainable)
  codes = quantized_params(case.params, paths, axis)
  floats = lj.dequantize(codes)

  def loss(params, trainable):
    out = adaptation.apply(params, trainable, *case.args)
    return jnp.mean(jnp.sin(out)), out

  def both(params):
    def fn(trainable):
      return loss(params, trainable)

    return jax.jit(jax.value_and_grad(fn, has_aux=True))(trainable)

  (_, out), grads = both(codes)
  (_, expected), expected_grads = both(floats)
  assert out.dtype == expected.dtype
  assert_close(out, expected, 1e-5)
  for got, reference in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
    assert_close(got, reference, 1e-5)


class Model(NamedTuple):
  """A small Llama with bfloat16 compute and a tied head, its codes, and a loss."""

  loss: Callable[..., jax.Array]
  codes: Any
  tokens: jax.Array
  adaptation: lj.Adaptation
  trainable: Any


@functools.cache
def model(scan_layers: bool, variant=lj.LORA, dtype="bfloat16", target=".*(query|up|down)/kernel"):
  config = LlamaConfig(
    **{"vocab_size": 160, "num_positions": 16, "embed_dim": 32, "num_layers": 2, "mlp_dim": 96},
    **{"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "tie_head": True},
    scan_layers=scan_layers,
    dtype=dtype,
  )
  tokens = jax.random.randint(jax.random.key(0), (1, 5), 0, 160)
  module = Llama(config)
  params = jax.jit(module.init)(jax.random.key(1), tokens)["params"]
  codes = lj.quantize(params, "Q4_1", ".*kernel")
  codes = lj.quantize(codes, "Q8_0", ".*embedding", axis=-1)

  def loss(params, tokens):
    return jnp.mean(jnp.sin(module.apply({"params": params}, tokens)))

  adaptation = lj.lora(loss, lj.LoraConfig(rank=2, alpha=4.0, target=target, variant=variant))
  trainable = adaptation.init(jax.random.key(2), codes, tokens)
  return Model(loss, codes, tokens, adaptation, trainable)


@pytest.mark.parametrize(
  "variant", [lj.LORA, pytest.param(lj.DORA, marks=pytest.mark.long)], ids=["LoRA", "DoRA"]
)
@pytest.mark.parametrize(
  "scan_layers",
  [pytest.param(False, marks=pytest.mark.long), True],
  ids=["unrolled", "scanned"],
)
def test_gradients_equal_those_on_the_dequantized_base(scan_layers, variant):
  _, codes, tokens, adaptation, start = model(
    scan_layers, variant, "float32", ".*(kernel|embedding)"
  )
  # Small factors: with large ones a change of the weights by 1e-7 changes gradients by 4e-5.
  small = jax.tree.map(lambda a, b: a + 0.03 * (b - a), start, randomized(start))
  part, frozen = trained(small)

  def fn(params, part):
    return adaptation.apply(params, lj.combine(part, frozen), tokens)

  gradients = jax.jit(jax.grad(fn, argnums=1))
  got, expected = gradients(codes, part), gradients(lj.dequantize(codes), part)
  for leaf, reference in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert jnp.linalg.norm(leaf - reference) <= 1e-5 * jnp.linalg.norm(reference)


@pytest.mark.parametrize(
  "scan_layers",
  [False, pytest.param(True, marks=pytest.mark.long)],
  ids=["unrolled", "scanned"],
)
def test_no_dequantized_weight_is_a_residual(scan_layers, capsys):
  _, codes, tokens, adaptation, trainable = model(scan_layers)

  def weights_kept(params):
    print_saved_residuals(lambda part: adaptation.apply(params, part, tokens), trainable)
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if re.match(WEIGHTS, line) and "from the argument" not in line]

  assert weights_kept(codes) == []
  assert weights_kept(lj.dequantize(codes))  # the count can tell


@pytest.mark.parametrize("scan_layers", LAYERS, ids=["unrolled", "scanned"])
def test_no_dequantized_weight_is_kept_by_the_compiled_step(scan_layers):
  """More layers need as much more temporary memory as the float model, and the codes once more.

  In float32, with a tied head in Q8_0: in bfloat16, XLA keeps converted weights of the float model
  too on CPUs, 5.2 MB for these two layers, so the comparison would tell nothing.
  """

  def temporaries(num_layers, is_quantized):
    config = LlamaConfig(
      **{"vocab_size": 64, "num_positions": 8, "embed_dim": 256, "num_layers": num_layers},
      **{"num_heads": 2, "num_kv_heads": 2, "mlp_dim": 512, "tie_head": True},
      scan_layers=scan_layers,
    )
    module, tokens = Llama(config), jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]

    def quantize(params):
      if not is_quantized:
        return params
      return lj.quantize(lj.quantize(params, "int8", ".*kernel"), "Q8_0", ".*embedding", axis=-1)

    def loss(params):
      return module.apply({"params": params}, tokens).std()

    params = jax.eval_shape(quantize, shapes)
    adaptation = lj.lora(loss, lj.LoraConfig(rank=2, alpha=4.0, target=".*query/kernel"))
    trainable = jax.eval_shape(adaptation.init, jax.random.key(0), params)
    step = jax.jit(lambda part, params: jax.grad(lambda p: adaptation.apply(params, p))(part))
    memory = step.lower(trainable, params).compile().memory_analysis()
    return memory.temp_size_in_bytes, memory.argument_size_in_bytes

  growth, codes = (b - a for a, b in zip(temporaries(2, True), temporaries(4, True), strict=True))
  floats, weights = (
    b - a for a, b in zip(temporaries(2, False), temporaries(4, False), strict=True)
  )
  assert growth <= floats + 1.1 * codes
  assert floats + 1.1 * codes < 0.5 * weights  # of the float weights, which are not kept


def test_a_quantized_weight_is_shown_and_counted_as_the_weight_itself():
  _, codes, _, _, trainable = model(False)
  table = lj.summary(codes, trainable)
  assert "32 x 96" in table
  assert f"{sum(leaf.size for _, leaf in weights_with_path(codes)):,}" in table


def test_an_adapter_is_not_merged_into_codes():
  _, codes, _, adaptation, trainable = model(False)
  with pytest.raises(ValueError, match=r"attn/query/kernel and 5 more are quantized \(Q4_1\)"):
    adaptation.merge(codes, trainable)
  merged = adaptation.merge(lj.dequantize(codes), trainable)
  assert not any(map(is_quantized, jax.tree.leaves(merged, is_leaf=is_quantized)))


def test_codes_are_not_fully_trained():
  loss, codes, tokens, _, _ = model(False)
  for method in (
    lj.full_finetuning(loss),
    lj.partial_finetuning(loss, ".*/up/kernel"),
    lj.lora(loss, lj.LoraConfig(rank=2, alpha=1.0, target=".*query/kernel", extra=".*/up/kernel")),
  ):
    with pytest.raises(ValueError, match="kernel is quantized"):
      method.init(jax.random.key(0), codes, tokens)


def test_frozen_codes_serve_partial_finetuning_and_evaluation():
  loss, codes, tokens, _, _ = model(False)
  norms = lj.partial_finetuning(loss, ".*norm/scale")
  trainable = norms.init(jax.random.key(0), codes)
  expected = jax.jit(loss)(lj.dequantize(codes), tokens)
  for fn, args in ((norms.apply, (trainable, tokens)), (lj.dequantized(loss), (tokens,))):
    got = jax.jit(fn)(codes, *args)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_sharded_quantized_weight_is_adapted_as_its_float_weight():
  mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
  kernel = normal(256, 64)
  codes = lj.quantize({"kernel": kernel}, "Q4_1", "kernel")["kernel"]
  sharding = NamedSharding(mesh, PartitionSpec("tensor", "data"))
  placed = {"kernel": jax.device_put(codes, codes.shardings(sharding))}
  assert placed["kernel"].arrays["qs"].sharding.spec == PartitionSpec("data", "tensor")
  adaptation = lj.lora(lambda p, x: x @ p["kernel"], lj.LoraConfig(rank=2, alpha=4.0, target=".*"))
  x = normal(8, 256)
  trainable = adaptation.init(jax.random.key(0), placed, x)
  assert trainable["kernel"].lora_a.sharding.spec == PartitionSpec("tensor", None)
  trainable = randomized(trainable)
  got = jax.jit(adaptation.apply)(placed, trainable, x)
  assert_close(got, adaptation.apply(lj.dequantize({"kernel": codes}), trainable, x), 1e-5)


USES = {
  "a row past the start": lambda w: jax.lax.dynamic_index_in_dim(w, jnp.array(-5), keepdims=False),
  "a fill value": lambda w: (-w[0]).at[jnp.array([0, 99])].get(mode="fill", fill_value=5.0),
  "an empty operand": lambda w: jnp.concatenate([jnp.ones((32, 0)), w[0]], 1).sum(0),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_a_use_of_a_quantized_weight_equals_that_of_the_dequantized(use):
  codes = lj.quantize(normal(4, 32, 32), "Q8_0", ".*", axis=-1)
  np.testing.assert_allclose(lj.dequantized(use)(codes), use(codes.dequantize()), rtol=1e-5)


def test_a_quantized_weight_on_a_mesh_with_explicit_axes():
  mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
  codes = lj.quantize({"kernel": normal(256, 64)}, "nf4", "kernel")["kernel"]
  shardings = codes.shardings(NamedSharding(mesh, PartitionSpec("tensor", "data")))
  placed = {"kernel": jax.device_put(codes, shardings)}
  x = normal(8, 256)

  def fn(p, x):
    return jnp.einsum("bi,io->bo", x, p["kernel"], out_sharding=PartitionSpec())

  with jax.set_mesh(mesh):
    adaptation = lj.lora(fn, lj.LoraConfig(rank=2, alpha=4.0, target=".*"))
    trainable = adaptation.init(jax.random.key(0), placed, x)
    got = jax.jit(adaptation.apply)(placed, trainable, x)
  np.testing.assert_allclose(got, x @ codes.dequantize(), rtol=1e-4, atol=1e-4)
  found = lj.shardings(trainable, {"kernel": shardings})["kernel"]
  assert found.lora_b.spec == trainable["kernel"].lora_b.sharding.spec
