"""LoRA-FA (Zhang et al. 2023, arXiv 2308.03303, sec. 3). With x a row vector, as in JAX:

    h = x W + scaling * x A B

as in LoRA, but A is frozen. The gradient of B needs x A, of the size of the rank, and not x: the
backward pass keeps the layer's input only if the base model needs it.

Of the changes of W that B can make, a step along

    (A^T A)^-1 grad_B / scaling^2

is nearest to one along the gradient of W. PEFT's LoRA-FA optimizer takes this for B's gradient, and
so does `lora_fa_optimizer`. Without it, this is the setting of AsymmetryLoRA (Zhu et al. 2024,
arXiv 2402.16842).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.adapt import adapt_by
from lora_jax.adapters.checks import check_adapter
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import LoraWeight, Variant, adapter_weights, is_lora_weight
from lora_jax.adapters.targets import find_leaves
from lora_jax.transform.interpreter import OpaqueRule
from lora_jax.variants.lora import ARRAYS, start, weight

DAMPING = 1e-8  # PEFT's, added to the diagonal of A^T A

LORA_FA = Variant("LoRA-FA", ARRAYS, start, weight, frozen=("lora_a",))


def lora_fa(
  fn: Callable[..., Any], config: LoraConfig, opaque: Mapping[str, OpaqueRule] | None = None
) -> Adaptation:
  """Adapts `fn(params, *args, **kwargs)` by LoRA-FA: `lora` with `variant=LORA_FA` in the config.

  For the arguments, the further arguments of `apply` and the errors, see
  `lora_jax.adapters.adapt.adapt`. An optimizer of the bare trainable tree must not update A: use
  `lora_jax.freeze`, or `partition`, which also leaves A's gradient out.

  >>> fn = lambda params, x: x @ params["kernel"]
  >>> params, x = {"kernel": jnp.ones((8, 6))}, jnp.ones((3, 8))
  >>> adapted = lora_fa(fn, LoraConfig(rank=2, alpha=4.0, target="kernel"))
  >>> trainable = adapted.init(jax.random.key(0), params, x)
  >>> import lora_jax
  >>> lora_jax.trainable_mask({"base": params, "adapter": trainable})["adapter"]["kernel"].arrays
  {'lora_a': False, 'lora_b': True}
  """
  return adapt_by(LORA_FA, fn, config, opaque)


class LoraFaState(NamedTuple):
  """The state of `lora_fa_optimizer`.

  Attributes:
    inverses: `(A^T A)^-1 / scaling^2` of each weight of LoRA-FA, in JAX's order of the tree.
    inner: the state of the inner optimizer.
  """

  inverses: tuple[Float[Array, "*batch rank rank"], ...]
  inner: Any


def lora_fa_optimizer(
  optimizer: optax.GradientTransformation, config: LoraConfig, trainable: PyTree, params: PyTree
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer, whose gradient of B becomes `(A^T A)^-1 grad_B / scaling^2`.

  The inverses are in its state, rank x rank each: A need not be among the leaves that the optimizer
  sees. Other leaves keep their gradients.

  Args:
    optimizer: any optax transformation.
    config: of the adapter; it has the scaling of each weight.
    trainable: its tree, or its shapes, for a state of which only the shapes matter.
    params: of the base model, or their shapes.
  Raises:
    ValueError: if the adapter is not for these params, or no weight is adapted by LoRA-FA.
  """
  targets, extra = find_leaves(config, params)
  check_adapter(trainable, targets, extra)
  inverses = tuple(
    _inverse(node, targets[path].scaling)
    for path, node in adapter_weights(trainable).items()
    if is_lora_fa(node)
  )
  if not inverses:
    raise ValueError(
      "lora_fa_optimizer got an adapter without a weight of LoRA-FA. Use "
      "LoraConfig(variant=lora_jax.LORA_FA), or the optimizer without it"
    )
  inner = optax.with_extra_args_support(optimizer)

  def init(params: PyTree) -> LoraFaState:
    return LoraFaState(inverses, inner.init(params))

  def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any):
    leaves, structure = jax.tree.flatten(updates, is_leaf=is_lora_weight)
    remaining = iter(state.inverses)
    leaves = [
      _preconditioned(leaf, next(remaining)) if is_lora_fa(leaf) else leaf for leaf in leaves
    ]
    grads = jax.tree.unflatten(structure, leaves)
    updates, inner_state = inner.update(grads, state.inner, params, **extra)
    return updates, LoraFaState(state.inverses, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def is_lora_fa(node: Any) -> bool:
  return is_lora_weight(node) and node.table == LORA_FA.table


def _inverse(node: LoraWeight, scaling: float) -> Float[Array, "*batch rank rank"]:
  """Returns `(A^T A)^-1 / scaling^2`; zeros for shapes."""
  a, rank = node.lora_a, node.rank
  batch = a.shape[: len(node.axes.batch)]
  if isinstance(a, jax.ShapeDtypeStruct):
    return jnp.zeros((*batch, rank, rank))
  with jax.default_matmul_precision("float32"):
    columns = jnp.asarray(a, jnp.float32).reshape(*batch, -1, rank)
    gram = columns.mT @ columns
    damped = gram + DAMPING * jnp.broadcast_to(jnp.eye(rank), gram.shape)
    return jnp.linalg.pinv(damped, hermitian=True) / scaling**2


def _preconditioned(gradient: LoraWeight, inverse: Float[Array, "*batch rank rank"]) -> LoraWeight:
  """Returns a weight's gradients, B's multiplied by the inverse."""
  b = gradient.lora_b
  rows = b.reshape(*inverse.shape[:-1], math.prod(b.shape[inverse.ndim - 1 :]))
  with jax.default_matmul_precision("float32"):
    return gradient.replace(lora_b=(inverse @ rows).reshape(b.shape).astype(b.dtype))
