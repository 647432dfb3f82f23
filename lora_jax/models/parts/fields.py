"""Types and bounds of the fields that the configs of models have in common."""

import dataclasses
from typing import Annotated, Any

import jax.numpy as jnp

from lora_jax.fields import Within

REMAT_POLICIES = (
  "nothing_saveable",
  "dots_saveable",
  "dots_with_no_batch_dims_saveable",
  "everything_saveable",
)
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class OneOf:
  """The values that a field may have."""

  choices: tuple[Any, ...]

  def __call__(self, name: str, value: Any) -> None:
    """Raises ValueError if the value is not one of the choices."""
    if value not in self.choices:
      raise ValueError(f"{name} must be one of {', '.join(map(str, self.choices))}; got {value!r}")


def float_dtype(name: str, value: Any) -> None:
  """Raises ValueError if the value is not a dtype that models compute in."""
  try:
    dtype = jnp.dtype(value).name
  except TypeError:
    dtype = value
  OneOf(DTYPES)(name, dtype)


# The upper bounds are far above any model: they keep a wrong digit from exhausting the memory.
NumLayers = Annotated[int, Within("[1, 10000]")]
NumExperts = Annotated[int, Within("[1, 10000]")]
Width = Annotated[int, Within("[1, 10000000]")]
NumRows = Annotated[int, Within("[1, 1000000000]")]  # of tables of tokens and positions
RowIndex = Annotated[int, Within("[0, 1000000000]")]
Epsilon = Annotated[float, Within("[0, 1)")]
Remat = Annotated[str | None, OneOf((None, *REMAT_POLICIES))]
AttentionName = Annotated[str, OneOf(("compact", "xla", "cudnn"))]
FloatDtype = Annotated[Any, float_dtype]
