"""lora_jax starts where the vectors say, whatever the signs of singular vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from conformance.check import disagreements

from tests.conformance.test_layers import LAYERS
from tests.conformance.vectors import cases, vector

PAIRS = {  # the first pair of each, by the library's names
  "pissa": (lj.PISSA, "initial_a", "initial_b"),
  "olora": (lj.OLORA, "initial_a", "initial_b"),
  "milora": (lj.MILORA, "initial_a", "initial_b"),
  "lora_xs": (lj.LORA_XS, "lora_a", "lora_b"),
}


def started(name: str, case: str, variant: lj.Variant):
  """Returns the initial node of a case, its axes of inputs and of outputs joined into one each."""
  tensors, details = vector(name)[0], cases(name)[case]
  params = {"w": jnp.asarray(tensors[f"{case}/w"], jnp.float32)}
  config = lj.LoraConfig(details["rank"], details["alpha"], "w", variant=variant)
  x = jnp.asarray(tensors[f"{case}/x"])
  adaptation = lj.lora(LAYERS[details["layer"]], config)
  return adaptation.init(jax.random.key(0), params, x)["w"]


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("case", ["matmul", "conv", "stack"])
def test_a_pair_is_the_weights(name, case):
  variant, name_a, name_b = PAIRS[name]
  node, tensors = started(name, case, variant), vector(name)[0]
  stacked = case == "stack"
  a = np.asarray(node.arrays[name_a], np.float64)
  b = np.asarray(node.arrays[name_b], np.float64)
  if not stacked:
    a = a.reshape(-1, a.shape[-1])
  w = tensors[f"{case}/w"]
  scaling = 1.0 if name == "lora_xs" else float(tensors[f"{case}/scaling"])
  delta = (scaling * a @ b).reshape(w.shape)
  results = {"delta": delta, "residual": w - delta}
  results |= {"norms_a": np.linalg.norm(a, axis=-2), "norms_b": np.linalg.norm(b, axis=-1)}
  results = {f"{case}/start/{key}": value for key, value in results.items()}
  assert disagreements(tensors, results, only=f"{case}/start/") == []


@pytest.mark.parametrize("case", ["matmul", "conv", "lookup", "stack"])
def test_doras_magnitude_is_the_norm(case):
  results = {f"{case}/start/magnitude": started("dora", case, lj.DORA).magnitude}
  assert disagreements(vector("dora")[0], results, only=f"{case}/start/") == []


def test_loftqs_errors():
  """With one iteration Q and A B are the vector's; with more, the best iterate's error is."""
  case, tensors = "uniform_8_bits", vector("loftq")[0]
  params = {"w": jnp.asarray(tensors[f"{case}/w"], jnp.float32)}
  config = lj.LoraConfig(4, 8.0, "w")
  trainable = lj.lora(LAYERS["matmul"], config).init(jax.random.key(0), params, jnp.ones((1, 24)))
  norm = np.linalg.norm(tensors[f"{case}/w"])
  base, first, errors = lj.loftq(config, trainable, params, "int8", num_iterations=1)
  rounded, corrected = errors["w"].rounded * norm, errors["w"].corrected * norm
  best = lj.loftq(config, trainable, params, "int8")[2]["w"].corrected * norm
  expected = tensors[f"{case}/out/errors"]
  assert rounded == pytest.approx(float(tensors[f"{case}/out/first_error"]), rel=1e-4)
  assert corrected == pytest.approx(expected[0], rel=1e-4)
  assert best == pytest.approx(expected.min(), rel=1e-4)
  assert expected.min() < 0.99 * expected[0]
  results = {"first_quantized": lj.dequantize(base)["w"]}
  results["first_delta"] = 2.0 * first["w"].lora_a @ first["w"].lora_b
  results = {f"{case}/out/{name}": array for name, array in results.items()}
  own = tuple(results)
  assert disagreements(tensors, results, 1e-4, only=own) == []  # of small residuals, in float32


def test_lora_ga_starts_from_the_gradient():
  tensors, details = vector("lora_ga")[0], cases("lora_ga")["matmul"]
  w, gradient = (jnp.asarray(tensors[f"matmul/{n}"], jnp.float32) for n in ("w", "gradient"))

  def loss(params, x):  # its gradient with respect to w is the vector's, where x is the identity
    return jnp.sum(gradient * (x @ params["w"]))

  config = lj.LoraConfig(details["rank"], details["alpha"], "w")
  batches = [jnp.eye(len(w))]
  settings = {"gamma": details["gamma"], "num_iterations": 30}
  config = lj.lora_ga_config(loss, config, {"w": w}, batches, **settings)
  node = lj.lora(loss, config).init(jax.random.key(0), {"w": w}, batches[0])["w"]
  results = {"projection_a": node.lora_a @ node.lora_a.T}
  results["projection_b"] = node.lora_b.T @ node.lora_b
  results = {f"matmul/start/{name}": array for name, array in results.items()}
  own = "matmul/start/"
  assert disagreements(tensors, results, 1e-4, only=own) == []  # of an iteration in float32


@pytest.mark.parametrize(
  "mode", ["instruction_previewed", pytest.param("knowledge_preserved", marks=pytest.mark.long)]
)
def test_corda_starts_from_the_inputs(mode):
  tensors, details = vector("corda")[0], cases("corda")[mode]
  w, x = (jnp.asarray(tensors[f"{mode}/{n}"], jnp.float32) for n in ("w", "activations"))

  def loss(params, x):
    return jnp.sum((x @ params["w"]) ** 2)

  config = lj.LoraConfig(details["rank"], details["alpha"], "w")
  config = lj.corda_config(loss, config, {"w": w}, [x], mode=details["mode"])
  node = lj.lora(loss, config).init(jax.random.key(0), {"w": w}, x)["w"]
  delta = details["scaling"] * node.lora_a @ node.lora_b
  results = {f"{mode}/start/delta": delta, f"{mode}/start/residual": w - delta}
  own = f"{mode}/start/"
  assert disagreements(tensors, results, 1e-4, only=own) == []  # of an inverse in float32


def test_evas_ranks_and_directions():
  tensors, details = vector("eva")[0], cases("eva")["centered"]
  x = {n: jnp.asarray(tensors[f"activations/{n}"], jnp.float32) for n in details["weights"]}
  params = {name: jnp.ones((x[name].shape[1], 8)) for name in details["weights"]}

  def loss(params, batch):
    return sum(jnp.sum((batch[name] @ params[name]) ** 2) for name in params)

  config = lj.LoraConfig(details["rank"], 1.0, ".*")
  config = lj.eva_config(loss, config, params, [x], rho=details["rho"])
  trainable = lj.lora(loss, config).init(jax.random.key(0), params, x)
  ranks = [trainable[name].rank for name in details["weights"]]
  assert ranks == tensors["centered/out/ranks"].tolist()
  assert len({*ranks}) > 1
  results = {
    f"centered/out/{name}/projection": trainable[name].lora_a @ trainable[name].lora_a.T
    for name in details["weights"]
  }
  own = tuple(results)
  assert disagreements(tensors, results, 1e-4, only=own) == []  # of a covariance in float32
