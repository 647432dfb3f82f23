"""A small transformer in plain JAX, unrolled or scanned, for the tests that need a model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.trees import FrozenKey

WIDTH, HEADS, LAYERS, VOCABULARY = 24, 4, 3, 50


def block(p: Any, x: jax.Array) -> jax.Array:
  """Pre-LN causal attention and MLP; x is (batch, time, width)."""
  h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
  q, k, v = (
    (h @ p["attn"][n]["kernel"]).reshape(*h.shape[:2], HEADS, -1) for n in ("query", "key", "value")
  )
  h = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(h.shape)
  x = x + h @ p["attn"]["out"]["kernel"]
  h = jax.nn.gelu(x @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"][None, None])
  return x + h @ p["mlp"]["down"]["kernel"]


def unrolled(params: Any, tokens: jax.Array) -> jax.Array:
  """Returns logits (batch, time, vocabulary); the head is tied."""
  x = jnp.take(params["embed"]["embedding"], tokens, axis=0)
  for i in range(LAYERS):
    x = block(params[f"h_{i}"], x)
  return x @ params["embed"]["embedding"].T


def scanned(params: Any, tokens: jax.Array) -> jax.Array:
  """The same with stacked layers under scan and remat."""
  x = jnp.take(params["embed"]["embedding"], tokens, axis=0)
  body = jax.checkpoint(lambda x, p: (block(p, x), None), prevent_cse=False)
  x, _ = jax.lax.scan(body, x, params["blocks"])
  return x @ params["embed"]["embedding"].T


def make_params(stacked: bool = False) -> Any:
  draw = np.random.default_rng(0)

  def kernel(d_in: int, d_out: int) -> dict[str, jax.Array]:
    return {"kernel": jnp.asarray(np.float32(draw.standard_normal((d_in, d_out)) / d_in**0.5))}

  layers = []
  for _ in range(LAYERS):
    attn = {name: kernel(WIDTH, WIDTH) for name in ("query", "key", "value", "out")}
    up = kernel(WIDTH, 4 * WIDTH) | {"bias": jnp.zeros(4 * WIDTH)}
    layers.append({"attn": attn, "mlp": {"up": up, "down": kernel(4 * WIDTH, WIDTH)}})
  embed = {"embedding": jnp.asarray(np.float32(draw.standard_normal((VOCABULARY, WIDTH)) / 5))}
  if stacked:
    return {"embed": embed, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *layers)}
  return {"embed": embed} | {f"h_{i}": layer for i, layer in enumerate(layers)}


def tokens(batch: int = 2, time: int = 7) -> jax.Array:
  return jnp.asarray(np.random.default_rng(1).integers(0, VOCABULARY, (batch, time)), jnp.int32)


def mlp(params: Any, x: Any) -> Any:
  """Two matrices, `up` and `down`."""
  return jnp.tanh(x @ params["up"]) @ params["down"]


def mlp_example(shapes: Any) -> Any:
  """Returns random params of `mlp` of these shapes, and inputs, three rows."""
  draw = np.random.default_rng(0).standard_normal
  params = {name: jnp.asarray(np.float32(draw(shape))) for name, shape in shapes.items()}
  return params, jnp.asarray(np.float32(draw((3, shapes["up"][0]))))


def randomized(trainable: Any, scale: float = 0.2, seed: int = 3) -> Any:
  """Returns a tree like `trainable` with random trained leaves, so that B is not zero."""
  draw = np.random.default_rng(seed)

  def drawn(keys: Any, x: Any) -> Any:
    if any(isinstance(key, FrozenKey) for key in keys):
      return x
    return jnp.asarray(np.asarray(scale * draw.standard_normal(x.shape), x.dtype))

  return jax.tree_util.tree_map_with_path(drawn, trainable)


def relative_difference(got: Any, expected: Any) -> float:
  """Returns max|difference| / max|expected| over all leaves: this project's relative error.

  In NumPy: JAX would compile a program for each shape.
  """
  leaves = ([np.asarray(x, np.float64) for x in jax.tree.leaves(tree)] for tree in (got, expected))
  pairs = list(zip(*leaves, strict=True))
  assert all(a.shape == b.shape for a, b in pairs), "trees of equal shapes"
  difference = max(np.abs(a - b).max() for a, b in pairs)
  return float(difference / max(np.abs(b).max() for _, b in pairs))
