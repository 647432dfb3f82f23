"""LoRA (Hu et al. 2021, arXiv 2106.09685, sec. 4.1). With x a row vector, as in JAX:

    h = x W + scaling * x A B          scaling = alpha / rank

W, (in, out), is frozen; A, (in, rank), and B, (rank, out), are trained. B is initialized to 0, so
that step 0 is the base model. No array of W's size is materialized, except W.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jaxtyping import PRNGKeyArray

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.adapt import adapt
from lora_jax.adapters.checks import check_number
from lora_jax.adapters.config import LoraConfig, check_config
from lora_jax.adapters.delta import Site, Variant
from lora_jax.fields import NonNegative, Positive
from lora_jax.transform.factored import Factored
from lora_jax.transform.interpreter import OpaqueRule
from lora_jax.trees import FrozenKey, key_parts

ARRAYS = {"lora_a": "batch in rank", "lora_b": "batch rank out"}


def weight(w: Factored, p: Any, scaling: Any) -> Factored:
  """Returns `W + scaling * A B` (sec. 4.1)."""
  return w + scaling * (p.lora_a @ p.lora_b)


def start(key: PRNGKeyArray, site: Site) -> dict[str, jax.Array]:
  """Returns the initial A and B, drawn by the config's `init`."""
  return initial_pair(key, site, *(site.array_shape(words) for words in ARRAYS.values()))


def initial_pair(
  key: PRNGKeyArray, site: Site, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
) -> dict[str, jax.Array]:
  """Returns A and B of these shapes, drawn by the config's `init`."""
  pair = site.initialize(key, a_shape, b_shape, site.num_inputs)
  if not isinstance(pair, tuple | list) or len(pair) != 2:
    raise ValueError(f"{site.path}: init must return (lora_a, lora_b), got {pair!r:.100}")
  return dict(zip(ARRAYS, pair, strict=True))


LORA = Variant("LoRA", ARRAYS, start, weight)


def lora(
  fn: Callable[..., Any], config: LoraConfig, opaque: Mapping[str, OpaqueRule] | None = None
) -> Adaptation:
  """Adapts `fn(params, *args, **kwargs)` by LoRA, or by the config's variant.

  For the arguments, the further arguments of `apply` and the errors, see
  `lora_jax.adapters.adapt.adapt`.

  Examples:
    >>> import jax, jax.numpy as jnp, lora_jax
    >>> fn = lambda params, x: x @ params["kernel"]
    >>> params = {"kernel": jnp.ones((8, 6))}
    >>> config = lora_jax.LoraConfig(rank=2, alpha=4.0, target="kernel")
    >>> adapted = lora_jax.lora(fn, config)
    >>> trainable = adapted.init(jax.random.key(0), params, jnp.ones((3, 8)))
    >>> jax.tree.map(jnp.shape, trainable["kernel"].lora_a)
    (8, 2)
    >>> out = adapted.apply(params, trainable, jnp.ones((3, 8)))
    >>> bool((out == fn(params, jnp.ones((3, 8)))).all())
    True
  """
  check_config(config)
  return adapt(fn, config, LORA, opaque)


def rank_stabilized(config: LoraConfig) -> LoraConfig:
  """Returns a config whose scaling is alpha / sqrt(rank): rsLoRA (Kalajdzievski 2023, 2312.03732).

  >>> rank_stabilized(LoraConfig(rank=16, alpha=8.0, target="kernel")).alpha  # 32 / 16 = 8 / 4
  32.0
  """

  check_config(config)

  def stabilize(alpha: float, rank: int) -> float:
    return alpha * math.sqrt(rank)

  rules = []
  for rule in config.rules:
    alpha = config.alpha if rule.alpha is None else rule.alpha
    rank = config.rank if rule.rank is None else rule.rank
    rules.append(dataclasses.replace(rule, alpha=stabilize(alpha, rank)))
  return dataclasses.replace(config, alpha=stabilize(config.alpha, config.rank), rules=rules)


def lora_plus(
  make_optimizer: Callable[[Any], optax.GradientTransformation],
  learning_rate: optax.ScalarOrSchedule,
  ratio: float = 16.0,
) -> optax.GradientTransformation:
  """Returns LoRA+: B's learning rate is `ratio` times A's (Hayou et al. 2024, 2402.12354).

  >>> optimizer = lora_plus(lambda rate: optax.adamw(rate, weight_decay=0.0), 1e-3)

  Args:
    make_optimizer: from a learning rate, or a schedule of it, to an optimizer.
    learning_rate: of A and all other leaves, 0 or more, or a schedule.
    ratio: the paper's lambda, positive; its authors take 16 (sec. 5).
  Raises:
    ValueError: naming the argument, its value and the allowed values.
  """
  check_number("ratio", ratio, Positive)
  if not callable(learning_rate):
    check_number("learning_rate", learning_rate, NonNegative)
  if not callable(make_optimizer):
    raise ValueError(
      "make_optimizer must be a function from a learning rate to an optimizer, as optax.adamw, got "
      f"{make_optimizer!r:.100}"
    )

  def faster(step: Any) -> Any:
    return ratio * (learning_rate(step) if callable(learning_rate) else learning_rate)

  def group(keys: Any, leaf: Any) -> str:
    del leaf
    if any(isinstance(key, FrozenKey) for key in keys):
      return "held"
    return "b" if key_parts(keys)[-1] == "lora_b" else "other"

  return optax.partition(
    {
      "b": make_optimizer(faster),
      "other": make_optimizer(learning_rate),
      "held": optax.set_to_zero(),
    },
    lambda tree: jax.tree_util.tree_map_with_path(group, tree),
  )
