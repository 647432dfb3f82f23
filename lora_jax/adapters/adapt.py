"""The transform: `init`, `apply` and `merge` of any variant, made from an unmodified function.

    params                                  trainable (LoRA, rank 4)
    h_0/attn/query/kernel  (64, 64)   ->    h_0/attn/query/kernel/lora_a  (64, 4)
                                            h_0/attn/query/kernel/lora_b  (4, 64)
    h_0/attn/query/bias    (64,)      ->    (nothing: frozen)

A variant sees one weight and its arrays: `weights.py` calls its equation, `start.py` its `start`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.biases import Bias, bias_gains, check_biases, find_biases, scaled
from lora_jax.adapters.checks import check_adapter, check_site
from lora_jax.adapters.config import LoraConfig, check_config
from lora_jax.adapters.copies import in_dtypes_of, merged_leaves, trained_copy
from lora_jax.adapters.delta import Site, Variant, adapter_extra, whole_weights
from lora_jax.adapters.initializers import BY_NAME, embedding, gaussian, kaiming_uniform
from lora_jax.adapters.settings import (
  NOT_GIVEN,
  NotGiven,
  dropout_key,
  dropout_rates_of,
  is_zero,
  scalings_of,
)
from lora_jax.adapters.start import fold_path, start_shared, start_weight
from lora_jax.adapters.targets import Target, find_leaves, shapes, variant_of
from lora_jax.adapters.weights import adapted_weight, check_drops, merge_weight, with_dropout
from lora_jax.axes import LoraAxes
from lora_jax.quantization.leaf import is_quantized
from lora_jax.transform.deferred import deferred
from lora_jax.transform.factored import Source, as_values
from lora_jax.transform.inference import infer_axes
from lora_jax.transform.interpreter import Interpreter, OpaqueRule
from lora_jax.transform.tracing import TracedCall, trace_call
from lora_jax.trees import nest, replace_leaves


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
      (target.keys, start_weight(fold_path(key, path), target, sites[path]))
      for path, target in targets.items()
    ]
    items += start_shared(key, targets, sites)
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
    key = dropout_key(lora_key, targets, dropout_rate)
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
    scalings = scalings_of(scaling, targets)
    _check_unquantized(targets)
    merged = {
      path: merge_weight(
        jnp.asarray(targets[path].leaf), weight, variant_of(targets[path]), scalings[path]
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
  check_site(target, axes, variant_of(target))
  initialize = target.init if callable(target.init) else BY_NAME[target.init]
  if is_lookup and initialize in (kaiming_uniform, gaussian):
    initialize = embedding
  layers = target.stacked_layers
  settings = target.rank, layers, initialize, is_lookup, target.scaling
  return Site(target.path, target.leaf, axes, *settings)


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
  scalings, rates = scalings_of(scaling, targets), dropout_rates_of(dropout_rate, targets)
  values = as_values(leaves, position)
  for path, weight in whole_weights(trainable, shapes(targets)).items():
    target, leaf = targets[path], leaves[position[path]]
    base = deferred(leaf) if is_quantized(leaf) else jnp.asarray(leaf)
    adapted = adapted_weight(base, weight, variant_of(target), source_of(target), scalings[path])
    if key is not None and not is_zero(rates[path]):
      check_drops(adapted, variant_of(target), rates[path])
      terms = with_dropout(adapted.terms, rates[path], fold_path(key, path))
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


def source_of(target: Target) -> Source:
  """Returns a weight's source in the engine."""
  return Source([target.path], target.on_unhandled == "materialize")
