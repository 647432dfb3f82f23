"""Several methods at once, such as the paper's LoRA with prefix embeddings.

    compose(fn, lora, prefix)      apply = prefix(lora(fn).apply).apply

Each method adapts the function that the methods before it have made, and has its own part of the
trainable tree: `part_0`, `part_1`, ...
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.delta import adapter_extra
from lora_jax.adapters.parts import ADDED, is_added, join_parts, path_in_part, split_parts
from lora_jax.methods.prefix import PREFIX_EMBEDDING, PREFIX_LAYER

OPTIONS = ("lora_key", "scaling", "dropout_rate")


def compose(
  fn: Callable[..., Any], *methods: Callable[[Callable[..., Any]], Adaptation]
) -> Adaptation:
  """Returns several methods of adaptation of `fn(params, *args, **kwargs)` as one.

  The paper's LoRA+PE (Hu et al. 2021, table 15) is

      lj.compose(
        fn,
        functools.partial(lj.lora, config=config),
        functools.partial(lj.prefix_embedding, num_slots=lj.Slots(8, 4).count),
      )

  `merge` merges the parts in turn, and raises the error of the first that cannot be merged.
  `scaling` and `dropout_rate` of `apply` go to every method, `lora_key` folded with its number.

  Args:
    fn: any JAX function of a parameter tree and further arguments.
    methods: functions that adapt a function; the first one adapts `fn` itself.
  Raises:
    ValueError: if there are fewer than two methods; by `init`, if one owns the base model, two
      train the same leaf, or two replace slots.

  >>> import jax.numpy as jnp
  >>> import lora_jax as lj
  >>> fn = lambda params, x: x @ params["body"] @ params["head"]
  >>> params = {"body": jnp.eye(3), "head": jnp.ones((3, 2))}
  >>> lora = functools.partial(lj.lora, config=lj.LoraConfig(1, 1.0, target="body"))
  >>> head = functools.partial(lj.partial_finetuning, train="head")
  >>> tune = compose(fn, lora, head).init(jax.random.key(0), params, jnp.ones((1, 3)))
  >>> list(tune), tune["part_1"]["head"].shape
  (['part_0', 'part_1'], (3, 2))
  """
  if len(methods) < 2:
    raise ValueError(f"compose takes two or more methods, got {len(methods)}")

  def call(params: PyTree, inner: Any, *args: Any, **kwargs: Any) -> Any:
    del inner
    return fn(params, *args, **kwargs)

  stages: list[Adaptation] = []
  for method in methods:
    stages.append(method(call))
    call = functools.partial(_call, stages[-1])

  def init(key, params, *args, **kwargs):
    parts: list[PyTree] = []
    for i, stage in enumerate(stages):
      inner = tuple((part, {"lora_key": None}) for part in parts)
      part = stage.init(jax.random.fold_in(key, i), params, inner, *args, **kwargs)
      if part is params:
        raise ValueError(
          f"method {i} of compose fully trains the base model itself, whose arrays no other method "
          "can share. Use lora_jax.partial_finetuning(fn, '.*'), which trains copies"
        )
      parts.append(part)
    _check_parts(parts)
    return join_parts(parts)

  def apply(params, trainable, *args, **kwargs):
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    parts = split_parts(trainable, len(stages))
    inner = tuple((part, _options(options, i)) for i, part in enumerate(parts))
    return call(params, inner, *args, **kwargs)

  def merge(params, trainable):
    parts = split_parts(trainable, len(stages))
    for stage, part in reversed(list(zip(stages, parts, strict=True))):
      params = stage.merge(params, part)
    return params

  return Adaptation(init, apply, merge)


def _call(stage: Adaptation, params: PyTree, inner: Any, *args: Any, **kwargs: Any) -> Any:
  """Calls a method with its part; the parts of the methods before it are its first argument."""
  *others, (part, options) = inner
  return stage.apply(params, part, tuple(others), *args, **options, **kwargs)


def _options(options: Mapping[str, Any], number: int) -> dict[str, Any]:
  """Returns the options of one method: its own key, so that no two draw the same mask."""
  key = options.get("lora_key")
  return dict(options) if key is None else {**options, "lora_key": jax.random.fold_in(key, number)}


def _check_parts(parts: list[PyTree]) -> None:
  """Raises ValueError if two parts train the same leaf or slots: only one of them has an effect."""
  slots = [f"{ADDED}/{name}" for name in (PREFIX_EMBEDDING, PREFIX_LAYER)]
  owners: dict[str, int] = {}
  for i, part in enumerate(parts):
    for path in map(path_in_part, adapter_extra(part)):
      if is_added(path) and path not in slots:  # bottleneck adapters, which follow each other
        continue
      trained = "the vectors of slots" if path in slots else repr(path)
      if owners.setdefault(trained, i) != i:
        raise ValueError(
          f"methods {owners[trained]} and {i} of compose both train {trained}, and only one of "
          "them would have an effect; leave it out of one"
        )
