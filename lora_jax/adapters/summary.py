"""The table of an adapter's parameters, and the error of merging it."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lora_jax.adaptation import Adaptation
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.copies import is_float, wide_dtype
from lora_jax.adapters.delta import adapter_extra, adapter_weights, shared_arrays
from lora_jax.adapters.parts import has_parts, path_in_part
from lora_jax.adapters.targets import find_leaves
from lora_jax.transform.tracing import is_array
from lora_jax.trees import leaves_with_path, weights_with_path


class _Row(NamedTuple):
  """A row of the table: a path, or several of one kind, and how many parameters are trained."""

  path: str
  cells: tuple[str, ...]
  size: int


def summary(
  params: PyTree, trainable: PyTree, config: LoraConfig | None = None, by_kind: bool = False
) -> str:
  """Returns a table of the trained parameters: path, shapes, rank, scaling, count and share.

  Fully trained leaves follow the adapted weights and are counted separately, as the paper counts
  heads. Shares are of the base model's parameters. Each part of `lora_jax.compose` has a table.

  >>> import jax, jax.numpy as jnp, lora_jax
  >>> fn, params = lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((64, 32))}
  >>> config = lora_jax.LoraConfig(rank=2, alpha=4.0, target="kernel")
  >>> lora = lora_jax.lora(fn, config)
  >>> print(summary(params, lora.init(jax.random.key(0), params, jnp.ones((1, 64))), config))
  path      weight    lora_a   lora_b  rank  scaling  parameters   share
  kernel    64 x 32   64 x 2   2 x 32     2        2         192  9.375%
  adapter                                                    192  9.375%
  base                                                     2,048

  Args:
    params: the base model's parameters, or `ShapeDtypeStruct`s.
    trainable: as `init` returns it.
    config: for the column of scalings, which are not in the tree; None writes alpha/rank.
    by_kind: one row for the weights of all layers that differ only in the layer's number, as
      `h_{0..11}/attn/query/kernel x12`.
  Raises:
    ValueError: if `trainable` has a weight that `params` lacks.
  """
  if has_parts(trainable):  # of several methods: a table for each
    tables = (summary(params, part, config, by_kind) for part in trainable.values())
    return "\n\n".join(tables)
  base = {path: leaf for path, leaf in weights_with_path(params) if hasattr(leaf, "shape")}
  total = sum(_size(leaf) for leaf in base.values())
  targets, _ = find_leaves(config, params) if config is not None else ({}, {})
  weights, fully_trained = adapter_weights(trainable), adapter_extra(trainable)
  shared = shared_arrays(trainable)
  weights |= {path: node for path, node in shared.items() if not all(s.frozen for s in node.table)}
  specs = [spec for weight in weights.values() for spec in weight.table if not spec.frozen]
  names = list(dict.fromkeys(spec.name for spec in specs)) or ["lora_a", "lora_b"]
  blank = ("",) * (len(names) + 2)
  head = ("path", "weight", *names, "rank", "scaling", "parameters", "share")
  adapted: list[_Row] = []
  for path, weight in weights.items():
    if path not in base and path not in shared:
      raise ValueError(f"params have no leaf {path!r}, which the trainable tree adapts")
    arrays = {spec.name: weight.arrays[spec.name] for spec in weight.table if not spec.frozen}
    shapes = (_shape(arrays[name]) if name in arrays else "" for name in names)
    rank = str(weight.rank) if weight.has_rank and path in base else ""
    scaling = f"{targets[path].scaling:g}" if path in targets else f"alpha/{rank}"
    cells = (_shape(base[path]) if path in base else "", *shapes, rank, scaling if rank else "")
    adapted.append(_Row(path, cells, sum(map(_size, arrays.values()))))
  extras = [_Row(path, (_shape(leaf), *blank), _size(leaf)) for path, leaf in fully_trained.items()]
  rows = []
  for part, label in ((adapted, "adapter"), (extras, "fully trained")):
    if part:
      rows += _by_kind(part) if by_kind else part
      rows.append(_Row(label, ("", *blank), sum(row.size for row in part)))
  lines = [(row.path, *row.cells, f"{row.size:,}", _share(row.size, total)) for row in rows]
  return _aligned([head, *lines, ("base", *blank, "", f"{total:,}", "")], len(names) + 2)


def _by_kind(rows: Iterable[_Row]) -> list[_Row]:
  """Returns one row for those whose paths differ only in numbers and whose cells are the same."""
  kinds: dict[tuple[str, tuple[str, ...]], list[_Row]] = defaultdict(list)
  for row in rows:
    kinds[re.sub(r"\d+", "#", row.path), row.cells].append(row)
  return [
    _Row(_kind_name([row.path for row in same]), cells, sum(row.size for row in same))
    for (_, cells), same in kinds.items()
  ]


def _kind_name(paths: Sequence[str]) -> str:
  """Returns paths that differ only in numbers as one.

  >>> _kind_name(["h_0/query/kernel", "h_1/query/kernel", "h_2/query/kernel"])
  'h_{0..2}/query/kernel x3'
  """
  if len(paths) == 1:
    return paths[0]
  places = zip(*(map(int, re.findall(r"\d+", path)) for path in paths), strict=True)
  numbers = (_numbers(sorted(set(place))) for place in places)
  return re.sub(r"\d+", lambda _: next(numbers), paths[0]) + f" x{len(paths)}"


def _numbers(numbers: Sequence[int]) -> str:
  if len(numbers) == 1:
    return str(numbers[0])
  if numbers[-1] - numbers[0] == len(numbers) - 1:
    return f"{{{numbers[0]}..{numbers[-1]}}}"
  return f"{{{','.join(map(str, numbers))}}}"


def merge_error(adaptation: Adaptation, params: PyTree, trainable: PyTree) -> dict[str, jax.Array]:
  """Returns the relative error of each merged weight from rounding to the base model's dtype.

  The error is max|merged - exact| / max|exact| over a weight, where `exact` is merged in float32:
  0 for a float32 base model, NaN or infinity if the dtype cannot hold a merged value.

  Args:
    adaptation: as `lora` returns it, or another that can be merged.
    params: the base model's parameters.
    trainable: as `init` returns it, trained.
  """
  merged = dict(leaves_with_path(adaptation.merge(params, trainable)))
  wide = jax.tree.map(_widened, params)
  exact = dict(leaves_with_path(adaptation.merge(wide, trainable)))
  errors = {}
  for path in map(path_in_part, adapter_weights(trainable)):
    difference = jnp.max(jnp.abs(merged[path].astype(exact[path].dtype) - exact[path]))
    size = jnp.max(jnp.abs(exact[path]))
    errors[path] = jnp.where(difference == 0, 0.0, difference / size)
  return errors


def _widened(leaf: Any) -> Any:
  return (
    jnp.asarray(leaf, wide_dtype(leaf.dtype)) if is_array(leaf) and is_float(leaf.dtype) else leaf
  )


def _size(leaf: Any) -> int:
  return math.prod(leaf.shape)


def _shape(leaf: Any) -> str:
  return " x ".join(map(str, leaf.shape)) or "()"


def _share(count: int, total: int) -> str:
  return f"{100 * count / total:.3f}%"


def _aligned(rows: list[tuple[str, ...]], num_texts: int) -> str:
  """Lays out rows: the columns of texts to the left, the numbers to the right."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  gap = ["   "] * (num_texts - 1) + ["  "] * 4 + [""]
  lines = []
  for row in rows:
    cells = [
      (cell.ljust if i < num_texts else cell.rjust)(width) + gap[i]
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append("".join(cells).rstrip())
  return "\n".join(lines)
