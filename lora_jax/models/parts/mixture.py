"""The MLPs of the Llama family: one gated MLP, or a mixture of experts with top-k routing.

    mlp(x) = down(activation(gate(x)) * up(x))                      (Shazeer 2020)
    mixture(x) = sum over the token's experts e of p_e mlp_e(x)     (Shazeer et al. 2017)

p is a softmax over all experts. No token is dropped and shapes are static: each token has
`experts_per_token` rows, which are sorted by expert and multiplied in groups (`ragged_dot`). On
CPUs XLA multiplies all rows with all experts, and the rows are those of the whole batch: sharding
it over `data` splits attention, not the experts.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lora_jax.fields import check_fields
from lora_jax.models.parts.activations import gelu_tanh
from lora_jax.models.parts.causal_lm import dense
from lora_jax.models.parts.fields import NumExperts, Width

ACTIVATIONS = {"silu": nn.silu, "gelu_pytorch_tanh": gelu_tanh}


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
  """The experts of each layer; their inner width is the model's `mlp_dim`.

  Attributes:
    num_experts: E.
    experts_per_token: the number of experts that each token is routed to.
    renormalize: whether the weights of a token's experts are scaled to sum to 1.
    shared_dim: inner width of a shared expert for all tokens, gated by its own weight between 0 and
      1 (Qwen 2); None for no such expert.
  """

  num_experts: NumExperts
  experts_per_token: NumExperts
  renormalize: bool = True
  shared_dim: Width | None = None

  def __post_init__(self):
    check_fields(self)
    if not 1 <= self.experts_per_token <= self.num_experts:
      raise ValueError(
        f"experts_per_token must be from 1 to num_experts = {self.num_experts}, got "
        f"{self.experts_per_token}"
      )


class MLP(nn.Module):
  """A dense layer gated by another one, and a projection down.

  Attributes:
    config: a `LlamaConfig`.
    width: the inner width; None is the config's `mlp_dim`.
  """

  config: Any
  width: int | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    config, bias = self.config, self.config.mlp_bias
    width = config.mlp_dim if self.width is None else self.width
    gate = ACTIVATIONS[config.activation](dense(config, width, "gate", x, use_bias=bias))
    x = gate * dense(config, width, "up", x, use_bias=bias)
    return dense(config, config.embed_dim, "down", x, residual_std(config), bias)


class Mixture(nn.Module):
  """A router, the experts it sends each token to, and an optional shared expert."""

  config: Any

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    config, mixture = self.config, self.config.mixture
    logits = dense(config, mixture.num_experts, "router", x, use_bias=False)
    weights, chosen = route(mixture, logits.reshape(-1, mixture.num_experts))
    tokens = x.reshape(-1, config.embed_dim)
    out = Experts(config, name="experts")(tokens, weights, chosen).reshape(x.shape)
    if mixture.shared_dim is None:
      return out
    gate = jax.nn.sigmoid(dense(config, 1, "shared_gate", x, use_bias=False))
    return out + gate * MLP(config, mixture.shared_dim, name="shared")(x)


class Experts(nn.Module):
  """Gated MLPs with stacked kernels: `gate` and `up` (E, D, F), `down` (E, F, D)."""

  config: Any

  @nn.compact
  def __call__(
    self, tokens: Float[Array, "T D"], weights: Float[Array, "T K"], chosen: Int[Array, "T K"]
  ) -> Float[Array, "T D"]:
    config, count = self.config, self.config.mixture.num_experts
    inner, outer = config.mlp_dim, config.embed_dim

    def kernel(name: str, shape: tuple[int, int], std: float) -> Array:
      init = nn.initializers.normal(std)
      return self.param(name, init, (count, *shape), config.param_dtype).astype(config.dtype)

    gate, up = kernel("gate", (outer, inner), 0.02), kernel("up", (outer, inner), 0.02)
    down = kernel("down", (inner, outer), residual_std(config))
    order = jnp.argsort(chosen.reshape(-1))  # of rows, K for each token, by their expert
    sizes = jnp.bincount(chosen.reshape(-1), length=count)
    x = tokens[order // chosen.shape[1]]
    x = ACTIVATIONS[config.activation](jax.lax.ragged_dot(x, gate, sizes)) * jax.lax.ragged_dot(
      x, up, sizes
    )
    out = jax.lax.ragged_dot(x, down, sizes)[jnp.argsort(order)]
    return jnp.einsum("TKD,TK->TD", out.reshape(*chosen.shape, outer), weights)


def route(
  mixture: MixtureConfig, logits: Float[Array, "T E"]
) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
  """Returns the weights of each token's experts, in the logits' dtype, and their numbers."""
  probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
  weights, chosen = jax.lax.top_k(probabilities, mixture.experts_per_token)
  if mixture.renormalize:
    weights = weights / weights.sum(axis=-1, keepdims=True)
  return weights.astype(logits.dtype), chosen


def residual_std(config: Any) -> float:
  """Returns the initial std of kernels before each of the 2 L sums, smaller as in GPT-2."""
  return 0.02 / (2 * config.num_layers) ** 0.5
