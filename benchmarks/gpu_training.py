"""The training sections of `benchmarks.gpu`; its head explains them."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

import lora_jax as lj
from benchmarks.e2e_epoch import peft_inputs
from benchmarks.gpu_figures import (
  GPT2_MEDIUM,
  LLAMA_8B,
  TINY_GPT2,
  TINY_LLAMA,
  Figures,
  count_adapter_matrices,
  count_matmul_weights,
  gpt2_batch,
  jax_device,
  make_batch,
  nemo_flops,
  peak_gb,
  planned_bytes,
  random_params,
  step_figures,
  time_steps,
  training_flops,
)
from benchmarks.turns import ratio, take_turns, timed
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.models.llama.model import Llama, LlamaConfig
from lora_jax.models.parts.causal_lm import shapes_of
from lora_jax.training.concurrent import make_concurrent_step
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import make_mesh, place_batch
from lora_jax.training.step import make_train_step, start
from lora_jax.trees import leaves_with_path, matches, replace_leaves

Method = Callable[[Callable[..., Any], lj.LoraConfig], lj.Adaptation]

ALL_LINEAR = r".*/(attn/(query|key|value|out)|mlp/(gate|up|down))/kernel"
QUERY_VALUE = r".*/attn/(query|value)/kernel"


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
  tiny: bool,
  attention: str,
  rows: int,
  remat: str,
  adapt: Method = lj.lora,
  base: str = "bfloat16",
) -> Figures:
  """Returns the figures of a training step of Llama 3 8B by LoRA or another method.

  Args:
    base: storage of the adapted weights: bfloat16, int8 (one scale per output) or fp8
      (float8_e4m3fn). Matmuls are bfloat16 in all three.
  """
  shape = TINY_LLAMA if tiny else LLAMA_8B
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
  model = Llama(config)
  batch = make_batch(config.vocab_size, rows, length)
  params = store(random_params(model), base)
  figures = measure_lora(model, params, batch, rank, ALL_LINEAR, chunk, 3 if tiny else 10, adapt)
  return figures | {"attention": attention, "remat": remat, "base": base}


def store(params: PyTree, base: str) -> PyTree:
  """Returns params whose adapted weights are stored in another format."""
  if base == "bfloat16":
    return params
  if base == "int8":
    return lj.quantize(params, "int8", ALL_LINEAR)

  adapted = {path: leaf for path, leaf in leaves_with_path(params) if matches(ALL_LINEAR, path)}
  return replace_leaves(
    params, {path: leaf.astype(jnp.float8_e4m3fn) for path, leaf in adapted.items()}
  )


def measure_gpt2(tiny: bool, attention: str, packed: bool = False) -> Figures:
  """Returns the figures of a LoRA step of GPT-2 medium, with all logits in memory at once."""
  shape = TINY_GPT2 if tiny else GPT2_MEDIUM
  config = GPT2Config(**shape, dtype="bfloat16", param_dtype="float32", attention=attention)
  model, batch = GPT2(config), gpt2_batch(tiny, packed)
  repeats = 3 if tiny else 20
  figures = measure_lora(model, random_params(model), batch, 4, QUERY_VALUE, None, repeats)
  return figures | {"attention": attention}


def measure_lora(
  model: Llama | GPT2,
  params: PyTree,
  batch: Mapping[str, Any],
  rank: int,
  target: str,
  chunk: int | None,
  repeats: int,
  adapt: Method = lj.lora,
) -> Figures:
  """Returns the figures of one training step: forward, backward, AdamW.

  Args:
    model: a language model.
    params: its weights, quantized or not.
    batch: a batch of tokens.
    rank: rank of the adapter; alpha is twice the rank.
    target: pattern of the weights to adapt.
    chunk: number of a row's targets for which logits are in memory at once; None is all.
    repeats: number of timed steps.
    adapt: LoRA or a variant of it.
  """
  mesh = make_mesh()
  inputs = place_batch(mesh, batch)
  loss = adapt(language_model_loss(model, 0.0, chunk), lj.LoraConfig(rank, 2.0 * rank, target))
  trainable = jax.jit(loss.init)(jax.random.key(1), params, inputs)
  state, frozen, optimizer = start(params, trainable, optax.adamw(1e-4), jax.random.key(2), mesh)
  adapter = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state.part)
  step: Any = make_train_step(loss, optimizer, state)
  compile_start = time.perf_counter()
  compiled = step.lower(state, frozen, inputs).compile()
  compile_s = time.perf_counter() - compile_start
  seconds = time_steps(lambda state: compiled(state, frozen, inputs)[0], state, repeats)
  rows, length = batch["tokens"].shape
  config, shapes = model.config, shapes_of(model)
  weights, matrices = count_matmul_weights(config, shapes), count_adapter_matrices(adapter)
  layers, width = config.num_layers, config.embed_dim
  figures = step_figures(seconds, batch, training_flops(weights, matrices, layers, width, length))
  nemo = nemo_flops(weights, layers, width, length)
  return {
    **jax_device(),
    "rank": rank,
    "base_parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
    "base_gb": sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e9,
    "adapter_parameters": sum(leaf.size for leaf in jax.tree.leaves(adapter)),
    "adapter_dtype": str(jax.tree.leaves(adapter)[0].dtype),
    "compile_s": compile_s,
    "peak_gb": peak_gb(),
    "planned_gb": planned_bytes(compiled) / 1e9,
    **figures,
    "nemo_flops_per_token": nemo,
    "nemo_tflops": rows * length * nemo / figures["step_s"] / 1e12,
  }


def measure_concurrent(tiny: bool, attention: str, length: int) -> Figures:
  """Returns the figures of 16 runs in one step, against one after another.

  Each run has its own batch, adapter, optimizer state, key and learning rate. The ordinary step
  reads the learning rate from the optimizer's state, so that all runs share its program. Layers
  are recomputed in the backward pass in both ways, so that all runs fit into memory.
  """
  runs, rows, length, chunk = (3, 2, 16, 8) if tiny else (16, 8, length, 64)
  shape = TINY_GPT2 if tiny else GPT2_MEDIUM
  config = GPT2Config(
    **shape, dtype="bfloat16", scan_layers=True, remat="nothing_saveable", attention=attention
  )
  model, mesh = GPT2(config), make_mesh()
  params = random_params(model)
  loss = lj.lora(language_model_loss(model, 0.0, chunk), lj.LoraConfig(4, 8.0, QUERY_VALUE))
  batches = [
    place_batch(mesh, make_batch(config.vocab_size, rows, length, seed)) for seed in range(runs)
  ]
  rates = [1e-4 * (run + 1) for run in range(runs)]
  adamw, init = optax.inject_hyperparams(optax.adamw), jax.jit(loss.init)

  def started(run: int) -> Any:
    trainable = init(jax.random.key(run), params, batches[run])
    return start(params, trainable, adamw(learning_rate=rates[run]), jax.random.key(run), mesh)

  states, frozens, optimizers = map(list, zip(*map(started, range(runs)), strict=True))
  together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
  frozen = frozens[0]  # of plain LoRA: the base model, the same for all runs
  settings = {"learning_rate": jnp.asarray(rates)}
  step = make_train_step(loss, optimizers[0], states[0])
  joint = make_concurrent_step(lambda _: loss, lambda settings: adamw(**settings), states[0])
  losses: dict[str, Any] = {}

  def run_alone() -> float:
    def all_runs() -> list[Any]:
      return [step(state, frozen, batch) for state, batch in zip(states, batches, strict=True)]

    seconds, results = timed(all_runs)
    states[:] = [state for state, _ in results]
    losses["alone"] = np.asarray([metrics.loss for _, metrics in results])
    return seconds

  def run_together() -> float:
    nonlocal together
    seconds, (together, metrics) = timed(
      joint, together, frozen["base"], frozen["adapter"], batches, settings
    )
    losses["together"] = np.asarray(metrics.loss)
    return seconds

  ways = {"alone": run_alone, "together": run_together}
  take_turns(ways, 2)  # compiles; the second loss is that of an updated adapter
  difference = float(np.abs(losses["alone"] / losses["together"] - 1).max())
  times = take_turns(ways, 3 if tiny else 10)
  speed = ratio(times["alone"], times["together"])
  median = statistics.median(times["together"])
  return {
    **jax_device(),
    "runs": runs,
    "rows": rows,
    "length": length,
    "attention": attention,
    "step_s": median,
    "alone_s": statistics.median(times["alone"]),
    "tokens_per_s": runs * rows * length / median,
    "times_alone": speed.median,
    "loss_difference": difference,
    "peak_gb": peak_gb(),
    "note": f"{runs} runs: {speed} times one after another",
  }


def measure_peft(tiny: bool, packed: bool = False) -> Figures:
  """Returns the figures of PEFT's LoRA step of GPT-2 medium, compiled and eager.

  Packed rows have a block-diagonal causal mask; all logits are computed.
  """
  import peft  # pyright: ignore[reportMissingImports]
  import torch  # pyright: ignore[reportMissingImports]
  import transformers  # pyright: ignore[reportMissingImports]

  device = "cuda" if torch.cuda.is_available() else "cpu"
  shape = TINY_GPT2 if tiny else GPT2_MEDIUM
  batch = gpt2_batch(tiny, packed)
  length = batch["tokens"].shape[1]
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
  inputs = {
    name: torch.from_numpy(array).to(device)
    for name, array in peft_inputs(batch, packed).items()
    if packed or name != "attention_mask"  # of full rows: it hides nothing
  }

  def wait() -> None:
    if device == "cuda":
      torch.cuda.synchronize()

  def time_torch(module: Any, count: int) -> list[float]:
    seconds = []
    for _ in range(count):
      step_start = time.perf_counter()
      with torch.autocast(device, torch.bfloat16):
        loss = module(**inputs).loss
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
    **step_figures(compiled, batch, flops),
  }
