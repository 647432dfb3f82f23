"""Bad inputs of configs, functions and optimizers, and adapters from disk."""

import functools
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj

from tests.bad_inputs import BadInput

KEY = jax.random.key(0)
NAN, INFINITY = math.nan, math.inf
PARAMS = {"layer_0": {"w": jnp.ones((4, 4))}, "layer_1": {"w": jnp.ones((4, 4))}}
CONFIG = {"rank": 2, "alpha": 4.0, "target": ".*"}
X = jnp.ones((2, 4))


def fn(params: Any, x: jax.Array) -> jax.Array:
  return x @ params["layer_0"]["w"] @ params["layer_1"]["w"]


def square(params: Any, x: jax.Array) -> jax.Array:
  return x @ params["w"]


def config(words: tuple[str, ...], **options: Any) -> BadInput:
  name = ", ".join(f"{key}={value!r:.60}" for key, value in options.items())
  return BadInput(f"LoraConfig: {name}", lambda _: lj.LoraConfig(**CONFIG | options), words)


def rule(words: tuple[str, ...], **options: Any) -> BadInput:
  name = ", ".join(f"{key}={value!r:.60}" for key, value in options.items())
  call = lambda _: lj.LoraRule(**{"pattern": ".*"} | options)  # noqa: E731
  return BadInput(f"LoraRule: {name}", call, words)


def variant(words: tuple[str, ...], **options: Any) -> BadInput:
  changed = lj.LORA._replace(**options)
  name = ", ".join(f"{key}={value!r:.60}" for key, value in options.items())
  return BadInput(f"Variant: {name}", lambda _: lj.LoraConfig(**CONFIG, variant=changed), words)


CONFIGS = [
  config(("rank", "an integer in [1, inf)", "got 0"), rank=0),
  config(("rank", "an integer in [1, inf)", "got -1"), rank=-1),
  config(("rank", "an integer", "got 2.0"), rank=2.0),
  config(("rank", "an integer", "got True"), rank=True),
  config(("rank", "an integer", "got None"), rank=None),
  config(("rank", "an integer", "got '8'"), rank="8"),
  config(("alpha", "must not be 0", "got 0.0"), alpha=0.0),
  config(("alpha", "must not be 0", "got 0.0"), alpha=0),
  config(("alpha", "a finite number", "got -inf"), alpha=-INFINITY),
  config(("alpha", "a finite number", "got nan"), alpha=NAN),
  config(("alpha", "a finite number", "got inf"), alpha=INFINITY),
  config(("alpha", "a number", "got '16'"), alpha="16"),
  config(("alpha", "a number", "got None"), alpha=None),
  config(("alpha", "a number", "apply(scaling="), alpha=jnp.float32(1)),
  config(("dropout", "in [0, 1)", "got 1.0"), dropout=1.0),
  config(("dropout", "in [0, 1)", "got -0.1"), dropout=-0.1),
  config(("dropout", "in [0, 1)", "got nan"), dropout=NAN),
  config(("dropout", "a number", "got False"), dropout=False),
  config(("init", "one of kaiming_uniform", "or a function", "got 'kaiming'"), init="kaiming"),
  config(("init", "got None"), init=None),
  config(("target", "'('", "is not a regular expression"), target="("),
  config(("target[1]", "'['", "is not a regular expression"), target=["a", "["]),
  config(("target[0]", "a string", "got 5"), target=[5]),
  config(("target", "a string or a list", "got 5"), target=5),
  config(("target", "must name a pattern"), target=()),
  config(("extra", "'*'", "is not a regular expression"), extra="*"),
  config(("extra[0]", "a string", "got None"), extra=[None]),
  config(("layers", "a list", "got '01'"), layers="01"),
  config(("layers[0]", "in [0, inf)", "got -1"), layers=(-1,)),
  config(("layers[1]", "an integer", "got 1.0"), layers=[0, 1.0]),
  config(("layers", "names layer 3 twice"), layers=[3, 1, 3]),
  config(("layers", "must name a layer", "None adapts all"), layers=[]),
  config(("stacked_layers", "must name a layer"), stacked_layers=()),
  config(("stacked_layers[0]", "an integer", "got True"), stacked_layers=[True]),
  config(("rules[0]", "pattern"), rules=({"rank": 2},)),
  config(("rules[0]", "must be a LoraRule", "got {'pattern'"), rules=({"pattern": "a"},)),
  config(("rules", "a list", "got LoraRule"), rules=lj.LoraRule("a")),
  config(("rules[1]", "rules[0]", "'a'", "never apply"), rules=[lj.LoraRule("a")] * 2),
  config(("variant", "of type Variant", "got 'dora'"), variant="dora"),
  rule(("pattern", "'('", "is not a regular expression"), pattern="("),
  rule(("pattern", "a string", "got None"), pattern=None),
  rule(("rank", "in [1, inf)", "got 0"), rank=0),
  rule(("alpha", "must not be 0", "got -0.0"), alpha=-0.0),
  rule(("dropout", "in [0, 1)", "got 1.5"), dropout=1.5),
  rule(("on_unhandled", "one of raise, materialize", "got 'ignore'"), on_unhandled="ignore"),
  rule(("axes", "of type LoraAxes", "got ((), (0,), (1,))"), axes=((), (0,), (1,))),
  rule(("axes.inputs[0]", "in [0, inf)", "got -1"), axes=lj.LoraAxes((), (-1,), (0,))),
  rule(("axes.outputs", "a list", "got 1"), axes=lj.LoraAxes((), (0,), 1)),  # pyright: ignore
  variant(("'LoRA'", "arrays['lora_a']", "a string", "got 3"), arrays={"lora_a": 3}),
  variant(("'axes' cannot name an array",), arrays={"axes": "in rank", "b": "rank out"}),
  variant(("unknown axes width",), arrays={"lora_a": "in width"}),
  variant(("no array that is trained",), frozen=("lora_a", "lora_b")),
  variant(("frozen='lora_a'", "a collection"), frozen="lora_a"),
  variant(("frozen=('typo',)", "names of its arrays, lora_a, lora_b"), frozen=("typo",)),
  variant(("weight must be a function", "got None"), weight=None),
]


# ---- init, apply, merge ----------------------------------------------------------------


def initialize(params: Any = PARAMS, **options: Any) -> Any:
  return lj.lora(fn, lj.LoraConfig(**CONFIG | options)).init(KEY, params, X)


@functools.cache
def adapted() -> tuple[lj.Adaptation, Any]:
  lora = lj.lora(fn, lj.LoraConfig(**CONFIG))
  return lora, lora.init(KEY, PARAMS, X)


def applied(**options: Any) -> Any:
  lora, trainable = adapted()
  return lora.apply(PARAMS, trainable, X, **options)


def of_dtype(dtype: Any) -> Any:
  lora, trainable = adapted()
  return lora.merge(PARAMS, jax.tree.map(lambda x: x.astype(dtype), trainable))


def with_extra(leaf: Any, pattern: str = "scale") -> Any:
  params = {"w": jnp.ones((4, 4)), "scale": leaf}
  return lj.lora(square, lj.LoraConfig(2, 4.0, "w", extra=pattern)).init(KEY, params, X)


def partial(train: Any, leaf: Any = None) -> Any:
  params = {"w": jnp.ones((4, 4)), "counts": jnp.arange(3) if leaf is None else leaf}
  return lj.partial_finetuning(square, train).init(KEY, params, X)


def twins(key: Any, a_shape: Any, b_shape: Any, fan_in: int) -> Any:
  return jnp.zeros(a_shape)


def integers(key: Any, a_shape: Any, b_shape: Any, fan_in: int) -> Any:
  return jnp.zeros(a_shape, jnp.int32), jnp.zeros(b_shape)


def call(name: str, function: Callable[[], Any], *words: str) -> BadInput:
  return BadInput(name, lambda _: function(), words)


CALLS = [
  call(
    "a layer that does not exist",
    lambda: initialize(layers=[1, 9]),
    "layers=[1, 9]",
    "no targeted weight is in layer 9",
    "0 to 1",
  ),
  call(
    "a mapping for a config",
    lambda: lj.lora(fn, {"rank": 2}),  # pyright: ignore
    "a lora_jax.LoraConfig",
    "got {'rank': 2}",
  ),
  call(
    "a mapping for a config of DoRA",
    lambda: lj.dora(fn, {"rank": 2}),  # pyright: ignore
    "a lora_jax.LoraConfig",
  ),
  call("scaling nan", lambda: applied(scaling=NAN), "scaling", "finite", "got nan"),
  call("scaling as text", lambda: applied(scaling="2"), "scaling", "a number", "got '2'"),
  call("an array of scalings", lambda: applied(scaling=jnp.ones(2)), "scaling", "(2,)"),
  call(
    "scaling of an unknown path",
    lambda: applied(scaling={"layer_2/w": 1.0}),
    "scaling",
    "layer_2/w",
    "Did you mean layer_",
  ),
  call(
    "scaling infinite at a path",
    lambda: applied(scaling={"layer_0/w": INFINITY}),
    "scaling['layer_0/w']",
    "got inf",
  ),
  call("dropout rate 1", lambda: applied(dropout_rate=1.0), "dropout_rate", "[0, 1)", "got 1.0"),
  call("negative dropout", lambda: applied(dropout_rate=np.float32(-1)), "dropout_rate", "[0, 1)"),
  call("init of one array", lambda: initialize(init=twins), "layer_0/w", "(lora_a, lora_b)"),
  call("init of integers", lambda: initialize(init=integers), "layer_0/w", "lora_a", "floating"),
  call("an integer adapter", lambda: of_dtype("int32"), "layer_0/w/lora_a is int32", "float32"),
  call("a complex adapter", lambda: of_dtype("complex64"), "layer_0/w/lora_a", "complex64"),
  call(
    "an unsigned float8 weight",
    lambda: initialize({"w": jnp.ones((4, 4), jnp.float8_e8m0fnu)}),
    "w cannot be adapted",
    "with a sign",
    "float8_e8m0fnu",
  ),
  call(
    "a complex weight",
    lambda: initialize({"w": jnp.ones((4, 4), jnp.complex64)}),
    "w cannot be adapted",
    "complex64",
    "Fully train it with `extra`",
  ),
  call("an int4 weight", lambda: initialize({"w": jnp.ones((4, 4), jnp.int4)}), "w ", "int4"),
  call("an int4 extra", lambda: with_extra(jnp.ones(4, jnp.int4)), "extra scale", "int4"),
  call("a NumPy integer extra", lambda: with_extra(np.arange(4)), "extra scale", "int64"),
  call("a boolean extra", lambda: with_extra(jnp.ones(4, bool)), "extra scale", "bool"),
  call("a key as extra", lambda: with_extra(KEY), "extra scale", "key<"),
  call("a number as extra", lambda: with_extra(1.5), "'scale'", "1.5", "jnp.asarray(1.5)"),
  call("a string as extra", lambda: with_extra("relu"), "'scale'", "'relu'", "not an array"),
  call("an unknown extra", lambda: with_extra(X, "scales"), "extra 'scales'", "scale"),
  call("train nothing", lambda: partial(()), "train must name a pattern"),
  call("train by no regular expression", lambda: partial("("), "'('", "regular expression"),
  call("train integers", lambda: partial("counts"), "counts", "int32", "Narrow the pattern"),
  call("train a number", lambda: partial("counts", 3), "train 'counts'", "which is 3"),
]


# ---- optimizers ------------------------------------------------------------------------


def plus(make: Any = optax.sgd, rate: Any = 0.1, ratio: Any = 16.0) -> Any:
  return lj.lora_plus(make, rate, ratio)


OPTIMIZERS = [
  call("lora_plus: ratio 0", lambda: plus(ratio=0.0), "ratio", "(0, inf)", "got 0.0"),
  call("lora_plus: ratio -1", lambda: plus(ratio=-1), "ratio", "(0, inf)", "got -1"),
  call("lora_plus: ratio nan", lambda: plus(ratio=NAN), "ratio", "got nan"),
  call("lora_plus: ratio None", lambda: plus(ratio=None), "ratio", "a number", "got None"),
  call("lora_plus: a negative rate", lambda: plus(rate=-0.1), "learning_rate", "[0, inf)"),
  call("lora_plus: rate as text", lambda: plus(rate="1e-3"), "learning_rate", "got '1e-3'"),
  call(
    "lora_plus: an optimizer, not a function",
    lambda: plus(make=optax.sgd(0.1)),
    "make_optimizer must be a function",
  ),
  call(
    "freeze: a function, not an optimizer",
    lambda: lj.freeze(optax.adam, {"a": True}),  # pyright: ignore
    "optimizer must be an optax.GradientTransformation",
  ),
  call("freeze: an integer mask", lambda: lj.freeze(optax.sgd(1.0), {"a": 1}), "mask", "got 1"),
  call(
    "freeze: nothing trainable",
    lambda: lj.freeze(optax.sgd(1.0), {"a": False}),
    "mask has no True leaf",
  ),
]


# ---- adapters on disk ------------------------------------------------------------------


@functools.cache
def packed() -> tuple[dict[str, Any], str]:
  params = {"w": jnp.ones((4, 6)), "b": jnp.ones(6)}
  lora = lj.lora(lambda p, x: x @ p["w"] + p["b"][None], lj.LoraConfig(2, 4.0, "w", extra="b"))
  return lj.pack(lora.init(KEY, params, X))


def stored(name: str, change: Callable[[Any], Any], *words: str) -> BadInput:
  """Returns the row of an adapter whose arrays are changed."""
  return BadInput(name, lambda _: lj.unpack(change(dict(packed()[0])), packed()[1]), words)


def axes_json(name: str, change: Callable[[Any], Any], *words: str) -> BadInput:
  """Returns the row of an adapter whose JSON is changed."""

  def read(_: Any) -> Any:
    data = json.loads(packed()[1])
    return lj.unpack(packed()[0], json.dumps(change(data) or data))

  return BadInput(name, read, ("lora_jax adapter", *words))


def text(name: str, axes: str, *words: str) -> BadInput:
  return BadInput(name, lambda _: lj.unpack(packed()[0], axes), ("lora_jax adapter", *words))


def set_in(*path: Any, value: Any) -> Callable[[Any], None]:
  def change(data: Any) -> None:
    for key in path[:-1]:
      data = data[key]
    data[path[-1]] = value

  return change


def leaf(*path: Any, value: Any) -> Callable[[Any], None]:
  return set_in("leaves", "w", *path, value=value)


def cast(name: str, dtype: Any) -> Callable[[Any], Any]:
  return lambda arrays: arrays | {name: arrays[name].astype(dtype)}


def filled(value: float) -> Callable[[Any], Any]:
  return lambda arrays: arrays | {"w/lora_b": jnp.full((2, 6), value)}


def mistyped_like(_: Any) -> Any:
  arrays, axes = packed()
  like = lj.unpack(arrays, axes)
  return lj.unpack(cast("b", jnp.bfloat16)(dict(arrays)), axes, like)


DEEP = "[" * 100_000
STORED = [
  stored("an adapter with NaN", filled(NAN), "w/lora_b", "NaN or infinity"),
  stored("an adapter with infinity", filled(-INFINITY), "w/lora_b", "NaN or infinity"),
  stored("an adapter of integers", cast("w/lora_a", "int32"), "w/lora_a is int32", "float32"),
  stored("an adapter of booleans", cast("b", bool), "b is bool", "float32"),
  stored("an adapter in float8", cast("w/lora_a", "float8_e4m3fn"), "w/lora_a is float8_e4m3fn"),
  stored("an adapter without an array", lambda a: {"b": a["b"]}, "missing: w/lora_a"),
  stored("an adapter with another array", lambda a: a | {"c": X}, "unexpected: c"),
  stored("a truncated array", lambda a: a | {"b": X[0]}, "mis-shaped: b is (4,), expected (6,)"),
  stored("an adapter without arrays", lambda a: {}, "missing: b", "missing: w/lora_a"),
  BadInput("an extra in bfloat16", mistyped_like, ("b is bfloat16", "expected float32", "`like`")),
  text("empty JSON", "", "got ''", "not JSON"),
  text("truncated JSON", packed()[1][:100], "not JSON"),
  text("nested JSON", DEEP, "nested too deeply"),
  text("a JSON list", "[1]", "got '[1]'"),
  text("a key twice", '{"format": "lora_jax", "format": 1}', "'format' occurs twice"),
  text("another format", '{"format": "peft", "version": 2, "leaves": {}}', "format 'lora_jax'"),
  axes_json("another version", set_in("version", value=3), "version 3"),
  axes_json("a version of text", set_in("version", value="2"), "version '2'"),
  axes_json("no leaves", set_in("leaves", value={}), "no leaves"),
  axes_json("leaves in a list", set_in("leaves", value=[]), "leaves", "of type Mapping"),
  axes_json("a leaf of text", set_in("leaves", "w", value="w"), "leaves['w']", "got 'w'"),
  axes_json("a renamed leaf", leaf("keys", value=["v"]), "leaves['w']", "keys ['v']"),
  axes_json("keys of integers", leaf("keys", value=[1]), "leaves['w'].keys[0]", "got 1"),
  axes_json("a shape of text", leaf("shapes", "w/lora_a", value="4"), "shapes['w/lora_a']"),
  axes_json("a negative size", leaf("shapes", "w/lora_a", value=[-4, 2]), "[0, inf)", "got -4"),
  axes_json("another array", leaf("shapes", value={"v": [1]}), "expected w/lora_a, w/lora_b"),
  axes_json("axes twice", leaf("axes", "inputs", value=[1]), "leaves['w']", "one role"),
  axes_json("axes of text", leaf("axes", "inputs", value="0"), "axes.inputs", "a list", "got '0'"),
  axes_json("a field of none", leaf("axes", "batch", value=None), "axes.batch", "got None"),
  axes_json(
    "axes without batch", lambda d: d["leaves"]["w"]["axes"].pop("batch") and None, "batch"
  ),
  axes_json("an unknown field", leaf("colour", value=1), "leaves['w'].colour"),
  axes_json("layers without a stack", leaf("layers", value=[0]), "layers=[0]", "batch axis"),
  axes_json("unknown words", leaf("arrays", 0, "words", value="in width"), "'in width'"),
  axes_json("an axis too many", leaf("arrays", 0, "words", value="in in rank"), "lora_a"),
  axes_json("frozen as text", leaf("arrays", 0, "frozen", value="no"), "frozen", "true or false"),
  axes_json(
    "a leaf in a leaf",
    set_in("leaves", "b/c", value={"keys": ["b", "c"], "shapes": {"b/c": [1]}}),
    "leaves['b'] contains another leaf",
  ),
  call("pack of nothing", lambda: lj.pack({}), "no arrays", "got {}"),
  call("pack of a number", lambda: lj.pack({"w": 1.5}), "w is 1.5", "expected an array"),
  call("pack of one path", lambda: lj.pack({"a": {"b": X}, "a/b": X}), "'a/b'", "rename one"),
]

ROWS = [*CONFIGS, *CALLS, *OPTIMIZERS, *STORED]
