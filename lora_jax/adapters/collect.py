"""Statistics of data, for adapters that are initialized from it: EVA, LoRA-GA, CorDA.

`collect` runs a function on batches and returns, for each weight that a config targets, the moments
of the inputs of its layer, or the gradient of the function with respect to the weight.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from lora_jax.adapters.adapt import find_sites, source_of
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import Site, Variant
from lora_jax.adapters.layers import spread_term
from lora_jax.adapters.shardings import array_sharding
from lora_jax.adapters.targets import find_leaves
from lora_jax.fields import Count, read_value
from lora_jax.placement import leaf_sharding, place
from lora_jax.quantization.leaf import is_quantized
from lora_jax.transform.deferred import deferred
from lora_jax.transform.dequantized import dequantized
from lora_jax.transform.factored import Factored, as_values
from lora_jax.transform.factors import Factor
from lora_jax.transform.interpreter import Interpreter, OpaqueRule
from lora_jax.transform.taps import Tap
from lora_jax.transform.tracing import is_array, trace_call
from lora_jax.trees import replace_leaves, weights_with_path

Kind = Literal["activations", "gradients"]


class InputMoments(NamedTuple):
  """Sums over the tokens that a layer got, float32; `inputs` is the number of its inputs.

  Attributes:
    second: of x x^T.
    first: of x.
    num_tokens: the number of tokens.
  """

  second: Float[Array, "*batch inputs inputs"]
  first: Float[Array, "*batch inputs"]
  num_tokens: Float[Array, "*batch"]

  def covariance(self) -> Float[Array, "*batch inputs inputs"]:
    """Returns the mean of (x - mean) (x - mean)^T; 0 without tokens."""
    count = jnp.maximum(self.num_tokens, 1)[..., None]
    mean = self.first / count
    return self.second / count[..., None] - mean[..., :, None] * mean[..., None, :]


def collect(
  fn: Callable[..., Any],
  config: LoraConfig,
  params: PyTree,
  batches: Sequence[Any],
  kind: Kind,
  *,
  weights_at_once: int | None = None,
  summarize: Callable[[Site, Any], Any] | None = None,
  opaque: Mapping[str, OpaqueRule] | None = None,
) -> dict[str, Any]:
  """Returns statistics of each weight that `config` targets, by path.

  `activations`: the `InputMoments` of its layer. Tokens count on whose output the value of `fn`
  depends: of a loss, padding does not count, and in the last layer of a model only the tokens with
  a target do. Uses of one weight are added, and a use of a part of its inputs has moments of that
  part. They take 4 * inputs * (inputs + 2) bytes for each matrix, twice.

  `gradients`: the mean over the batches of the gradient of `fn`, a number, with respect to the
  weight, in its shape, float32.

  >>> fn = lambda params, x: jnp.mean(jnp.square(x @ params["kernel"]))
  >>> params, batches = {"kernel": jnp.ones((3, 2))}, [jnp.eye(4, 3), jnp.ones((1, 3))]
  >>> config = LoraConfig(rank=1, alpha=1.0, target="kernel")
  >>> moments = collect(fn, config, params, batches, "activations")["kernel"]
  >>> [float(x) for x in (moments.second[0, 0], moments.second[0, 1], moments.num_tokens)]
  [2.0, 1.0, 4.0]
  >>> collect(fn, config, params, batches, "gradients")["kernel"].shape
  (3, 2)

  The fourth row of the first batch is all zero: its output has no gradient, and it does not count.

  Args:
    fn: `fn(params, batch)`, as a loss.
    config: its targets, layers and rules; its rank must fit them.
    params: the base model's, of any dtype, quantized or sharded.
    batches: the second arguments of `fn`, trees of arrays.
    kind: "activations" or "gradients".
    weights_at_once: the number of weights for which statistics are held at once, each time in a
      pass over all batches; None is all.
    summarize: from a weight and its statistics to the value that is returned for it; the statistics
      are freed.
    opaque: as in `lora_jax.lora`.
  Raises:
    ValueError: naming the weight, if its inputs have no moments (an embedding's rows are looked
      up) or no gradient reaches it; if `fn` does not return a number.
    UnsupportedOperation: if a weight is used where its inputs are not those of its layer.
  """
  if kind not in ("activations", "gradients"):
    raise ValueError(f"kind must be 'activations' or 'gradients', got {kind!r}")
  batches = list(batches)
  if not batches:
    raise ValueError("batches are empty; expected at least one")
  count = read_value(Count | None, weights_at_once, "weights_at_once")
  sites = data_sites(fn, config, params, batches[0], opaque)
  rules = dict(opaque or {})
  paths = list(sites)
  result = {}
  for start in range(0, len(paths), count or len(paths)):
    group = {path: sites[path] for path in paths[start : start + (count or len(paths))]}
    if kind == "activations":
      statistics = _moments(fn, config, group, params, batches, rules)
    else:
      statistics = _gradients(fn, group, params, batches)
    for path, site in group.items():
      whole = statistics.pop(path)
      result[path] = whole if summarize is None else jax.block_until_ready(summarize(site, whole))
  return result


_ANY = Variant(  # of which only the name and the axes are read
  "any",
  {"lora_a": "batch in rank", "lora_b": "batch rank out"},
  lambda key, site: {},
  lambda w, p, scaling: w,
)


def data_sites(
  fn: Callable[..., Any],
  config: LoraConfig,
  params: PyTree,
  batch: Any,
  opaque: Mapping[str, OpaqueRule] | None = None,
) -> dict[str, Site]:
  """Returns the weights that a config targets, by path, with their axes in a call of `fn`."""
  targets = {
    path: dataclasses.replace(target, variant=_ANY)
    for path, target in find_leaves(config, params)[0].items()
  }
  return find_sites(targets, trace_call(fn, params, (batch,), {}), dict(opaque or {}))


def _moments(
  fn: Callable[..., Any],
  config: LoraConfig,
  sites: Mapping[str, Site],
  params: PyTree,
  batches: Sequence[Any],
  opaque: Mapping[str, OpaqueRule],
) -> dict[str, InputMoments]:
  """Returns the moments of the inputs of some weights."""
  for path, site in sites.items():
    if site.is_lookup:
      raise ValueError(
        f"{path}: its rows are looked up, so that its inputs are one-hot and their moments mean "
        "nothing. Leave it out of `target`"
      )

  def total(probes: Mapping[str, Sequence[Array]], params: PyTree, batch: Any) -> Array:
    call = trace_call(fn, params, (batch,), {})
    targets, _ = find_leaves(config, params)
    values = as_values(call.leaves, call.position)
    for path, site in sites.items():
      position = call.position[path]
      base = deferred(call.leaves[position])
      terms = [_tap(site, array) for array in probes[path]]
      if site.layers is not None:
        dim = site.axes.batch[0]
        terms = [spread_term(term, dim, site.layers, base.shape[dim]) for term in terms]
      values[position] = Factored(base, source_of(targets[path]), tuple(terms))
    outputs = Interpreter(opaque).evaluate(call.jaxpr, values)
    return _in_a_direction([out for out in outputs if _has_gradient(out)])

  def gradients(params: PyTree, batch: Any) -> dict[str, tuple[Array, ...]]:
    probes = {path: _probes(site) for path, site in sites.items()}
    with jax.default_matmul_precision("float32"):
      sums_by_path = jax.grad(total)(probes, params, batch)
    return {
      path: tuple(
        place(
          array, array_sharding(leaf_sharding(site.leaf), "batch in rank", site.axes, site.layers)
        )
        for array in sums_by_path[path]
      )
      for path, site in sites.items()
    }

  sums = _sums(gradients, params, batches)
  return {path: _as_moments(site, *sums.pop(path)) for path, site in sites.items()}


def _probes(site: Site) -> tuple[Array, Array]:
  """Returns the values of A of both taps of a weight, whose gradients are the statistics."""
  n, axes = site.num_inputs, site.axes
  lead = tuple(site.shape[d] for d in axes.batch)
  inputs = tuple(site.shape[d] for d in axes.inputs)
  identity = jnp.eye(n, n + 1).reshape(*(1 for _ in lead), *inputs, n + 1)
  return jnp.broadcast_to(identity, (*lead, *inputs, n + 1)), jnp.full((*lead, *inputs, 1), 1 / n)


def _tap(site: Site, array: Array) -> Tap:
  """Returns the tap of a weight with this A."""
  axes, shape = site.axes, site.shape
  sizes = [*(shape[d] for d in axes.batch), 1, *(shape[d] for d in axes.outputs)]
  a = Factor(array, axes.labels("batch in rank"))
  b = Factor(jax.random.normal(jax.random.key(0), sizes), axes.labels("batch rank out"))
  return Tap((a, b), num_inputs=site.num_inputs, counts=array.shape[-1] == 1)


def _in_a_direction(outputs: Sequence[Array]) -> Array:
  """Returns the outputs' component in a random direction.

  Their sum may be constant, as that of probabilities is.
  """
  total = jnp.zeros(())
  for i, out in enumerate(outputs):
    direction = jax.random.normal(jax.random.key(i), out.shape)
    total += jnp.sum(direction * out.astype(jnp.float32))
  return total


def _has_gradient(array: Any) -> bool:
  return is_array(array) and jnp.issubdtype(jnp.result_type(array), jnp.floating)


def _as_moments(site: Site, second: Array, count: Array) -> InputMoments:
  lead, n = second.shape[: len(site.axes.batch)], site.num_inputs
  second = second.reshape(*lead, n, n + 1)
  moments = InputMoments(
    second[..., :n], second[..., n], jnp.round(jnp.mean(count.reshape(*lead, n), axis=-1))
  )
  if not bool(jnp.any(moments.num_tokens)):
    raise ValueError(
      f"{site.path}: no token counts, since the value of `fn` does not depend on the output of its "
      "layer, or only through an operation without a gradient. Leave it out of `target`, or give "
      "another `fn`"
    )
  return moments


def _gradients(
  fn: Callable[..., Any], sites: Mapping[str, Site], params: PyTree, batches: Sequence[Any]
) -> dict[str, Array]:
  """Returns the mean gradients with respect to some weights."""

  def loss(weights: Mapping[str, Array], params: PyTree, batch: Any) -> Array:
    out = dequantized(fn)(replace_leaves(params, weights), batch)
    if jax.tree.structure(out) != jax.tree.structure(0) or jnp.shape(out) != ():
      raise ValueError(f"fn must return one number, of which the gradient is taken, got {out!r}")
    return out

  def gradients(params: PyTree, batch: Any) -> dict[str, Array]:
    leaves = dict(weights_with_path(params))
    weights = {path: _dequantized(leaves[path]) for path in sites}
    by_path = jax.grad(loss)(weights, params, batch)
    return {
      path: place(by_path[path].astype(jnp.float32), leaf_sharding(site.leaf))
      for path, site in sites.items()
    }

  sums = _sums(gradients, params, batches)
  return {path: sums.pop(path) / len(batches) for path in sites}


def _dequantized(leaf: Any) -> Array:
  return leaf.dequantize() if is_quantized(leaf) else leaf


def _sums(
  statistics: Callable[[PyTree, Any], dict[str, Any]], params: PyTree, batches: Sequence[Any]
) -> dict[str, Any]:
  """Returns the sums over the batches, computed in one compiled function."""
  leaves, structure = jax.tree.flatten(params, is_leaf=is_quantized)
  dynamic = [is_array(leaf) for leaf in leaves]
  arrays = [leaf for leaf, traced in zip(leaves, dynamic, strict=True) if traced]

  def call(arrays: Sequence[Any], batch: Any) -> dict[str, Any]:
    traced = iter(arrays)
    filled = [
      next(traced) if is_traced else leaf for leaf, is_traced in zip(leaves, dynamic, strict=True)
    ]
    return statistics(jax.tree.unflatten(structure, filled), batch)

  first = jax.jit(call)

  @functools.partial(jax.jit, donate_argnums=0)
  def add(totals: dict[str, Any], arrays: Sequence[Any], batch: Any) -> dict[str, Any]:
    return jax.tree.map(jnp.add, totals, call(arrays, batch))

  totals = first(arrays, batches[0])
  for batch in batches[1:]:
    totals = add(totals, arrays, batch)
  return totals
