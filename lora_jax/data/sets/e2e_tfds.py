"""The E2E NLG data set as a TFDS builder: `array_record` files, read without TensorFlow.

    builder = E2E(config="reference")
    builder.download_and_prepare()
    source = builder.as_data_source("train")    # random access: source[123]["context"]

`load` does that and returns the records of a split, which are those of `e2e.read`. The files are
prepared once; a record is read when it is accessed.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import tensorflow_datasets as tfds

from lora_jax.data.sets import e2e, prepared
from lora_jax.data.sets.prepared import PreparedBuilder

DOWNLOAD = "https://raw.githubusercontent.com/tuetschek/e2e-dataset/master/"

DESCRIPTION = """Descriptions of restaurants in English (Novikova et al. 2017, arXiv 1706.09254):
several texts for each input, which is a list of attributes and values."""
CITATION = """@inproceedings{novikova2017e2e,
  title = {The {E2E} Dataset: New Challenges for End-to-End Generation},
  author = {Novikova, Jekaterina and Du{\\v{s}}ek, Ond{\\v{r}}ej and Rieser, Verena},
  booktitle = {Proceedings of the 18th Annual SIGdial Meeting on Discourse and Dialogue},
  year = {2017},
  note = {arXiv:1706.09254},
}"""


class E2E(PreparedBuilder):
  """Records of `context`, `completion` and `input_id`, the number of the distinct input.

  The configs are the two formats of `e2e.py`, `reference` and `official`; the splits are `train`,
  `valid` and `test`, each in the order of its file.

  Args:
    source: `embedded`; `download`, the official format's files from their authors' repository; or a
      folder that has the format's three files under their original names. The embedded copy
      of the official format has no `train`.
    data_dir: the folder of the prepared files, with one for each source; None is
      `default_data_dir()`.
    config: `reference` or `official`.
    version: as in any TFDS builder.
  """

  name = "e2e"
  BUILDER_CONFIGS = [  # noqa: RUF012 (the form that TFDS prescribes)
    tfds.core.BuilderConfig(name="reference", description="The lines of Hu et al.'s code."),
    tfds.core.BuilderConfig(name="official", description="The challenge's CSV files."),
  ]

  def __init__(
    self,
    *,
    source: str | os.PathLike[str] = "embedded",
    data_dir: str | os.PathLike[str] | None = None,
    config: Any = None,
    version: Any = None,
  ):
    form = getattr(config, "name", config) or "reference"
    if form not in e2e.FILES:
      raise ValueError(f"config must be one of {', '.join(e2e.FILES)}, got {form!r}")
    if source == "download" and form != "official":
      raise ValueError("only the official format can be downloaded; the reference one is embedded")
    self._source = source
    self._form: e2e.Form = form
    super().__init__(_folder_of(source, form), data_dir, config, version, source=source)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          "context": tfds.features.Text(),
          "completion": tfds.features.Text(),
          "input_id": tfds.features.Scalar(np.int32),
        }
      ),
      homepage="https://github.com/tuetschek/e2e-dataset",
      citation=CITATION,
      license="CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/",
      disable_shuffling=True,
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    files = _files(self._source, self._form, dl_manager)
    return {
      split: self._generate_examples(e2e.parse(data, e2e.file_name(split, self._form), self._form))
      for split, data in files.items()
    }

  def _generate_examples(self, records: list[e2e.Record]) -> Iterator[tuple[int, dict[str, Any]]]:
    for i, (record, number) in enumerate(zip(records, e2e.input_ids(records), strict=True)):
      yield i, {**record._asdict(), "input_id": number}


def _folder_of(source: str | os.PathLike[str], form: e2e.Form) -> str:
  """Returns a name for the source's content, so that changed files are never read as prepared."""
  if source in ("embedded", "download"):
    return str(source)
  digest = hashlib.sha256()
  for name in e2e.FILES[form].values():
    digest.update(hashlib.sha256(e2e.folder_bytes(name, source)).digest())
  return f"folder-{digest.hexdigest()[:16]}"


def _files(
  source: str | os.PathLike[str], form: e2e.Form, dl_manager: tfds.download.DownloadManager
) -> dict[e2e.Split, bytes]:
  names = e2e.FILES[form]
  if source == "embedded":
    return {s: e2e.embedded_bytes(n) for s, n in names.items() if n in e2e.EMBEDDED_SHA256}
  if source == "download":
    paths = dl_manager.download({name: DOWNLOAD + name for name in names.values()})
    return {split: paths[name].read_bytes() for split, name in names.items()}
  return {split: e2e.folder_bytes(name, source) for split, name in names.items()}


def prepare(
  form: e2e.Form = "reference",
  source: str | os.PathLike[str] = "embedded",
  data_dir: str | os.PathLike[str] | None = None,
) -> E2E:
  """Returns the builder with its files in place, as `prepared.prepare`.

  The arguments are those of `E2E`.
  """
  return prepared.prepare(E2E(config=form, source=source, data_dir=data_dir))


def load(
  split: e2e.Split,
  form: e2e.Form = "reference",
  source: str | os.PathLike[str] = "embedded",
  data_dir: str | os.PathLike[str] | None = None,
) -> "Records":
  """Returns the records of a split, in the file's order, by way of TFDS.

  The arguments are those of `E2E`.

  Raises:
    FileNotFoundError: if a file of the folder is missing, or the source has no such split.
    ValueError: if a line cannot be read, naming file and line, or a file is empty.
  """
  sources: Any = prepare(form, source, data_dir).as_data_source()
  name = e2e.file_name(split, form)
  if split not in sources:
    e2e.embedded_bytes(name)  # raises, saying what to do
  return Records(sources[split])


class Records(Sequence[e2e.Record]):
  """The records of a prepared split, each read from its file when it is accessed."""

  def __init__(self, source: Any):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  @overload
  def __getitem__(self, index: int) -> e2e.Record: ...
  @overload
  def __getitem__(self, index: slice) -> list[e2e.Record]: ...
  def __getitem__(self, index: int | slice) -> e2e.Record | list[e2e.Record]:
    numbers = range(len(self))[index]
    return self.take([numbers])[0] if isinstance(numbers, int) else self.take(numbers)

  def __iter__(self) -> Iterator[e2e.Record]:
    return iter(self.take(range(len(self))))

  def take(self, indices: Iterable[int]) -> list[e2e.Record]:
    """Returns the records at some indices, in one read: about 50 microseconds each."""
    rows = self._source.__getitems__([int(i) for i in indices])
    return [e2e.Record(row["context"].decode(), row["completion"].decode()) for row in rows]
