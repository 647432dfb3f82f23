"""The base of TFDS builders on original files: a folder's records, without TensorFlow."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import tensorflow_datasets as tfds

from lora_jax.data.sets import originals
from lora_jax.data.sets.e2e import Record, input_ids
from lora_jax.data.sets.e2e_tfds import Records
from lora_jax.data.sets.prepared import PreparedBuilder, prepare
from lora_jax.files import local_path


class Reader(Protocol):
  """A module such as `webnlg.py`: the names of each split's file, and its records."""

  TITLE: str
  SOURCE: str
  FILES: dict[str, Any]

  @staticmethod
  def read(split: str, folder: Path, *, any_size: bool = False) -> list[Record]: ...


class FromOriginals(PreparedBuilder, skip_registration=True):
  """Records of `context`, `completion` and `input_id`, the number of the distinct input.

  The splits are those of the data set whose files are in the folder, each in its file's order.

  Args:
    source: the folder of the original files.
    data_dir: the folder of the prepared files; None is `default_data_dir()`.
    any_size: whether files other than the published ones are accepted, as excerpts.
    config: as in any TFDS builder.
    version: as in any TFDS builder.
  """

  READER: ClassVar[Any]
  ABOUT: ClassVar[dict[str, str]]

  def __init__(
    self,
    *,
    source: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    any_size: bool = False,
    config: Any = None,
    version: Any = None,
  ):
    self._source = local_path(os.fspath(source))
    self._any_size = any_size
    folder = _folder_of(self.READER, self._source, any_size)
    super().__init__(folder, data_dir, config, version, source=source, any_size=any_size)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.ABOUT["description"],
      features=tfds.features.FeaturesDict(
        {
          "context": tfds.features.Text(),
          "completion": tfds.features.Text(),
          "input_id": tfds.features.Scalar(np.int32),
        }
      ),
      homepage=self.ABOUT["homepage"],
      citation=self.ABOUT["citation"],
      license=self.ABOUT["license"],
      disable_shuffling=True,
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    del dl_manager
    read, folder = self.READER.read, self._source
    return {
      split: self._generate_examples(read(split, folder, any_size=self._any_size))
      for split in _paths(self.READER, folder)
    }

  def _generate_examples(self, records: list[Record]) -> Iterator[tuple[int, dict[str, Any]]]:
    for i, (record, number) in enumerate(zip(records, input_ids(records), strict=True)):
      yield i, {**record._asdict(), "input_id": number}


def _paths(reader: Reader, folder: Path) -> dict[str, Path]:
  """Returns the file of each split that is there; raises FileNotFoundError if none is."""
  paths, missing = {}, None
  for split, names in reader.FILES.items():
    try:
      paths[split] = originals.find_file(folder, names, reader.TITLE, reader.SOURCE)
    except FileNotFoundError as error:
      missing = missing or error
  if not paths and missing:
    raise missing
  return paths


def _folder_of(reader: Reader, folder: Path, any_size: bool) -> str:
  """Returns a name for the source's content, so that changed files are never read as prepared."""
  digest = hashlib.sha256(repr(any_size).encode())
  for path in sorted(set(_paths(reader, folder).values())):
    digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
  return f"folder-{digest.hexdigest()[:16]}"


def load(
  builder: type[FromOriginals],
  split: str,
  source: str | os.PathLike[str],
  *,
  data_dir: str | os.PathLike[str] | None = None,
  any_size: bool = False,
) -> Records:
  """Returns the records of a split, in the file's order, by way of TFDS.

  Args:
    builder: of the data set.
    split: one of the data set's `FILES`.
    source: the folder of the original files.
    data_dir: the folder of the prepared files; None is `default_data_dir()`.
    any_size: whether files other than the published ones are accepted, as excerpts.
  Raises:
    FileNotFoundError: if the split's file does not exist.
    ValueError: if there is no such split, or as the data set's `read`.
  """
  reader = builder.READER
  originals.check_split(reader.TITLE, split, reader.FILES)
  originals.find_file(source, reader.FILES[split], reader.TITLE, reader.SOURCE)
  prepared = prepare(builder(source=source, data_dir=data_dir, any_size=any_size))
  return Records(prepared.as_data_source()[split])
