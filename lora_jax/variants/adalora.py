"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512, sec. 3). With x a row vector, as in JAX:

    h = x W + scaling * x (A * e) B            e: (rank,), of either sign

with A, e and B in the roles of a singular value decomposition: A's columns and B's rows are kept
nearly orthonormal by a penalty. e is initialized to 0, so that step 0 is the base model. A column
of A, its e and its row of B are a triplet. Its importance is (eq. 7 to 10)

    s(e) + mean over in of s(A) + mean over out of s(B)
    s = sensitivity * uncertainty,   moving averages of |w grad_w| and of its deviation

During training the budget, a number of triplets for all weights together, falls from all of them
along a cubic curve (eq. 12), and the e of the least important ones are set to 0. Each weight ends
with a rank of its own: see `adalora_ranks`.

`adalora_optimizer` does this, around any optimizer. The settings are PEFT's.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.adapt import adapt_by
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import LoraWeight, Site, Variant, adapter_weights, is_lora_weight
from lora_jax.fields import Count, CountOrZero, NonNegative, Within, check_fields
from lora_jax.transform.factored import Factored
from lora_jax.transform.interpreter import OpaqueRule

ARRAYS = {"lora_a": "batch in rank", "lora_e": "batch rank", "lora_b": "batch rank out"}
STDDEV = 0.02
Decay = Annotated[float, Within("(0, 1)")]


def weight(w: Factored, p: Any, scaling: Any) -> Factored:
  """Returns `W + scaling * (A * e) B` (eq. 3)."""
  return w + scaling * ((p.lora_a * p.lora_e) @ p.lora_b)


def start(key: PRNGKeyArray, site: Site) -> dict[str, jax.Array]:
  """Returns A and B from N(0, 0.02^2), as PEFT, whatever the config's `init`, and e = 0."""
  a, e, b = (site.array_shape(words) for words in ARRAYS.values())
  keys = jax.random.split(key)
  return {
    "lora_a": STDDEV * jax.random.normal(keys[0], a),
    "lora_e": jnp.zeros(e),
    "lora_b": STDDEV * jax.random.normal(keys[1], b),
  }


ADALORA = Variant("AdaLoRA", ARRAYS, start, weight)


def adalora(
  fn: Callable[..., Any], config: LoraConfig, opaque: Mapping[str, OpaqueRule] | None = None
) -> Adaptation:
  """Adapts `fn(params, *args, **kwargs)` by AdaLoRA: `lora` with `variant=ADALORA` in the config.

  The config's rank is the initial one, PEFT's `init_r`; the paper's is 1.5 times the final mean.
  Train with `adalora_optimizer`. For the arguments, the further arguments of `apply` and the
  errors, see `lora_jax.adapters.adapt.adapt`.

  >>> fn = lambda params, x: x @ params["kernel"]
  >>> params = {"kernel": jnp.ones((8, 6))}
  >>> adapted = adalora(fn, LoraConfig(rank=3, alpha=3.0, target="kernel"))
  >>> trainable = adapted.init(jax.random.key(0), params, jnp.ones((1, 8)))
  >>> jax.tree.map(jnp.shape, trainable["kernel"].arrays)
  {'lora_a': (8, 3), 'lora_b': (3, 6), 'lora_e': (3,)}
  """
  return adapt_by(ADALORA, fn, config, opaque)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoraBudget:
  """The settings of `adalora_optimizer`.

  Attributes:
    target_rank: the final mean rank of a matrix; PEFT's `target_r`.
    num_train_steps: number of updates; PEFT's `total_step`.
    initial_steps: the first updates, without a reduction; `tinit`.
    final_steps: the last updates, in which the choice is fixed; `tfinal`.
    interval: number of updates from one choice to the next; `deltaT`. Between them, the e that were
      set to 0 are trained, and may be chosen again.
    beta1: decay of the sensitivity's moving average.
    beta2: decay of the uncertainty's.
    orthogonality: the weight of the penalty in the loss, the mean over all A and B of
      `|A^T A - I|` in the Frobenius norm; 0 is none.
  """

  target_rank: Count
  num_train_steps: Count
  initial_steps: CountOrZero = 0
  final_steps: CountOrZero = 0
  interval: Count = 1
  beta1: Decay = 0.85
  beta2: Decay = 0.85
  orthogonality: NonNegative = 0.5

  def __post_init__(self):
    check_fields(self)
    if self.initial_steps >= self.last_choice:
      raise ValueError(
        f"initial_steps={self.initial_steps} and final_steps={self.final_steps} leave none of the "
        f"{self.num_train_steps} steps for reducing the ranks. Lower them, or train for longer"
      )

  @property
  def last_choice(self) -> int:
    """The step after which the choice is fixed."""
    return self.num_train_steps - self.final_steps

  def at(self, step: Int[Array, ""], initial: int, final: int) -> Int[Array, ""]:
    """Returns the number of triplets at a step between `initial_steps` and `last_choice`."""
    done = (step - self.initial_steps) / (self.last_choice - self.initial_steps)
    return jnp.floor(final + (initial - final) * (1 - done) ** 3).astype(jnp.int32)


class AdaLoraState(NamedTuple):
  """The state of `adalora_optimizer`; its trees have the nodes of AdaLoRA.

  Attributes:
    step: number of updates made so far.
    sensitivity: the moving average of |w grad_w|.
    uncertainty: the moving average of its deviation.
    kept: the chosen triplets, in the place of e.
    inner: the state of the inner optimizer.
  """

  step: Int[Array, ""]
  sensitivity: PyTree
  uncertainty: PyTree
  kept: PyTree
  inner: Any


def adalora_optimizer(
  optimizer: optax.GradientTransformation, budget: AdaLoraBudget
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer so that it trains by AdaLoRA.

  The penalty's gradient is added to the loss's. After each update the importances follow, from the
  new values and this gradient, as in PEFT; then the e that are not chosen are set to 0, exactly.

  >>> budget = AdaLoraBudget(target_rank=2, num_train_steps=100, initial_steps=10, final_steps=30)
  >>> optimizer = adalora_optimizer(optax.adamw(1e-3), budget)

  Args:
    optimizer: any optax transformation. It sees all leaves, also those that are not AdaLoRA's.
    budget: the settings.
  Raises:
    ValueError: when it is initialized, if no weight is adapted by AdaLoRA, or `target_rank` is
      above the mean rank.
  """
  inner = optax.with_extra_args_support(optimizer)

  def init(params: PyTree) -> AdaLoraState:
    _sizes(params, budget.target_rank)
    sensitivity, uncertainty = (
      _on_nodes(lambda node: jax.tree.map(jnp.zeros_like, node), params) for _ in range(2)
    )
    kept = _on_nodes(lambda node: _only_e(node, jnp.ones_like(node.lora_e, bool)), params)
    step = jnp.zeros((), jnp.int32)
    return AdaLoraState(step, sensitivity, uncertainty, kept, inner.init(params))

  def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any):
    if params is None:
      raise ValueError("AdaLoRA needs the params: optimizer.update(grads, state, params)")
    weight = budget.orthogonality
    grads = _with_penalty(updates, params, weight) if weight else updates
    updates, inner_state = inner.update(grads, state.inner, params, **extra)
    step, new = state.step + 1, optax.apply_updates(params, updates)
    sensitivity, uncertainty = _moved(state, new, grads, step, budget)
    scores = _on_nodes(_importance, sensitivity, uncertainty)
    initial, final = _sizes(params, budget.target_rank)
    chooses = (step > budget.initial_steps) & (step <= budget.last_choice)
    chooses &= (step % budget.interval == 0) | (step == budget.last_choice)
    threshold = _threshold(scores, initial - budget.at(step, initial, final))
    kept = _on_nodes(
      lambda kept, score: _only_e(kept, jnp.where(chooses, score.lora_e > threshold, kept.lora_e)),
      state.kept,
      scores,
    )
    masks = chooses | (step > budget.last_choice)
    updates = jax.tree.map(
      lambda update, param, kept: _masked(update, param, kept, masks),
      *(updates, params, kept),
      is_leaf=is_lora_weight,
    )
    return updates, AdaLoraState(step, sensitivity, uncertainty, kept, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def adalora_ranks(trainable: PyTree) -> dict[str, Int[Array, "*batch"]]:
  """Returns the rank of each weight adapted by AdaLoRA, by path: the number of e other than 0.

  For the same adapter as plain LoRA of these ranks, `lora_jax.drop_zero_ranks` of
  `lora_jax.to_lora`.
  """
  return {
    path: jnp.sum(node.lora_e != 0, axis=-1)
    for path, node in adapter_weights(trainable).items()
    if _is_adalora(node)
  }


def _is_adalora(node: Any) -> bool:
  return is_lora_weight(node) and node.table == ADALORA.table


def _on_nodes(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
  """Applies a function to the nodes of AdaLoRA; None takes the place of the other leaves."""

  def apply(node: Any, *others: Any) -> Any:
    return fn(node, *others) if _is_adalora(node) else None

  return jax.tree.map(apply, tree, *rest, is_leaf=is_lora_weight)


def _nodes(tree: PyTree) -> list[LoraWeight]:
  return [node for node in jax.tree.leaves(tree, is_leaf=is_lora_weight) if _is_adalora(node)]


def _only_e(node: LoraWeight, e: jax.Array) -> LoraWeight:
  return node.replace(lora_a=None, lora_e=e, lora_b=None)


def _sizes(params: PyTree, target_rank: int) -> tuple[int, int]:
  """Returns the initial and the final number of triplets."""
  shapes = [node.lora_e.shape for node in _nodes(params)]
  if not shapes:
    raise ValueError(
      "adalora_optimizer got an adapter without a weight of AdaLoRA. Use "
      "LoraConfig(variant=lora_jax.ADALORA)"
    )
  initial = sum(math.prod(shape) for shape in shapes)
  final = target_rank * sum(math.prod(shape[:-1]) for shape in shapes)
  if final > initial:
    raise ValueError(
      f"target_rank={target_rank} is above the mean initial rank "
      f"{initial * target_rank / final:g}, which AdaLoRA lowers. Choose a larger rank in "
      "LoraConfig; the paper's is 1.5 times the target"
    )
  return initial, final


def _with_penalty(grads: PyTree, params: PyTree, weight: float) -> PyTree:
  slopes = jax.grad(_penalty)(_on_nodes(lambda node: node, params), weight)

  def added(grad: Any, slope: Any) -> Any:
    return grad if slope is None else jax.tree.map(jnp.add, grad, slope)

  return jax.tree.map(added, grads, slopes, is_leaf=is_lora_weight)


def _penalty(params: PyTree, weight: float) -> Float[Array, ""]:
  """Returns `weight` times the mean distance of A^T A and B B^T from the identity."""
  distances = []
  with jax.default_matmul_precision("float32"):
    for node in _nodes(params):
      batch, rank = node.lora_e.shape[:-1], node.lora_e.shape[-1]
      columns = node.lora_a.reshape(*batch, -1, rank)
      for rows in (columns.mT, node.lora_b.reshape(*batch, rank, -1)):
        gram = rows @ rows.mT
        identity = jnp.broadcast_to(jnp.eye(rank), gram.shape)
        squared = jnp.sum((gram - identity) ** 2, axis=(-2, -1))
        positive = squared > 0  # the gradient of the root of 0 is not finite
        distance = jnp.sqrt(jnp.where(positive, squared, 1.0))
        distances.append(jnp.where(positive, distance, 0.0).ravel())
  return weight * jnp.mean(jnp.concatenate(distances))


def _moved(
  state: AdaLoraState, params: PyTree, grads: PyTree, step: Int[Array, ""], budget: AdaLoraBudget
) -> tuple[PyTree, PyTree]:
  """Returns the moving averages after an update; they are fixed from the last choice on."""

  def average(decay: float, old: Any, new: Any) -> Any:
    return jnp.where(step < budget.last_choice, decay * old + (1 - decay) * new, old)

  def sensitivity(param: LoraWeight, grad: LoraWeight, old: LoraWeight) -> LoraWeight:
    return jax.tree.map(
      lambda p, g, old: average(budget.beta1, old, jnp.abs(p * g)), param, grad, old
    )

  def uncertainty(
    param: LoraWeight, grad: LoraWeight, mean: LoraWeight, old: LoraWeight
  ) -> LoraWeight:
    return jax.tree.map(
      lambda p, g, mean, old: average(budget.beta2, old, jnp.abs(jnp.abs(p * g) - mean)),
      *(param, grad, mean, old),
    )

  means = _on_nodes(sensitivity, params, grads, state.sensitivity)
  return means, _on_nodes(uncertainty, params, grads, means, state.uncertainty)


def _importance(sensitivity: LoraWeight, uncertainty: LoraWeight) -> LoraWeight:
  """Returns the importance of each triplet, in the place of e (eq. 7)."""
  a, b, e = (
    sensitivity.arrays[name] * uncertainty.arrays[name] for name in ("lora_a", "lora_b", "lora_e")
  )
  num_batch_axes = e.ndim - 1
  over_inputs = jnp.mean(a, axis=tuple(range(num_batch_axes, a.ndim - 1)))
  over_outputs = jnp.mean(b, axis=tuple(range(num_batch_axes + 1, b.ndim)))
  return _only_e(sensitivity, e + over_inputs + over_outputs)


def _threshold(scores: PyTree, num_dropped: Int[Array, ""]) -> Float[Array, ""]:
  """Returns the largest of the dropped scores, of all weights; minus infinity if none is."""
  ordered = jnp.sort(jnp.concatenate([score.lora_e.ravel() for score in _nodes(scores)]))
  largest = ordered[jnp.maximum(num_dropped - 1, 0)]
  return jnp.where(num_dropped > 0, largest, -jnp.inf)


def _masked(update: Any, param: Any, kept: Any, masks: Bool[Array, ""]) -> Any:
  """Returns the update that makes an e of 0 where a triplet is not chosen."""
  if not _is_adalora(param):
    return update
  drops = masks & ~kept.lora_e
  return update.replace(lora_e=jnp.where(drops, -param.lora_e, update.lora_e))
