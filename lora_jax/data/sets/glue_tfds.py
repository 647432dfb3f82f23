"""GLUE and SuperGLUE as TFDS builders: `array_record` files, read without TensorFlow.

    builder = Glue(config="cola", source="glue_data")       # the folder of the original files
    builder.download_and_prepare()
    source = builder.as_data_source("validation")           # random access: source[0]["sentence"]

`load` does that and returns the records of `glue.py` or `superglue.py`. It also reads what TFDS's
own builders `glue` and `super_glue` have prepared: the rows are the same.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds

from lora_jax.data.sets import glue, superglue
from lora_jax.data.sets.glue import Record, Row
from lora_jax.data.sets.prepared import PreparedBuilder, default_data_dir, prepare
from lora_jax.files import local_path

Suite = Literal["glue", "super_glue"]
DESCRIPTIONS: dict[Suite, str] = {
  "glue": "The GLUE benchmark (Wang et al. 2018, arXiv 1804.07461), from its TSV files.",
  "super_glue": "The SuperGLUE benchmark (Wang et al. 2019, arXiv 1905.00537), from JSONL files.",
}


class _FromFiles(PreparedBuilder, skip_registration=True):
  """Rows of a benchmark's task, from the folder of its original files, in their order.

  Args:
    source: the folder; the task's own is in it.
    config: the task.
    data_dir: the folder of the prepared files; None is `default_data_dir()`.
    skip_malformed: whether lines that cannot be read are left out; only for GLUE.
    any_size: whether another number of rows than was published is accepted.
    version: as in any TFDS builder.
  """

  SUITE: Suite

  def __init__(
    self,
    *,
    source: str | os.PathLike[str],
    config: Any = None,
    data_dir: str | os.PathLike[str] | None = None,
    skip_malformed: bool = False,
    any_size: bool = False,
    version: Any = None,
  ):
    self._task = getattr(config, "name", config)
    self._source = local_path(os.fspath(source))
    self._options = (skip_malformed, any_size)
    folder = _folder_of(self.SUITE, self._task, self._source, self._options)
    options = {"skip_malformed": skip_malformed, "any_size": any_size}
    super().__init__(folder, data_dir, config, version, source=source, **options)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=DESCRIPTIONS[self.SUITE],
      features=tfds.features.FeaturesDict(_features(self.SUITE, self._task)),
      homepage="https://gluebenchmark.com",
      disable_shuffling=True,
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[int, Row]]]:
    del dl_manager
    read = {"glue": self._read_glue, "super_glue": self._read_superglue}[self.SUITE]
    return {split: self._generate_examples(read(split)) for split in self._splits()}

  def _splits(self) -> list[str]:
    """Returns the splits whose files are there: a folder need not have all."""
    return [split for split, paths in _paths(self.SUITE, self._task, self._source).items() if paths]

  def _read_glue(self, split: str) -> list[Row]:
    skip, any_size = self._options
    return glue.read(self._task, split, self._source, skip_malformed=skip, any_size=any_size)

  def _read_superglue(self, split: str) -> list[Row]:
    return superglue.read(self._task, split, self._source, any_size=self._options[1])

  def _generate_examples(self, rows: list[Row]) -> Iterator[tuple[int, Row]]:
    yield from enumerate(rows)


class Glue(_FromFiles):
  """GLUE from its TSV files; the configs are its tasks, `cola`, `sst2`, ..., `mnli`."""

  name = "glue_from_files"
  SUITE = "glue"
  BUILDER_CONFIGS = [  # noqa: RUF012 (the form that TFDS prescribes)
    tfds.core.BuilderConfig(name=name, description=f"The files of {task.folder}.")
    for name, task in glue.TASKS.items()
  ]


class SuperGlue(_FromFiles):
  """SuperGLUE from its JSONL files; the configs are its tasks, `boolq`, `cb`, ..., `wsc`."""

  name = "super_glue_from_files"
  SUITE = "super_glue"
  BUILDER_CONFIGS = [  # noqa: RUF012 (the form that TFDS prescribes)
    tfds.core.BuilderConfig(name=name, description=f"The files of {task.folder}.")
    for name, task in superglue.TASKS.items()
  ]


def _features(suite: Suite, name: str) -> Mapping[str, Any]:
  """Returns the features of a task's rows, which are those of TFDS's own builders."""
  number, text = tfds.features.Scalar(np.int32), tfds.features.Text()
  if suite == "glue":
    task = glue.task_of(name)
    label = tfds.features.ClassLabel(names=task.labels) if task.labels else np.float32
    return {**dict.fromkeys(task.texts, text), "label": label, "idx": number}
  task = superglue.task_of(name)
  features: dict[str, Any] = {**dict.fromkeys(task.texts, text), "idx": number}
  features |= dict.fromkeys(task.numbers, number)
  if name == "record":
    texts = tfds.features.Sequence(text)
    return features | {"entities": texts, "answers": texts, "idx": _numbers("passage", "query")}
  if name == "multirc":
    features["idx"] = _numbers("paragraph", "question", "answer")
  return features | {"label": tfds.features.ClassLabel(names=task.labels)}


def _numbers(*names: str) -> dict[str, Any]:
  return {name: tfds.features.Scalar(np.int32) for name in names}


def _paths(suite: Suite, name: str, source: Path) -> dict[str, list[Path]]:
  """Returns the files of each split; none where they are not there."""
  if suite == "glue":
    task = glue.task_of(name)
    folder = source / task.folder
    names = {split: glue.file_names(name, split, folder) for split in task.sizes}
  else:
    folder = source / superglue.task_of(name).folder
    names = {split: [file] for split, file in superglue.FILES.items()}
  paths = {split: [folder / file for file in files] for split, files in names.items()}
  present = {s: p if all(path.is_file() for path in p) else [] for s, p in paths.items()}
  if not any(present.values()):
    files = ", ".join(path.name for path in next(iter(paths.values())))
    raise FileNotFoundError(f"expected {files} and others of {name} in the folder {folder}")
  return present


def _folder_of(suite: Suite, name: str, source: Path, options: tuple[bool, bool]) -> str:
  """Returns a name for the source's content, so that changed files are never read as prepared."""
  digest = hashlib.sha256(repr(options).encode())
  for split, paths in _paths(suite, name, source).items():
    for path in paths:
      digest.update(f"{split}/{path.name}".encode())
      digest.update(hashlib.sha256(path.read_bytes()).digest())
  return f"folder-{digest.hexdigest()[:16]}"


def load(
  task: str,
  split: str,
  source: str | os.PathLike[str],
  *,
  suite: Suite = "glue",
  data_dir: str | os.PathLike[str] | None = None,
  skip_malformed: bool = False,
  any_size: bool = False,
) -> list[Record]:
  """Returns the records of a split, in the file's order, by way of TFDS.

  Args:
    task: a task of the suite.
    split: `train`, `validation` or `test`; of MNLI `validation_matched` and so on.
    source: the folder of the benchmark's original files; or `tfds`, what TFDS's own builder has
      prepared in `data_dir`, as `array_record`.
    suite: `glue` or `super_glue`.
    data_dir: of TFDS; None is `default_data_dir()`.
    skip_malformed: whether lines that cannot be read are left out; only for GLUE's files.
    any_size: whether another number of rows than was published is accepted.
  Raises:
    FileNotFoundError: if there is no such file or data set.
    ValueError: if a line cannot be read, naming file and line, or rows are missing.
  """
  suites = {"glue": (Glue, glue), "super_glue": (SuperGlue, superglue)}
  if suite not in suites:
    raise ValueError(f"suite must be one of {', '.join(suites)}, got {suite!r}")
  builder_class, module = suites[suite]
  glue.check_split(task, split, module.task_of(task).sizes)
  if source == "tfds":
    builder = _prepared(suite, task, data_dir)
  else:
    options = {"skip_malformed": skip_malformed, "any_size": any_size}
    builder = prepare(builder_class(config=task, source=source, data_dir=data_dir, **options))
  sources = builder.as_data_source()
  if split not in sources:
    raise FileNotFoundError(
      f"{source} has no files of {task}, {split}; it has {', '.join(sources)}"
    )
  rows = sources[split].__getitems__(range(len(sources[split])))
  return module.records(task, [_plain(row) for row in rows])


def _prepared(suite: Suite, task: str, data_dir: str | os.PathLike[str] | None) -> Any:
  """Returns the newest data set that TFDS has prepared, read only from its files."""
  root = default_data_dir() if data_dir is None else local_path(os.fspath(data_dir))
  folder = root / suite / task
  advice = (
    f"prepare it with tfds.builder('{suite}/{task}', data_dir='{folder.parent.parent}', "
    "file_format='array_record').download_and_prepare()"
  )
  infos = folder.glob("*/dataset_info.json")
  versions = sorted(
    (path.parent for path in infos), key=lambda path: [int(x) for x in path.name.split(".")]
  )
  if not versions:
    raise FileNotFoundError(f"{folder} holds no prepared data set; {advice}")
  builder = tfds.builder_from_directory(versions[-1])
  form = getattr(builder.info.file_format, "value", None)
  if form != "array_record":
    raise ValueError(f"{versions[-1]} is stored as {form}, expected array_record; {advice}")
  return builder


def _plain(value: Any) -> Any:
  """Returns a row as the files' readers give it: texts and plain numbers."""
  if isinstance(value, Mapping):
    return {name: _plain(part) for name, part in value.items()}
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, list) or (isinstance(value, np.ndarray) and value.ndim):
    return [_plain(part) for part in value]
  return value.item() if isinstance(value, np.ndarray | np.generic) else value
