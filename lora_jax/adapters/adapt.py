"""Low-Rank Adaptation (Hu et al. 2021, arXiv 2106.09685) of any JAX function.

The paper's equation (sec. 4.1), with x a row vector as in JAX:

    h = x W + scaling * x A B        scaling = alpha / rank

W, (in, out), is frozen; A, (in, rank), and B, (rank, out), are trained, and no array of W's
size but W itself is ever formed. `lora` returns three pure functions:

    lora = lora_jax.lora(fn, LoraConfig(rank=4, alpha=32.0, target=r".*/kernel"))
    trainable = lora.init(key, params, *args)
    out = lora.apply(params, trainable, *args)
    merged = lora.merge(params, trainable)

    params                                  trainable
    h_0/attn/query/kernel  (64, 64)   ->    h_0/attn/query/kernel/lora_a  (64, 4)
                                            h_0/attn/query/kernel/lora_b  (4, 64)
    h_0/attn/query/bias    (64,)      ->    (nothing: frozen)
"""

import enum
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.checks import check_adapter
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import (
  LoraWeight,
  adapter_extra,
  adapter_weights,
  copied,
  stored_shape,
  weight_factors,
)
from lora_jax.adapters.initializers import BY_NAME, embedding, gaussian, kaiming_uniform
from lora_jax.adapters.shardings import factor_shardings
from lora_jax.adapters.targets import Target, find_leaves
from lora_jax.axes import LoraAxes
from lora_jax.placement import leaf_sharding, place
from lora_jax.transform.factored import Factored, Label, Term
from lora_jax.transform.inference import infer_axes
from lora_jax.transform.interpreter import Interpreter, OpaqueRule
from lora_jax.transform.tracing import trace_call
from lora_jax.trees import near, nest, replace_leaves


class NotGiven(enum.Enum):
  """Tells an argument that was left out from one that is None."""

  NOT_GIVEN = enum.auto()


NOT_GIVEN = NotGiven.NOT_GIVEN


def lora(
  fn: Callable[..., Any], config: LoraConfig, opaque: Mapping[str, OpaqueRule] | None = None
) -> Adaptation:
  """Adapts `fn(params, *args, **kwargs)` by LoRA; `fn` stays as it is.

  `init` traces `fn` once to learn which axes of each targeted weight are inputs and outputs,
  and raises if one is unused or meets an operation without a rule. `apply` takes besides the
  arguments of `fn`:

  - `lora_key`: with dropout, a key trains, None evaluates, and leaving it out raises.
  - `scaling`: replaces alpha / rank, as a scalar or by path; may be traced.
  - `dropout_rate`: replaces the config's rate, likewise.

  Arguments that are no arrays are static. Call `apply` under `jax.jit`.

  Args:
    fn: any JAX function of a parameter tree and further arguments.
    config: what to adapt, and how.
    opaque: for functions that cannot be looked into (a `custom_vjp` kernel, a Pallas call),
      the name they are traced under to `rule(call, *args)`. `call` is the function itself;
      an adapted weight among the args is a `Factored`, whose `dot` is its low-rank part.

  Returns:
    `Adaptation(init, apply, merge)`.

  Examples:
    >>> import jax, jax.numpy as jnp, lora_jax
    >>> fn = lambda params, x: x @ params["kernel"]
    >>> params = {"kernel": jnp.ones((8, 6))}
    >>> config = lora_jax.LoraConfig(rank=2, alpha=4.0, target="kernel")
    >>> adapted = lora_jax.lora(fn, config)
    >>> trainable = adapted.init(jax.random.key(0), params, jnp.ones((3, 8)))
    >>> jax.tree.map(jnp.shape, trainable["kernel"].lora_a)
    (8, 2)
    >>> out = adapted.apply(params, trainable, jnp.ones((3, 8)))
    >>> bool((out == fn(params, jnp.ones((3, 8)))).all())
    True
  """
  opaque = dict(opaque or {})

  def init(key: PRNGKeyArray, params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
    targets, extra = find_leaves(config, params)
    call = trace_call(fn, params, args, kwargs)
    found = infer_axes(call, targets, _interpreter(opaque, targets))
    unused = [path for path, target in targets.items() if not (path in found or target.axes)]
    if unused:
      raise ValueError(
        f"these targeted weights are never used by the function: {', '.join(unused)}. "
        "Narrow `target`, or trace a call that uses them"
      )
    items: list[tuple[tuple[str, ...], Any]] = []
    for path, target in targets.items():
      inferred, lookup = found.get(path, (None, False))
      axes = target.axes or inferred
      assert axes is not None, "a weight that is not found has axes of its own"
      items.append((target.keys, _new_weight(_fold_path(key, path), target, axes, lookup)))
    items += [(keys, copied(f"extra {path}", leaf)) for path, (keys, leaf) in extra.items()]
    trainable = nest(items)

    def first_step(leaves):
      factored = _factored(targets, trainable, call.position, leaves, None, None, None)
      return _interpreter(opaque, targets).evaluate(call.jaxpr, factored)

    jax.eval_shape(first_step, call.leaves)  # what only real factors show is raised here
    return trainable

  def apply(
    params: PyTree,
    trainable: PyTree,
    *args: Any,
    lora_key: PRNGKeyArray | NotGiven | None = NOT_GIVEN,
    scaling: Any = None,
    dropout_rate: Any = None,
    **kwargs: Any,
  ) -> Any:
    targets, extra = find_leaves(config, params)
    check_adapter(trainable, targets, extra)
    key = _dropout_key(lora_key, targets, dropout_rate)
    call = trace_call(fn, _with_extra(params, trainable), args, kwargs)
    values = _factored(targets, trainable, call.position, call.leaves, key, scaling, dropout_rate)
    outputs = _interpreter(opaque, targets).evaluate(call.jaxpr, values)
    return jax.tree.unflatten(call.out_tree, outputs)

  def merge(params: PyTree, trainable: PyTree, *, scaling: Any = None) -> PyTree:
    targets, extra = find_leaves(config, params)
    check_adapter(trainable, targets, extra)
    by_path = _by_path(
      scaling, {path: target.scaling for path, target in targets.items()}, "scaling"
    )
    merged = {
      path: merge_weight(targets[path].leaf, weight, by_path[path])
      for path, weight in adapter_weights(trainable).items()
    }
    return replace_leaves(params, merged | adapter_extra(trainable))

  return Adaptation(init, apply, merge)


def merge_weight(
  w: Float[Array, "*shape"], weight: LoraWeight, scaling: Any
) -> Float[Array, "*shape"]:
  """Returns `W + scaling * A B` (sec. 4.1), computed in float32 and returned in W's dtype."""
  term = Term(weight_factors(weight, w.shape), Label("merge"), scaling)
  wide = jnp.promote_types(w.dtype, jnp.float32)
  return Factored(w.astype(wide), (term,)).materialize().astype(w.dtype)


def _new_weight(key: PRNGKeyArray, target: Target, axes: LoraAxes, lookup: bool) -> LoraWeight:
  layers = target.stacked_layers
  _check_layers(target, axes)
  shape = stored_shape(target.leaf.shape, axes, layers)
  sides = axes.sides(shape)
  if target.rank > min(sides):
    raise ValueError(
      f"{target.path}: rank {target.rank} is larger than the smaller side of the weight, "
      f"{sides[0]} inputs by {sides[1]} outputs (shape {target.leaf.shape}). Lower the rank, "
      "or give LoraRule(pattern, rank=...) for it"
    )
  initialize = target.init if callable(target.init) else BY_NAME[target.init]
  if lookup and initialize in (kaiming_uniform, gaussian):
    initialize = embedding
  shapes = axes.a_shape(shape, target.rank), axes.b_shape(shape, target.rank)
  factors = initialize(key, *shapes, sides[0])
  for name, factor, expected in zip(("lora_a", "lora_b"), factors, shapes, strict=True):
    if factor.shape != expected:
      raise ValueError(f"{target.path}: init gave {name} {factor.shape}, expected {expected}")
  places = factor_shardings(leaf_sharding(target.leaf), axes, layers)
  a, b = (place(x.astype(jnp.float32), s) for x, s in zip(factors, places, strict=True))
  return LoraWeight(a, b, axes, layers)


def _check_layers(target: Target, axes: LoraAxes) -> None:
  layers, shape = target.stacked_layers, target.leaf.shape
  if target.by_number and axes.batch:
    raise ValueError(
      f"{target.path}: layers= goes by the number in the path, but the weight is itself a stack "
      f"(axis {axes.batch[0]} of shape {shape}). Give stacked_layers= for the index on that "
      "axis, or choose paths by `target` alone"
    )
  if layers is None:
    return
  if not axes.batch:
    raise ValueError(
      f"{target.path}: stacked_layers={list(layers)} needs a stacked axis, and shape {shape} has "
      "none. Give layers= for numbers in paths, or narrow `target` to the stacked weights"
    )
  count = shape[axes.batch[0]]
  if max(layers) >= count:
    raise ValueError(f"{target.path}: stacked_layers={list(layers)}, but it stacks {count} layers")


def _interpreter(opaque: Mapping[str, OpaqueRule], targets: Mapping[str, Target]) -> Interpreter:
  return Interpreter(opaque, [p for p, t in targets.items() if t.on_unhandled == "materialize"])


def _factored(
  targets: Mapping[str, Target],
  trainable: PyTree,
  position: Mapping[str, int],
  leaves: list[Any],
  key: PRNGKeyArray | None,
  scaling: Any,
  dropout_rate: Any,
) -> list[Any]:
  """Returns the leaves of a call with the adapted weights among them factored."""
  scalings = _by_path(scaling, {p: t.scaling for p, t in targets.items()}, "scaling")
  rates = _by_path(dropout_rate, {p: t.dropout for p, t in targets.items()}, "dropout_rate")
  values = list(leaves)
  for path, weight in adapter_weights(trainable).items():
    base = jnp.asarray(values[position[path]])
    path_key = None if key is None or _is_zero(rates[path]) else _fold_path(key, path)
    factors = weight_factors(weight, base.shape)
    term = Term(factors, Label(path), scalings[path], rates[path], path_key)
    values[position[path]] = Factored(base, (term,))
  return values


def _by_path(given: Any, defaults: Mapping[str, float], what: str) -> Mapping[str, Any]:
  """Returns `given` for each path: None is the default, a mapping may name some of the paths."""
  if given is None:
    return defaults
  if not isinstance(given, Mapping):
    return dict.fromkeys(defaults, given)
  unknown = [path for path in given if path not in defaults]
  if unknown:
    names = ", ".join(near(unknown[0], defaults))
    raise ValueError(f"{what} is given for {', '.join(unknown)}, not adapted. Near names: {names}")
  return {path: given.get(path, default) for path, default in defaults.items()}


def _dropout_key(
  lora_key: PRNGKeyArray | NotGiven | None, targets: Mapping[str, Target], dropout_rate: Any
) -> PRNGKeyArray | None:
  """Returns the key, None to evaluate. Raises ValueError if there is dropout and no answer."""
  rates = _by_path(dropout_rate, {p: t.dropout for p, t in targets.items()}, "dropout_rate")
  drops = not all(_is_zero(rate) for rate in rates.values())
  if not drops:
    return None
  if isinstance(lora_key, NotGiven):
    raise ValueError(
      "there is LoRA dropout, so apply needs lora_key: a key to train, None to evaluate"
    )
  return lora_key


def _fold_path(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
  """Returns a key that depends on the path alone, not on what else is adapted."""
  return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _is_zero(rate: Any) -> bool:
  return isinstance(rate, int | float) and rate == 0


def _with_extra(params: PyTree, trainable: PyTree) -> PyTree:
  return replace_leaves(params, adapter_extra(trainable))
