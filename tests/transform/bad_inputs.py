"""Bad inputs of the transform and of trees: weights, uses, patterns, masks and NNX models."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

import lora_jax as lj
from lora_jax.axes import LoraAxes

from tests.bad_inputs import BadInput
from tests.layer_kinds import kernel_dot

KEY = jax.random.key(0)
X, W = jnp.ones((3, 4)), jnp.ones((4, 4))
REFUSED = lj.UnsupportedOperation
TREE = {"base": {"a": 1.0, "b": 2.0}, "adapter": {}}


def init(
  name: str,
  use: Callable[..., Any],
  words: tuple[str, ...],
  w: Any = W,
  error: type[Exception] = ValueError,
  x: Any = X,
  rule: dict[str, Any] | None = None,
  opaque: dict[str, Any] | None = None,
  **options: Any,
) -> BadInput:
  """Returns a row that adapts `w` in `use(w, x)`."""

  def call(_):
    rules = [lj.LoraRule(".*", **rule)] if rule else []
    config = lj.LoraConfig(**{"rank": 2, "alpha": 4.0, "target": "w", "rules": rules} | options)
    with warnings.catch_warnings(action="ignore"):  # that a weight is materialized
      lj.lora(lambda p, x: use(p["w"], x), config, opaque).init(KEY, {"w": w}, x)

  return BadInput(f"init: {name}", call, words, error)


def matmul(w, x):
  return x @ w


def dtype(kind: Any, *words: str) -> BadInput:
  name = np.dtype(kind).str if kind == ">f4" else np.dtype(kind).name
  return init(f"a weight of {name}", matmul, ("w", *words), np.ones((4, 4)).astype(kind))


DTYPES = [
  dtype(np.int8, "cannot be adapted", "got int8"),
  dtype(np.int64, "cannot be adapted", "got int64"),
  dtype(ml_dtypes.int4, "cannot be adapted", "got int4"),
  dtype(ml_dtypes.uint4, "cannot be adapted", "got uint4"),
  dtype(bool, "cannot be adapted", "got bool"),
  dtype(np.complex64, "cannot be adapted", "got complex64", "narrow `target`"),
  dtype(ml_dtypes.float8_e8m0fnu, "cannot be adapted", "got float8_e8m0fnu"),
  dtype(">f4", "is a NumPy array of float32 in another byte order", "x.astype(np.float32)"),
  dtype(np.longdouble, "is a NumPy array of", "which JAX does not have", "x.astype(np.float32)"),
  dtype("U1", "target 'w' matches w", "not an array"),
  init("a vector", lambda w, x: x + w[None], ("w cannot be adapted", "shape (4,)"), jnp.ones(4)),
  init("a number", lambda w, x: x + w, ("w cannot be adapted", "shape ()"), jnp.ones(())),
  BadInput(
    "init: an input of another byte order",
    lambda _: lj.lora(lambda p, x: x @ p["w"], lj.LoraConfig(2, 4.0, "w")).init(
      KEY, {"w": W}, np.ones((3, 4), ">f4")
    ),
    ("args: 0", "float32 in another byte order", "x.astype(np.float32)"),
  ),
]

ASK = "axes=LoraAxes(batch, inputs, outputs)"
ALLOW = "on_unhandled='materialize'"
ALLOWED = {"on_unhandled": "materialize"}
STACK = jnp.ones((2, 4, 4))
USES = [
  init("a nonlinear use", lambda w, x: x @ jnp.abs(w), ("'abs'", "w", ALLOW), error=REFUSED),
  init("an additive use", lambda w, x: x @ (w + 1), ("'add'", ALLOW), error=REFUSED),
  init("a cast to integers", lambda w, x: w.astype(int), ("a cast to int", ALLOW), error=REFUSED),
  init("a product with itself", lambda w, x: w @ w, ("two adapted weights",), error=REFUSED),
  init("a returned weight", lambda w, x: w, ("returned by the function", ALLOW), error=REFUSED),
  init(
    "an opaque use", lambda w, x: kernel_dot(x, w), ("opaque={'kernel_dot': rule}",), error=REFUSED
  ),
  init(
    "all axes contracted", lambda w, x: jnp.einsum("ab,ab->", w, w * 0 + 1.0 * W), (), error=REFUSED
  ),
  *(
    init(
      f"an opaque rule, {name}", lambda w, x: kernel_dot(x, w), words, opaque={"kernel_dot": rule}
    )
    for name, rule, words in (
      ("None", lambda call, x, w: None, ("opaque['kernel_dot']", "NoneType", "shape (3, 4)")),
      ("another shape", lambda call, x, w: x.sum(), ("float32 of shape (3, 4)", "shape ()")),
      ("another dtype", lambda call, x, w: x.astype(int), ("float32 of shape", "got int32")),
      ("two outputs", lambda call, x, w: (x, x), ("shape (3, 4); got", "(3, 4), float32")),
    )
  ),
  init("an unused weight", lambda w, x: x, ("never used by the function: w", "Narrow `target`")),
  init(
    "a materialized stack",
    lambda w, x: jnp.abs(w).sum(0) @ x.T,
    ("w is only used where it is materialized", ASK),
    STACK,
    rule=ALLOWED,
  ),
  init(
    "two uses of other axes",
    lambda w, x: (
      jnp.einsum("bi,ijk->bjk", x, w).sum() + jnp.einsum("bj,ijk->bik", x[:, :4], w).sum()
    ),
    ("conflicting uses of w", "Leave it out of `target`", ASK),
    jnp.ones((4, 4, 4)),
  ),
  init(
    "dropout of a materialized weight",
    lambda w, x: x @ jnp.abs(w),
    ("w: LoRA dropout acts on the input of a layer", "LoraRule(pattern, dropout=0.0)"),
    rule=ALLOWED,
    dropout=0.1,
  ),
  init(
    "given axes twice",
    matmul,
    ("w: axes must give each of the 2 axes of the weight one role",),
    rule={"axes": LoraAxes((), (0,), (0,))},
  ),
  init(
    "given axes without an output",
    matmul,
    ("w: axes need an input and an output axis",),
    rule={"axes": LoraAxes((), (0, 1), ())},
  ),
  init(
    "axes that no use fits",
    lambda w, x: x @ w.reshape(8, 2)[:4],
    ("reshape", "merges", ALLOW),
    error=REFUSED,
    rule={"axes": LoraAxes((), (0,), (1,))},
  ),
  init(
    "branches of weights",
    lambda w, x: x @ lax.cond(x[0, 0] > 0, jnp.tanh, jnp.sin, w),
    (),
    error=REFUSED,
  ),
]


def pattern(name: str, call: Callable[[], Any], *words: str) -> BadInput:
  return BadInput(f"tree: {name}", lambda _: call(), words)


EVIL = "not a regular expression"
TREES = [
  pattern("match, an open bracket", lambda: lj.match(TREE, "("), "pattern: '('", EVIL),
  pattern("match, no such leaf", lambda: lj.match(TREE, "base/c"), "'base/c'", "base/a"),
  pattern("match, a back reference", lambda: lj.match(TREE, r"(a)\1"), EVIL, "back references"),
  pattern("match, a long pattern", lambda: lj.match(TREE, "a" * 10_001), "at most 10,000"),
  pattern("match, a deep pattern", lambda: lj.match(TREE, "(" * 5000 + ")" * 5000), EVIL),
  pattern("match, many ways", lambda: lj.match({"a" * 99: 1}, "(a+)+b"), "matches none"),
  pattern("match, a number", lambda: lj.match(TREE, [5]), "a pattern must be a string, got 5"),
  pattern("match, None", lambda: lj.match(TREE, None), "a pattern or a list", "None"),
  pattern("label, a leaf without", lambda: lj.label(TREE, {"base/a": "x"}), "base/b", "r'.*'"),
  pattern("label, no such leaf", lambda: lj.label(TREE, {"c": "x"}), "label pattern 'c'"),
  pattern("label, a wrong pattern", lambda: lj.label(TREE, {"[": "x"}), "label pattern: '['", EVIL),
  pattern("mask of a base", lambda: lj.trainable_mask({"a": 1}), "combined tree", "['a']"),
  pattern("mask of a list", lambda: lj.trainable_mask([1]), "combined tree", "list"),
  pattern("mask, extra", lambda: lj.trainable_mask(TREE, extra="a"), "extra 'a'", "base/a"),
  pattern("mask, wrong extra", lambda: lj.trainable_mask(TREE, extra="*"), "extra: '*'", EVIL),
  pattern("partition, a mask of less", lambda: lj.partition({"a": 1}, {}), "structure", "a"),
  pattern("partition, no bools", lambda: lj.partition({"a": 1}, {"a": "x"}), "mask of a", "'x'"),
  pattern("combine, twice", lambda: lj.combine({"a": 1}, {"a": 2}), "'a' is in 2 of the parts"),
  pattern("combine, other trees", lambda: lj.combine({"a": 1}, {"b": None}), "parts", "a", "b"),
  pattern("combine nothing", lambda: lj.combine(), "parts", "got none"),
]


@functools.cache
def nnx_model(kind: str) -> tuple[Callable[..., Any], Any]:
  from flax import nnx

  model = {
    "norm": lambda: nnx.BatchNorm(4, rngs=nnx.Rngs(0)),
    "dropout": lambda: nnx.Dropout(0.5, rngs=nnx.Rngs(0)),
  }[kind]()
  return lj.functional(model)


def nnx_call(kind: str, *words: str) -> BadInput:
  def call(_):
    fn, params = nnx_model(kind)
    fn(params, X)

  return BadInput(f"NNX: a call with {kind} in training", call, words)


NNX = [
  BadInput("NNX: a dict", lambda _: lj.functional({}), ("NNX model, got dict", "model.apply")),
  BadInput("NNX: a class", lambda _: lj.functional(int), ("NNX model, got type",)),
  nnx_call("norm", "mean (BatchStat), var (BatchStat)", "model.eval()"),
  nnx_call("dropout", "rngs/count (RngCount)", "model.eval()", "rngs=nnx.Rngs(...)"),
]

ROWS = [*DTYPES, *USES, *TREES, *NNX]
