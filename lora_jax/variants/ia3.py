"""(IA)^3 (Liu et al. 2022, arXiv 2205.05638, sec. 3.3). With x a row vector, as in JAX:

    key, value:      h = (x W + b) * l       l, (out,), is trained
    feed-forward:    h = (x * l) W + b       l, (in,): the input of the down projection

l is initialized to 1, so that step 0 is the base model. Keys and values are scaled after their
bias is added, so b is scaled with W. There is no rank and no scaling: alpha has no effect.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.adapt import adapt_by
from lora_jax.adapters.config import LoraConfig, LoraRule, check_config
from lora_jax.adapters.delta import BiasGain, Site, Variant
from lora_jax.transform.factored import Factored
from lora_jax.transform.interpreter import OpaqueRule

OUTPUTS, INPUTS = {"ia3_gain": "batch out"}, {"ia3_gain": "batch in"}


def weight(w: Factored, p: Any, scaling: Any) -> Factored:
  """Returns `W * l`."""
  del scaling
  return w * p.ia3_gain


def start(key: PRNGKeyArray, site: Site) -> dict[str, jax.Array]:
  """Returns l = 1 for each output."""
  del key
  return {"ia3_gain": jnp.ones(site.array_shape(OUTPUTS["ia3_gain"]))}


def start_inputs(key: PRNGKeyArray, site: Site) -> dict[str, jax.Array]:
  """Returns l = 1 for each input."""
  del key
  return {"ia3_gain": jnp.ones(site.array_shape(INPUTS["ia3_gain"]))}


def ia3_variant(biases: Mapping[str, str | None] | None = None) -> Variant:
  """Returns (IA)^3 of keys and values: a gain over the outputs, which scales the bias, too.

  Args:
    biases: the path of the bias by that of the weight, None for a weight without one. By default
      the bias is the leaf `bias` or `b` next to the weight.
  Raises:
    ValueError: if they are not such a mapping.
  """
  if not isinstance(biases, Mapping | None):
    raise ValueError(
      f"biases must be a mapping from the paths of weights to those of biases, got {biases!r}. For "
      "the leaves `bias` or `b` next to the weights leave it out"
    )
  return Variant("(IA)^3", OUTPUTS, start, weight, bias=BiasGain("ia3_gain", dict(biases or {})))


IA3 = ia3_variant()

IA3_FEEDFORWARD = Variant("(IA)^3 of inputs", INPUTS, start_inputs, weight)
"""(IA)^3 of feed-forward layers: a gain over the inputs."""


def ia3(
  fn: Callable[..., Any],
  config: LoraConfig,
  feedforward: str,
  biases: Mapping[str, str | None] | None = None,
  opaque: Mapping[str, OpaqueRule] | None = None,
) -> Adaptation:
  """Adapts `fn(params, *args, **kwargs)` by (IA)^3.

  It is `lora` with `variant=IA3` in the config, and a first rule with `variant=IA3_FEEDFORWARD` for
  the feed-forward layers. The config's rank and alpha have no effect. For the other arguments, the
  further arguments of `apply` and the errors, see `lora_jax.adapters.adapt.adapt`.

  >>> fn = lambda params, x: jnp.tanh(x @ params["value"] + params["bias"]) @ params["down"]
  >>> params = {"value": jnp.ones((8, 6)), "bias": jnp.ones((6,)), "down": jnp.ones((6, 4))}
  >>> adapted = ia3(fn, LoraConfig(1, 1.0, target="value|down"), feedforward="down")
  >>> trainable = adapted.init(jax.random.key(0), params, jnp.ones(8))
  >>> jax.tree.map(jnp.shape, (trainable["value"].ia3_gain, trainable["down"].ia3_gain))
  ((6,), (6,))
  >>> trainable["value"] = trainable["value"].replace(ia3_gain=2 * jnp.ones(6))
  >>> adapted.merge(params, trainable)["bias"]
  Array([2., 2., 2., 2., 2., 2.], dtype=float32)

  Args:
    fn: any JAX function of a parameter tree and further arguments.
    config: its `target` has the keys, the values and the feed-forward layers.
    feedforward: a regular expression for whole paths: the targeted weights whose inputs are scaled,
      the down projections of a transformer.
    biases: as in `ia3_variant`.
    opaque: as in `lora`.
  """
  check_config(config)
  rules = [LoraRule(feedforward, variant=IA3_FEEDFORWARD), *config.rules]
  return adapt_by(ia3_variant(biases), fn, dataclasses.replace(config, rules=rules), opaque)
