"""DART 1.1.1 as a TFDS builder: `array_record` files, read without TensorFlow.

    builder = Dart(source="dart/data/v1.1.1")               # the folder of the original files
    builder.download_and_prepare()
    source = builder.as_data_source("test")                 # random access: source[0]["context"]

`load` does that and returns the records of a split, which are those of `dart.read`. A folder
without the training set has the other splits.
"""

import os

from lora_jax.data.sets import dart, originals_tfds
from lora_jax.data.sets.e2e_tfds import Records

CITATION = """@inproceedings{nan2021dart,
  title = {{DART}: Open-Domain Structured Data Record to Text Generation},
  author = {Nan, Linyong and Radev, Dragomir and Zhang, Rui and others},
  booktitle = {Proceedings of NAACL-HLT 2021},
  year = {2021},
  note = {arXiv:2007.02871},
}"""


class Dart(originals_tfds.FromOriginals):
  """DART 1.1.1; the splits are `train`, `valid`, `test`, `dev_train` and `dev_valid`.

  Its arguments are those of `originals_tfds.FromOriginals`.
  """

  name = "dart_from_files"
  READER = dart
  ABOUT = {  # noqa: RUF012 (a constant of the class)
    "description": "Facts of tables as triples, and English texts (Nan et al. 2021).",
    "homepage": "https://github.com/Yale-LILY/dart",
    "citation": CITATION,
    "license": "MIT, https://github.com/Yale-LILY/dart/blob/master/LICENSE",
  }


def load(
  split: str,
  source: str | os.PathLike[str],
  *,
  data_dir: str | os.PathLike[str] | None = None,
  any_size: bool = False,
) -> Records:
  """Returns the records of a split, in the file's order, by way of TFDS.

  Args:
    split: `train`, `valid` or `test`; `dev_train` or `dev_valid`, parts of the development set.
    source: the folder of the original files.
    data_dir: the folder of the prepared files; None is `default_data_dir()`.
    any_size: whether another number of texts than was published is accepted, as in an excerpt.
  Raises:
    FileNotFoundError, ValueError: as in `dart.read`.
  """
  return originals_tfds.load(Dart, split, source, data_dir, any_size)
