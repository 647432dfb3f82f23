"""PiSSA's equation with A0 and B0 from data: shared by LoRA-GA and CorDA."""

import dataclasses
from collections.abc import Mapping

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import Site, Variant
from lora_jax.variants.pissa import ARRAYS, FROZEN, initialized_to, weight

Factors = tuple[Float[Array, "*a"], Float[Array, "*b"]]


def from_data(name: str, maker: str, factors: Mapping[str, Factors] | None = None) -> Variant:
  """Returns the variant whose start has these A and B.

  Args:
    name: of the variant.
    maker: the function of `lora_jax` that returns a config with the factors, for the error.
    factors: A and B of each weight, by path; without them it is for adapters that exist.
  """
  remedy = f"lora_jax.{maker}(fn, config, params, batches)"
  return Variant(name, ARRAYS, _Start(remedy, factors or {}), weight, FROZEN)


@dataclasses.dataclass(frozen=True, eq=False)
class _Start:
  """The start of a variant that is initialized from data: A and B of each weight, by path."""

  remedy: str
  factors: Mapping[str, Factors]

  def __call__(self, key: PRNGKeyArray, site: Site) -> dict[str, jax.Array]:
    del key
    if site.path not in self.factors:
      raise ValueError(
        f"{site.path}: this variant is initialized from data, and there is none for this weight. "
        f"Take the config from {self.remedy}"
      )
    return initialized_to(*self.factors[site.path])


def check_no_variant(config: LoraConfig, name: str) -> None:
  """Raises ValueError if a config or one of its rules has a variant."""
  for chosen in (config.variant, *(rule.variant for rule in config.rules)):
    if chosen is not None:
      raise ValueError(
        f"{name} returns a config with a variant, and it got one with {chosen.name}. Leave it out"
      )
