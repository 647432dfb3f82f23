"""What a method of adaptation is: three pure functions made from an unmodified one."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import PyTree


class Adaptation(NamedTuple):
  """A method of adaptation of `fn(params, *args, **kwargs)`.

  Training loops, checkpoints and sweeps know nothing else of a method.

  Attributes:
    init: `init(key, params, *args, **kwargs) -> trainable`. The trainable leaves alone; the
      arguments may be `ShapeDtypeStruct`s.
    apply: `apply(params, trainable, *args, lora_key=..., scaling=None, dropout_rate=None,
      **kwargs)` returns what the adapted `fn` returns.
    merge: `merge(params, trainable) -> params`. A tree like `params`, for `fn` itself: no
      added latency.
  """

  init: Callable[..., PyTree]
  apply: Callable[..., Any]
  merge: Callable[..., PyTree]
