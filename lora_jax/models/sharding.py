"""The sharding rules for the parameters of the zoo's models."""

from collections.abc import Callable

from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from lora_jax.placement import Rules, params_shardings
from lora_jax.trees import leaves_with_path, matches

SHARDING: Rules = (  # for all models of the zoo: their leaves have the same names
  (r".*/(query|key|value|position_query|position_key|gate|up)/kernel", P("fsdp", "tensor")),
  (r".*/(query|key|value|position_query|position_key|gate|up)/bias", P("tensor")),
  (r".*/(attn/out|down)/kernel", P("tensor", "fsdp")),
  (r".*/experts/(gate|up)", P("fsdp", "tensor")),
  (r".*/experts/down", P("tensor", "fsdp")),
  (r".*embedding|wte/.*|wpe/.*", P(None, ("tensor", "fsdp"))),
  (r"(lm_head|pooler|head/dense|conv)/kernel", P("fsdp", "tensor")),
  (r".*/(router|shared_gate)/kernel|head/out/kernel", P()),  # a few columns
  (r".*(bias|scale)", P()),  # of norms, and of the linear layers above that split their inputs
)


def sharding_of(mesh: Mesh) -> Callable[[PyTree], PyTree]:
  """Returns a function from a model's params, or their shapes, to their shardings on a mesh."""

  def shardings(params: PyTree) -> PyTree:
    paths = [path for path, _ in leaves_with_path(params)]
    rules = [rule for rule in SHARDING if any(matches(rule[0], path) for path in paths)]
    return params_shardings(mesh, params, rules)

  return shardings
