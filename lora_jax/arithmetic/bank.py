"""Adapters of one base model, stacked: one compiled function serves them all at once.

Slot i of a bank is the i-th entry of the leading axis of every leaf. `apply` of an adapted function
is mapped over slots, and the base model's matmuls remain one matmul over the rows of all slots:

    bank = lora_jax.bank([(config_1, one), (config_2, other)], params)
    apply = jax.vmap(lora_jax.lora(fn, bank.config).apply, (None, 0, 0))
    apply(params, bank.trainable, x)  # x has a leading axis of slots
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.delta import LoraWeight, adapter_extra, adapter_weights
from lora_jax.adapters.targets import find_leaves
from lora_jax.arithmetic.combination import align, pad_weight
from lora_jax.arithmetic.opened import Adapter
from lora_jax.fields import Count, CountOrZero, read_value
from lora_jax.trees import nest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bank:
  """Adapters of one config and one shape; a pytree, whose structure `replace` does not change.

  Attributes:
    config: of every slot, with scaling 1; static.
    trainable: a trainable tree with a leading axis of slots on each leaf. An empty slot is the base
      model.
  """

  config: LoraConfig = dataclasses.field(metadata={"static": True})
  trainable: PyTree

  @property
  def slots(self) -> int:
    """The number of slots."""
    return jax.tree.leaves(self.trainable)[0].shape[0]

  def adapter(self, slot: int) -> Adapter:
    """Returns the adapter of a slot, padded; `drop_zero_ranks` removes the padding.

    Raises:
      ValueError: if there is no such slot.
    """
    self.check_slot(slot)
    return self.config, jax.tree.map(lambda leaf: leaf[slot], self.trainable)

  def replace(self, slot: int, adapter: Adapter, params: PyTree) -> "Bank":
    """Returns the bank with another adapter in a slot; functions of it are not compiled again.

    Args:
      slot: its number.
      adapter: `(config, trainable)`, padded as `align` does.
      params: of the base model; shapes suffice if the adapter has all fully trained leaves.
    Raises:
      ValueError: if there is no such slot, or the adapter does not fit: it adapts a weight or a
        layer that the bank does not, has a larger rank, or is of a variant that is not plain LoRA.
    """
    config, before = self.adapter(slot)
    aligned, (_, tree) = align([(config, before), adapter], params)
    _check_fits(adapter_weights(before), adapter_weights(tree))
    extra = sorted(set(adapter_extra(tree)) - set(adapter_extra(before)))
    if extra:
      raise ValueError(
        f"the adapter has fully trained {', '.join(extra)}, and no adapter of the bank has. Create "
        "the bank with this adapter among the others"
      )
    if _hashable(aligned) != config:
      raise ValueError(
        'the adapter has on_unhandled="materialize" for a weight for which the bank has "raise". '
        "Create the bank with this adapter among the others"
      )
    put = jax.tree.map(lambda leaf, entry: leaf.at[slot].set(entry), self.trainable, tree)
    return dataclasses.replace(self, trainable=put)

  def check_slot(self, slot: int) -> None:
    """Raises ValueError unless it is the number of a slot."""
    read_value(CountOrZero, slot, "slot")
    if slot >= self.slots:
      raise ValueError(
        f"slot {slot} is not in the bank: it has slots 0 to {self.slots - 1}. Create it with more, "
        "lora_jax.bank(..., slots=...)"
      )


def bank(
  adapters: Sequence[Adapter],
  params: PyTree,
  *,
  slots: int | None = None,
  rank: int | None = None,
) -> Bank:
  """Returns adapters as a bank: padded to one config and one shape by `align`, and stacked; exact.

  >>> import jax, jax.numpy as jnp, lora_jax
  >>> fn, params = lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((8, 6))}
  >>> config = lora_jax.LoraConfig(rank=2, alpha=4.0, target="kernel")
  >>> trainable = lora_jax.lora(fn, config).init(jax.random.key(0), params, jnp.ones((1, 8)))
  >>> two = bank([(config, trainable)], params, slots=2, rank=4)
  >>> two.trainable["kernel"].lora_a.shape
  (2, 8, 4)
  >>> two = two.replace(1, (config, trainable), params)

  Args:
    adapters: `(config, trainable)` of each, for slots 0, 1, ...; of plain LoRA (`convert` returns
      the nearest of another variant). Ranks, alphas and targets may differ.
    params: of the base model; shapes suffice if every fully trained leaf is in all adapters.
    slots: the number of slots, with empty ones for adapters to come; None is one for each adapter.
    rank: of the slots, if it is larger than the adapters', for others to come.
  Raises:
    ValueError: as `align`, or if there are more adapters than slots.
  """
  config, trees = align(adapters, params)
  if rank is not None:
    read_value(Count, rank, "rank")
  count = len(trees) if slots is None else read_value(Count, slots, "slots")
  if count < len(trees):
    raise ValueError(f"slots={slots} must be at least the number of adapters, {len(trees)}")
  if rank is not None or count > len(trees):
    blank = _blank(config, trees[0], params, rank or 1)
    config, (*trees, empty) = align([*adapters, blank], params)
    trees += [empty] * (count - len(trees))
  # In NumPy: JAX would compile a program for each shape and each number of adapters.
  stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *trees)
  return Bank(_hashable(config), stacked)


def _blank(config: LoraConfig, tree: PyTree, params: PyTree, rank: int) -> Adapter:
  """Returns an adapter that changes nothing, of this rank at least, with the factors of another."""
  targets, _ = find_leaves(config, params)
  zeros = {
    path: pad_weight(jax.tree.map(jnp.zeros_like, weight), max(rank, weight.rank))
    for path, weight in adapter_weights(tree).items()
  }
  items = ((targets[path].keys, weight) for path, weight in zeros.items())
  return dataclasses.replace(config, extra=()), nest(items)


def _hashable(config: LoraConfig) -> LoraConfig:
  """Returns a config as static data of a pytree, which is hashed: with tuples for lists."""
  fields = {name: tuple(getattr(config, name)) for name in ("target", "rules", "extra")}
  return dataclasses.replace(config, **fields)


def _check_fits(before: Mapping[str, LoraWeight], after: Mapping[str, LoraWeight]) -> None:
  """Raises ValueError if padding to a new adapter has changed the shapes of a bank's weights.

  Args:
    before: a slot's weights by path.
    after: the same, aligned with the new adapter.
  """
  remedy = "Create the bank with this adapter among the others"
  if others := sorted(set(after) - set(before)):
    raise ValueError(f"the adapter adapts {', '.join(others)}, which the bank does not. {remedy}")
  for path, weight in after.items():
    slot = before[path]
    if weight.layers != slot.layers:
      raise ValueError(
        f"the adapter adapts other layers of {path} than the bank, whose layers are "
        f"{list(slot.layers or ())}. {remedy}"
      )
    if weight.rank > slot.rank:
      raise ValueError(
        f"the adapter has rank {weight.rank} at {path}, and the bank has rank {slot.rank}. Create "
        "the bank with lora_jax.bank(..., rank=...), or truncate the adapter by "
        "lora_jax.truncate_rank"
      )
