"""Compares `lora_jax.lora` with LoRA written into the model by hand.

    python -m benchmarks.transform
    python -m benchmarks.transform --target query,value     # the paper's
    python -m benchmarks.transform --batch 8 --length 1024 --dtype bfloat16  # a GPU
    python -m benchmarks.transform --against /tmp/before  # another commit's LoRA

The model has GPT-2's shape (learned positions, LayerNorm before each part, a tied head), once
with a Python loop over its layers ("unrolled") and once with `jax.lax.scan` over stacked layers.
The whole train step (loss, gradients, AdamW) is measured in four ways:

    hand      x W + scaling * (x A) B, written into the model
    lora_jax  `lora_jax.lora` of the plain model
    merged    the plain model on `merge(params, trainable)`, merged in every step
    full      full fine-tuning

It prints one table; each column is followed by its ratio to `hand` ("x"):

    trace_s    seconds to trace the step to a jaxpr, with empty JAX caches
    retrace_s  the same for a fresh copy of the step, with JAX's own functions cached
    lower_s    seconds from the jaxpr to XLA's input
    gflop      operations in the matmuls of the compiled step, each iteration of a loop counted
    temp_mb    memory that the compiled step allocates in addition to its arguments and results
    step_ms    milliseconds of one step

Then it prints the operations counted in three ways, and which goals are met.

The ways take turns, and a ratio of times is the median of the turns' ratios, so that other work on
the machine slows all of them; the quartiles are of the ratios of step times. `merged` and `full`,
whose ratios are far from 1, take part in every fifth turn of the steps. Tracing runs in one thread
and is measured in CPU seconds of that thread, without garbage collection. Before any step is timed,
the losses and gradients of the compiled steps of `hand` and `lora_jax` are compared.

`--against CHECKOUT` compares this checkout's `lora_jax.lora` with that of another checkout, for
example one made by `git worktree add /tmp/before COMMIT`. Each runs this file in a separate process
that imports `lora_jax` from its checkout; they take turns (other, this, other, this, ...), so that
other work on the machine slows both. The models are "mlp" (unrolled, without attention),
"unrolled", and "remat" (scanned, each layer recomputed in the backward pass). The table has this
checkout's columns, each with its ratio to the other checkout ("x"). For step_ms it is the median of
the turns' ratios, with their quartiles; for trace_s it is the ratio of medians. The losses of all
timed steps are compared too. A change that should cost nothing has these goals, which are not
asserted:

    gflop      x is 1.00
    temp_mb    x is within 2 % of 1
    step_ms    x is at most 1.02, or its quartiles include 1
    trace_s    x is within 10 % of 1

`--against .`, this checkout against itself, shows how much of a ratio is noise.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

import lora_jax
from experiments.harness.flops import compiled_flops

ALPHA = 32.0
HEAD_WIDTH = 64
LAYERS = {
  "query": "attn/query",
  "key": "attn/key",
  "value": "attn/value",
  "attn_out": "attn/out",
  "mlp_in": "mlp/in",
  "mlp_out": "mlp/out",
}
HERE = Path(__file__).resolve().parents[1]
FORMS = ("mlp", "unrolled", "scanned", "remat")
WAYS = ("hand", "lora_jax", "merged", "full")
COLUMNS = {"trace_s": 3, "retrace_s": 3, "lower_s": 3, "gflop": 3, "temp_mb": 1, "step_ms": 1}
GOALS = {"trace_s": 2.5, "retrace_s": 2.5, "gflop": 1.01, "temp_mb": 1.05, "step_ms": 1.05}


# ---- the model, with optional hand-written LoRA ----------------------------------------


def linear(layer: PyTree, x: jax.Array, adapter: PyTree, scaling: float) -> jax.Array:
  """Returns `x W + b`, plus the low-rank term of the paper's sec. 4.1 with an adapter."""
  out = x @ layer["kernel"]
  if adapter:
    a, b = (adapter["kernel"][name].astype(x.dtype) for name in ("lora_a", "lora_b"))
    out = out + scaling * ((x @ a) @ b)
  return out + layer["bias"]


def layer_norm(layer: PyTree, x: jax.Array) -> jax.Array:
  wide = x.astype(jnp.float32)
  centred = wide - wide.mean(-1, keepdims=True)
  normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
  return normal.astype(x.dtype) * layer["scale"] + layer["bias"]


def attention(layer: PyTree, x: jax.Array, adapter: PyTree, scaling: float) -> jax.Array:
  batch, length, width = x.shape
  heads = (batch, length, width // HEAD_WIDTH, HEAD_WIDTH)
  query, key, value = (
    linear(layer[name], x, adapter.get(name), scaling).reshape(heads)
    for name in ("query", "key", "value")
  )
  scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(HEAD_WIDTH)
  seen = jnp.tril(jnp.ones((length, length), bool))
  scores = jnp.where(seen, scores.astype(jnp.float32), -1e9)
  weights = jax.nn.softmax(scores).astype(x.dtype)
  mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
  return linear(layer["out"], mixed, adapter.get("out"), scaling)


def block(layer: PyTree, x: jax.Array, adapter: PyTree, scaling: float) -> jax.Array:
  attn, mlp = adapter.get("attn", {}), adapter.get("mlp", {})
  if "attn" in layer:
    x = x + attention(layer["attn"], layer_norm(layer["ln_1"], x), attn, scaling)
  hidden = linear(layer["mlp"]["in"], layer_norm(layer["ln_2"], x), mlp.get("in"), scaling)
  return x + linear(layer["mlp"]["out"], jax.nn.gelu(hidden), mlp.get("out"), scaling)


def gpt(
  params: PyTree,
  ids: jax.Array,
  adapters: PyTree | None = None,
  scaling: float = 0.0,
  *,
  remat: bool = False,
) -> jax.Array:
  """Returns the logits; the layers are either `h_0`, `h_1`, ... or stacked under `h`."""
  layer_adapters = adapters or {}
  x = params["wte"]["embedding"][ids] + params["wpe"]["embedding"][: ids.shape[1]]

  def body(x, layer_and_adapter):
    return block(layer_and_adapter[0], x, layer_and_adapter[1], scaling), None

  if "h" in params:
    scanned = jax.checkpoint(body) if remat else body
    x, _ = jax.lax.scan(scanned, x, (params["h"], layer_adapters.get("h", {})))
  for i in range(sum(name.startswith("h_") for name in params)):
    x, _ = body(x, (params[f"h_{i}"], layer_adapters.get(f"h_{i}", {})))
  return layer_norm(params["ln_f"], x) @ params["wte"]["embedding"].T


def init_layer(key: jax.Array, width: int, dtype: Any) -> PyTree:
  """Returns one layer's parameters."""

  def kernel(number, rows, columns):
    drawn = 0.02 * jax.random.normal(jax.random.fold_in(key, number), (rows, columns))
    return {"kernel": drawn.astype(dtype), "bias": jnp.zeros(columns, dtype)}

  attn = {name: kernel(i, width, width) for i, name in enumerate(("query", "key", "value", "out"))}
  mlp = {"in": kernel(4, width, 4 * width), "out": kernel(5, 4 * width, width)}
  return {"attn": attn, "mlp": mlp, "ln_1": _norm(width, dtype), "ln_2": _norm(width, dtype)}


def init_params(options: argparse.Namespace, form: str) -> PyTree:
  """Returns the model's parameters in one of the forms, with equal values in all."""
  width, dtype = options.width, jnp.dtype(options.dtype)

  def init(key):
    keys = jax.random.split(key, options.layers + 2)
    sizes = {"wte": options.vocabulary, "wpe": options.length}
    tables = {
      name: {"embedding": (0.02 * jax.random.normal(k, (size, width))).astype(dtype)}
      for k, (name, size) in zip(keys, sizes.items(), strict=False)
    }
    layers = jax.vmap(lambda k: init_layer(k, width, dtype))(keys[2:])
    if form == "mlp":
      layers = {name: layers[name] for name in ("ln_2", "mlp")}
    if form in ("scanned", "remat"):
      stacks = {"h": layers}
    else:
      stacks = {f"h_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(options.layers)}
    return {**tables, **stacks, "ln_f": _norm(width, dtype)}

  return jax.jit(init)(_key(0))


def _key(seed: int) -> jax.Array:
  return jax.random.key(seed, impl="rbg")  # many times faster than the default on CPUs


def _norm(width: int, dtype: Any) -> PyTree:
  return {"scale": jnp.ones(width, dtype), "bias": jnp.zeros(width, dtype)}


# ---- the four ways ---------------------------------------------------------------------


def adapt(options: argparse.Namespace, model: Callable[..., jax.Array]) -> lora_jax.Adaptation:
  """Returns LoRA of a fresh copy of the plain model, not yet traced."""
  paths = "|".join(LAYERS[name] for name in options.target)
  config = lora_jax.LoraConfig(rank=options.rank, alpha=ALPHA, target=rf".*/({paths})/kernel")
  return lora_jax.lora(lambda params, ids: model(params, ids), config)


def make_apply(way: str, options: argparse.Namespace, form: str) -> Callable[..., jax.Array]:
  """Returns a fresh `apply(trainable, params, ids)` for one way."""
  scaling = ALPHA / options.rank
  model = functools.partial(gpt, remat=form == "remat")
  adapted = adapt(options, model)
  full = lora_jax.full_finetuning(lambda params, ids: model(params, ids))
  return {
    "hand": lambda trainable, params, ids: model(params, ids, trainable, scaling),
    "lora_jax": lambda trainable, params, ids: adapted.apply(params, trainable, ids),
    "merged": lambda trainable, params, ids: model(adapted.merge(params, trainable), ids),
    "full": lambda trainable, params, ids: full.apply(params, trainable, ids),
  }[way]


def make_step(way: str, options: argparse.Namespace, form: str) -> Any:
  """Returns the jitted train step of one way; each call returns a new function."""
  apply, optimizer = make_apply(way, options, form), optax.adamw(1e-4)

  def loss_fn(trainable, params, ids, labels):
    logits = apply(trainable, params, ids).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  def step(trainable, state, params, ids, labels):
    loss, grads = jax.value_and_grad(loss_fn)(trainable, params, ids, labels)
    updates, state = optimizer.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state, loss

  return jax.jit(step, donate_argnums=(0, 1))


def make_trainable(way: str, options: argparse.Namespace, params: PyTree) -> PyTree:
  """Returns a trainable tree with new arrays; B is random too, so that A has gradients."""
  if way == "full":
    return jax.tree.map(jnp.copy, params)
  ids = jax.ShapeDtypeStruct((options.batch, options.length), jnp.int32)
  trainable = adapt(options, gpt).init(_key(1), params, ids)
  leaves, structure = jax.tree.flatten(trainable)
  keys = jax.random.split(_key(2), len(leaves))
  leaves = [0.02 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
  trainable = jax.tree.unflatten(structure, leaves)
  return by_hand(trainable) if way == "hand" else trainable


def by_hand(trainable: PyTree) -> PyTree:
  """Returns the trainable tree with plain dicts as its nodes."""
  return jax.tree.map(
    lambda weight: {"lora_a": weight.lora_a, "lora_b": weight.lora_b},
    trainable,
    is_leaf=lambda node: isinstance(node, lora_jax.LoraWeight),
  )


# ---- counting operations ---------------------------------------------------------------


def jaxpr_flops(jaxpr: Any) -> float:
  """Returns the operations in the matmuls of a jaxpr; a scan's body counts for each step."""
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  total = 0.0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      total += 2 * equation.outvars[0].aval.size * math.prod(shape[d] for d in contracted)
    times = equation.params["length"] if equation.primitive.name == "scan" else 1
    for value in equation.params.values():
      inner = value if isinstance(value, tuple | list) else [value]
      total += times * sum(jaxpr_flops(item) for item in inner if hasattr(item, "eqns"))
  return total


# ---- measurements ----------------------------------------------------------------------


@dataclasses.dataclass
class Measured:
  """The measurements of one way in one form of the model.

  Attributes:
    compiled: the compiled step.
    counts: the table's columns that are not times.
    jaxpr_gflop: operations in the matmuls of the jaxpr.
    xla_gflop: XLA's count: with elementwise operations, but a loop's body only once.
    turns: the table's other columns: the value for each turn that it took part in.
  """

  compiled: Any
  counts: dict[str, float]
  jaxpr_gflop: float
  xla_gflop: float
  turns: dict[str, dict[int, float]]

  def value(self, column: str) -> float:
    if column in self.counts:
      return self.counts[column]
    return statistics.median(self.turns[column].values())

  def ratios(self, hand: "Measured", column: str) -> list[float]:
    """Returns the quartiles over the turns of the ratio to `hand`."""
    if column in self.counts:
      return [self.counts[column] / hand.counts[column]] * 3
    ratios = [value / hand.turns[column][turn] for turn, value in self.turns[column].items()]
    return statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3


def timed_traces(way: str, options: argparse.Namespace, form: str, shapes: Sequence[PyTree]) -> Any:
  """Returns the seconds by column, the traced step and the lowered one."""
  jax.clear_caches()
  seconds = {}

  def timed(column, fn, *args):
    gc.collect()
    gc.disable()
    start = time.thread_time()
    result = fn(*args)
    seconds[column] = time.thread_time() - start
    gc.enable()
    return result

  timed("trace_s", make_step(way, options, form).trace, *shapes)
  traced = timed("retrace_s", make_step(way, options, form).trace, *shapes)
  lowered = timed("lower_s", traced.lower)
  return seconds, traced, lowered


def compile_ways(
  options: argparse.Namespace, form: str, shapes: Mapping[str, Any]
) -> dict[str, Measured]:
  """Traces each way several times, in turns, and compiles it once."""
  timed_traces("hand", options, form, shapes["hand"])  # warm-up: JAX imports modules lazily
  turns: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
  last, measured = {}, {}
  for _ in range(options.traces):
    for way in WAYS:
      seconds, *last[way] = timed_traces(way, options, form, shapes[way])
      turns[way].append(seconds)
  for way in WAYS:
    traced, lowered = last.pop(way)
    compiled = lowered.compile()
    measured[way] = Measured(
      compiled,
      counts=compiled_counts(compiled),
      jaxpr_gflop=jaxpr_flops(traced.jaxpr) / 1e9,
      xla_gflop=compiled.cost_analysis()["flops"] / 1e9,
      turns={c: {i: turn[c] for i, turn in enumerate(turns[way])} for c in turns[way][0]},
    )
  return measured


def compiled_counts(compiled: Any) -> dict[str, float]:
  """Returns the table's columns that describe a compiled step."""
  gflop = compiled_flops(compiled.as_text()) / 1e9
  return {"gflop": gflop, "temp_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6}


def first_steps(
  options: argparse.Namespace, measured: Mapping[str, Measured], args: Sequence[Any]
) -> dict[str, Any]:
  """Runs each compiled step once and checks the results of `lora_jax` against `hand`.

  Returns:
    Each way's trainable tree and optimizer state.
  Raises:
    ValueError: if a loss or a gradient differs.
  """
  states, results = {}, {}
  for way in WAYS:
    trainable = jax.jit(lambda p, way=way: make_trainable(way, options, p))(args[0])
    state = jax.jit(optax.adamw(1e-4).init)(trainable)
    trainable, state, loss = measured[way].compiled(trainable, state, *args)
    states[way] = trainable, state
    if way in ("hand", "lora_jax"):  # Adam's first moment is now a tenth of the gradient
      moments = state[0].mu if way == "hand" else by_hand(state[0].mu)
      results[way] = jax.device_get({"loss": loss, "gradients": moments})
  worst = max(jax.tree.leaves(jax.tree.map(_difference, results["hand"], results["lora_jax"])))
  loss = float(results["hand"]["loss"])
  print(f"  loss {loss:.4f}; loss and gradients agree to {worst:.1e}", flush=True)
  if not worst <= loss_tolerance(options):
    raise ValueError(f"lora_jax differs from the hand-written LoRA by {worst:.1e}, relative")
  return states


def loss_tolerance(options: argparse.Namespace) -> float:
  exact = options.dtype == "float32" and options.precision == "highest"
  return 1e-4 if exact else 5e-2


def _difference(expected: Any, got: Any) -> float:
  largest = abs(expected).max()
  if not largest > 0:
    raise ValueError("a loss or gradient is zero or NaN, so that the check says nothing")
  return float(abs(expected - got).max() / largest)


def time_steps(
  options: argparse.Namespace,
  measured: Mapping[str, Measured],
  states: dict[str, Any],
  args: Sequence[Any],
) -> None:
  """Times the steps in turns, in a random order, so that no way always follows the same one."""
  for turn in range(options.repeats):
    ways = WAYS if turn % 5 == 0 else ("hand", "lora_jax")
    for way in random.Random(turn).sample(ways, len(ways)):
      trainable, state = states.pop(way)
      step_ms, trainable, state, _ = timed_step(measured[way].compiled, trainable, state, args)
      measured[way].turns.setdefault("step_ms", {})[turn] = step_ms
      states[way] = trainable, state


def timed_step(compiled: Any, trainable: PyTree, state: PyTree, args: Sequence[Any]) -> Any:
  """Returns one step's milliseconds, then the trainable tree, optimizer state and loss."""
  jax.block_until_ready((trainable, state))
  start = time.perf_counter()
  results = jax.block_until_ready(compiled(trainable, state, *args))
  return 1e3 * (time.perf_counter() - start), *results


def init_arguments(options: argparse.Namespace, form: str) -> tuple[PyTree, jax.Array, jax.Array]:
  """Returns the step's constant arguments: parameters, token ids and labels."""
  sizes = (2, options.batch, options.length)
  ids, labels = jax.random.randint(_key(3), sizes, 0, options.vocabulary)
  return init_params(options, form), ids, labels


def step_shapes(way: str, options: argparse.Namespace, args: Sequence[Any]) -> Sequence[PyTree]:
  """Returns the shapes of all the step's arguments, the trainable tree first."""
  trainable = jax.eval_shape(lambda p: make_trainable(way, options, p), args[0])
  state = jax.eval_shape(optax.adamw(1e-4).init, trainable)
  return (trainable, state, *jax.eval_shape(lambda *a: a, *args))


def measure(options: argparse.Namespace, form: str) -> dict[str, Measured]:
  """Returns the measurements of the four ways for one form of the model."""
  print(f"{form}: tracing and compiling", flush=True)
  args = init_arguments(options, form)
  shapes = {way: step_shapes(way, options, args) for way in WAYS}
  measured = compile_ways(options, form, shapes)
  states = first_steps(options, measured, args)
  time_steps(options, measured, states, args)
  return measured


# ---- two checkouts ---------------------------------------------------------------------


def measurements(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
  """Yields a worker's answers in the order of `compare`, each computed on request.

  It also runs with the `lora_jax` of other commits, so it uses only the public API.
  """
  jax.config.update("jax_default_matmul_precision", options.precision)
  device = jax.devices()[0]
  yield {"package": lora_jax.__file__, "device": f"{device.device_kind} ({device.platform})"}
  for form in options.forms:
    args = init_arguments(options, form)
    shapes = step_shapes("lora_jax", options, args)
    timed_traces("lora_jax", options, form, shapes)  # warm-up: JAX imports modules lazily
    yield {}
    lowered: Any = None
    for _ in range(options.traces):
      seconds, _, lowered = timed_traces("lora_jax", options, form, shapes)
      yield seconds
    compiled = lowered.compile()
    trainable = jax.jit(lambda p: make_trainable("lora_jax", options, p))(args[0])
    state = jax.jit(optax.adamw(1e-4).init)(trainable)
    _, trainable, state, _ = timed_step(compiled, trainable, state, args)
    yield compiled_counts(compiled)
    for _ in range(options.repeats):
      step_ms, trainable, state, loss = timed_step(compiled, trainable, state, args)
      yield {"step_ms": step_ms, "loss": float(loss)}


def work(options: argparse.Namespace) -> None:
  """Answers each line of stdin with a line of JSON, until stdin ends."""
  answers = measurements(options)
  for _ in sys.stdin:
    print(json.dumps(next(answers)), flush=True)


def start_worker(package: Path, options: argparse.Namespace) -> subprocess.Popen[str]:
  """Starts this file in a process that imports `lora_jax` from a folder, all else from here."""
  choices = json.dumps({**vars(options), "against": None})
  environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45", **os.environ}  # two share a GPU
  return subprocess.Popen(
    [sys.executable, "-P", __file__, "--worker", choices],  # -P: without this file's folder
    env=environment | {"PYTHONPATH": f"{package}{os.pathsep}{HERE}"},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


def ask(worker: subprocess.Popen[str], word: str) -> dict[str, Any]:
  """Returns a worker's next answer; `word` names the request in errors."""
  assert worker.stdin
  assert worker.stdout
  with contextlib.suppress(BrokenPipeError):
    print(word, file=worker.stdin, flush=True)
  line = worker.stdout.readline()
  if not line:
    raise RuntimeError(f"a worker ended at {word!r}; its own error is above")
  return json.loads(line)


@dataclasses.dataclass
class Pair:
  """The answers for one form; each turn is [other checkout, this checkout]."""

  traces: list[list[dict[str, float]]]
  compiled: list[list[dict[str, float]]]
  steps: list[list[dict[str, float]]]

  def column(self, name: str) -> tuple[float, float]:
    """Returns this checkout's median and its ratio to the other checkout's median."""
    turns = [t for t in (*self.traces, *self.compiled, *self.steps) if name in t[0]]
    before, after = (statistics.median(turn[side][name] for turn in turns) for side in (0, 1))
    return after, after / before if before else math.nan

  def step_quartiles(self) -> list[float]:
    """Returns the quartiles over the turns of the ratio of step times."""
    ratios = [after["step_ms"] / before["step_ms"] for before, after in self.steps]
    return statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3

  def loss_difference(self) -> float:
    """Returns the largest relative difference of the losses in a turn."""
    return max(abs(after["loss"] / before["loss"] - 1) for before, after in self.steps)


def compare(options: argparse.Namespace) -> dict[str, Pair]:
  """Returns the measurements of both checkouts for each form, taken in turns.

  Raises:
    RuntimeError: if a worker fails or did not import its checkout's package.
    ValueError: if the checkouts' losses differ.
  """
  checkouts = (options.against.resolve(), HERE)
  results = {}
  with contextlib.ExitStack() as stack:
    workers = []
    for checkout in checkouts:
      folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
      (folder / "lora_jax").symlink_to(checkout / "lora_jax")
      workers.append(stack.enter_context(start_worker(folder, options)))

    def take(word: str, turns: int = 1) -> list[list[dict[str, Any]]]:
      return [[ask(worker, word) for worker in workers] for _ in range(turns)]

    for checkout, answer in zip(checkouts, take("import")[0], strict=True):
      print(f"{checkout} at {commit(checkout)}, {answer['device']}", flush=True)
      if not Path(answer["package"]).resolve().is_relative_to(checkout):
        raise RuntimeError(f"expected lora_jax of {checkout}, got {answer['package']}")
    for form in options.forms:
      take(f"warm up {form}")
      traces, compiled = take("trace", options.traces), take("compile")
      pair = results[form] = Pair(traces, compiled, take("step", options.repeats))
      difference = pair.loss_difference()
      print(f"{form}: losses agree to {difference:.1e}", flush=True)
      if not difference <= loss_tolerance(options):
        raise ValueError(f"the checkouts' losses for {form} differ by {difference:.1e}, relative")
  return results


def commit(checkout: Path) -> str:
  """Returns a checkout's commit, with "-dirty" if files differ from it."""
  command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  return done.stdout.strip() or "an unknown commit"


# ---- the report ------------------------------------------------------------------------


def print_table(results: Mapping[str, Mapping[str, Measured]]) -> None:
  print("\nform      way     " + "".join(f"{name:>10}     x" for name in COLUMNS) + "  (quartiles)")
  for form, measured in results.items():
    for name, way in measured.items():
      cells = "".join(
        f"{way.value(column):10.{digits}f}{way.ratios(measured['hand'], column)[1]:6.2f}"
        for column, digits in COLUMNS.items()
      )
      low, _, high = way.ratios(measured["hand"], "step_ms")
      print(f"{form:9} {name:8}{cells}  ({low:.2f}-{high:.2f})")


def print_checks(results: Mapping[str, Mapping[str, Measured]]) -> None:
  """Prints the three counts of operations, and the goals."""
  print("\nGFLOP, counted in the compiled step, in its jaxpr, and by XLA's cost analysis (which")
  print("adds elementwise operations and takes a loop's body once: comparable where unrolled)")
  for form, measured in results.items():
    for name, way in measured.items():
      gflop = way.counts["gflop"]
      counts = f"{gflop:10.3f} compiled {way.jaxpr_gflop:10.3f} jaxpr {way.xla_gflop:10.3f} XLA"
      share = f"  compiled / XLA {gflop / way.xla_gflop:.3f}" if form == "unrolled" else ""
      print(f"{form:9} {name:8} {counts}{share}")
  print("\ngoals, lora_jax to hand:")
  for form, measured in results.items():
    for column, goal in GOALS.items():
      ratio = measured["lora_jax"].ratios(measured["hand"], column)[1]
      met = "met" if ratio <= goal else "MISSED"
      print(f"{form:9} {column:9}{ratio:8.3f} (at most {goal})  {met}")


def print_comparison(pairs: Mapping[str, Pair]) -> None:
  """Prints this checkout's figures with their ratios to the other checkout's."""
  columns = ("gflop", "temp_mb", "step_ms", "trace_s")
  heads = [f"{name:>10}      x" for name in columns]
  heads[2] += "  (quartiles)  "
  print("\nform     " + "".join(heads))
  for form, pair in pairs.items():
    low, middle, high = pair.step_quartiles()
    cells = []
    for name in columns:
      value, ratio = pair.column(name)
      shown = middle if name == "step_ms" else ratio
      cells.append(f"{value:10.{COLUMNS[name]}f}{shown:7.3f}")
    cells[2] += f"  ({low:.3f}-{high:.3f})"
    print(f"{form:9}" + "".join(cells))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description="lora_jax against LoRA written by hand.")
  parser.add_argument("--layers", type=int, default=12)
  parser.add_argument("--width", type=int, default=768, help=f"a multiple of {HEAD_WIDTH}")
  parser.add_argument("--vocabulary", type=int, default=50257)
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--length", type=int, default=64)
  parser.add_argument("--rank", type=int, default=4)
  parser.add_argument("--repeats", type=int, help="turns of timed steps: 30, --against: 24")
  parser.add_argument("--traces", type=int, default=5, help="turns of timed traces")
  parser.add_argument("--target", default=",".join(LAYERS), help="adapted layers")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--forms", help="unrolled,scanned; --against: mlp,unrolled,remat")
  parser.add_argument("--precision", default="highest", help="of float32 matmuls on GPUs")
  parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="checkout of another commit")
  parser.add_argument("--worker", help=argparse.SUPPRESS)
  options = parser.parse_args(arguments)
  options.repeats = options.repeats or (24 if options.against else 30)
  options.forms = options.forms or ("mlp,unrolled,remat" if options.against else "unrolled,scanned")
  options.target, options.forms = options.target.split(","), options.forms.split(",")
  for flag, values, known in (
    ("--target", options.target, LAYERS),
    ("--forms", options.forms, FORMS),
  ):
    if not set(values) <= set(known):
      parser.error(f"{flag} must be among {','.join(known)}, got {','.join(values)}")
  if options.width % HEAD_WIDTH:
    parser.error(f"--width must be a multiple of {HEAD_WIDTH}, got {options.width}")
  if options.against and not (options.against / "lora_jax" / "__init__.py").is_file():
    parser.error(f"--against must be a checkout with lora_jax/ in it, got {options.against}")
  return options


def main(arguments: Sequence[str] | None = None) -> None:
  options = parse(arguments)
  if options.worker:
    work(argparse.Namespace(**json.loads(options.worker)))
    return
  if options.against:
    print(f"JAX {jax.__version__}, {vars(options)}")
    print_comparison(compare(options))
    return
  jax.config.update("jax_default_matmul_precision", options.precision)
  device = jax.devices()[0]
  print(f"JAX {jax.__version__}, {device.device_kind} ({device.platform}), {vars(options)}")
  start = time.perf_counter()
  results = {form: measure(options, form) for form in options.forms}
  print_table(results)
  print_checks(results)
  print(f"\n{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
  main()
