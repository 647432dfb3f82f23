"""Bottleneck adapters: small trained layers between the frozen ones (Hu et al. 2021, sec. 5.1).

    y = x + up(activation(down(norm(x))))        down: D -> width, up: width -> D, with biases

| name      | config                | x                         | activation | norm | arXiv      |
|-----------|-----------------------|---------------------------|------------|------|------------|
| Adapter_H | `houlsby_config`      | attention and MLP outputs | GELU       |      | 1902.00751 |
| Adapter_L | `lin_config`          | each layer's output       | ReLU       | yes  | 2004.03829 |
| Adapter_P | `pfeiffer_config`     | each layer's output       | ReLU       |      | 2005.00247 |
| Adapter_D | `adapter_drop_config` | those of the last layers  | ReLU       |      | 2010.11918 |

The outputs of H are those of the sublayers before they are added to their inputs; a layer's output
is normalized in BERT and is not in GPT-2. `up` starts from 0, so that y = x in the first step.
Parameters: adapters (2 D width + width + D) + norms 2 D.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.checks import check_adapter
from lora_jax.adapters.copies import in_dtypes_of, trained_copy
from lora_jax.adapters.initializers import kaiming_uniform
from lora_jax.adapters.parts import ADDED
from lora_jax.adapters.start import fold_path
from lora_jax.adapters.targets import Extra, array_leaves, select_arrays
from lora_jax.fields import Count, CountOrZero, Pattern, check_fields
from lora_jax.marks import ATTENTION_OUTPUT, LAYER_OUTPUT, MLP_OUTPUT
from lora_jax.transform.marks import Mark, MarkedCall, count_layers, require_marks, trace_marks
from lora_jax.trees import as_patterns, leaves_with_path, nest, replace_leaves

NAME = "bottleneck"
EPSILON = 1e-5  # of the norm


@dataclasses.dataclass(frozen=True)
class BottleneckConfig:
  """Where bottleneck adapters are, and what they compute.

  Attributes:
    width: r, of the bottleneck.
    marks: the marked values that they replace, as in `lora_jax.marks`.
    activation: `gelu`, exact, or `relu`.
    norm: whether the adapter's input is normalized, by a LayerNorm of its own.
    num_dropped: the number of layers without adapters, the first ones.
    extra: patterns of leaves of the base model that are fully trained, a head for instance.
  """

  width: Count
  marks: tuple[str, ...]
  activation: Literal["gelu", "relu"]
  norm: bool = False
  num_dropped: CountOrZero = 0
  extra: Pattern | tuple[Pattern, ...] = ()

  def __post_init__(self):
    check_fields(self)
    if not self.marks or len(set(self.marks)) < len(self.marks):
      raise ValueError(f"marks must name one or more marks, each once, got {self.marks}")


def houlsby_config(width: int, *, extra: str | tuple[str, ...] = ()) -> BottleneckConfig:
  """Returns Adapter_H: after the attention and after the MLP (Houlsby et al. 2019).

  The authors also train the model's LayerNorms, which the paper's counts of Adapter_H do not have:
  with them, `extra=lora_jax.NORMS`.
  """
  return BottleneckConfig(width, (ATTENTION_OUTPUT, MLP_OUTPUT), "gelu", extra=extra)


def lin_config(width: int, *, extra: str | tuple[str, ...] = ()) -> BottleneckConfig:
  """Returns Adapter_L: after each layer, with a LayerNorm of its own (Lin et al. 2020)."""
  return BottleneckConfig(width, (LAYER_OUTPUT,), "relu", norm=True, extra=extra)


def pfeiffer_config(width: int, *, extra: str | tuple[str, ...] = ()) -> BottleneckConfig:
  """Returns Adapter_P: after the MLP and its LayerNorm (Pfeiffer et al. 2021).

  In BERT, the authors' code adds the adapter's output before that LayerNorm, which it then applies
  a second time; here the sum is the layer's output.
  """
  return BottleneckConfig(width, (LAYER_OUTPUT,), "relu", extra=extra)


def adapter_drop_config(
  width: int, num_dropped: int, *, extra: str | tuple[str, ...] = ()
) -> BottleneckConfig:
  """Returns Adapter_D: Adapter_P but in the first layers (Rücklé et al. 2021).

  It is their specialized AdapterDrop: the layers are the same in training and in inference.
  """
  return dataclasses.replace(pfeiffer_config(width, extra=extra), num_dropped=num_dropped)


def bottleneck_adapter(fn: Callable[..., Any], config: BottleneckConfig) -> Adaptation:
  """Returns bottleneck adapters in `fn(params, *args, **kwargs)` as an `Adaptation`.

  `fn` has to mark the values that they replace; the zoo's models do. The trainable tree is float32:

      lora_added/bottleneck/layer_3/attention_output/{down,up}/{kernel,bias}
      lora_added/bottleneck/layers/...        in stacked layers, with the adapted ones first

  `extra` is as in `LoraConfig`. An adapter takes a token's values only, so that caches and beam
  search need no change.

  Args:
    fn: any JAX function of a parameter tree and further arguments.
    config: as `houlsby_config`, `lin_config`, `pfeiffer_config` or `adapter_drop_config` make it.
  Raises:
    ValueError: by `init`, if `fn` lacks the marks, or no layer is left; by `apply`, if the
      trainable tree has other shapes or layers than `fn`; by `merge` always: no weight computes
      what an adapter does.

  >>> from jax.ad_checkpoint import checkpoint_name
  >>> fn = lambda params, x: x + checkpoint_name(jnp.sin(x @ params["kernel"]), MLP_OUTPUT)
  >>> config = BottleneckConfig(2, (MLP_OUTPUT,), "relu")
  >>> method = bottleneck_adapter(fn, config)
  >>> tune = method.init(jax.random.key(0), {"kernel": jnp.eye(3)}, jnp.ones((1, 3)))
  >>> jax.tree.map(jnp.shape, tune["lora_added"]["bottleneck"]["layer_0"]["mlp_output"]["down"])
  {'bias': (2,), 'kernel': (3, 2)}
  """
  if not isinstance(config, BottleneckConfig):
    raise ValueError(f"config must be a BottleneckConfig, got {config!r:.100}")

  def trace(params: PyTree, trained: Mapping[str, Any], args: Any, kwargs: Any) -> MarkedCall:
    visible = in_dtypes_of(_extra(config, params), trained)
    return trace_marks(fn, config.marks, replace_leaves(params, visible), args, kwargs)

  def init(key, params, *args, **kwargs):
    extra = _extra(config, params)
    copies = {path: trained_copy(f"extra {path}", leaf) for path, (_, leaf) in extra.items()}
    call = trace(params, copies, args, kwargs)
    require_marks(call, config.marks, "lora_jax.bottleneck_adapter")
    shapes = _shapes(config, call)
    if not shapes:
      raise ValueError(
        f"num_dropped={config.num_dropped} leaves no adapter in the function's layers. Lower it"
      )
    added = [(tuple(path.split("/")), _start(key, path, shapes[path])) for path in shapes]
    return nest([*added, *((keys, copies[path]) for path, (keys, _) in extra.items())])

  def apply(params, trainable, *args, lora_key=None, scaling=None, dropout_rate=None, **kwargs):
    del lora_key, scaling, dropout_rate
    added = trainable.get(ADDED) if isinstance(trainable, Mapping) else None
    if not isinstance(added, Mapping) or set(added) != {NAME}:
      raise ValueError(
        f"expected a trainable tree with adapters under '{ADDED}/{NAME}', as init returns it, got "
        f"{trainable!r:.100}"
      )
    rest = {name: part for name, part in trainable.items() if name != ADDED}
    check_adapter(rest, {}, _extra(config, params))
    call = trace(params, dict(leaves_with_path(rest)), args, kwargs)
    if call.marks:  # a function of the head, for instance, has none
      _check_shapes(trainable, _shapes(config, call))
    arrays = _arrays(config, call, added[NAME])

    def visit(mark: Mark, x: Array, p: PyTree) -> Array:
      del mark
      return bottleneck(x, p, config.activation)

    return call.evaluate(visit, arrays)

  def merge(params, trainable):
    del params, trainable
    raise ValueError(
      "bottleneck adapters cannot be merged: they are nonlinear layers of their own, which add "
      "latency (Hu et al. 2021, sec. 3). Call apply instead"
    )

  return Adaptation(init, apply, merge)


def bottleneck(
  x: Float[Array, "*batch D"], p: Mapping[str, Any], activation: Literal["gelu", "relu"]
) -> Float[Array, "*batch D"]:
  """Returns `x + up(activation(down(norm(x))))`, in the dtype of x.

  Args:
    x: hidden states.
    p: the arrays of one adapter: `down`, `up`, and perhaps `norm`.
    activation: `gelu`, exact, or `relu`.
  """
  tokens = x.reshape(-1, x.shape[-1])  # one axis of tokens, as the zoo's dense layers
  h = _layer_norm(tokens, **p["norm"]) if "norm" in p else tokens
  h = _dense(h, **p["down"])
  h = jax.nn.gelu(h, approximate=False) if activation == "gelu" else jax.nn.relu(h)
  return x + _dense(h, **p["up"]).reshape(x.shape)


def _dense(x: Array, kernel: Array, bias: Array) -> Array:
  return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)[None]


def _layer_norm(x: Array, scale: Array, bias: Array) -> Array:
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  wide = wide - wide.mean(axis=-1, keepdims=True)
  normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPSILON)
  return (normed * scale[None] + bias[None]).astype(x.dtype)


def _extra(config: BottleneckConfig, params: PyTree) -> Extra:
  """Returns the fully trained leaves, `{path: (keys, leaf)}`."""
  patterns, leaves = as_patterns(config.extra, "extra"), array_leaves(params)
  paths = select_arrays(patterns, params, leaves, "extra") if patterns else []
  return {path: leaves[path] for path in paths}


def _node(config: BottleneckConfig, mark: Mark) -> str | None:
  """Returns the path of a mark's adapter; None if its layer has none."""
  if not mark.layers and mark.number < config.num_dropped:
    return None
  layer = "layers" if mark.layers else f"layer_{mark.number}"
  return f"{ADDED}/{NAME}/{layer}/{mark.name.rpartition('/')[2]}"


def _shapes(config: BottleneckConfig, call: MarkedCall) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the adapters' arrays in a call, by path."""
  shapes: dict[str, tuple[int, ...]] = {}
  for mark in call.marks:
    path = _node(config, mark)
    count = count_layers([m for m in call.marks if m.name == mark.name]) - config.num_dropped
    if path is None or count <= 0:
      continue
    lead, width, embed_dim = (count,) if mark.layers else (), config.width, mark.shape[-1]
    shapes[f"{path}/down/kernel"] = (*lead, embed_dim, width)
    shapes[f"{path}/down/bias"] = (*lead, width)
    shapes[f"{path}/up/kernel"] = (*lead, width, embed_dim)
    shapes[f"{path}/up/bias"] = (*lead, embed_dim)
    if config.norm:
      shapes[f"{path}/norm/scale"] = shapes[f"{path}/norm/bias"] = (*lead, embed_dim)
  return shapes


def _start(key: PRNGKeyArray, path: str, shape: tuple[int, ...]) -> Array:
  """Returns initial values: `down` as LoRA's A, the identity as norm, zeros otherwise."""
  if path.endswith("/down/kernel"):
    return kaiming_uniform(fold_path(key, path), shape, (), shape[-2])[0]
  fill = 1.0 if path.endswith("/norm/scale") else 0.0
  return jnp.full(shape, fill, jnp.float32)


def _check_shapes(trainable: Mapping[str, PyTree], expected: Mapping[str, tuple[int, ...]]) -> None:
  """Raises ValueError unless a trainable tree has the adapters of a call."""
  added = leaves_with_path(trainable[ADDED])
  leaves = {f"{ADDED}/{path}": jnp.shape(leaf) for path, leaf in added}
  problems = [f"missing: {path}" for path in expected if path not in leaves]
  problems += [f"unexpected: {path}" for path in leaves if path not in expected]
  problems += [
    f"mis-shaped: {path} is {shape}, expected {expected[path]}"
    for path, shape in leaves.items()
    if path in expected and shape != expected[path]
  ]
  if problems:
    raise ValueError(
      f"the trainable tree does not fit the function's layers: {'; '.join(problems[:5])}"
      f"{f'; {len(problems) - 5} more' if len(problems) > 5 else ''}. Call init for this function, "
      "params and config"
    )


def _arrays(config: BottleneckConfig, call: MarkedCall, nodes: PyTree) -> dict[Mark, PyTree]:
  """Returns the arrays of each mark; zeros in stacked layers without adapters, which add 0."""

  def whole_stack(leaf: Array) -> Array:
    return jnp.pad(leaf, [(config.num_dropped, 0), *[(0, 0)] * (leaf.ndim - 1)])

  arrays: dict[Mark, PyTree] = {}
  for mark in call.marks:
    path = _node(config, mark)
    if path is not None:
      layer, name = path.split("/")[2:]
      node = nodes[layer][name]
      arrays[mark] = jax.tree.map(whole_stack, node) if mark.layers else node
  return arrays
