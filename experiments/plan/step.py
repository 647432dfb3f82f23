"""Compiles a train step for a mesh, and reads from it what each of the devices needs."""

import contextlib
import functools
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from jaxtyping import PyTree

import lora_jax as lj
from experiments.harness.flops import compiled_flops
from experiments.harness.methods import find_method
from experiments.plan.collectives import collective_bytes
from experiments.plan.config import PlanLora
from experiments.plan.models import Planned
from lora_jax.models.checkpoints.loaded_weights import with_shardings
from lora_jax.models.sharding import sharding_of
from lora_jax.training.step import TrainState, make_train_step, start

LINEAR = r".*/(attn|mlp)/(.*/)?(query|key|value|out|gate|up|down)(/kernel)?"  # not routers or heads
NEEDED = re.compile(r"(?:Used |for HLO temporaries \()([\d.]+)([MGT])\b")  # arguments included
UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}


class Costs(NamedTuple):
  """What one device needs for a train step; bytes if not said otherwise.

  Attributes:
    trained_parameters: of all devices.
    weights: its part of the frozen and trained weights.
    optimizer: its part of the optimizer's state.
    gradients: its part of the trained weights' gradients, in the weights' dtypes.
    arguments: what the compiled step is given: weights, optimizer, batch.
    peak: the most memory that the compiled step has in use; what exceeds the arguments is
      activations, gradients and gathered weights.
    flops: operations of matmuls and convolutions, loops counted.
    sent: to other devices, by kind of collective, loops counted.
    seconds: to compile.
    fits: whether the compiler could place it.
  """

  trained_parameters: int
  weights: float
  optimizer: float
  gradients: float
  arguments: float
  peak: float
  flops: float
  sent: dict[str, float]
  seconds: float
  fits: bool

  @property
  def temporaries(self) -> float:
    return self.peak - self.arguments


class Step(NamedTuple):
  """A traced train step; its arguments are shapes with their shardings."""

  lowered: Any
  state: TrainState
  frozen: PyTree
  batch: dict[str, Any]


class Compiled(NamedTuple):
  """What the compiler says of a step.

  Attributes:
    arguments: bytes; 0 if the step does not fit.
    peak: the most memory in use, bytes.
    fits: whether the compiler could place it.
    text: of the HLO module after its partitioning over the devices.
  """

  arguments: float
  peak: float
  fits: bool
  text: str


def plan_step(step: Step) -> Costs:
  """Compiles a train step; nothing of the model's size is allocated."""
  began = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    compiled = compile_step(step.lowered, Path(folder))
  return Costs(
    trained_parameters=sum(leaf.size for leaf in jax.tree.leaves(step.state.part)),
    weights=bytes_of((step.state.part, step.frozen)),
    optimizer=bytes_of(step.state.opt_state),
    gradients=bytes_of(step.state.part),
    arguments=compiled.arguments or bytes_of((step.state, step.frozen, step.batch)),
    peak=compiled.peak,
    flops=compiled_flops(compiled.text),
    sent=collective_bytes(compiled.text),
    seconds=time.perf_counter() - began,
    fits=compiled.fits,
  )


def lower_step(
  model: Planned,
  method: str,
  base: str,
  lora: PlanLora,
  batch_size: int,
  row_length: int,
  mesh: Mesh,
) -> Step:
  """Traces the train step of a method with AdamW.

  Args:
    model: as `find_model` returns it.
    method: `lora`, or `full_finetuning` of float32 weights.
    base: dtype or format of LoRA's frozen weights.
    lora: the adapter.
    batch_size: rows.
    row_length: tokens.
    mesh: of any devices.
  """
  batch = model.batch(batch_size, row_length, mesh)
  if find_method(method).owns_base:
    loss, params = lj.full_finetuning(model.loss), params_shapes(model, "float32", mesh)
    trainable = params
  else:
    config = lj.LoraConfig(
      lora.rank, lora.alpha, target=lora.target, dropout=lora.dropout, extra=model.head
    )
    loss, params = lj.lora(model.loss, config), params_shapes(model, base, mesh)
    trainable = jax.eval_shape(loss.init, jax.random.key(0), params, batch)
    trainable = with_shardings(trainable, lj.shardings(trainable, params))
  optimizer = optax.adamw(2e-4, weight_decay=0.1)
  state, frozen, optimizer = start(params, trainable, optimizer, jax.random.key(0), mesh)
  step: Any = make_train_step(loss, optimizer, state)
  return Step(step.lower(state, frozen, batch), state, frozen, batch)


def params_shapes(model: Planned, base: str, mesh: Mesh) -> PyTree:
  """Returns the shapes of a model's weights, in a dtype or quantized, with their shardings."""
  if base not in ("int8", "nf4"):
    shapes = planned = model.shapes(base)
  else:
    shapes = model.shapes("bfloat16")
    planned = jax.eval_shape(functools.partial(lj.quantize, format=base, target=LINEAR), shapes)
  return with_shardings(planned, sharding_of(mesh)(shapes))


def bytes_of(tree: PyTree) -> float:
  """Returns the bytes of one device's part of a tree's arrays, from their shapes and shardings."""
  return sum(_bytes_of_leaf(leaf) for leaf in jax.tree.leaves(tree))


def _bytes_of_leaf(leaf: Any) -> float:
  size = jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype).size
  is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return size * (8 if is_key else jax.dtypes.itemsize_bits(leaf.dtype) / 8)


def compile_step(lowered: Any, folder: Path) -> Compiled:
  """Compiles a step; the compiler writes its module to the folder, by stages."""
  options = {
    "xla_dump_to": str(folder),
    "xla_dump_hlo_as_text": True,
    "xla_dump_hlo_pass_re": ".*spmd-partitioning.*",
  }
  try:
    with _without_cache():
      compiled = lowered.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    if not (needed := NEEDED.search(str(error))):
      raise
    return Compiled(0.0, float(needed[1]) * UNITS[needed[2]], False, _partitioned(folder))
  memory = compiled.memory_analysis()
  arguments = memory.argument_size_in_bytes
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  peak = memory.peak_memory_in_bytes
  if _is_for_cpus(compiled):  # whose peak leaves out nearly all temporaries
    peak = arguments + outputs + memory.temp_size_in_bytes
  return Compiled(arguments, peak, True, _partitioned(folder))


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
  """Turns JAX's persistent cache off: a program that is read from it leaves no module behind."""
  name = "jax_enable_compilation_cache"
  before = getattr(jax.config, name)
  jax.config.update(name, False)
  compilation_cache.reset_cache()  # JAX looks at its settings once
  try:
    yield
  finally:
    jax.config.update(name, before)
    compilation_cache.reset_cache()


def _is_for_cpus(compiled: Any) -> bool:
  sharding = jax.tree.leaves(compiled.output_shardings)[0]
  return any(device.platform == "cpu" for device in sharding.device_set)


def _partitioned(folder: Path) -> str:
  """Returns the module after its partitioning; before it, for one device."""
  for pattern in (r"\.after_[\w-]*spmd-partitioning\.", r"\.before_optimizations\."):
    texts = [path.read_text() for path in folder.glob("*.txt") if re.search(pattern, path.name)]
    if texts:
      return max(texts, key=len)  # the step, among functions that are compiled with it
  raise RuntimeError("the compiler wrote no module; XLA_FLAGS may redirect its dumps")
