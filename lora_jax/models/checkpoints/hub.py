"""Finds Hugging Face folders, and reads and writes their tensors strictly.

Weights are read only from safetensors, never from a pickle, and no folder can name a file outside
itself. Files are mapped into memory, and a part of a tensor is a view of the file until it is
copied to its device: no model is in memory twice, and a sharded one is never there as a whole.
"""

import difflib
import json
import logging
import math
import mmap
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from lora_jax.files import local_path, new_path, parse_json, read_json, regular_file
from lora_jax.models.checkpoints.gguf import is_gguf
from lora_jax.models.checkpoints.pretrained import PRETRAINED, find_pretrained
from lora_jax.models.checkpoints.recognize import (
  Stored,
  describe_file,
  describe_folder,
  describe_tensors,
)
from lora_jax.models.text.tokenizer import TOKENIZER_FILES, tokenizer_files

logger = logging.getLogger(__name__)
INDEX = "model.safetensors.index.json"
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
HUB_TIMEOUT = 5.0  # seconds, for the hub's first answer

Index = tuple[Any, ...]
"""A slice per axis; the rows of a tensor may be their numbers."""
Parts: TypeAlias = "np.ndarray | Later | list[Parts]"
"""An array, one to be written, or the parts that are stacked to one."""


class Later(NamedTuple):
  """An array that is written where it is needed, so that no other copy is in memory."""

  shape: tuple[int, ...]
  write_to: Callable[[np.ndarray], None]


class StoredTensor(NamedTuple):
  """A tensor of a Hugging Face model, and the leaves of our params that it holds.

  Attributes:
    name: its name in the safetensors files, with the model's prefix.
    paths: our leaves, concatenated along its output axis: one, or the parts of a fused tensor, such
      as query, key and value.
    layer: the index into leaves with stacked layers; None without a stack.
    transposed: whether its axes are torch's: (out, in) of a Linear, where ours are (in, out), or
      (out, in, height, width) of a convolution, where ours are (height, width, in, out); the
      experts' axis stays first.
    is_embedding: whether its rows are looked up.
    is_scaled: whether the model multiplies these rows by a constant, as Gemma.
    expert: the index into leaves with stacked experts; None if it holds all of them.
    is_parameter: whether its module in `transformers` has it as a plain parameter instead of a
      common layer: fused experts, a router.
    heads: the number of heads whose outputs it interleaves, as llama.cpp's rotation needs them;
      None if they are in our order. `our_outputs` has the order.
    offset: added to the numbers of our leaf in it.
  """

  name: str
  paths: tuple[str, ...]
  layer: int | None = None
  transposed: bool = False
  is_embedding: bool = False
  expert: int | None = None
  is_parameter: bool = False
  heads: int | None = None
  offset: float = 0.0
  is_scaled: bool = False

  @property
  def module(self) -> str:
    """The name of its module."""
    return self.name.rpartition(".")[0]

  @property
  def is_bias(self) -> bool:
    return self.name.endswith(".bias")

  @property
  def place(self) -> tuple[int, ...]:
    """The index of its part in stacked leaves."""
    return tuple(i for i in (self.layer, self.expert) if i is not None)

  def our_outputs(self, size: int) -> np.ndarray:
    """Returns the index in it of each output of our leaf.

    Outputs i and i + H / 2 of a head, which are rotated together, are neighbours in a tensor with
    interleaved heads: `leaf = tensor[:, our_outputs]`, `tensor = leaf[:, argsort(our_outputs)]`.

    Args:
      size: the number of outputs.
    """
    if self.heads is None:
      return np.arange(size)
    return np.arange(size).reshape(self.heads, -1, 2).swapaxes(1, 2).reshape(-1)

  def to_ours(self, array: np.ndarray) -> np.ndarray:
    """Returns an array of its axes in the axes of our leaves; outputs stay in its order."""
    return array.transpose(np.argsort(self.axes_to_file(tuple(range(array.ndim)))))

  def to_file(self, array: np.ndarray) -> np.ndarray:
    """Returns an array of the axes of our leaves in its own."""
    return array.transpose(self.axes_to_file(tuple(range(array.ndim))))

  def axes_to_file(self, axes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns one item per axis of our leaves in the order of its own axes."""
    if not self.transposed or len(axes) < 2:
      return axes
    *leading, inputs, outputs = axes
    if self.is_parameter:  # experts in one tensor
      return (*leading, outputs, inputs)
    return (outputs, inputs, *leading)


def find_folder(name: str | Path, weights: bool = True) -> Path:
  """Returns a local folder or GGUF file: `name` itself if it is one, else a repository's files.

  Args:
    name: a folder, a GGUF file, a named model or a hub repository.
    weights: whether to download a repository's weights with its other files.
  Raises:
    FileNotFoundError: if there is neither, with the remedy.
    ValueError: if `name` is empty, a file, or the address of a bucket or a server.
  """
  if not isinstance(name, str | Path) or not str(name).strip():
    raise ValueError(f"a model must be a folder or a hub repository, got {name!r}")
  path = local_path(name)
  if path.is_dir():
    return path
  if path.exists() and is_gguf(path):
    return regular_file(path)
  if path.exists():
    raise ValueError(
      f"{path} is a file; expected a GGUF file, or a folder with config.json and *.safetensors"
    )
  if is_gguf(path):
    raise FileNotFoundError(f"{path} does not exist; expected a GGUF file")
  if str(name) in PRETRAINED:
    return find_pretrained(str(name))
  repository = str(name)
  if repository.count("/") > 1 or repository.startswith((".", "/", "~")):
    raise FileNotFoundError(f"{repository} is not a folder; expected one with config.json")
  try:
    folder, files = _from_hub(repository, weights)
  except Exception as error:  # the hub's client raises errors of several libraries
    near = difflib.get_close_matches(repository.lower(), PRETRAINED, 1)
    meant = f"Did you mean {near[0]}? " if near else ""
    raise FileNotFoundError(
      f"{repository!r} is not a local folder and could not be downloaded from the hub "
      f"({type(error).__name__}: {error}). {meant}Give the path of a folder with config.json "
      "and *.safetensors, or check the network and HF_TOKEN"
    ) from error
  if weights and not _has_weights(folder):
    pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    raise FileNotFoundError(
      f"{repository!r} on the hub has no model.safetensors{', but ' if pickles else ''}"
      f"{', '.join(pickles[:3])}; pickles are not read. If you trust it, load it once in "
      "transformers, save it by save_pretrained, and give that folder"
    )
  return folder


def _has_weights(folder: Path) -> bool:
  return any((folder / name).is_file() for name in ("model.safetensors", INDEX))


def _from_hub(repository: str, weights: bool) -> tuple[Path, list[str]]:
  """Returns a repository's files: the newest, or without network those downloaded before.

  Also returns the names of all its files on the hub, if the hub was reached.
  """
  import huggingface_hub

  patterns = ["config.json", "generation_config.json", "LICENSE*", *TOKENIZER_FILES]
  if weights:  # repositories may hold others too, such as consolidated.safetensors
    patterns += ["model*.safetensors", INDEX]

  def files(**options: Any) -> Path:  # of main, so that they are found again without network
    return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns, **options))

  try:  # `snapshot_download` itself would wait forever for a server that does not answer
    about = huggingface_hub.HfApi().model_info(repository, timeout=HUB_TIMEOUT)
  except Exception as error:
    response = getattr(error, "response", None)
    if response is not None and response.status_code in (401, 403, 404):  # no access, or missing
      raise
    try:
      folder = files(local_files_only=True)
    except huggingface_hub.errors.LocalEntryNotFoundError:
      raise error from None
    if weights and not _has_weights(folder):  # downloaded by a --dry_run
      raise error
    logger.warning("the hub cannot be reached (%s); using %s", type(error).__name__, folder)
    return folder, []
  return files(), [file.rfilename for file in about.siblings or ()]


class Tensors:
  """The tensors of a folder by name; open only inside `open_tensors`.

  Attributes:
    readable: the dtypes that are read.
    described_by: what says which tensors there should be.
  """

  readable: Collection[str] = FLOATS
  described_by = "config.json"

  def __init__(self, files: Mapping[str, "_File"]):
    self._files = files  # by the tensors' names

  def __iter__(self) -> Iterator[str]:
    return iter(self._files)

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._files[name].header[name]["shape"])

  def dtype(self, name: str) -> str:
    """Returns the dtype by the file's name for it, such as `F32` or `BF16`."""
    return self._files[name].header[name]["dtype"]

  def place(self, name: str) -> tuple[str, int]:
    """Returns the name of a tensor's file, and the offset of the tensor in it, bytes."""
    file = self._files[name]
    return file.name, file.start + file.header[name]["data_offsets"][0]

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    """Returns a tensor of floats, or a part of it, as a read-only view of the file."""
    array = self._bytes(name).view(FLOATS[self.dtype(name)]).reshape(self.shape(name))
    return array[index] if index else array

  def are_same(self, name: str, other: str) -> bool:
    """Returns whether two tensors have the same shape and the same numbers, in any dtype."""
    if self.shape(name) != self.shape(other):
      return False
    if self.dtype(name) == self.dtype(other):
      return np.array_equal(self._bytes(name), self._bytes(other))
    if not {self.dtype(name), self.dtype(other)} <= FLOATS.keys():
      return False
    return np.array_equal(self.read(name).astype("float64"), self.read(other).astype("float64"))

  def explain(self, stored: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]]) -> str:
    """Returns why tensors are not the expected ones, and the remedy; empty if unknown."""
    return describe_tensors(stored, expected, FLOATS)

  def _bytes(self, name: str) -> np.ndarray:
    file = self._files[name]
    start, stop = (file.start + offset for offset in file.header[name]["data_offsets"])
    return file.data[start:stop]


class _File(NamedTuple):
  """A mapped safetensors file: its header, and the offset of the tensors."""

  name: str
  data: np.ndarray
  header: dict[str, Any]
  start: int


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
  """Opens a safetensors file.

  Raises:
    ValueError: if it is truncated or not safetensors, or its header names a tensor twice.
  """
  with _open_checked(path) as file:
    _read_header(path)
    yield file


@contextmanager
def _open_checked(path: Path) -> Iterator[Any]:
  """Opens a safetensors file, whose header safetensors checks against the file's length."""
  from safetensors import SafetensorError, safe_open

  try:
    with safe_open(path, "numpy") as file:
      yield file
  except SafetensorError as error:
    if kind := describe_file(path):
      raise ValueError(f"{path} is not a safetensors file but {kind}") from error
    raise ValueError(
      f"{path} is truncated or not a safetensors file: {error}. Copy or download it again"
    ) from error


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
  """Returns the header of a file that safetensors has checked, and where the tensors start."""
  with path.open("rb") as file:
    size = int.from_bytes(file.read(8), "little")
    header = parse_json(file.read(size), path)
  header.pop("__metadata__", None)
  return header, 8 + size


def _map(path: Path) -> _File:
  """Maps a safetensors file."""
  with _open_checked(path):
    header, start = _read_header(path)
  return _File(path.name, np.asarray(np.memmap(path, np.uint8, "r")), header, start)


@contextmanager
def open_tensors(folder: Path) -> Iterator[Tensors]:
  """Opens the safetensors of a folder, one file or several with an index.

  Raises:
    FileNotFoundError: if weights are missing.
    ValueError: if a file is truncated or the index is wrong or points out of the folder.
  """
  names, weight_map = weight_files(folder)
  files: dict[str, _File] = {}
  for name in names:
    file = _map(folder / name)
    for tensor in file.header:
      if tensor in files:
        raise ValueError(f"{folder}: {tensor} is in {files[tensor].name} and in {name}")
      files[tensor] = file
  actual = {tensor: file.name for tensor, file in files.items()}
  if weight_map is not None and weight_map != actual:
    wrong = sorted({key for key, _ in weight_map.items() ^ actual.items()})
    raise ValueError(f"{folder / INDEX} and the files disagree about {', '.join(wrong[:5])}")
  yield Tensors(files)


def weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
  """Returns the weights' files, and the index's file by tensor if there are several.

  In a folder with both, the single file counts, as in `transformers`.
  """
  if folder.is_file():
    raise ValueError(f"{folder} is a file, expected a folder with safetensors")
  single, index = folder / "model.safetensors", folder / INDEX
  if single.is_file():
    return [single.name], None
  if not index.is_file():
    kinds = ("*.bin", "*.pt", "*.pth")
    unread = sorted(path.name for kind in kinds for path in folder.glob(kind))
    hint = describe_folder(folder) or (
      f"{', '.join(unread[:5])} may be pickles and are not read. If you trust them, load the model "
      "in transformers and save it by save_pretrained"
      if unread
      else ""
    )
    raise FileNotFoundError(
      f"{single} does not exist: the weights are missing{'; ' if hint else ''}{hint}. Expected "
      f"model.safetensors, or several files with {INDEX}"
    )
  weight_map = read_json(index).get("weight_map")
  if (
    not isinstance(weight_map, dict)
    or not weight_map
    or not all(isinstance(name, str) for name in weight_map.values())
  ):
    raise ValueError(f"{index}: expected an object 'weight_map' of file names")
  names = sorted(set(weight_map.values()))
  for name in names:
    if Path(name).name != name or not name.endswith(".safetensors"):
      raise ValueError(f"{index}: {name!r} is not the name of a safetensors file of the folder")
    if not (folder / name).is_file():
      raise FileNotFoundError(
        f"{folder / name} does not exist, but {INDEX} names it. Copy or download it again"
      )
  return names, weight_map


def dtype_of(folder: Path) -> np.dtype:
  """Returns the dtype of most of a folder's numbers; errors as in `open_tensors`."""
  counts = dict.fromkeys(FLOATS, 0)
  with open_tensors(folder) as tensors:
    for name in tensors:
      if tensors.dtype(name) in counts:
        counts[tensors.dtype(name)] += math.prod(tensors.shape(name))
  return np.dtype(FLOATS[max(counts, key=lambda dtype: counts[dtype])])


def check_tied(folder: Path, tensors: Tensors, head: str, *embeddings: str) -> None:
  """Raises ValueError if a head is stored and differs from its embedding, by any of its names."""
  for embedding in embeddings:
    if {head, embedding} <= set(tensors) and not tensors.are_same(head, embedding):
      shapes = f"{head} {tensors.shape(head)} differs from {embedding} {tensors.shape(embedding)}"
      raise ValueError(
        f"{folder}: {shapes}, but config.json says that they are tied. Set "
        "tie_word_embeddings to false there"
      )


def make_leaf(
  shape: tuple[int, ...],
  dtype: Any,
  read: Callable[[Index], Parts],
  sharding: Sharding | None = None,
) -> jax.Array:
  """Returns an array; each device reads its own part.

  Args:
    shape: of the whole array.
    dtype: of the result.
    read: returns the part of the array at an index, which is copied once.
    sharding: of the array; None is the default device.
  """
  if sharding is None:
    parts = read((slice(None),) * len(shape))
    if isinstance(parts, np.ndarray) and not parts.flags.c_contiguous:
      return jax.device_put(parts.astype(dtype, copy=False))  # a transposed copy is faster there
    return jax.device_put(_aligned_copy(parts, dtype))

  def part(index: Index | None) -> np.ndarray:
    assert index is not None, "a part on this process's devices has an index"
    return _aligned_copy(read(index), dtype)

  return jax.make_array_from_callback(shape, sharding, part)


def _aligned_copy(parts: Parts, dtype: Any) -> np.ndarray:
  """Returns a copy aligned to 64 bytes, which JAX uses on CPUs without another copy.

  JAX would use a view of a file too, and the weights would follow later changes of the file. Pages
  come from the system: NumPy asks for huge pages, and finding them can take longer than loading.
  """
  shape = _shape(parts)
  size = math.prod(shape) * jnp.dtype(dtype).itemsize
  pages = mmap.mmap(-1, max(size, 1), access=mmap.ACCESS_COPY)
  copy = np.frombuffer(pages, np.uint8, size).view(dtype).reshape(shape)
  _copy_into(copy, parts)
  return copy


def _shape(parts: Parts) -> tuple[int, ...]:
  if isinstance(parts, list):
    return (len(parts), *_shape(parts[0]))
  return parts.shape


def _copy_into(out: np.ndarray, parts: Parts) -> None:
  if isinstance(parts, list):
    for target, part in zip(out, parts, strict=True):
      _copy_into(target, part)
  elif isinstance(parts, Later):
    parts.write_to(out)
  else:
    out[...] = parts


def save_folder(
  folder: str | Path,
  config: Mapping[str, Any],
  tensors: Iterable[tuple[str, np.ndarray]],
  tokenizer_from: str | Path | None = None,
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a new Hugging Face folder, completely or not at all.

  Args:
    folder: the new folder.
    config: the content of config.json.
    tensors: names and arrays, taken one by one; one shard at a time is in memory.
    tokenizer_from: a folder or GGUF file to take the tokenizer's files from.
    max_shard_bytes: the largest size of one file; more weights are split, with an index.
  Raises:
    FileExistsError: if there is such a folder.
    FileNotFoundError: if `tokenizer_from` holds no tokenizer.
    OSError: if it cannot be written, such as on a full disk; nothing is left behind.
  """
  files = {} if tokenizer_from is None else tokenizer_files(Path(tokenizer_from))
  with new_folder(folder) as temporary:
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    _save_shards(temporary, tensors, max_shard_bytes)
    for name, content in files.items():
      (temporary / name).write_bytes(content)


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
  """Yields a temporary folder, renamed to `folder` at the end; errors as in `new_path`."""
  with new_path(folder) as temporary:
    temporary.mkdir()
    yield temporary


def _save_shards(
  folder: Path, tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int
) -> None:
  shards: list[list[str]] = []
  shard: dict[str, np.ndarray] = {}
  total = 0

  def write() -> None:
    shards.append(list(shard))
    save_tensors(folder / f"{len(shards)}.safetensors", shard)
    shard.clear()

  for name, array in tensors:
    if shard and sum(x.nbytes for x in shard.values()) + array.nbytes > max_shard_bytes:
      write()
    shard[name] = np.ascontiguousarray(array)
    total += array.nbytes
  write()
  if len(shards) == 1:
    os.rename(folder / "1.safetensors", folder / "model.safetensors")
    return
  weight_map = {}
  for i, names in enumerate(shards, 1):
    file = f"model-{i:05}-of-{len(shards):05}.safetensors"
    os.rename(folder / f"{i}.safetensors", folder / file)
    weight_map |= dict.fromkeys(names, file)
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def save_tensors(
  path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
  """Writes a safetensors file with the mode of the config file next to it.

  safetensors makes files that only the owner can read; ours follow the umask.

  Args:
    path: of the file.
    tensors: by name.
    metadata: text by name, for the header.
  Raises:
    OSError: if it cannot be written, such as on a full disk.
  """
  from safetensors import SafetensorError
  from safetensors.numpy import save_file

  try:
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt", **(metadata or {})})
  except SafetensorError as error:
    raise OSError(f"could not write {path}: {error}. Nothing is left behind") from error
  shutil.copymode(next(path.parent.glob("*config.json")), path)
