"""LoRA training on one GPU: step time, tokens/s, memory, and share of the matmul throughput.

    python -m benchmarks.gpu --out FOLDER
    python -m benchmarks.gpu --out FOLDER --only matmul "gpt2 medium"  # prefixes of the names
    JAX_PLATFORMS=cpu python -m benchmarks.gpu --out FOLDER --tiny     # toy sizes, no GPU

Weights and tokens are random. Each section runs in a separate process, so that peak memory is
measured per section. FOLDER/figures.json is written after each one; a later run adds its sections
to the file. Attention is cuDNN's; if cuDNN fails, XLA's is measured and the row says so.

    matmul       bfloat16, (8192, 8192) @ (8192, 8192)
    llama8b      Llama 3 8B, bfloat16, rows of 4096 tokens; rank 16 on all linear layers; AdamW.
                 LoRA, unless the name says DoRA
    gpt2 medium  float32 weights, bfloat16 computation, 16 rows of 512 tokens; rank 4 on query and
                 value; AdamW. PEFT with torch.compile: rank 8 on the fused query, key, value layer

    step_s    seconds of a step, median
    tokens/s  tokens of a step over step_s
    peak_gb   peak memory of the allocator, weights included
    tflop/s   matmul operations that the gradient needs, without recomputation: 4 per frozen weight
              and token, 6 per adapter weight and token, 3 times the forward of causal attention.
              Elementwise operations and DoRA's norms are not counted
    share     tflop/s over that of `matmul`

If LoRA and DoRA were both measured, the last line has the ratios of DoRA to LoRA.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj
from lora_jax.models.gpt2 import GPT2, GPT2Config
from lora_jax.models.llama import Llama, LlamaConfig
from lora_jax.training.loss import language_model_loss, mean
from lora_jax.trees import key_parts

PyTree = Any
Figures = dict[str, Any]
Method = Callable[[Callable[..., Any], lj.LoraConfig], lj.Adaptation]

ALL_LINEAR = r".*/(attn/(query|key|value|out)|mlp/(gate|up|down))/kernel"
QUERY_VALUE = r".*/attn/(query|value)/kernel"

LLAMA_8B = {
  "vocab_size": 128256,
  "embed_dim": 4096,
  "num_layers": 32,
  "num_heads": 32,
  "num_kv_heads": 8,
  "mlp_dim": 14336,
  "rope_theta": 500000.0,
}
TINY_LLAMA = {
  "vocab_size": 512,
  "embed_dim": 64,
  "num_layers": 2,
  "num_heads": 4,
  "num_kv_heads": 2,
  "mlp_dim": 128,
}
GPT2_MEDIUM = {"vocab_size": 50257, "embed_dim": 1024, "num_layers": 24, "num_heads": 16}
TINY_GPT2 = {"vocab_size": 512, "embed_dim": 64, "num_layers": 2, "num_heads": 4}


def measure_matmul(tiny: bool) -> Figures:
  """Returns the figures of a chain of square bfloat16 matmuls on random data."""
  size, count = (256, 2) if tiny else (8192, 20)
  a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)

  @jax.jit
  def chain(x: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, count, lambda _, y: (a @ y) * size**-0.5, x)

  seconds = [duration / count for duration in time_steps(chain, a, 5)]
  return {
    **jax_device(),
    "size": size,
    "step_s": statistics.median(seconds),
    "tflops": 2 * size**3 / statistics.median(seconds) / 1e12,
  }


def measure_llama(
  tiny: bool, attention: str, rows: int, remat: str, adapt: Method = lj.lora
) -> Figures:
  """Returns the figures of a training step of Llama 3 8B by LoRA or another method."""
  shape: dict[str, Any] = TINY_LLAMA if tiny else LLAMA_8B
  length, rank, chunk = (64, 4, 32) if tiny else (4096, 16, 1024)
  config = LlamaConfig(
    **shape,
    num_positions=length,
    dtype="bfloat16",
    param_dtype="bfloat16",
    scan_layers=True,
    remat=remat,
    attention=attention,
  )
  batch = make_batch(config.vocab_size, rows, length)
  repeats = 3 if tiny else 10
  figures = measure_lora(Llama(config), batch, rank, ALL_LINEAR, chunk, repeats, adapt)
  return figures | {"attention": attention, "remat": remat}


def measure_gpt2(tiny: bool, attention: str) -> Figures:
  """Returns the figures of a LoRA step of GPT-2 medium, with all logits in memory at once."""
  shape: dict[str, Any] = TINY_GPT2 if tiny else GPT2_MEDIUM
  rows, length = (2, 64) if tiny else (16, 512)
  config = GPT2Config(**shape, dtype="bfloat16", param_dtype="float32", attention=attention)
  batch = make_batch(config.vocab_size, rows, length)
  figures = measure_lora(GPT2(config), batch, 4, QUERY_VALUE, None, 3 if tiny else 20)
  return figures | {"attention": attention}


def measure_lora(
  model: Llama | GPT2,
  batch: Mapping[str, np.ndarray],
  rank: int,
  target: str,
  chunk: int | None,
  repeats: int,
  adapt: Method = lj.lora,
) -> Figures:
  """Returns the figures of one training step: forward, backward, AdamW.

  Args:
    model: a language model.
    batch: a batch of tokens from `make_batch`.
    rank: rank of the adapter; alpha is twice the rank.
    target: pattern of the weights to adapt.
    chunk: number of a row's targets for which logits are in memory at once; None is all.
    repeats: number of timed steps.
    adapt: LoRA or a variant of it.
  """
  params, inputs = random_params(model), jax.device_put(dict(batch))
  loss = language_model_loss(model, 0.0, chunk)
  adapted = adapt(loss, lj.LoraConfig(rank, 2.0 * rank, target))
  optimizer = optax.adamw(1e-4)
  trainable = jax.jit(adapted.init)(jax.random.key(1), params, inputs)
  mask = lj.trainable_mask({"base": None, "adapter": trainable})["adapter"]
  adapter, constants = lj.partition(trainable, mask)  # constants: untrained arrays of a variant

  def update(params: PyTree, constants: PyTree, inputs: PyTree, state: PyTree) -> PyTree:
    adapter, moments, _ = state

    def loss_of(adapter: PyTree) -> jax.Array:
      return mean(adapted.apply(params, lj.combine(adapter, constants), inputs))

    loss, grads = jax.value_and_grad(loss_of)(adapter)
    updates, moments = optimizer.update(grads, moments, adapter)
    return optax.apply_updates(adapter, updates), moments, loss

  state = (adapter, optimizer.init(adapter), jnp.zeros(()))
  compile_start = time.perf_counter()
  lowered = jax.jit(update, donate_argnums=3).lower(params, constants, inputs, state)
  compiled = lowered.compile()
  compile_s = time.perf_counter() - compile_start
  seconds = time_steps(lambda state: compiled(params, constants, inputs, state), state, repeats)
  stats = jax.local_devices()[0].memory_stats() or {}
  rows, length = batch["tokens"].shape
  config, adapter_size = model.config, int(optax.tree.size(adapter))
  weights = count_matmul_weights(config, params)
  matrices = count_adapter_matrices(adapter)
  flops = training_flops(weights, matrices, config.num_layers, config.embed_dim, length)
  return {
    **jax_device(),
    "rank": rank,
    "base_parameters": int(optax.tree.size(params)),
    "adapter_parameters": adapter_size,
    "adapter_dtype": str(jax.tree.leaves(adapter)[0].dtype),
    "compile_s": compile_s,
    "peak_gb": stats.get("peak_bytes_in_use", 0) / 1e9,
    "planned_gb": planned_bytes(compiled) / 1e9,
    **step_figures(seconds, rows, length, flops),
  }


def measure_peft(tiny: bool) -> Figures:
  """Returns the figures of PEFT's LoRA step of GPT-2 medium, compiled and eager."""
  import peft  # pyright: ignore[reportMissingImports]
  import torch  # pyright: ignore[reportMissingImports]
  import transformers  # pyright: ignore[reportMissingImports]

  device = "cuda" if torch.cuda.is_available() else "cpu"
  shape: dict[str, Any] = TINY_GPT2 if tiny else GPT2_MEDIUM
  rows, length = (2, 64) if tiny else (16, 512)
  config = transformers.GPT2Config(
    vocab_size=shape["vocab_size"],
    n_embd=shape["embed_dim"],
    n_layer=shape["num_layers"],
    n_head=shape["num_heads"],
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    attn_implementation="sdpa",
    use_cache=False,
  )
  torch.set_float32_matmul_precision("high")
  lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True)
  model = peft.get_peft_model(transformers.GPT2LMHeadModel(config).to(device), lora).train()
  trainable = [weight for weight in model.parameters() if weight.requires_grad]
  optimizer = torch.optim.AdamW(trainable, 1e-4, fused=device == "cuda")
  tokens = torch.randint(0, shape["vocab_size"], (rows, length), device=device)

  def wait() -> None:
    if device == "cuda":
      torch.cuda.synchronize()

  def time_torch(module: Any, count: int) -> list[float]:
    seconds = []
    for _ in range(count):
      step_start = time.perf_counter()
      with torch.autocast(device, torch.bfloat16):
        loss = module(input_ids=tokens, labels=tokens).loss
      loss.backward()
      optimizer.step()
      optimizer.zero_grad()
      wait()
      seconds.append(time.perf_counter() - step_start)
    return seconds[5:]  # the first five warm up or compile

  eager = statistics.median(time_torch(model, 8 if tiny else 15))
  on_gpu = device == "cuda"
  if on_gpu:
    torch.cuda.reset_peak_memory_stats()
  compiled = time_torch(torch.compile(model), 25) if on_gpu else [eager]
  adapter_size = sum(weight.numel() for weight in trainable)
  kernels = 12 * shape["num_layers"] * shape["embed_dim"] ** 2
  weights = kernels + shape["vocab_size"] * shape["embed_dim"]
  flops = training_flops(weights, adapter_size, shape["num_layers"], shape["embed_dim"], length)
  return {
    "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    "versions": {module.__name__: module.__version__ for module in (torch, peft, transformers)},
    "rank": 8,
    "adapter_parameters": adapter_size,
    "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0,
    "eager_step_s": eager,
    "attention": "sdpa",
    **step_figures(compiled, rows, length, flops),
  }


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


def make_batch(vocab_size: int, rows: int, length: int) -> dict[str, np.ndarray]:
  """Returns full rows of random tokens, all supervised."""
  tokens = np.random.default_rng(0).integers(0, vocab_size, (rows, length)).astype(np.int32)
  index = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
  return {
    "tokens": tokens,
    "positions": index,
    "segment_ids": np.ones_like(tokens),
    "target_index": index,
    "targets": np.roll(tokens, -1, axis=1),
    "target_weights": np.ones(tokens.shape, np.float32),
  }


def time_steps(step: Callable[[Any], Any], state: Any, repeats: int) -> list[float]:
  """Returns the seconds of each `state = step(state)`, after two warm-up steps."""
  seconds = []
  for _ in range(repeats + 2):
    step_start = time.perf_counter()
    state = jax.block_until_ready(step(state))
    seconds.append(time.perf_counter() - step_start)
  return seconds[2:]


def step_figures(
  seconds: Sequence[float], rows: int, length: int, flops_per_token: float
) -> Figures:
  """Returns step time, tokens/s and operations per second."""
  median = statistics.median(seconds)
  return {
    "rows": rows,
    "length": length,
    "step_s": median,
    "fastest_s": min(seconds),
    "slowest_s": max(seconds),
    "tokens_per_s": rows * length / median,
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


LORA = "llama8b rows=1 nothing_saveable"
DORA = "llama8b rows=1 nothing_saveable, DoRA"
SECTIONS: dict[str, Callable[[bool, str], Figures]] = {
  "matmul": lambda tiny, attention: measure_matmul(tiny),
  LORA: functools.partial(measure_llama, rows=1, remat="nothing_saveable"),
  DORA: functools.partial(measure_llama, rows=1, remat="nothing_saveable", adapt=lj.dora),
  "gpt2 medium, lora_jax": measure_gpt2,
  "gpt2 medium, PEFT": lambda tiny, attention: measure_peft(tiny),
  "llama8b rows=2 nothing_saveable": functools.partial(
    measure_llama, rows=2, remat="nothing_saveable"
  ),
  "llama8b rows=1 dots": functools.partial(
    measure_llama, rows=1, remat="dots_with_no_batch_dims_saveable"
  ),
}
WITHOUT_CHOICE = ("matmul", "gpt2 medium, PEFT")
"""Sections without a choice of attention."""


def measure_apart(name: str, tiny: bool, attention: str, limit: float) -> Figures:
  """Returns the figures of a section, measured in a separate process, or its error."""
  command = [sys.executable, "-m", "benchmarks.gpu", "--run", name, "--attention", attention]
  command += ["--tiny"] if tiny else []
  try:
    process = subprocess.run(command, capture_output=True, text=True, timeout=limit)
  except subprocess.TimeoutExpired:
    return {"error": f"not finished within {limit} s"}
  if process.returncode:
    return {"error": process.stderr[-2000:]}
  return json.loads(process.stdout.splitlines()[-1])


def measure_section(name: str, tiny: bool, limit: float) -> Figures:
  """Returns the figures of a section, with XLA's attention if cuDNN's fails."""
  if tiny or name in WITHOUT_CHOICE:
    return measure_apart(name, tiny, "xla", limit)
  figures = measure_apart(name, tiny, "cudnn", limit)
  if "error" in figures:
    figures = measure_apart(name, tiny, "xla", limit) | {"error_of_cudnn": figures["error"]}
  return figures


def print_table(figures: Mapping[str, Figures]) -> None:
  """Prints a row for each section, and the ratios of DoRA to LoRA."""
  matmul_tflops = figures.get("matmul", {}).get("tflops")
  print(
    f"{'section':38}{'attention':>10}{'step_s':>9}{'tokens/s':>10}{'peak_gb':>9}{'tflop/s':>9}"
    f"{'share':>7}"
  )
  for name, values in figures.items():
    if "error" in values:
      print(f"{name:38} failed: {values['error'].strip().splitlines()[-1][:60]}")
      continue
    share = f"{values['tflops'] / matmul_tflops:.2f}" if matmul_tflops else ""
    tokens = f"{values['tokens_per_s']:.0f}" if "tokens_per_s" in values else ""
    memory = f"{values['peak_gb']:.1f}" if "peak_gb" in values else ""
    print(
      f"{name:38}{values.get('attention', ''):>10}{values['step_s']:9.4f}{tokens:>10}"
      f"{memory:>9}{values['tflops']:9.1f}{share:>7}"
    )
  lora, dora = figures.get(LORA, {}), figures.get(DORA, {})
  if "step_s" in lora and "step_s" in dora:
    memory = f", peak {dora['peak_gb'] / lora['peak_gb']:.3f}" if lora["peak_gb"] else ""
    print(f"DoRA / LoRA: step {dora['step_s'] / lora['step_s']:.3f}{memory}")


def main(arguments: Sequence[str] | None = None) -> dict[str, Figures]:
  parser = argparse.ArgumentParser(description="LoRA training on one GPU.")
  parser.add_argument("--out", type=Path, help="folder for figures.json")
  parser.add_argument("--tiny", action="store_true", help="toy sizes, for a CPU")
  parser.add_argument("--only", nargs="*", default=[""], help="prefixes of the sections' names")
  parser.add_argument("--limit", type=float, default=600.0, help="time limit of a section, seconds")
  parser.add_argument("--run", choices=SECTIONS, help=argparse.SUPPRESS)
  parser.add_argument("--attention", default="xla", help=argparse.SUPPRESS)
  options = parser.parse_args(arguments)
  if options.run:
    print(json.dumps(SECTIONS[options.run](options.tiny, options.attention)))
    return {}
  if options.out is None:
    parser.error("--out is required")
  options.out.mkdir(parents=True, exist_ok=True)
  path = options.out / "figures.json"
  figures: dict[str, Figures] = json.loads(path.read_text()) if path.exists() else {}
  for name in SECTIONS:
    if name.startswith(tuple(options.only)):
      figures[name] = measure_section(name, options.tiny, options.limit)
      path.write_text(json.dumps(figures, indent=2) + "\n")
  print_table(figures)
  return figures


if __name__ == "__main__":
  main()
