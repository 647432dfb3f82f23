"""Makes tests/golden/storage: adapters and an interrupted run as commit 306f88d wrote them.

    cd /tmp
    PYTHONPATH=/path/to/checkout/of/306f88d python /path/to/tests/make_storage_golden.py

Users have folders of that version, so it was run with that commit and uses only its API; with
later code it stops. `tests/training/test_golden_storage.py` reads the folders with today's code.

    adapter/                 of unrolled layers, with fully trained biases and a head
    stacked/                 of layers under `lax.scan`, two of three adapted
    run/, run_full/          the checkpoints of `fit` after 6 of 12 steps: LoRA; full fine-tuning
    *.safetensors            outputs of `apply`; the adapter and losses of the uninterrupted run
"""

import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

FOLDER = Path(__file__).parent / "golden" / "storage"
WIDTH, HEADS, VOCABULARY, LAYERS, ROWS = 8, 2, 12, 3, 8
STEPS, INTERRUPTED_AT = 12, 6
ADAPTER: dict[str, Any] = {
  "rank": 2,
  "alpha": 4.0,
  "target": [r"embed/embedding", r"layer_\d/(query|out)/kernel"],
  "extra": [r".*/bias", r"head/kernel"],
}
STACKED: dict[str, Any] = {
  "rank": 2,
  "alpha": 4.0,
  "target": r"blocks/(up|down)/kernel",
  "stacked_layers": (0, 2),
}
RUN: dict[str, Any] = {
  "rank": 2,
  "alpha": 4.0,
  "target": r"(up|down)/kernel",
  "extra": r"up/bias",
  "dropout": 0.2,
}


def draw_tree(shapes: Any, seed: int) -> Any:
  """Returns a tree of random arrays; `shapes` is a tree of tuples or of arrays."""
  draw = np.random.default_rng(seed)

  def array(leaf: Any) -> jax.Array:
    shape = leaf if isinstance(leaf, tuple) else leaf.shape
    return jnp.asarray(0.5 * draw.standard_normal(shape), jnp.float32)

  return jax.tree.map(array, shapes, is_leaf=lambda leaf: type(leaf) is tuple)


# ---- two models ------------------------------------------------------------------------


def unrolled_params() -> Any:
  layer = {
    "query": {"kernel": (WIDTH, HEADS, WIDTH // HEADS), "bias": (HEADS, WIDTH // HEADS)},
    "out": {"kernel": (WIDTH, WIDTH)},
  }
  shapes = {"embed": {"embedding": (VOCABULARY, WIDTH)}, "head": {"kernel": (WIDTH, 3)}}
  return draw_tree(shapes | {"layer_0": layer, "layer_1": layer}, 0)


def unrolled(params: Any, tokens: jax.Array) -> jax.Array:
  """A lookup, two layers with a kernel of three axes and a square one, and a head."""
  x = jnp.take(params["embed"]["embedding"], tokens, axis=0)
  for name in ("layer_0", "layer_1"):
    query = params[name]["query"]
    heads = jnp.einsum("bd,dhk->bhk", x, query["kernel"]) + query["bias"][None]
    x = x + jnp.tanh(heads).reshape(x.shape) @ params[name]["out"]["kernel"]
  return x @ params["head"]["kernel"]


def stacked_params() -> Any:
  kernels = {"up": (LAYERS, WIDTH, 2 * WIDTH), "down": (LAYERS, 2 * WIDTH, WIDTH)}
  return draw_tree({"blocks": {name: {"kernel": shape} for name, shape in kernels.items()}}, 1)


def scanned(params: Any, x: jax.Array) -> jax.Array:
  """Layers under `lax.scan`."""

  def block(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
    return x + jnp.tanh(x @ layer["up"]["kernel"]) @ layer["down"]["kernel"], None

  return jax.lax.scan(block, x, params["blocks"])[0]


def tokens() -> jax.Array:
  return jnp.arange(5) * 5 % VOCABULARY


def inputs() -> jax.Array:
  return draw_tree((4, WIDTH), 2)


# ---- a run -----------------------------------------------------------------------------


def run_params() -> Any:
  shapes = {"up": {"kernel": (WIDTH, 10), "bias": (10,)}, "down": {"kernel": (10, WIDTH)}}
  return draw_tree(shapes, 3)


def squared_errors(params: Any, batch: Any, key: Any) -> tuple[jax.Array, jax.Array]:
  """Returns the sum of squared errors and of weights; with a key, inputs are dropped out."""
  x = batch["x"]
  if key is not None:
    x = jnp.where(jax.random.bernoulli(key, 0.8, x.shape), x / 0.8, 0.0)
  hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
  errors = jnp.sum((hidden @ params["down"]["kernel"] - batch["y"]) ** 2, axis=1)
  return jnp.sum(errors * batch["weights"]), jnp.sum(batch["weights"])


def run_optimizer() -> optax.GradientTransformation:
  schedule = optax.linear_schedule(0.05, 0.0, STEPS)
  return optax.chain(optax.clip_by_global_norm(5.0), optax.adamw(schedule, weight_decay=0.1))


class Batches:
  """An endless iterator of batches, which can interrupt the run before a step."""

  def __init__(self, interrupted_at: int | None = None):
    self._count, self._interrupted_at = 0, interrupted_at

  def __next__(self) -> dict[str, np.ndarray]:
    if self._count == self._interrupted_at:
      raise KeyboardInterrupt
    self._count += 1
    return batch(self._count)

  def get_state(self) -> Any:
    return {"count": self._count}

  def set_state(self, state: Any) -> None:
    self._count = state["count"]


def batch(number: int) -> dict[str, np.ndarray]:
  draw = np.random.default_rng(100 + number)
  x = draw.standard_normal((ROWS, WIDTH)).astype("float32")
  return {
    "x": x,
    "y": np.tanh(x[:, ::-1]),
    "weights": draw.integers(1, 4, ROWS).astype("float32"),
    "segment_ids": np.ones((ROWS, 1), np.int32),
  }


def fit_run(workdir: Path, method: str, loss: Any, interrupted_at: int | None = None) -> Any:
  """Trains in `workdir`, from its last checkpoint if there is one.

  Args:
    workdir: of the run.
    method: "lora" or "full_finetuning".
    loss: `fn(params, batch) -> LossSum` with `squared_errors`, as the train step calls it.
    interrupted_at: the step after which the run stops.
  """
  import lora_jax as lj
  from lora_jax.training.loop import FitConfig, fit

  full = method == "full_finetuning"
  adapted = lj.full_finetuning(loss) if full else lj.lora(loss, lj.LoraConfig(**RUN))
  params = run_params()
  mesh = jax.sharding.Mesh(
    np.asarray(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor")
  )
  params = jax.device_put(params, jax.NamedSharding(mesh, P()))
  return fit(
    adapted,
    params,
    adapted.init(jax.random.key(4), params, batch(0)),
    run_optimizer(),
    Batches(interrupted_at),
    config=FitConfig(STEPS, INTERRUPTED_AT, INTERRUPTED_AT, 1),
    eval_loss=adapted,
    eval_batches=lambda: iter([batch(0)]),
    workdir=workdir,
    key=jax.random.key(5),
    mesh=mesh,
    progress=False,
  )


def losses(workdir: Path) -> np.ndarray:
  """Returns the loss of each step in a run's log."""
  from lora_jax.training.metrics_log import read_metrics

  log = read_metrics(workdir / "metrics.jsonl")
  return np.asarray([line["train/loss"] for line in log if "train/loss" in line])


# ---- making ----------------------------------------------------------------------------


def make_adapters() -> None:
  from safetensors.numpy import save_file

  import lora_jax as lj
  from lora_jax.training.checkpoint import save_adapter

  models = {
    "adapter": (unrolled, unrolled_params(), tokens(), ADAPTER),
    "stacked": (scanned, stacked_params(), inputs(), STACKED),
  }
  for seed, (name, (fn, params, x, config)) in enumerate(models.items(), 10):
    lora = lj.lora(fn, lj.LoraConfig(**config))
    trainable = draw_tree(lora.init(jax.random.key(0), params, x), seed)
    save_adapter(FOLDER / name, trainable)
    outputs = jax.jit(lora.apply)(params, trainable, x)
    save_file({"outputs": np.asarray(outputs)}, FOLDER / f"{name}.safetensors")


def make_runs() -> None:
  from safetensors.numpy import save_file

  from lora_jax.training.loss import LossSum
  from lora_jax.trees import leaves_with_path

  def loss(params: Any, batch: Any) -> LossSum:
    return LossSum(*squared_errors(params, batch, batch.get("dropout_key")))

  for name, method in {"run": "lora", "run_full": "full_finetuning"}.items():
    workdir = Path(mkdtemp())
    fitted = fit_run(workdir, method, loss)
    arrays = {path: np.asarray(leaf) for path, leaf in leaves_with_path(fitted.last)}
    save_file(arrays | {"losses": losses(workdir)}, FOLDER / f"{name}.safetensors")
    interrupted = Path(mkdtemp())
    try:
      fit_run(interrupted, method, loss, INTERRUPTED_AT)
    except KeyboardInterrupt:
      shutil.copytree(interrupted / "checkpoints", FOLDER / name / "checkpoints")
    else:
      raise RuntimeError("the run was not interrupted")


def main() -> None:
  import lora_jax

  if not Path(lora_jax.__file__).with_name("low_rank.py").exists():
    raise SystemExit(f"{lora_jax.__file__} is not of commit 306f88d; see this file's docstring")
  shutil.rmtree(FOLDER, ignore_errors=True)
  FOLDER.mkdir(parents=True)
  make_adapters()
  make_runs()


if __name__ == "__main__":
  main()
