"""Times a LoRA step of SmolLM2-135M on quantized base weights, against the float32 base.

    make smollm2
    python -m benchmarks.quantized_step
    python -m benchmarks.quantized_step --unrolled --only stored

LoRA of rank 16 on all linear layers and AdamW, 8 rows of 128 tokens of E2E's training examples, a
loss at every token. `stored` computes the float32 base's function: its file has these codes, and
the first losses must agree. The formats take turns; `x` is the median of the turns' ratios to
float32's time, `x_cpu` that of CPU time.

    base_mb     bytes of the frozen weights, MB
    temp_mb     memory that the compiled step allocates in addition to its arguments and results, MB
    compile_s   seconds of the first step, tracing and compilation included, beyond a later one
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import optax

import lora_jax as lj
from benchmarks import e2e_epoch
from benchmarks.smollm2 import TARGET, make_batches, timed
from lora_jax.data import text
from lora_jax.data.sets import e2e
from lora_jax.models.checkpoints.pretrained import find_pretrained
from lora_jax.models.text.tokenizer import end_of_text_id, load_tokenizer
from lora_jax.models.zoo import load_causal_lm
from lora_jax.training.allocator import keep_freed_memory
from lora_jax.training.loss import language_model_loss
from lora_jax.training.loss import mean as mean_loss

FORMATS = ("stored", "int8", "nf4", "bfloat16")
AGREEMENT = 1e-4  # of first losses, relative


class Step:
  """A compiled train step on one base, with its state."""

  def __init__(self, param_dtype: str, scan_layers: bool, batch: Any):
    model = load_causal_lm("smollm2", param_dtype=param_dtype, scan_layers=scan_layers)
    config = lj.LoraConfig(rank=e2e_epoch.RANK, alpha=e2e_epoch.ALPHA, target=TARGET)
    loss = lj.lora(language_model_loss(model.module), config)
    optimizer = optax.adamw(e2e_epoch.LEARNING_RATE)
    self.params = model.params
    self.trainable = loss.init(jax.random.key(0), self.params, batch)
    self.state = optimizer.init(self.trainable)

    def step(params: Any, trainable: Any, state: Any, batch: Any) -> Any:
      def mean(trainable: Any) -> jax.Array:
        return mean_loss(loss.apply(params, trainable, batch))

      value, gradients = jax.value_and_grad(mean)(trainable)
      updates, state = optimizer.update(gradients, state, trainable)
      return optax.apply_updates(trainable, updates), state, value

    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(1, 2)).lower(
      self.params, self.trainable, self.state, batch
    )
    self.run = lowered.compile()
    self.compile_seconds = time.perf_counter() - start

  def __call__(self, batch: Any) -> float:
    self.trainable, self.state, value = self.run(self.params, self.trainable, self.state, batch)
    return float(value)

  @property
  def base_mb(self) -> float:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params)) / 1e6

  @property
  def temp_mb(self) -> float:
    analysis = self.run.memory_analysis()
    assert analysis is not None, "compiled programs have one"
    return analysis.temp_size_in_bytes / 1e6


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description="SmolLM2: steps on quantized bases.")
  parser.add_argument("--only", nargs="+", choices=FORMATS, default=FORMATS)
  parser.add_argument("--unrolled", action="store_true", help="without scan over layers")
  parser.add_argument("--repeats", type=int, default=6, help="turns")
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
  options = parse(arguments)
  print(f"JAX {jax.__version__}, {jax.devices()[0].platform}, {vars(options)}")
  tokenizer = load_tokenizer(find_pretrained("smollm2"))
  records = random.Random(0).sample(e2e.read("train"), 400)
  examples = text.encode(tokenizer, records, end_of_text_id(tokenizer), 256)
  first, *turns = make_batches("full", examples, options.repeats)
  with jax.default_matmul_precision("highest"):
    steps = {name: Step(name, not options.unrolled, first) for name in ("float32", *options.only)}
    losses = {name: step(first) for name, step in steps.items()}
    if "stored" in steps and abs(losses["stored"] / losses["float32"] - 1) > AGREEMENT:
      raise ValueError(f"the first losses differ: {losses}")
    times = {name: [] for name in steps}
    for number, batch in enumerate(turns):
      for name in list(steps)[:: -1 if number % 2 else 1]:
        times[name].append(timed(lambda step=steps[name], batch=batch: step(batch))[0])
  print(f"{'':9}" + "".join(f"{head:>11}" for head in HEADS))
  for name, step in steps.items():
    wall = statistics.median(time for time, _ in times[name])
    x, x_cpu = (
      statistics.median(
        mine[i] / base[i] for mine, base in zip(times[name], times["float32"], strict=True)
      )
      for i in (0, 1)
    )
    print(
      f"{name:9}{step.compile_seconds:11.1f}{wall:11.2f}{x:11.2f}{x_cpu:11.2f}"
      f"{step.base_mb:11.1f}{step.temp_mb:11.1f}{losses[name]:11.5f}"
    )


HEADS = ("compile_s", "step_s", "x", "x_cpu", "base_mb", "temp_mb", "first_loss")

if __name__ == "__main__":
  keep_freed_memory()
  main()
