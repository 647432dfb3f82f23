"""RandLoRA (Albert et al. 2025, arXiv 2502.00987). With x a row vector, as in JAX:

    h = x W + scaling * x D,   D = sum over j of (A * lambda[j] * gamma[j]) B[j]

for a weight with no more inputs than outputs: A, (in, rank), lambda[j], (rank,), gamma[j], (in,),
and B[j], (rank, out). With more inputs than outputs A and gamma are along the outputs, B along the
inputs. Along the smaller side, of `small` entries, j runs over small / rank bases, rounded up, so
that D has full rank: a lower rank has more trained parameters.

lambda and gamma are trained. A and B are drawn once, frozen, and shared by all weights: as long as
the largest smaller side and the largest larger side, of which each weight uses the first entries
and bases. lambda is initialized to 0, so that step 0 is the base model, gamma to 1 / small.

D is formed where the weight is used: each layer computes it in the forward and again in the
backward pass, and keeps none of it. LoRA dropout has no branch to act on, and is refused.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.adapt import adapt_by
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import Shared, Site, Variant
from lora_jax.axes import IN1, OUT1, RANK, RANK2
from lora_jax.transform.factored import Factored
from lora_jax.transform.factors import Factor
from lora_jax.transform.interpreter import OpaqueRule

ARRAYS = {"rand_lambda": "batch rank2 rank", "rand_gamma": "batch rank2 in1"}
SHARED_ARRAYS = {"rand_a": "in1 rank", "rand_b": "rank2 rank out1"}  # in1: smaller, out1: larger


def sizes(site: Site) -> Mapping[str, int]:
  """Returns the smaller side of the weight, and the number of bases that fill it."""
  small = min(site.axes.counts(site.shape))
  return {"in1": small, "rank2": math.ceil(small / site.rank)}


def start(key: PRNGKeyArray, site: Site) -> dict[str, jax.Array]:
  """lambda = 0 and gamma = 1 / small."""
  del key
  size = sizes(site)
  shapes = {name: site.array_shape(words, **size) for name, words in ARRAYS.items()}
  gamma = jnp.full(shapes["rand_gamma"], 1 / size["in1"])
  return {"rand_lambda": jnp.zeros(shapes["rand_lambda"]), "rand_gamma": gamma}


def start_shared(key: PRNGKeyArray, sites: Sequence[Site]) -> dict[str, jax.Array]:
  """Returns A and B, uniform with a standard deviation of 1."""
  rank = max(site.rank for site in sites)
  sides = [sorted(site.axes.counts(site.shape)) for site in sites]
  small, large = (max(side) for side in zip(*sides, strict=True))
  bases = max(sizes(site)["rank2"] for site in sites)
  shapes = {"rand_a": (small, rank), "rand_b": (bases, rank, large)}
  bound = math.sqrt(3)
  return {
    name: jax.random.uniform(k, shape, jnp.float32, -bound, bound)
    for k, (name, shape) in zip(jax.random.split(key), shapes.items(), strict=True)
  }


def weight(w: Factored, p: Any, scaling: Any) -> Factored:
  """Returns `W + scaling * D`."""
  inputs, outputs = (tuple(d - w.ndim for d in dims) for dims in (p.axes.inputs, p.axes.outputs))
  arrays = p.rand_a, p.rand_lambda, p.rand_gamma, p.rand_b
  return w.formed(_Update(inputs, outputs), scaling, *arrays, dims=p.axes.batch)


@dataclasses.dataclass(frozen=True)
class _Update:
  """D as an array of the weight's size; dimensions are counted from the last one."""

  inputs: tuple[int, ...]
  outputs: tuple[int, ...]

  def __call__(self, w: Factor, a: Factor, lam: Factor, gamma: Factor, b: Factor) -> Factor:
    sides = ([w.labels[d] for d in dims] for dims in (self.inputs, self.outputs))
    small, large = sorted(sides, key=lambda labels: math.prod(map(w.size, labels)))
    scaled = _along(a * lam * gamma, IN1, small, w)
    return scaled.sum_over(_along(b, OUT1, large, w), (RANK, RANK2))


def _along(factor: Factor, inner: int, labels: Sequence[int], w: Factor) -> Factor:
  """Returns a factor whose inner axis, its first entries, has become dimensions of the weight."""
  rest, shape = tuple(label for label in factor.labels if label != inner), [*map(w.size, labels)]
  array = factor.along((*rest, inner))[..., : math.prod(shape)]
  return Factor(array.reshape(*array.shape[:-1], *shape), (*rest, *labels), factor.frozen)


RAND_LORA = Variant(
  "RandLoRA",
  ARRAYS,
  start,
  weight,
  frozen=tuple(SHARED_ARRAYS),
  sizes=sizes,
  shared=Shared(SHARED_ARRAYS, start_shared),
)


def rand_lora(
  fn: Callable[..., Any], config: LoraConfig, opaque: Mapping[str, OpaqueRule] | None = None
) -> Adaptation:
  """Adapts `fn(params, *args, **kwargs)` by RandLoRA: `lora` with `variant=RAND_LORA`.

  For the arguments, the further arguments of `apply` and the errors, see
  `lora_jax.adapters.adapt.adapt`. PEFT's default is a rank of 32 and a scaling, alpha / rank, of
  20. An optimizer of the bare trainable tree must not update A and B: use `lora_jax.freeze`.

  >>> fn = lambda params, x: x @ params["up"] @ params["down"]
  >>> params = {"up": jnp.ones((8, 12)), "down": jnp.ones((12, 8))}
  >>> adapted = rand_lora(fn, LoraConfig(rank=2, alpha=40.0, target=".*"))
  >>> trainable = adapted.init(jax.random.key(0), params, jnp.ones((3, 8)))
  >>> jax.tree.map(jnp.shape, trainable["down"].arrays)
  {'rand_gamma': (4, 8), 'rand_lambda': (4, 2)}
  >>> jax.tree.map(jnp.shape, trainable["lora_shared"]["RandLoRA"].arrays)
  {'rand_a': (8, 2), 'rand_b': (4, 2, 12)}
  """
  return adapt_by(RAND_LORA, fn, config, opaque)
