"""Models, batches and counts of operations for the sections of `benchmarks.gpu`."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lora_jax.data.batches import Batch, packed_batches, suggest_loss_length
from lora_jax.data.text import Example
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.models.llama.model import Llama, LlamaConfig
from lora_jax.trees import key_parts

Figures = dict[str, Any]

LLAMA_8B: dict[str, Any] = {
  "vocab_size": 128256,
  "embed_dim": 4096,
  "num_layers": 32,
  "num_heads": 32,
  "num_kv_heads": 8,
  "mlp_dim": 14336,
  "rope_theta": 500000.0,
}
TINY_LLAMA: dict[str, Any] = {
  "vocab_size": 512,
  "embed_dim": 64,
  "num_layers": 2,
  "num_heads": 4,
  "num_kv_heads": 2,
  "mlp_dim": 128,
}
GPT2_MEDIUM: dict[str, Any] = {
  "vocab_size": 50257,
  "embed_dim": 1024,
  "num_layers": 24,
  "num_heads": 16,
}
TINY_GPT2: dict[str, Any] = {"vocab_size": 512, "embed_dim": 64, "num_layers": 2, "num_heads": 4}


def random_params(model: Llama | GPT2) -> PyTree:
  """Returns random weights on the device in the config's dtype, using little extra memory."""
  plain = model.clone(config=dataclasses.replace(model.config, attention="compact"))
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  shapes = jax.eval_shape(plain.init, jax.random.key(0), tokens)["params"]

  def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if len(shape) == 3:  # stacked layers, one at a time
      keys = jax.random.split(key, shape[0])
      return jax.lax.map(lambda layer_key: draw(layer_key, shape[1:], dtype), keys)
    return (jax.random.normal(key, shape, jnp.float32) * 0.02).astype(dtype)

  make = jax.jit(draw, static_argnums=(1, 2))
  paths, tree = jax.tree_util.tree_flatten_with_path(shapes)
  weights = []
  for number, (path, leaf) in enumerate(paths):
    constant = {"scale": 1.0, "bias": 0.0}.get(path[-1].key)
    if constant is None:
      weights.append(make(jax.random.key(number), leaf.shape, leaf.dtype))
    else:
      weights.append(jnp.full(leaf.shape, constant, leaf.dtype))
  return jax.block_until_ready(jax.tree.unflatten(tree, weights))


def gpt2_batch(tiny: bool, packed: bool) -> Batch:
  """Returns full rows with a loss at every token, or packed rows shaped like E2E's examples."""
  vocab_size = (TINY_GPT2 if tiny else GPT2_MEDIUM)["vocab_size"]
  rows, length = (2, 128) if tiny else (16, 512)
  if not packed:
    return make_batch(vocab_size, rows, length)
  draw = np.random.default_rng(0)

  def example() -> Example:
    context, completion = draw.integers(20, 50), draw.integers(15, 45)
    tokens = draw.integers(0, vocab_size, context + completion + 1).astype(np.int32)
    index = np.arange(context - 1, context + completion, dtype=np.int32)
    return Example(tokens[:-1], tokens[index + 1], index)

  examples = [example() for _ in range(rows * length // 32)]
  data = packed_batches(
    examples,
    batch_size=rows,
    row_length=length,
    loss_length=suggest_loss_length(examples, length),
    seed=None,
  )
  return data[0]


def make_batch(vocab_size: int, rows: int, length: int, seed: int = 0) -> Batch:
  """Returns full rows of random tokens, all supervised."""
  tokens = np.random.default_rng(seed).integers(0, vocab_size, (rows, length)).astype(np.int32)
  index = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
  return Batch(
    tokens=tokens,
    positions=index,
    segment_ids=np.ones_like(tokens),
    target_index=index,
    targets=np.roll(tokens, -1, axis=1),
    target_weights=np.ones(tokens.shape, np.float32),
  )


def time_steps(step: Callable[[Any], Any], state: Any, repeats: int) -> list[float]:
  """Returns the seconds of each `state = step(state)`, after two warm-up steps."""
  seconds = []
  for _ in range(repeats + 2):
    step_start = time.perf_counter()
    state = jax.block_until_ready(step(state))
    seconds.append(time.perf_counter() - step_start)
  return seconds[2:]


def step_figures(
  seconds: Sequence[float], batch: Mapping[str, Any], flops_per_token: float
) -> Figures:
  """Returns step time, tokens/s without padding, and operations per second."""
  median, (rows, length) = statistics.median(seconds), batch["tokens"].shape
  return {
    "rows": rows,
    "length": length,
    "step_s": median,
    "fastest_s": min(seconds),
    "slowest_s": max(seconds),
    "tokens_per_s": int(np.count_nonzero(batch["segment_ids"])) / median,
    "supervised": int(np.count_nonzero(batch["target_weights"])),
    "flops_per_token": flops_per_token,
    "tflops": rows * length * flops_per_token / median / 1e12,
  }


def training_flops(
  matmul_weights: int, adapter_weights: int, num_layers: int, embed_dim: int, length: int
) -> float:
  """Returns the operations per token of a LoRA step, without recomputation.

  Args:
    matmul_weights: number of frozen weights in matmuls; an embedding counts only as a head.
    adapter_weights: number of weights in A and B.
    num_layers: number of attention layers.
    embed_dim: width of all heads together.
    length: tokens in a row; on average a token attends to half of them.
  """
  attention = 2 * num_layers * embed_dim * length  # forward: query @ key.T, weights @ value
  return 4.0 * matmul_weights + 6.0 * adapter_weights + 3.0 * attention


def nemo_flops(matmul_weights: int, num_layers: int, embed_dim: int, length: int) -> float:
  """Returns the operations per token by the count of NVIDIA NeMo; arguments as `training_flops`.

  It leaves out the adapter, and counts attention twice instead of three times.
  """
  return 4.0 * matmul_weights + 2.0 * (2 * num_layers * embed_dim * length)


def count_matmul_weights(config: LlamaConfig | GPT2Config, params: PyTree) -> int:
  """Returns the number of frozen weights in matmuls."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  kernels = sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")
  return kernels + (config.vocab_size * config.embed_dim if config.tie_head else 0)


def count_adapter_matrices(adapter: PyTree) -> int:
  """Returns the number of weights in A and B, without DoRA's magnitudes."""
  leaves = jax.tree_util.tree_leaves_with_path(adapter)
  return sum(leaf.size for path, leaf in leaves if key_parts(path)[-1] in ("lora_a", "lora_b"))


def planned_bytes(compiled: Any) -> int:
  """Returns the bytes that XLA plans for a compiled step, arguments included; 0 if unknown."""
  plan = compiled.memory_analysis()
  if plan is None:
    return 0
  buffers = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
  return buffers - plan.alias_size_in_bytes


def jax_device() -> Figures:
  return {"device": jax.devices()[0].device_kind, "versions": {"jax": jax.__version__}}


def peak_gb() -> float:
  """Returns the peak memory of JAX's allocator, GB; 0 on a CPU."""
  return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9
