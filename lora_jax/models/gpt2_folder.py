"""GPT-2 from and to a Hugging Face folder, whose fused c_attn is our query, key and value."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models.files import read_json
from lora_jax.models.gpt2 import GPT2, GPT2Config
from lora_jax.models.hub import (
  Index,
  StoredTensor,
  Tensors,
  check_tensors,
  find_folder,
  make_leaf,
  open_tensors,
  save_folder,
)

PyTree = Any

FIELDS = {  # ours: Hugging Face's
  "vocab_size": "vocab_size",
  "num_positions": "n_positions",
  "embed_dim": "n_embd",
  "num_layers": "n_layer",
  "num_heads": "n_head",
}
LAYER = {  # our leaf: the tensor, and which third of its last axis
  "ln_1/scale": ("ln_1.weight", None),
  "ln_1/bias": ("ln_1.bias", None),
  "attn/query/kernel": ("attn.c_attn.weight", 0),
  "attn/query/bias": ("attn.c_attn.bias", 0),
  "attn/key/kernel": ("attn.c_attn.weight", 1),
  "attn/key/bias": ("attn.c_attn.bias", 1),
  "attn/value/kernel": ("attn.c_attn.weight", 2),
  "attn/value/bias": ("attn.c_attn.bias", 2),
  "attn/out/kernel": ("attn.c_proj.weight", None),
  "attn/out/bias": ("attn.c_proj.bias", None),
  "ln_2/scale": ("ln_2.weight", None),
  "ln_2/bias": ("ln_2.bias", None),
  "mlp/up/kernel": ("mlp.c_fc.weight", None),
  "mlp/up/bias": ("mlp.c_fc.bias", None),
  "mlp/down/kernel": ("mlp.c_proj.weight", None),
  "mlp/down/bias": ("mlp.c_proj.bias", None),
}
OUTSIDE = {
  "wte/embedding": "wte.weight",
  "wpe/embedding": "wpe.weight",
  "ln_f/scale": "ln_f.weight",
  "ln_f/bias": "ln_f.bias",
}
MASKS = re.compile(r".*\.attn\.(bias|masked_bias)")  # constants that old files hold


def load_gpt2(
  name: str | Path,
  *,
  param_dtype: Any = "float32",
  shardings: PyTree | Callable[[PyTree], PyTree] | None = None,
  **computation: Any,
) -> tuple[GPT2Config, PyTree]:
  """Loads a GPT-2 from a local folder or the hub.

  Args:
    name: a folder with config.json and safetensors, or a hub repository.
    param_dtype: that the weights are brought to.
    shardings: where the params lie, each device reading its own part: a tree like theirs or
      a prefix of it, as one `Sharding` for all; or a function from `params_shapes` to such a
      tree. None is the default device.
    **computation: fields of `GPT2Config` that the folder does not give: `dtype`,
      `scan_layers`, `remat`, `attention`.

  Returns:
    The model's config and params, `GPT2(config).apply({"params": params}, tokens)`.
  Raises:
    FileNotFoundError: if config.json or weights are missing.
    ValueError: if the folder holds no GPT-2 that is computed as ours is, or its tensors are
      missing, unexpected, mis-shaped or truncated.
  """
  folder = find_folder(name)
  config = read_config(folder, param_dtype=param_dtype, **computation)
  shapes = params_shapes(config)
  if callable(shardings):
    shardings = shardings(shapes)
  flat, structure = jax.tree_util.tree_flatten_with_path(shapes)
  places = jax.tree.broadcast(shardings, shapes, is_leaf=lambda x: x is None)
  places = jax.tree.leaves(places, is_leaf=lambda x: x is None)
  leaves = []
  with open_tensors(folder) as tensors:
    prefix = _check(folder, config, tensors)
    for (keys, leaf), place in zip(flat, places, strict=True):
      path = "/".join(key.key for key in keys)

      def read(index: Index, path: str = path) -> np.ndarray:
        return _read(tensors, prefix, config, path, index)

      leaves.append(make_leaf(leaf.shape, leaf.dtype, read, place))
  return config, jax.tree.unflatten(structure, leaves)


def params_shapes(config: GPT2Config) -> PyTree:
  """Returns the params' tree of `ShapeDtypeStruct`s."""
  tokens = jax.ShapeDtypeStruct((1, 1), "int32")
  return jax.eval_shape(GPT2(config).init, jax.random.key(0), tokens)["params"]


def read_config(folder: str | Path, **computation: Any) -> GPT2Config:
  """Returns the config of the GPT-2 in a local folder.

  Raises:
    ValueError: if it is no GPT-2, or one that is computed otherwise.
  """
  path = Path(folder) / "config.json"
  given = read_json(path)
  if given.get("model_type") != "gpt2":
    raise ValueError(f"{path}: expected model_type 'gpt2', got {given.get('model_type')!r}")
  for key, ours in (
    ("scale_attn_weights", True),
    ("scale_attn_by_inverse_layer_idx", False),
    ("add_cross_attention", False),
  ):
    if given.get(key, ours) != ours:
      raise ValueError(f"{path}: {key}={given[key]} is not supported; expected {ours}")
  missing = [key for key in FIELDS.values() if key not in given]
  if missing:
    raise ValueError(f"{path}: missing {', '.join(missing)}")
  inner = {} if given.get("n_inner") is None else {"n_inner": given["n_inner"]}
  for key, value in ({key: given[key] for key in FIELDS.values()} | inner).items():
    if type(value) is not int or value < 1:
      raise ValueError(f"{path}: expected a positive integer for {key}, got {value!r}")
  try:
    return GPT2Config(
      **{ours: given[theirs] for ours, theirs in FIELDS.items()},
      mlp_dim=given.get("n_inner"),
      activation=given.get("activation_function", "gelu_new"),
      layer_norm_epsilon=given.get("layer_norm_epsilon", 1e-5),
      tie_head=given.get("tie_word_embeddings", True),
      **computation,
    )
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def save_gpt2(
  folder: str | Path,
  config: GPT2Config,
  params: PyTree,
  tokenizer_from: str | Path | None = None,
  end_of_text_id: int | None = None,
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a GPT-2 as a new folder that `transformers` and `load_gpt2` read.

  Args:
    folder: to make.
    config: of the model.
    params: of the model, unrolled or scanned, with the dtype they are saved in; merged, if it
      was adapted.
    tokenizer_from: a folder whose tokenizer files are copied.
    end_of_text_id: for config.json's bos_token_id and eos_token_id.
    max_shard_bytes: of one file.
  Raises:
    FileExistsError: if there is such a folder.
    ValueError: if the params are not those of the config.
  """
  _check_params(config, params)
  given = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
  written = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    **given,
    "n_inner": config.mlp_dim,
    "activation_function": config.activation,
    "layer_norm_epsilon": config.layer_norm_epsilon,
    "tie_word_embeddings": config.tie_head,
    "bos_token_id": end_of_text_id,
    "eos_token_id": end_of_text_id,
    "torch_dtype": str(jnp.result_type(*jax.tree.leaves(params))),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
  }
  save_folder(folder, written, _tensors(config, params), tokenizer_from, max_shard_bytes)


def stored_tensors(config: GPT2Config) -> list[StoredTensor]:
  """Returns the tensors of a GPT-2 in `transformers`, and which of our leaves they hold."""
  stored = [
    StoredTensor(f"transformer.{name}", (path,), is_embedding=path.endswith("embedding"))
    for path, name in OUTSIDE.items()
  ]
  parts: dict[str, list[str]] = {}
  for path, (name, _) in LAYER.items():
    parts.setdefault(name, []).append(path)
  for i in range(config.num_layers):
    layer, stack = (i, "h") if config.scan_layers else (None, f"h_{i}")
    for name, paths in parts.items():
      ours = tuple(f"{stack}/{path}" for path in paths)
      stored.append(StoredTensor(f"transformer.h.{i}.{name}", ours, layer))
  if not config.tie_head:
    stored.append(StoredTensor("lm_head.weight", ("lm_head/kernel",), transposed=True))
  return stored


def _check_params(config: GPT2Config, params: PyTree) -> None:
  """Raises ValueError naming what is not as the config has it."""

  def described(tree: PyTree) -> set[tuple[str, tuple[int, ...]]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {(jax.tree_util.keystr(k, simple=True, separator="/"), jnp.shape(x)) for k, x in leaves}

  expected, found = described(params_shapes(config)), described(params)
  if expected != found:
    raise ValueError(
      "the params are not those of the config: expected "
      f"{sorted(expected - found)[:3]}, got {sorted(found - expected)[:3]}"
    )


def _tensors(config: GPT2Config, params: PyTree) -> Iterator[tuple[str, np.ndarray]]:
  """Yields our params under Hugging Face's names, one after another."""

  def outside(path: str) -> np.ndarray:
    module, name = path.split("/")
    return np.asarray(params[module][name])

  def inside(i: int, path: str) -> np.ndarray:
    leaf = params["h" if config.scan_layers else f"h_{i}"]
    for key in path.split("/"):
      leaf = leaf[key]
    return np.asarray(leaf[i] if config.scan_layers else leaf)

  for path, name in OUTSIDE.items():
    yield f"transformer.{name}", outside(path)
  parts: dict[str, list[str]] = {}
  for path, (name, _) in LAYER.items():
    parts.setdefault(name, []).append(path)
  for i in range(config.num_layers):
    for name, paths in parts.items():
      yield f"transformer.h.{i}.{name}", np.concatenate([inside(i, p) for p in paths], axis=-1)
  if not config.tie_head:
    yield "lm_head.weight", outside("lm_head/kernel").T


def _expected(config: GPT2Config, prefix: str) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the tensors of a GPT-2."""
  d, inner = config.embed_dim, config.mlp_dim or 4 * config.embed_dim
  layer = {
    **dict.fromkeys(("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"), (d,)),
    "attn.c_attn.weight": (d, 3 * d),
    "attn.c_attn.bias": (3 * d,),
    "attn.c_proj.weight": (d, d),
    "attn.c_proj.bias": (d,),
    "mlp.c_fc.weight": (d, inner),
    "mlp.c_fc.bias": (inner,),
    "mlp.c_proj.weight": (inner, d),
    "mlp.c_proj.bias": (d,),
  }
  expected = {
    f"{prefix}wte.weight": (config.vocab_size, d),
    f"{prefix}wpe.weight": (config.num_positions, d),
    f"{prefix}ln_f.weight": (d,),
    f"{prefix}ln_f.bias": (d,),
  }
  for i in range(config.num_layers):
    expected |= {f"{prefix}h.{i}.{name}": shape for name, shape in layer.items()}
  if not config.tie_head:
    expected["lm_head.weight"] = (config.vocab_size, d)
  return expected


def _check(folder: Path, config: GPT2Config, tensors: Tensors) -> str:
  """Checks names and shapes; returns the prefix of the names, which old files lack."""
  prefix = "transformer." if any(name.startswith("transformer.") for name in tensors) else ""
  expected = _expected(config, prefix)
  head = "lm_head.weight"
  if config.tie_head and head in tensors:
    expected[head] = (config.vocab_size, config.embed_dim)
  check_tensors(folder, tensors, expected, lambda name: bool(MASKS.fullmatch(name)))
  if config.tie_head and head in expected:
    same = np.array_equal(tensors.read(head), tensors.read(f"{prefix}wte.weight"))
    if not same:
      raise ValueError(
        f"{folder}: lm_head.weight differs from wte.weight, but config.json says that they are "
        "tied. Set tie_word_embeddings to false there"
      )
  return prefix


def _read(tensors: Tensors, prefix: str, config: GPT2Config, path: str, index: Index) -> np.ndarray:
  """Returns a part of one of our leaves."""
  if path == "lm_head/kernel":
    return tensors.read("lm_head.weight", index[::-1]).T
  if path in OUTSIDE:
    return tensors.read(prefix + OUTSIDE[path], index)
  layer, rest = path.split("/", 1)
  name, third = LAYER[rest]
  if layer != "h":
    return tensors.read(f"{prefix}h.{layer[2:]}.{name}", _third(index, third, config.embed_dim))
  inner = _third(index[1:], third, config.embed_dim)
  layers = range(config.num_layers)[index[0]]
  return np.stack([tensors.read(f"{prefix}h.{i}.{name}", inner) for i in layers])


def _third(index: Index, third: int | None, size: int) -> Index:
  """Returns the index into a fused tensor of an index into a third of its last axis."""
  if third is None:
    return index
  start, stop, _ = index[-1].indices(size)
  return (*index[:-1], slice(third * size + start, third * size + stop))
