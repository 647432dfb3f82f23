"""The transform: `init`, `apply` and `merge` of any variant, made from an unmodified function.

    params                                  trainable (LoRA, rank 4)
    h_0/attn/query/kernel  (64, 64)   ->    h_0/attn/query/kernel/lora_a  (64, 4)
                                            h_0/attn/query/kernel/lora_b  (4, 64)
    h_0/attn/query/bias    (64,)      ->    (nothing: frozen)

A variant sees one weight and its arrays; paths, layer subsets and dropout are handled here.
"""

import dataclasses
import enum
import zlib
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree, Shaped

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.biases import Bias, bias_gains, check_biases, find_biases, scaled
from lora_jax.adapters.checks import check_adapter, check_number, check_site
from lora_jax.adapters.config import LoraConfig, check_config
from lora_jax.adapters.copies import (
  in_dtypes_of,
  is_float,
  merged_leaves,
  trained_copy,
  wide_dtype,
)
from lora_jax.adapters.delta import (
  LoraWeight,
  Site,
  Table,
  Variant,
  adapter_extra,
  largest_site,
  shared_path,
  whole_weights,
)
from lora_jax.adapters.initializers import BY_NAME, embedding, gaussian, kaiming_uniform
from lora_jax.adapters.layers import spread_layers, spread_term, spread_update, sum_with_weight
from lora_jax.adapters.shardings import array_sharding, replicated
from lora_jax.adapters.targets import Target, find_leaves, shapes
from lora_jax.axes import INNER, LoraAxes
from lora_jax.fields import Finite, Share
from lora_jax.placement import leaf_sharding, place
from lora_jax.quantization.leaf import is_quantized
from lora_jax.transform.deferred import deferred
from lora_jax.transform.factored import Factored, Source, as_values
from lora_jax.transform.factors import Factor, Term
from lora_jax.transform.inference import infer_axes
from lora_jax.transform.interpreter import Interpreter, OpaqueRule
from lora_jax.transform.tracing import TracedCall, is_array, trace_call
from lora_jax.trees import closest_names, nest, replace_leaves


class NotGiven(enum.Enum):
  """Distinguishes an argument that was left out from None."""

  NOT_GIVEN = enum.auto()


NOT_GIVEN = NotGiven.NOT_GIVEN


def adapt(
  fn: Callable[..., Any],
  config: LoraConfig,
  default: Variant,
  opaque: Mapping[str, OpaqueRule] | None = None,
) -> Adaptation:
  """Adapts `fn(params, *args, **kwargs)` by a variant of LoRA; `fn` is not changed.

  `init` traces `fn` once to infer which axes of each targeted weight are inputs and outputs, and
  raises if a weight is unused or meets an operation without a rule. In addition to the arguments
  of `fn`, `apply` takes:

  - `lora_key`: with dropout, a key trains, None evaluates, and leaving it out raises.
  - `scaling`: replaces alpha / rank, a number or a mapping by path; may be traced.
  - `dropout_rate`: replaces the config's `dropout`, in the same ways.

  The fully trained leaves of `config.extra` have float32 copies in the trainable tree; `fn` gets
  them in the base model's dtypes (float8 as bfloat16), and `merge` returns them in these.

  Arguments that are not arrays are static. Call `apply` under `jax.jit`.

  Args:
    fn: any JAX function of a parameter tree and further arguments.
    config: the weights to adapt, and their settings.
    default: the variant of weights for which neither the config nor a rule names one.
    opaque: rules for functions that have no jaxpr to trace (a `custom_vjp` kernel, a Pallas call),
      by the name they are traced under: `rule(call, *args)`. `call` is the function itself; an
      adapted weight among the args is a `Factored`, whose `dot(x, ..., base=...)` is the output.

  Returns:
    `Adaptation(init, apply, merge)`.
  """
  opaque = dict(opaque or {})

  def find(params: PyTree) -> tuple[dict[str, Target], dict[str, Any]]:
    targets, extra = find_leaves(config, params)
    return {
      path: dataclasses.replace(target, variant=target.variant or default)
      for path, target in targets.items()
    }, extra

  def init(key: PRNGKeyArray, params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
    targets, extra = find(params)
    copies = {path: trained_copy(f"extra {path}", leaf) for path, (_, leaf) in extra.items()}
    call = trace_call(fn, replace_leaves(params, in_dtypes_of(extra, copies)), args, kwargs)
    sites = find_sites(targets, call, opaque)
    biases = find_biases(targets, extra, params)
    check_biases(biases, targets, sites, call, params)
    items: list[tuple[tuple[str, ...], Any]] = [
      (target.keys, _start(_fold_path(key, path), target, sites[path]))
      for path, target in targets.items()
    ]
    items += _start_shared(key, targets, sites)
    items += [(keys, copies[path]) for path, (keys, _) in extra.items()]
    trainable = nest(items)

    def first_step(leaves: list[Any]) -> list[Any]:
      values = _factored(targets, trainable, call.position, leaves, key, None, None)
      _scale_biases(values, biases, trainable, targets, call.position)
      return Interpreter(opaque).evaluate(call.jaxpr, values)

    jax.eval_shape(first_step, call.leaves)  # raises errors that only real factors show
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
    targets, extra = find(params)
    check_adapter(trainable, targets, extra)
    key = _dropout_key(lora_key, targets, dropout_rate)
    trained = in_dtypes_of(extra, adapter_extra(trainable))
    call = trace_call(fn, replace_leaves(params, trained), args, kwargs)
    values = _factored(targets, trainable, call.position, call.leaves, key, scaling, dropout_rate)
    biases = find_biases(targets, extra, params)
    _scale_biases(values, biases, trainable, targets, call.position)
    outputs = Interpreter(opaque).evaluate(call.jaxpr, values)
    return jax.tree.unflatten(call.out_tree, outputs)

  def merge(params: PyTree, trainable: PyTree, *, scaling: Any = None) -> PyTree:
    targets, extra = find(params)
    check_adapter(trainable, targets, extra)
    scalings = _scalings(scaling, targets)
    _check_unquantized(targets)
    merged = {
      path: merge_weight(
        jnp.asarray(targets[path].leaf), weight, _variant(targets[path]), scalings[path]
      )
      for path, weight in whole_weights(trainable, shapes(targets)).items()
    }
    biases = find_biases(targets, extra, params)
    gains = bias_gains(biases, trainable, targets)
    for bias in biases.values():
      merged[bias.path] = scaled(jnp.asarray(bias.leaf), gains[bias.path])
    return replace_leaves(params, merged | merged_leaves(extra, adapter_extra(trainable)))

  return Adaptation(init, apply, merge)


def adapt_by(
  variant: Variant,
  fn: Callable[..., Any],
  config: Any,
  opaque: Mapping[str, OpaqueRule] | None,
) -> Adaptation:
  """Adapts a function by one variant, as `adapt` does with it in the config.

  Raises:
    ValueError: if the config is not a `LoraConfig`, or has another variant.
  """
  check_config(config)
  if config.variant not in (None, variant):
    raise ValueError(
      f"{variant.name} got a config of another variant, {config.variant.name}. Use "
      "lora_jax.lora(fn, config)"
    )
  return adapt(fn, dataclasses.replace(config, variant=variant), variant, opaque)


def find_sites(
  targets: Mapping[str, Target], call: TracedCall, opaque: Mapping[str, OpaqueRule]
) -> dict[str, Site]:
  """Returns the targeted weights, by path, with their axes as a call uses them.

  Args:
    targets: each with its variant.
    call: the traced function.
    opaque: as in `adapt`.
  Raises:
    ValueError: if a weight is never used, or its settings do not fit its axes.
  """
  sources = {path: source_of(target) for path, target in targets.items()}
  axes_by_path = {path: target.axes for path, target in targets.items() if target.axes is not None}
  inferred = infer_axes(call, sources, axes_by_path, Interpreter(opaque))
  unused = [path for path, target in targets.items() if not (path in inferred or target.axes)]
  if unused:
    raise ValueError(
      f"these targeted weights are never used by the function: {', '.join(unused)}. "
      "Narrow `target`, or trace a call that uses them"
    )
  sites: dict[str, Site] = {}
  for path, target in targets.items():
    axes, is_lookup = inferred.get(path, (None, False))
    axes = target.axes or axes
    assert axes is not None, "an unused weight has axes of its own"
    sites[path] = _site(target, axes, is_lookup)
  return sites


def merge_weight(
  w: Shaped[Array, "*shape"], weight: LoraWeight, variant: Variant, scaling: Any
) -> Shaped[Array, "*shape"]:
  """Returns a variant's weight as one array, computed in float32 and returned in W's dtype."""
  wide = w.astype(wide_dtype(w.dtype))
  adapted = adapted_weight(wide, weight, variant, Source(["merge"]), scaling)
  return adapted.materialize().astype(w.dtype)


def adapted_weight(
  w: Any, weight: LoraWeight, variant: Variant, source: Source, scaling: Any
) -> Factored:
  """Returns the adapted weight: the variant's equation on the adapted layers.

  The other layers of a stack get zeros as factors and ones as gains: the small arrays are padded,
  and the stack is not touched. `w` is an array, or a `Deferred` if it is quantized.
  """
  axes, layers = weight.axes, weight.layers
  if not isinstance(scaling, int | float):
    scaling = jnp.asarray(scaling, jnp.float32)
  adapted = variant.weight(Factored(w, source), _named_factors(w, weight), scaling)
  base, terms, gain = adapted.base, adapted.terms, adapted.gain
  if layers is not None:
    dim = axes.batch[0]
    base = spread_update(base, dim, layers, w.shape[dim])
    terms = tuple(spread_term(term, dim, layers, w.shape[dim]) for term in terms)
    if gain is not None and dim in gain.dims:
      gain = spread_layers(gain, dim, layers, w.shape[dim], 1.0)
    elif gain is not None:
      raise ValueError(f"{source}: the gain of some layers of a stack needs the stack's axis")
  return Factored(base, source, terms, gain)


def _named_factors(w: Any, weight: LoraWeight) -> SimpleNamespace:
  """Returns a node's arrays as labelled factors, for a variant's equation."""
  axes, layers = weight.axes, weight.layers
  factors = {
    spec.name: Factor(weight.arrays[spec.name], axes.labels(spec.words), spec.frozen)
    for spec in weight.table
  }
  dim = None if layers is None else axes.batch[0]

  def contract(factor: Factor, labels: Sequence[int]) -> Factor:
    return sum_with_weight(w, factor, labels, dim, layers or ())

  return SimpleNamespace(axes=axes, sum_with_weight=contract, **factors)


def _check_unquantized(targets: Mapping[str, Target]) -> None:
  """Raises ValueError if an adapter would be merged into codes, which cannot hold the sum."""
  quantized = [path for path, target in targets.items() if is_quantized(target.leaf)]
  if quantized:
    kind = targets[quantized[0]].leaf.format
    raise ValueError(
      f"{quantized[0]} and {len(quantized) - 1} more are quantized ({kind}): rounding the merged "
      "weights to its codes would lose most of the update. Keep the adapter beside the base model, "
      "or merge into floats: merge(lora_jax.dequantize(params), trainable)"
    )


def _site(target: Target, axes: LoraAxes, is_lookup: bool) -> Site:
  check_site(target, axes, _variant(target))
  initialize = target.init if callable(target.init) else BY_NAME[target.init]
  if is_lookup and initialize in (kaiming_uniform, gaussian):
    initialize = embedding
  layers = target.stacked_layers
  settings = target.rank, layers, initialize, is_lookup, target.scaling
  return Site(target.path, target.leaf, axes, *settings)


def _start(key: PRNGKeyArray, target: Target, site: Site) -> LoraWeight:
  """Returns the initial arrays of one weight, float32, sharded as the weight."""
  variant, sharding = _variant(target), leaf_sharding(target.leaf)
  arrays = _checked_arrays(variant.start(key, site), variant.table, site, variant.sizes(site))
  for spec in variant.table:
    where = array_sharding(sharding, spec.words, site.axes, site.layers)
    arrays[spec.name] = place(arrays[spec.name], where)
  return LoraWeight.from_arrays(arrays, variant.table, site.axes, site.layers)


def _start_shared(
  key: PRNGKeyArray, targets: Mapping[str, Target], sites: Mapping[str, Site]
) -> list[tuple[tuple[str, ...], LoraWeight]]:
  """Returns the initial shared arrays of each variant that has some, replicated, with their keys.

  Raises:
    ValueError: if two variants with shared arrays have one name, and hence one place in the tree.
  """
  nodes, variants = [], {}
  for target in targets.values():
    variant = _variant(target)
    if variant.shared is not None and variants.setdefault(variant.name, variant) != variant:
      raise ValueError(
        f"{target.path}: two variants with shared arrays have the name {variant.name!r}. Give "
        "these weights one variant"
      )
  for variant in variants.values():
    used_by = [site for path, site in sites.items() if _variant(targets[path]) == variant]
    path, site = shared_path(variant.name), largest_site(used_by)
    start = variant.shared.start(_fold_path(key, path), used_by)
    arrays = _checked_arrays(start, variant.shared_table, dataclasses.replace(site, path=path))
    sharding = replicated(leaf_sharding(used_by[0].leaf))
    placed = {name: place(array, sharding) for name, array in arrays.items()}
    node = LoraWeight.from_arrays(placed, variant.shared_table, site.axes, None)
    nodes.append((tuple(path.split("/")), node))
  return nodes


def _checked_arrays(
  arrays: Any, table: Table, site: Site, sizes: Mapping[str, int] | None = None
) -> dict[str, jax.Array]:
  """Returns the arrays that a `start` gave, float32, each in memory of its own.

  Args:
    arrays: by name.
    table: of the expected ones.
    site: of which they are the arrays.
    sizes: of further inner axes; None accepts any.
  Raises:
    ValueError: if they are not the expected ones, or one is not a float array of its shape.
  """
  if not isinstance(arrays, Mapping) or set(arrays) != {spec.name for spec in table}:
    got = ", ".join(sorted(arrays)) if isinstance(arrays, Mapping) else repr(arrays)
    raise ValueError(f"{site.path}: start of {table} gave {got:.100}, expected its arrays")
  checked, seen = {}, {id(site.leaf)}
  for spec in table:
    array, labels = arrays[spec.name], site.axes.labels(spec.words)
    if not is_array(array) or not is_float(array.dtype):
      raise ValueError(
        f"{site.path}: init gave {spec.name} {array!r:.100}, expected a floating-point array"
      )
    inner = sizes
    if inner is None:
      inner = {
        w: array.shape[labels.index(l)] for w, l in INNER.items() if l in labels[: array.ndim]
      }
    shape = site.array_shape(spec.words, **inner)
    if array.shape != shape:
      raise ValueError(f"{site.path}: init gave {spec.name} {array.shape}, expected {shape}")
    if id(array) in seen:
      array = jnp.copy(array)  # a step donates the trained arrays: no two may share a buffer
    seen.add(id(array))
    checked[spec.name] = array.astype(jnp.float32)
  return checked


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
  scalings, rates = _scalings(scaling, targets), _dropout_rates(dropout_rate, targets)
  values = as_values(leaves, position)
  for path, weight in whole_weights(trainable, shapes(targets)).items():
    target, leaf = targets[path], leaves[position[path]]
    base = deferred(leaf) if is_quantized(leaf) else jnp.asarray(leaf)
    adapted = adapted_weight(base, weight, _variant(target), source_of(target), scalings[path])
    if key is not None and not _is_zero(rates[path]):
      _check_drops(adapted, _variant(target), rates[path])
      terms = _with_dropout(adapted.terms, rates[path], _fold_path(key, path))
      adapted = dataclasses.replace(adapted, terms=terms)
    values[position[path]] = adapted
  return values


def _scale_biases(
  values: list[Any],
  biases: Mapping[str, Bias],
  trainable: PyTree,
  targets: Mapping[str, Target],
  position: Mapping[str, int],
) -> None:
  """Scales the biases among the leaves of a call, in place."""
  for path, gain in bias_gains(biases, trainable, targets).items():
    values[position[path]] = scaled(jnp.asarray(values[position[path]]), gain)


def _check_drops(adapted: Factored, variant: Variant, rate: Any) -> None:
  """Raises ValueError if dropout would have no effect: without a term that is trained."""
  if not variant.has_dropout or all(term.frozen for term in adapted.terms):
    value = f"{rate:g}" if isinstance(rate, int | float) else "a traced rate"
    raise ValueError(
      f"{adapted.source}: LoRA dropout ({value}) acts on the input of a low-rank branch, and "
      f"{variant.name} has none that is trained. Give LoraConfig or a LoraRule for it dropout=0.0, "
      "and apply no dropout_rate for it"
    )


def _with_dropout(terms: tuple[Term, ...], rate: Any, key: PRNGKeyArray) -> tuple[Term, ...]:
  """Gives every term its own dropout masks, except terms of frozen arrays only."""
  dropped = []
  for i, term in enumerate(terms):
    term_key = jax.random.fold_in(key, i) if i else key
    with_key = dataclasses.replace(term, dropout_rate=rate, key=term_key)
    dropped.append(term if term.frozen else with_key)
  return tuple(dropped)


def _variant(target: Target) -> Variant:
  assert target.variant is not None, "`adapt` sets it"
  return target.variant


def source_of(target: Target) -> Source:
  """Returns a weight's source in the engine."""
  return Source([target.path], target.on_unhandled == "materialize")


def _scalings(scaling: Any, targets: Mapping[str, Target]) -> Mapping[str, Any]:
  defaults = {path: target.scaling for path, target in targets.items()}
  return _by_path(scaling, defaults, "scaling", Finite)


def _dropout_rates(rate: Any, targets: Mapping[str, Target]) -> Mapping[str, Any]:
  defaults = {path: target.dropout for path, target in targets.items()}
  return _by_path(rate, defaults, "dropout_rate", Share)


def _by_path(value: Any, defaults: Mapping[str, float], name: str, kind: Any) -> Mapping[str, Any]:
  """Returns a value for each path; None is the default, a mapping may have some of the paths."""
  if value is None:
    return defaults
  for path, number in value.items() if isinstance(value, Mapping) else [("", value)]:
    check_number(f"{name}[{path!r}]" if path else name, number, kind)
  if not isinstance(value, Mapping):
    return dict.fromkeys(defaults, value)
  unknown = [path for path in value if path not in defaults]
  if unknown:
    names = ", ".join(closest_names(unknown[0], defaults))
    raise ValueError(
      f"{name} names {', '.join(unknown)}, which is not adapted. Did you mean {names}?"
    )
  return {path: value.get(path, default) for path, default in defaults.items()}


def _dropout_key(
  lora_key: PRNGKeyArray | NotGiven | None, targets: Mapping[str, Target], dropout_rate: Any
) -> PRNGKeyArray | None:
  """Returns the key, None to evaluate; raises ValueError if there is dropout and none is given."""
  rates = _dropout_rates(dropout_rate, targets)
  drops = not all(_is_zero(rate) for rate in rates.values())
  if not drops:
    return None
  if isinstance(lora_key, NotGiven):
    raise ValueError(
      "there is LoRA dropout, so apply needs lora_key: a key to train, None to evaluate"
    )
  return lora_key


def _fold_path(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
  """Returns a key that depends on the path, and not on which other weights are adapted."""
  return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _is_zero(rate: Any) -> bool:
  return isinstance(rate, int | float) and rate == 0
