"""The layer kinds that LoRA is tested on: one table, read by the tests and by the docs.

`python -m tests.layer_kinds` prints the lists of docs/layer_kinds.md. Every kind is an unmodified
model with its parameters and inputs. The sizes are chosen so that no activation has a weight's
size.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

import lora_jax as lj

KEY = jax.random.key(7)
D_IN, D_OUT = 26, 34  # 26 * 34 = 884 elements: no activation below has so many


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32, scale: float = 1) -> jax.Array:
  """Draws and casts in NumPy: JAX would compile each anew for every shape."""
  values = np.float32(scale * np.random.default_rng(seed).standard_normal(shape))
  return jnp.asarray(values.astype(dtype))


def weight(*shape: int, fan_in: int | None = None, seed: int = 1) -> jax.Array:
  return normal(*shape, seed=seed, scale=(fan_in or shape[0]) ** -0.5)


@dataclass(frozen=True)
class Case:
  """A function, its arguments, and the weights to adapt."""

  fn: Callable[..., Any]
  params: Any
  args: tuple[Any, ...]
  target: str | tuple[str, ...] = ".*kernel"
  rules: tuple[lj.LoraRule, ...] = ()
  opaque: dict[str, Callable[..., Any]] = field(default_factory=dict)
  rank: int = 2


@dataclass(frozen=True)
class LayerKind:
  family: str
  name: str
  build: Callable[[], Case]
  tolerance: float = 2e-4

  def __str__(self) -> str:
    return f"{self.family}: {self.name}"


KINDS: list[LayerKind] = []


def kind(family: str, name: str, tolerance: float = 2e-4):
  """Adds the decorated builder to the table."""

  def add(build: Callable[[], Case]) -> Callable[[], Case]:
    KINDS.append(LayerKind(family, name, build, tolerance))
    return build

  return add


# ---- Flax Linen ------------------------------------------------------------------------


def linen(module: nn.Module, *args: Any, method: str | None = None, **options: Any) -> Case:
  shapes = jax.eval_shape(lambda: module.init(KEY, *args, method=method)["params"])
  leaves, structure = jax.tree.flatten(shapes)
  scales = [leaf.size**-0.5 * leaf.shape[-1] ** 0.5 for leaf in leaves]  # fan_in ** -0.5
  draws = zip(leaves, scales, range(len(leaves)), strict=True)
  params = [normal(*x.shape, seed=i, dtype=x.dtype, scale=scale) for x, scale, i in draws]

  def fn(params, *args):
    return module.apply({"params": params}, *args, method=method)

  return Case(fn, jax.tree.unflatten(structure, params), args, **options)


X = (5, D_IN)


@kind("Flax Linen", "Dense, float32")
def _():
  return linen(nn.Dense(D_OUT), normal(*X))


@kind("Flax Linen", "Dense, bfloat16 compute", tolerance=2e-2)
def _():
  return linen(nn.Dense(D_OUT, dtype=jnp.bfloat16), normal(*X))


@kind("Flax Linen", "Dense, bfloat16 parameters", tolerance=2e-2)
def _():
  module = nn.Dense(D_OUT, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  return linen(module, normal(*X, dtype=jnp.bfloat16))


@kind("Flax Linen", "DenseGeneral, several input axes")
def _():
  return linen(nn.DenseGeneral(D_OUT, axis=(-2, -1)), normal(3, 4, 9))


@kind("Flax Linen", "DenseGeneral, several output axes")
def _():
  return linen(nn.DenseGeneral((4, 9)), normal(*X))


@kind("Flax Linen", "DenseGeneral, batch_dims")
def _():
  return linen(nn.DenseGeneral(17, axis=-1, batch_dims=(0,)), normal(3, 5, 13))


@kind("Flax Linen", "Einsum")
def _():
  return linen(nn.Einsum((D_IN, 4, 9), "btd,dhk->bhtk"), normal(2, 3, D_IN))


@kind("Flax Linen", "Einsum, fused QKV")
def _():
  class Fused(nn.Module):
    @nn.compact
    def __call__(self, x):
      q, k, v = nn.Einsum((3, D_IN, 4, 9), "btd,sdhk->sbthk", use_bias=False)(x)
      return nn.dot_product_attention(q, k, v)

  return linen(Fused(), normal(2, 3, D_IN))


@kind("Flax Linen", "Embed")
def _():
  ids = jnp.array([[1, 5, 5, 0], [36, 2, 7, 1]])
  return linen(nn.Embed(37, 13), ids, target=".*embedding")


@kind("Flax Linen", "Embed, tied to the head by attend")
def _():
  class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
      embed = nn.Embed(37, 13)
      return embed.attend(jnp.tanh(embed(ids)))

  return linen(Tied(), jnp.array([[1, 5, 5], [36, 2, 7]]), target=".*embedding")


@kind("Flax Linen", "Conv, 1-d, dilated")
def _():
  return linen(nn.Conv(23, (3,), kernel_dilation=2), normal(2, 11, 7))


@kind("Flax Linen", "Conv, 2-d, strided")
def _():
  return linen(nn.Conv(23, (3, 3), strides=2), normal(2, 8, 8, 7))


@kind("Flax Linen", "Conv, 3-d")
def _():
  return linen(nn.Conv(11, (3, 2, 3), padding="VALID"), normal(1, 4, 4, 4, 5))


@kind("Flax Linen", "ConvTranspose")
def _():
  return linen(nn.ConvTranspose(23, (3, 3), strides=(2, 2)), normal(1, 4, 4, 7))


@kind("Flax Linen", "ConvTranspose, transpose_kernel")
def _():
  module = nn.ConvTranspose(23, (3, 3), strides=(2, 2), transpose_kernel=True)
  return linen(module, normal(1, 4, 4, 7))


@kind("Flax Linen", "Conv, grouped")
def _():
  return linen(nn.Conv(27, (3, 3), feature_group_count=3), normal(2, 5, 5, 12))


@kind("Flax Linen", "Conv, depthwise")
def _():
  return linen(nn.Conv(21, (3, 3), feature_group_count=7), normal(2, 5, 5, 7))


@kind("Flax Linen", "MultiHeadDotProductAttention")
def _():
  module = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=36, out_features=D_OUT)
  return linen(module, normal(2, 3, D_IN))


class Block(nn.Module):
  width: int = D_IN

  @nn.compact
  def __call__(self, x, _=None):
    return x + nn.Dense(self.width)(jnp.tanh(nn.Dense(D_OUT)(x))), None


def scanned(block: Any) -> nn.Module:
  options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
  return nn.scan(block, **options)()


class First(nn.Module):
  """Returns only the carry of a block."""

  make: Callable[[], nn.Module]

  @nn.compact
  def __call__(self, x):
    return self.make()(x, None)[0]


@kind("Flax Linen", "nn.scan over layers")
def _():
  return linen(First(lambda: scanned(Block)), normal(*X))


@kind("Flax Linen", "nn.remat")
def _():
  return linen(First(nn.remat(Block)), normal(*X))


@kind("Flax Linen", "nn.remat with a policy, under nn.scan")
def _():
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  block = nn.remat(Block, policy=policy, prevent_cse=False)
  return linen(First(lambda: scanned(block)), normal(*X))


@kind("Flax Linen", "nn.vmap over a stack of layers")
def _():
  stacked = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
  return linen(stacked(D_OUT), normal(3, *X))


# ---- Flax NNX --------------------------------------------------------------------------


def from_nnx(model: nnx.Module, *args: Any, **options: Any) -> Case:
  fn, params = lj.functional(model)
  return Case(fn, params, args, **options)


@kind("Flax NNX", "Linear")
def _():
  return from_nnx(nnx.Linear(D_IN, D_OUT, rngs=nnx.Rngs(0)), normal(*X))


@kind("Flax NNX", "LinearGeneral")
def _():
  model = nnx.LinearGeneral((4, 9), (5, 7), axis=(-2, -1), rngs=nnx.Rngs(0))
  return from_nnx(model, normal(3, 4, 9))


@kind("Flax NNX", "Einsum")
def _():
  model = nnx.Einsum("btd,dhk->bthk", (D_IN, 4, 9), rngs=nnx.Rngs(0))
  return from_nnx(model, normal(2, 3, D_IN))


@kind("Flax NNX", "MultiHeadAttention")
def _():
  model = nnx.MultiHeadAttention(4, D_IN, 36, D_OUT, decode=False, rngs=nnx.Rngs(0))
  return from_nnx(model, normal(2, 3, D_IN))


@kind("Flax NNX", "Embed, tied by attend")
def _():
  class Tied(nnx.Module):
    def __init__(self, rngs):
      self.embed = nnx.Embed(37, 13, rngs=rngs)

    def __call__(self, ids):
      return self.embed.attend(jnp.tanh(self.embed(ids)))

  ids = jnp.array([[1, 5, 5], [36, 2, 7]])
  return from_nnx(Tied(nnx.Rngs(0)), ids, target=".*embedding")


@kind("Flax NNX", "Conv")
def _():
  return from_nnx(nnx.Conv(7, 23, (3, 3), rngs=nnx.Rngs(0)), normal(2, 6, 6, 7))


@kind("Flax NNX", "scan and remat over layers")
def _():
  class Layer(nnx.Module):
    def __init__(self, rngs):
      self.dense = nnx.Linear(D_IN, D_IN, rngs=rngs)

    def __call__(self, x):
      return x + jnp.tanh(self.dense(x))

  class Stack(nnx.Module):
    def __init__(self, rngs):
      @nnx.split_rngs(splits=3)
      @nnx.vmap(in_axes=(0,), out_axes=0)
      def make(rngs):
        return Layer(rngs)

      self.layers = make(rngs)

    def __call__(self, x):
      @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
      @nnx.remat
      def step(x, layer):
        return layer(x)

      return step(x, self.layers)

  return from_nnx(Stack(nnx.Rngs(0)), normal(*X))


# ---- plain functions -------------------------------------------------------------------


def plain(fn: Callable[..., Any], w: jax.Array, *args: Any, **options: Any) -> Case:
  return Case(lambda params, *args: fn(params["w"], *args), {"w": w}, args, target="w", **options)


@kind("plain", "x @ w.T")
def _():
  return plain(lambda w, x: x @ w.T, weight(D_OUT, D_IN, fan_in=D_IN), normal(*X))


@kind("plain", "w @ x")
def _():
  return plain(lambda w, x: w @ x, weight(D_OUT, D_IN, fan_in=D_IN), normal(D_IN, 5))


@kind("plain", "w split into q, k, v")
def _():
  def fn(w, x):
    q, k, v = jnp.split(w, 3, axis=1)
    return (x @ q) * (x @ k) + x @ v

  return plain(fn, weight(D_IN, 33), normal(*X))


@kind("plain", "concatenated weights, one of them plain")
def _():
  def fn(params, x):
    return x @ jnp.concatenate([params["q"], params["k"], params["v"]], axis=1)

  params = {name: weight(D_IN, 17, seed=i) for i, name in enumerate("qkv")}
  return Case(fn, params, (normal(*X),), target="[qv]")


@kind("plain", "weights stacked by jnp.stack, then scanned")
def _():
  def fn(params, x):
    stack = jnp.stack([params[name] for name in "abc"])
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

  params = {name: weight(D_IN, D_IN, seed=i) for i, name in enumerate("abc")}
  return Case(fn, params, (normal(*X),), target="[abc]")


@kind("plain", "stacked weights in a Python loop")
def _():
  def fn(w, x):
    for i in range(3):
      x = jnp.tanh(x @ w[i])
    return x

  return plain(fn, weight(3, D_IN, D_IN, fan_in=D_IN), normal(*X))


@kind("plain", "stacked weights in a fori_loop")
def _():
  def fn(w, x):
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w[i]), x)

  return plain(fn, weight(3, D_IN, D_IN, fan_in=D_IN), normal(*X))


@kind("plain", "weights among a loop's carried values")
def _():
  def fn(w, x):
    return lax.fori_loop(0, 3, lambda i, s: (s[0], jnp.tanh(s[1] @ s[0])), (w, x))[1]

  return plain(fn, weight(D_IN, D_IN), normal(*X))


@kind("plain", "cond")
def _():
  def fn(w, x):
    return lax.cond(x[0, 0] > 0, lambda w, x: x @ w, lambda w, x: 2 * jnp.sin(x @ w), w, x)

  return plain(fn, weight(D_IN, D_OUT), normal(*X))


@kind("plain", "ragged_dot over experts")
def _():
  sizes = jnp.array([2, 0, 3], jnp.int32)

  def fn(w, x, sizes):
    return lax.ragged_dot(x, w, sizes)

  return plain(fn, weight(3, D_IN, D_OUT, fan_in=D_IN), normal(*X), sizes)


@kind("plain", "one matrix per token by indexing experts")
def _():
  def fn(w, x, experts):
    return jnp.einsum("bd,bdo->bo", x, w[experts])

  return plain(fn, weight(4, 13, 17, fan_in=13), normal(3, 13), jnp.array([2, 0, 2]))


@kind("plain", "one_hot @ w")
def _():
  def fn(w, ids):
    return jax.nn.one_hot(ids, 37) @ w

  return plain(fn, weight(37, 13), jnp.array([1, 5, 36]))


@kind("plain", "w[ids]")
def _():
  return plain(lambda w, ids: w[ids], weight(37, 13), jnp.array([[1, 5, 5], [-1, 2, 7]]))


@kind("plain", "w[ids], out of bounds filled, clipped, promised")
def _():
  def fn(w, ids):
    filled = jnp.take(w, ids, axis=0, mode="fill", fill_value=0.5)
    clipped = jnp.take(w, ids, axis=0, mode="clip")
    promised = w.at[ids % 37].get(mode="promise_in_bounds")
    return jnp.stack([filled, clipped, promised])

  return plain(fn, weight(37, 13), jnp.array([1, 36, 99]))


@kind("plain", "w[ids] along the second axis, scaled")
def _():
  def fn(w, ids):
    return jnp.take(w, ids, axis=1) * 3.0 + 1.0

  return plain(fn, weight(13, 37), jnp.array([1, 36, 4]))


@kind("plain", "one weight used twice")
def _():
  return plain(lambda w, x: jnp.tanh(x @ w) @ w + x, weight(D_IN, D_IN), normal(*X))


@kind("plain", "scaled per channel and by a scalar, negated")
def _():
  def fn(w, x, per_out, per_in):
    return x @ (-(w * per_out[None, :]) / per_in[:, None] * 0.5)

  scales = jnp.linspace(0.5, 2, D_OUT), jnp.linspace(0.5, 2, D_IN)
  return plain(fn, weight(D_IN, D_OUT), normal(*X), *scales)


@kind("plain", "reshaped, inputs and outputs kept apart")
def _():
  def fn(w, x):
    return x @ w.reshape(D_IN, 2, 17)[:, 0, :] + x @ w.reshape(2, 13, D_OUT)[:, :, 17:].reshape(
      D_IN, 17
    )

  return plain(fn, weight(D_IN, D_OUT), normal(*X))


@kind("plain", "flipped, padded, sliced")
def _():
  def fn(w, x, start):
    padded = jnp.pad(jnp.flip(w, 0), ((0, 0), (2, 3)))
    return x @ padded + x @ lax.dynamic_slice(padded, (0, start), (D_IN, 1))

  return plain(fn, weight(D_IN, D_OUT), normal(*X), jnp.int32(4))


@kind("plain", "vmap over examples inside the function")
def _():
  def fn(w, x):
    return jax.vmap(lambda row: jnp.tanh(w.T @ row))(x)

  return plain(fn, weight(D_IN, D_OUT), normal(*X))


@kind("plain", "grad inside the function")
def _():
  def fn(w, x):
    return jax.grad(lambda x: jnp.sum(jnp.tanh(x @ w)))(x)

  return plain(fn, weight(D_IN, D_OUT), normal(*X))


@kind("plain", "nested jit, barrier, checkpoint_name, cast")
def _():
  @jax.jit
  def inner(w, x):
    w, x = lax.optimization_barrier((w, x))
    return x @ checkpoint_name(w, "w").astype(jnp.float32)

  return plain(lambda w, x: jnp.tanh(inner(w, x)), weight(D_IN, D_OUT), normal(*X))


@kind("plain", "integer and boolean inputs")
def _():
  def fn(w, ids, x):
    return ids @ w + (x > 0) @ w + jnp.dot(ids, w)

  ids = jnp.asarray(np.random.default_rng(2).integers(-3, 4, X), jnp.int8)
  return plain(fn, weight(D_IN, D_OUT), ids, normal(*X))


@kind("plain", "bfloat16 input, float32 weight, by lax.dot_general")
def _():
  def fn(w, x):
    dims = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)

  return plain(fn, weight(D_IN, D_OUT), normal(*X, dtype=jnp.bfloat16))


@kind("plain", "broadcast to a stack, padded on two axes")
def _():
  def fn(w, x):
    stack = jnp.pad(jnp.broadcast_to(w, (3, 13, 17)), ((1, 1), (0, 2), (0, 0)))
    return jnp.einsum("bi,eio->beo", x, stack)

  return plain(fn, weight(13, 17), normal(2, 15))


@kind("plain", "contracted over an axis that it is broadcast along")
def _():
  def fn(w, x):
    return jnp.einsum("bei,eio->bo", x, jnp.broadcast_to(w, (2, 13, 17)))

  return plain(fn, weight(13, 17), normal(3, 2, 13))


@kind("plain", "vmap over scalar ids")
def _():
  return plain(lambda w, ids: jax.vmap(lambda i: w[i])(ids), weight(37, 13), jnp.array([1, 5, 36]))


@kind("plain", "broadcast to a stack, looked up with out-of-bounds ids filled")
def _():
  def fn(w, x, ids):
    stack = jnp.broadcast_to(w, (3, 13, 17)).at[ids].get(mode="fill", fill_value=0)
    return jnp.einsum("bi,bio->bo", x, stack)

  return plain(fn, weight(13, 17), normal(4, 13), jnp.array([0, 2, 9, 1]))


@kind("plain", "single rows, added, broadcast and stacked")
def _():
  def fn(w, x):
    rows = jnp.stack([w[2], w[4], w[2] * 0.5])
    return jnp.tanh(x + w[1][None]) + jnp.concatenate([w[3][None], rows[:2]]) @ rows.T @ rows

  return plain(fn, weight(37, 13), normal(3, 13))


@kind("plain", "rows taken one by one in a scan")
def _():
  def fn(w, ids, x):
    return lax.scan(lambda c, i: (jnp.tanh(c + w[i]), None), x, ids)[0]

  return plain(fn, weight(37, 13), jnp.array([1, 5, 36]), normal(13))


# ---- where a rule is given, or a mesh --------------------------------------------------


@jax.custom_vjp
def kernel_dot(x, w):
  """A matmul that the interpreter cannot look into, with its own derivative."""
  return x @ w


kernel_dot.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


def dot_rule(call, x, w):
  """The rule of any opaque `x @ w`: the function for the base weight, all else from `dot`."""
  return w.dot(x, ((1,), (0,)), base=lambda x: call(x, w.base))


@kind("opaque", "custom_vjp kernel, by a given rule")
def _():
  def fn(w, x):
    return jnp.tanh(kernel_dot(x, w))

  opaque = {"kernel_dot": dot_rule}
  return plain(fn, weight(D_IN, D_OUT), normal(*X), opaque=opaque)


@kind("opaque", "Pallas kernel, by a given rule")
def _():
  def body(x, w, out):
    out[...] = x[...] @ w[...]

  @jax.custom_vjp
  def matmul(x, w):
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pl.pallas_call(body, shape, interpret=True, name="pallas_matmul")(x, w)

  matmul.defvjp(lambda x, w: (matmul(x, w), (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
  opaque = {"matmul": dot_rule}
  return plain(lambda w, x: jnp.tanh(matmul(x, w)), weight(D_IN, D_OUT), normal(*X), opaque=opaque)


@kind("mesh", "shard_map, weight split over its inputs")
def _():
  mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))

  def fn(w, x):
    def local(x, w):
      return lax.psum(x @ w, "tensor")

    specs = {"in_specs": (P(None, "tensor"), P("tensor", None)), "out_specs": P()}
    return jnp.tanh(jax.shard_map(local, mesh=mesh, **specs)(x, w))

  return plain(fn, weight(D_IN, D_OUT), normal(*X))


@kind("mesh", "shard_map over the batch, weight replicated")
def _():
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

  def fn(w, x):
    def local(x, w):
      return jnp.tanh(x @ w)

    return jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))(x, w)

  return plain(fn, weight(D_IN, D_OUT), normal(4, D_IN))


@kind("mesh", "shard_map, weight gathered from its shards")
def _():
  mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

  def fn(w, x):
    def local(x, w):
      return jnp.tanh(x @ lax.all_gather(w, "fsdp", axis=0, tiled=True))

    specs = {"in_specs": (P("fsdp"), P("fsdp")), "out_specs": P("fsdp")}
    return jax.shard_map(local, mesh=mesh, **specs)(x, w)

  return plain(fn, weight(D_IN, D_OUT), normal(4, D_IN))


@kind("mesh", "with_sharding_constraint on a weight")
def _():
  mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))

  def fn(w, x):
    w = lax.with_sharding_constraint(w, jax.NamedSharding(mesh, P(None, "tensor")))
    return jnp.tanh(x @ w)

  return plain(fn, weight(D_IN, D_OUT), normal(*X))


# ---- other libraries, as they are ------------------------------------------------------


@kind("Equinox", "MLP")
def _():
  import equinox as eqx

  model = eqx.nn.MLP(D_IN, 11, D_OUT, depth=2, key=KEY)
  args = (normal(*X),)  # the model's activation functions are leaves too, and static
  return Case(lambda model, x: jax.vmap(model)(x), model, args, target=r"layers/\d/weight")


@kind("Equinox", "Embedding, under vmap")
def _():
  import equinox as eqx

  model = eqx.nn.Embedding(37, 13, key=KEY)
  ids = jnp.array([1, 5, 36])
  return Case(lambda model, ids: jax.vmap(model)(ids), model, (ids,), target="weight")


@kind("Haiku", "MLP")
def _():
  import haiku as hk

  model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([D_OUT, 11])(x)))
  x = normal(*X)
  return Case(model.apply, model.init(KEY, x), (x,), target=".*/w")


@kind("Keras 3 on JAX", "Dense, by stateless_call")
def _():
  import keras

  keras.utils.set_random_seed(0)
  model = keras.Sequential([keras.Input((D_IN,)), keras.layers.Dense(D_OUT, "gelu")])
  params = {v.path: v.value for v in model.trainable_variables}

  def fn(params, x):
    variables = [params[v.path] for v in model.trainable_variables]
    with jax.numpy_rank_promotion("allow"):  # Keras adds biases so
      return model.stateless_call(variables, [], x)[0]

  return Case(fn, params, (normal(*X),))


TITLES = {
  "plain": "Plain JAX functions",
  "opaque": "Custom kernels, by a rule that you pass",
  "mesh": "Sharded weights",
}
CODE = re.compile(r"\w+ @ [\w.]+|\w+\[\w+\]|\w+(?:[._]\w+)+")


def lists() -> str:
  """Returns the lists of docs/layer_kinds.md: the layers of every family, with their cases."""
  families: dict[str, dict[str, list[str]]] = {}
  for kind in KINDS:
    layer, _, case = kind.name.partition(", ")
    families.setdefault(kind.family, {}).setdefault(layer, []).append(case)
  lines = []
  for family, layers in families.items():
    lines += [f"## {TITLES.get(family, family)} ({sum(map(len, layers.values()))})", ""]
    for layer, cases in layers.items():
      separator = ": " if len(cases) > 1 else ", " if cases[0] else ""
      item = f"- {layer}{separator}{'; '.join(case or 'plain' for case in cases if separator)}"
      lines.append(CODE.sub(r"`\g<0>`", item))
    lines.append("")
  return "\n".join(lines).strip()


if __name__ == "__main__":
  print(lists())
