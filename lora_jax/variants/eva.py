"""EVA (Paischer et al. 2024, arXiv 2410.07170, sec. 3). LoRA, initialized from data:

    A = the first rank right singular vectors of the inputs of the layer,  B = 0

so that step 0 is the base model. Of the inputs X, (tokens, in), their mean is subtracted, as in
PEFT; the vectors are the eigenvectors of X^T X. Ranks are redistributed among the weights: the
vectors of all weights, at most rho * rank of each, are ordered by the share of the variance that
they explain, and the first ones are taken, as many as there were ranks.

It is a config of plain LoRA: a rule for each weight has its rank and its `init`. alpha is changed
with the rank, so that alpha / rank is the same for all weights.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from lora_jax.adapters.collect import InputMoments, collect
from lora_jax.adapters.config import LoraConfig, LoraRule
from lora_jax.adapters.delta import Site
from lora_jax.adapters.targets import find_leaves
from lora_jax.fields import Finite, read_value
from lora_jax.transform.interpreter import OpaqueRule
from lora_jax.variants.dora import DORA
from lora_jax.variants.lora import LORA


@dataclasses.dataclass(frozen=True, eq=False)
class Directions:
  """The principal directions of a layer's inputs, in order.

  Attributes:
    vectors: orthonormal rows.
    shares: of the variance that each explains.
  """

  vectors: Float[Array, "*batch count inputs"]
  shares: Float[Array, "*batch count"]

  def __call__(
    self, key: PRNGKeyArray, a_shape: tuple[int, ...], b_shape: tuple[int, ...], fan_in: int
  ) -> tuple[Array, Array]:
    """Returns A, as many of the vectors as it has columns, and B = 0: an `init` of the config."""
    del key, fan_in
    return self.vectors[..., : a_shape[-1], :].mT.reshape(a_shape), jnp.zeros(b_shape)


def eva_config(
  fn: Callable[..., Any],
  config: LoraConfig,
  params: PyTree,
  batches: Sequence[Any],
  *,
  rho: float = 2.0,
  weights_at_once: int | None = None,
  opaque: Mapping[str, OpaqueRule] | None = None,
) -> LoraConfig:
  """Returns a config of plain LoRA, initialized by EVA, with redistributed ranks.

  A stack of layers (or experts) has one rank, and stays one weight: its share of the variance is
  the mean over its layers, and it counts as so many weights. Weights that get rank 0 are not
  adapted.

  >>> import jax, lora_jax
  >>> fn = lambda params, x: jnp.mean(jnp.square(x @ params["kernel"]))
  >>> params, x = {"kernel": jnp.ones((3, 4))}, jnp.array([[0, 1.0, 0], [0, -1.0, 0]])
  >>> config = eva_config(fn, LoraConfig(rank=1, alpha=1.0, target="kernel"), params, [x], rho=1.0)
  >>> trainable = lora_jax.lora(fn, config).init(jax.random.key(0), params, x)
  >>> [abs(round(float(x), 4)) for x in trainable["kernel"].lora_a[:, 0]]
  [0.0, 1.0, 0.0]

  Args:
    fn: `fn(params, batch)`, as a loss: the tokens that it depends on count, see
      `lora_jax.collect`.
    config: with the mean rank, of LoRA or DoRA.
    params: the base model's.
    batches: the second arguments of `fn`, trees of arrays.
    rho: no weight gets a rank above rho times its own; 1 or more. 1 leaves the ranks unchanged.
    weights_at_once, opaque: as in `lora_jax.collect`.
  Raises:
    ValueError: if rho is less than 1, the config has another variant, or `collect` raises.
  """
  rho = read_value(Finite, rho, "rho")
  if rho < 1:
    raise ValueError(f"rho must be 1 or more, got {rho}")
  targets, _ = find_leaves(config, params)
  for path, target in targets.items():
    if target.variant not in (None, LORA, DORA):
      raise ValueError(
        f"{path}: EVA initializes A and B of LoRA or DoRA, and the config has {target.variant.name}"
      )

  def directions(site: Site, moments: InputMoments) -> Directions:
    count = min(round(rho * site.rank), *site.axes.counts(site.shape))
    return Directions(*_principal(moments.covariance(), count))

  candidates = collect(
    fn,
    config,
    params,
    batches,
    "activations",
    weights_at_once=weights_at_once,
    summarize=directions,
    opaque=opaque,
  )
  ranks = redistributed({path: target.rank for path, target in targets.items()}, candidates)
  rules = []
  for path, target in targets.items():
    if ranks[path]:
      settings = {
        field.name: getattr(target, field.name)
        for field in dataclasses.fields(LoraRule)
        if field.name not in ("pattern", "rank", "alpha", "init")
      }
      alpha = target.alpha * ranks[path] / target.rank
      rules.append(LoraRule(re.escape(path), ranks[path], alpha, candidates[path], **settings))
  return dataclasses.replace(
    config, target=[rule.pattern for rule in rules], rules=rules, layers=None
  )


def _principal(
  covariance: Float[Array, "*batch inputs inputs"], count: int
) -> tuple[Float[Array, "*batch count inputs"], Float[Array, "*batch count"]]:
  """Returns the first eigenvectors, as rows, and the shares of their eigenvalues in the sum."""
  values, vectors = jnp.linalg.eigh(covariance)
  total = jnp.maximum(jnp.trace(covariance, axis1=-2, axis2=-1), jnp.finfo(values.dtype).tiny)
  first = jnp.flip(jnp.maximum(values, 0), -1)[..., :count]
  return jnp.flip(vectors, -1).mT[..., :count, :], first / total[..., None]


def redistributed(ranks: Mapping[str, int], candidates: Mapping[str, Directions]) -> dict[str, int]:
  """Returns the ranks by explained variance; their sum over all matrices is at most the old one.

  It is equal unless stacks of different sizes are adapted.

  Args:
    ranks: by path.
    candidates: the directions, at most that many for a weight.
  """
  sizes = {path: math.prod(d.shares.shape[:-1]) for path, d in candidates.items()}
  budget = sum(sizes[path] * rank for path, rank in ranks.items())
  shares = {
    path: jnp.mean(d.shares.reshape(-1, d.shares.shape[-1]), 0).tolist()
    for path, d in candidates.items()
  }
  order = sorted(((-share, path) for path in shares for share in shares[path]), key=lambda x: x[0])
  result = dict.fromkeys(ranks, 0)
  for _, path in order:
    if sizes[path] <= budget:  # a stack needs a rank for each layer; a smaller one may still fit
      result[path] += 1
      budget -= sizes[path]
  return result
