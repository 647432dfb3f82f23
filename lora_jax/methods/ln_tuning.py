"""LayerNorm tuning (Zhao et al. 2023, arXiv 2312.11420): only normalizations are trained.

ln_1/scale, ln_1/bias, attn_norm/scale, ...     trained
all other leaves                                frozen
"""

from collections.abc import Callable, Iterable
from typing import Any

from lora_jax.adaptation import Adaptation
from lora_jax.methods.partial import partial_finetuning

NORMS = r"(.*/)?(ln_\w+|\w+_norm|LayerNorm_\d+|RMSNorm_\d+)/(scale|bias)"
"""The scales and biases of normalizations: those of this project's models, and Flax's names."""


def ln_tuning(fn: Callable[..., Any], train: str | Iterable[str] = NORMS) -> Adaptation:
  """Returns fine-tuning of the normalizations of `fn(params, *args, **kwargs)`.

  It is `partial_finetuning`: `init` raises if a pattern matches no leaf of `params`.

  Args:
    fn: any JAX function of a parameter tree and further arguments.
    train: regular expressions for whole paths; give those of models with other names.

  >>> import jax, jax.numpy as jnp
  >>> fn = lambda params, x: x @ params["up"]["kernel"] * params["ln_f"]["scale"]
  >>> params = {"up": {"kernel": jnp.eye(3)}, "ln_f": {"scale": jnp.ones(3)}}
  >>> jax.tree.map(jnp.shape, ln_tuning(fn).init(jax.random.key(0), params))
  {'ln_f': {'scale': (3,)}}
  """
  return partial_finetuning(fn, train)
