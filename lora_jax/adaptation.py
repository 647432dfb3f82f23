"""The interface of a method of adaptation: three pure functions made from an unmodified one."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import PyTree


class Adaptation(NamedTuple):
  """A method of adaptation of `fn(params, *args, **kwargs)`.

  Training loops, checkpoints and sweeps use nothing else of a method.

  Attributes:
    init: `init(key, params, *args, **kwargs) -> trainable`. Only the trainable leaves; the
      arguments may be `ShapeDtypeStruct`s.
    apply: `apply(params, trainable, *args, lora_key=..., scaling=None, dropout_rate=None,
      **kwargs)` returns the adapted `fn`'s output.
    merge: `merge(params, trainable) -> params`. A tree like `params`, for `fn` itself: no
      added latency.
  """

  init: Callable[..., PyTree]
  apply: Callable[..., Any]
  merge: Callable[..., PyTree]
