"""Training on codes that are sharded over devices: as on one device, and no weight is kept."""

import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lj
from lora_jax.models.checkpoints.loaded_weights import with_shardings
from lora_jax.models.llama.model import Llama, LlamaConfig
from lora_jax.models.sharding import sharding_of
from lora_jax.training.mesh import make_mesh

from tests.toy_models import randomized

TOKENS = jax.random.randint(jax.random.key(0), (8, 16), 0, 256)


def module(num_layers):
  shape = {"vocab_size": 256, "num_positions": 16, "embed_dim": 256, "mlp_dim": 512}
  return Llama(
    LlamaConfig(**shape, num_heads=4, num_kv_heads=2, num_layers=num_layers, tie_head=True)
  )


def adapted(model):
  def loss(params, tokens):
    logits = model.apply({"params": params}, tokens)[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

  lora = lj.lora(loss, lj.LoraConfig(4, 8.0, ".*kernel"))
  return lora, jax.jit(jax.value_and_grad(lora.apply, argnums=1))


def placed_shapes(mesh, kind, num_layers):
  """Returns the shapes of params, their kernels in a format, with their shardings."""
  shapes = jax.eval_shape(module(num_layers).init, jax.random.key(0), TOKENS)["params"]
  quantize = functools.partial(lj.quantize, format=kind, target=".*kernel")
  codes = shapes if kind is None else jax.eval_shape(quantize, shapes)
  return with_shardings(codes, sharding_of(mesh)(shapes))


def batch(mesh):
  return jax.device_put(TOKENS, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["int8", "nf4", "Q4_1"])
def test_loss_and_gradients_are_those_of_one_device(kind):
  model = module(2)
  params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
  codes = lj.quantize(params, kind, ".*kernel")
  lora, step = adapted(model)
  trainable = randomized(lora.init(jax.random.key(1), codes, TOKENS), scale=0.02)
  expected = step(codes, trainable, TOKENS)
  mesh = make_mesh(data=2, fsdp=4)
  shapes = placed_shapes(mesh, kind, 2)
  codes = jax.device_put(codes, jax.tree.map(lambda leaf: leaf.sharding, shapes))
  shards = codes["layers_0"]["mlp"]["up"]["kernel"].arrays
  assert not all(array.sharding.is_fully_replicated for array in shards.values())
  for got, reference in zip(
    jax.tree.leaves(step(codes, trainable, batch(mesh))), jax.tree.leaves(expected), strict=True
  ):
    got, reference = np.asarray(got), np.asarray(reference)
    assert np.linalg.norm(got - reference) <= 1e-5 * np.linalg.norm(reference)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["int8", "Q4_1"])
def test_no_device_keeps_a_dequantized_weight(kind):
  """More layers need as much more temporary memory as the float model, and the codes once more."""
  mesh = make_mesh(data=2, fsdp=4)

  def memory(kind, num_layers):
    lora, step = adapted(module(num_layers))
    params = placed_shapes(mesh, kind, num_layers)
    trainable = jax.eval_shape(lora.init, jax.random.key(1), params, TOKENS)
    sizes = step.lower(params, trainable, batch(mesh)).compile().memory_analysis()
    return np.array([sizes.temp_size_in_bytes, sizes.argument_size_in_bytes])

  temporaries, codes = memory(kind, 4) - memory(kind, 2)
  of_floats, weights = memory(None, 4) - memory(None, 2)
  assert temporaries <= of_floats + 1.1 * codes
  assert 1.1 * codes < 0.5 * weights  # which are not kept
