"""BitFit (Ben Zaken et al. 2021, arXiv 2106.10199): only biases are trained.

attn/query/bias, mlp/up/bias, ln_1/bias, ...    trained, those of normalizations too (sec. 2)
all other leaves                                frozen
"""

from collections.abc import Callable, Iterable
from typing import Any

from jaxtyping import PRNGKeyArray, PyTree

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.targets import array_leaves
from lora_jax.methods.partial import partial_finetuning
from lora_jax.trees import as_patterns, matches

BIASES = r"(.*/)?bias"
"""All biases: this project's models and Flax's modules name each one `bias`."""


def bitfit(fn: Callable[..., Any], train: str | Iterable[str] = BIASES) -> Adaptation:
  """Returns fine-tuning of the biases of `fn(params, *args, **kwargs)`.

  It is `partial_finetuning`, which trains float32 copies. GPT-2, BERT, RoBERTa and DeBERTa have a
  bias in every layer and normalization, Qwen 2 has those of query, key and value; Llama, Mistral,
  Qwen 3, Gemma and SmolLM2 have none.

  Args:
    fn: any JAX function of a parameter tree and further arguments.
    train: regular expressions for whole paths; give those of models with other names, or add
      those of a head.
  Raises:
    ValueError: from `init`, if a pattern matches no leaf of `params`.

  >>> import jax, jax.numpy as jnp
  >>> fn = lambda params, x: x @ params["up"]["kernel"] + params["up"]["bias"]
  >>> params = {"up": {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}}
  >>> jax.tree.map(jnp.shape, bitfit(fn).init(jax.random.key(0), params))
  {'up': {'bias': (3,)}}
  """
  patterns = as_patterns(train, "train")
  method = partial_finetuning(fn, patterns)

  def init(key: PRNGKeyArray, params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
    leaves = array_leaves(params)
    if BIASES in patterns and not any(matches(BIASES, path) for path in leaves):
      raise ValueError(
        f"BitFit trains biases, and this model has none: no path of its {len(leaves)} leaves "
        f"matches {BIASES!r}. Give patterns of biases with other names as `train`, or use "
        "lora_jax.ln_tuning, which trains the scales of normalizations"
      )
    return method.init(key, params, *args, **kwargs)

  return method._replace(init=init)
