"""Initial values of A and B.

| name              | A                        | B              | source                           |
|-------------------|--------------------------|----------------|----------------------------------|
| `kaiming_uniform` | U(-b, b), b = fan_in^-½  | 0              | loralib and PEFT                 |
| `gaussian`        | N(0, 0.02²)              | 0              | the paper's text (sec. 4.1)      |
| `original_code`   | N(0, 0.02²)              | N(0, 0.02²)    | the paper's code                 |
| (embeddings)      | 0                        | N(0, 1)        | loralib; with the first two      |

The paper gives no standard deviation; its code uses 0.02 (branch snapshot-9-15-2021 of
microsoft/LoRA). There GPT-2 reinitialized every layer after LoRA had set B = 0, so that only under
`original_code` the first output is not the base model's. `kaiming_uniform` is PyTorch's with
a = sqrt(5), a bound of 1 / sqrt(fan_in); JAX's `he_uniform` is sqrt(6) = 2.45 times wider.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Shape = tuple[int, ...]
Factors = tuple[Float[Array, "*a"], Float[Array, "*b"]]
Initializer = Callable[[PRNGKeyArray, Shape, Shape, int], Factors]
"""`(key, a_shape, b_shape, fan_in) -> (lora_a, lora_b)`; fan_in is the weight's inputs."""

CODE_STDDEV = 0.02


def kaiming_uniform(key: PRNGKeyArray, a_shape: Shape, b_shape: Shape, fan_in: int) -> Factors:
  """Returns A ~ U(-fan_in^-½, fan_in^-½) and B = 0: `kaiming_uniform_(a=sqrt(5))`."""
  bound = 1 / math.sqrt(fan_in)
  a = jax.random.uniform(key, a_shape, jnp.float32, -bound, bound)
  return a, jnp.zeros(b_shape, jnp.float32)


def gaussian(key: PRNGKeyArray, a_shape: Shape, b_shape: Shape, fan_in: int) -> Factors:
  """Returns A ~ N(0, 0.02²) and B = 0 (sec. 4.1)."""
  del fan_in
  a = CODE_STDDEV * jax.random.normal(key, a_shape, jnp.float32)
  return a, jnp.zeros(b_shape, jnp.float32)


def original_code(key: PRNGKeyArray, a_shape: Shape, b_shape: Shape, fan_in: int) -> Factors:
  """Returns A and B ~ N(0, 0.02²): step 0 differs from the base model."""
  del fan_in
  keys = jax.random.split(key)
  a, b = (
    jax.random.normal(k, s, jnp.float32) for k, s in zip(keys, (a_shape, b_shape), strict=True)
  )
  return CODE_STDDEV * a, CODE_STDDEV * b


def embedding(key: PRNGKeyArray, a_shape: Shape, b_shape: Shape, fan_in: int) -> Factors:
  """Returns A = 0 and B ~ N(0, 1): loralib's Embedding."""
  del fan_in
  return jnp.zeros(a_shape, jnp.float32), jax.random.normal(key, b_shape, jnp.float32)


BY_NAME: Mapping[str, Initializer] = {
  "kaiming_uniform": kaiming_uniform,
  "gaussian": gaussian,
  "original_code": original_code,
}
