"""Paths, patterns and partitions of parameter trees.

One path language everywhere: the keys of a leaf joined by `/`, as in
`h_0/attn/query/kernel`, matched as a whole by a regular expression
(as `re.fullmatch` does; see `patterns`). A pattern that matches nothing is an error.
"""

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from lora_jax.patterns import compiled, fullmatch
from lora_jax.quantization.leaf import is_quantized


@dataclasses.dataclass(frozen=True)
class FrozenKey:
  """The key of an array that a node of an adapter holds and that is not trained."""

  name: str

  def __str__(self) -> str:
    return self.name


def key_parts(key_path: Sequence[Any]) -> tuple[str, ...]:
  """Returns the keys of a `jax.tree_util` key path as plain strings."""
  return tuple(jax.tree_util.keystr((key,), simple=True) for key in key_path)


def leaves_with_path(tree: PyTree, is_leaf=None) -> list[tuple[str, Any]]:
  """Returns `(path, leaf)` of every leaf of `tree`, in JAX's order."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
  return [("/".join(key_parts(keys)), leaf) for keys, leaf in flat]


def weights_with_path(params: PyTree) -> list[tuple[str, Any]]:
  """Returns `(path, leaf)` of every leaf of params; a quantized weight is one leaf."""
  return leaves_with_path(params, is_leaf=is_quantized)


def nest(items: Iterable[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
  """Builds nested dicts from `(keys, leaf)` pairs."""
  tree: dict[str, Any] = {}
  for keys, leaf in items:
    node = tree
    for key in keys[:-1]:
      node = node.setdefault(key, {})
    node[keys[-1]] = leaf
  return tree


def replace_leaves(tree: PyTree, replacements: Mapping[str, Any]) -> PyTree:
  """Returns a tree with the leaves at some paths replaced.

  >>> replace_leaves({"a": 1, "b": {"c": 2}}, {"b/c": 3})
  {'a': 1, 'b': {'c': 3}}
  """
  leaves = [replacements.get(path, leaf) for path, leaf in weights_with_path(tree)]
  return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_quantized), leaves)


def closest_names(name: str, names: Iterable[str], count: int = 5) -> list[str]:
  """Returns the entries of `names` that look most like `name`, best first."""
  names = list(dict.fromkeys(names))
  close = difflib.get_close_matches(name, names, n=count, cutoff=0.0)
  return close or names[:count]


@functools.lru_cache(maxsize=2**16)  # asked for each leaf at every trace
def matches(pattern: str, path: str) -> bool:
  """Tells whether the regular expression `pattern` matches the whole of `path`."""
  return fullmatch(pattern, path)


def as_patterns(patterns: str | Iterable[str], setting: str = "pattern") -> tuple[str, ...]:
  """Returns one pattern or several as a tuple.

  Args:
    patterns: regular expressions for whole paths.
    setting: the name of the setting that holds the patterns, for the message.
  Raises:
    ValueError: naming the setting, if a pattern is not a regular expression.
  """
  if not isinstance(patterns, Iterable):
    raise ValueError(f"{setting} must be a pattern or a list of patterns, got {patterns!r}")
  patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
  for pattern in patterns:
    if not isinstance(pattern, str):
      raise ValueError(f"{setting}: a pattern must be a string, got {pattern!r}")
    try:
      compiled(pattern)
    except ValueError as error:
      raise ValueError(f"{setting}: {error}") from error
  return patterns


def select(patterns: str | Iterable[str], paths: Iterable[str], setting: str) -> list[str]:
  """Returns the `paths` that any pattern matches; each pattern must match one.

  Args:
    patterns: regular expressions for whole paths.
    paths: the candidates.
    setting: the name of the setting that holds the patterns, for the message.
  Raises:
    ValueError: if a pattern matches no path; the message has the closest names.
  """
  paths = list(paths)
  selected: set[str] = set()
  for pattern in as_patterns(patterns, setting):
    matching = [path for path in paths if matches(pattern, path)]
    if not matching:
      raise ValueError(
        f"{setting} {pattern!r} matches none of the {len(paths)} leaves "
        "(patterns must match whole paths); did you mean "
        f"{', '.join(closest_names(pattern, paths))}?"
      )
    selected.update(matching)
  return [path for path in paths if path in selected]


def match(tree: PyTree, patterns: str | Iterable[str]) -> PyTree:
  """Returns a tree of bools: True where a leaf's path matches one of `patterns`.

  This is the format of optax's weight-decay masks:

  >>> import jax.numpy as jnp
  >>> tree = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
  >>> match(tree, r"kernel")
  {'bias': False, 'kernel': True}

  Raises:
    ValueError: if a pattern matches no leaf.
  """
  paths = [path for path, _ in leaves_with_path(tree)]
  selected = set(select(patterns, paths, "pattern"))
  return jax.tree.unflatten(jax.tree.structure(tree), [path in selected for path in paths])


def label(tree: PyTree, labels: Mapping[str, str]) -> PyTree:
  """Returns a tree of strings: each leaf's label by the first pattern that matches its path.

  This is the format of the groups of `optax.partition`. With it, LoRA+ (Hayou et al. 2024,
  arXiv 2402.12354) is a dict of two optimizers:

  >>> import jax.numpy as jnp
  >>> tree = {"query": {"lora_a": jnp.zeros((4, 2)), "lora_b": jnp.zeros((2, 4))}}
  >>> label(tree, {r".*/lora_b": "fast", r".*": "slow"})
  {'query': {'lora_a': 'slow', 'lora_b': 'fast'}}

  Args:
    tree: any tree of arrays; as in JAX, None marks the absence of a leaf.
    labels: pattern to label, in order of precedence.
  Raises:
    ValueError: if a pattern matches no leaf or a leaf matches no pattern.
  """
  paths = [path for path, _ in leaves_with_path(tree)]
  select(labels, paths, "label pattern")
  names = []
  for path in paths:
    name = next((name for pattern, name in labels.items() if matches(pattern, path)), None)
    if name is None:
      raise ValueError(
        f"no label pattern matches {path!r}; patterns: {', '.join(map(repr, labels))}. "
        "Add a last pattern r'.*' for the rest"
      )
    names.append(name)
  return jax.tree.unflatten(jax.tree.structure(tree), names)


def trainable_mask(tree: PyTree, extra: str | Iterable[str] = ()) -> PyTree:
  """Returns the optax mask of a combined tree `{"base": params, "adapter": trainable}`.

  True for every leaf under `adapter`, but for arrays that a variant holds and does not train
  (DoRA's `norm_squared`), and for the leaves whose whole path (with `base/`) matches
  `extra`; False for the rest.

  Raises:
    ValueError: if `tree` is not a combined tree, or a pattern matches nothing.
  """
  if not isinstance(tree, Mapping) or set(tree) != {"base", "adapter"}:
    actual = sorted(tree) if isinstance(tree, Mapping) else type(tree).__name__
    raise ValueError(
      f"expected a combined tree {{'base': params, 'adapter': trainable}}, got {actual}. "
      "A trainable tree on its own needs no mask; for other trees use lora_jax.match"
    )
  flat, structure = jax.tree_util.tree_flatten_with_path(tree)
  paths = ["/".join(key_parts(keys)) for keys, _ in flat]
  extra = as_patterns(extra, "extra")
  selected = set(select(extra, paths, "extra")) if extra else set()
  frozen = [any(isinstance(key, FrozenKey) for key in keys) for keys, _ in flat]
  mask = [
    (path.startswith("adapter/") and not is_frozen) or path in selected
    for path, is_frozen in zip(paths, frozen, strict=True)
  ]
  return jax.tree.unflatten(structure, mask)


def _is_none(leaf: Any) -> bool:
  return leaf is None


def partition(tree: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
  """Splits `tree` into its trainable and its frozen part; `combine` is the inverse.

  Both parts have the nesting of `tree`, with None in the places of the other part, so that
  `jax.grad` over the trainable part differentiates nothing else.

  Args:
    tree: any tree of arrays.
    mask: a tree of bools with the structure of `tree`, as `trainable_mask` returns it.
  Raises:
    ValueError: if `mask` has another structure than `tree`, or leaves that are not bools.
  """
  if jax.tree.structure(tree) != jax.tree.structure(mask):
    missing = {p for p, _ in leaves_with_path(tree)} ^ {p for p, _ in leaves_with_path(mask)}
    raise ValueError(
      "the mask must have the structure of the tree; paths in one of them only: "
      f"{', '.join(sorted(missing)[:5]) or '(none: the nodes differ)'}"
    )
  for path, keep in leaves_with_path(mask):
    if not isinstance(keep, bool | np.bool_):
      raise ValueError(f"the mask of {path} must be True or False, got {keep!r:.100}")
  trainable = jax.tree.map(lambda leaf, keep: leaf if keep else None, tree, mask)
  frozen = jax.tree.map(lambda leaf, keep: None if keep else leaf, tree, mask)
  return trainable, frozen


def combine(*parts: PyTree) -> PyTree:
  """Joins the parts of a tree that `partition` made, in any order.

  Raises:
    ValueError: if a leaf is in two parts, or the parts have different structures.
  """
  if not parts:
    raise ValueError("expected the parts of a tree, got none")
  structures = [jax.tree.structure(part, is_leaf=_is_none) for part in parts]
  if any(structure != structures[0] for structure in structures):
    paths = [{path for path, _ in leaves_with_path(part, _is_none)} for part in parts]
    different = sorted(set.union(*paths) - set.intersection(*paths))
    raise ValueError(
      "the parts must have one structure, with None for the leaves of the others; paths in some "
      f"of them only: {', '.join(different[:5]) or '(none: the nodes differ)'}"
    )

  def join(path, *leaves):
    present = [leaf for leaf in leaves if leaf is not None]
    if len(present) > 1:
      name = "/".join(key_parts(path))
      raise ValueError(f"{name!r} is in {len(present)} of the parts; expected one")
    return present[0] if present else None

  return jax.tree_util.tree_map_with_path(join, *parts, is_leaf=_is_none)
