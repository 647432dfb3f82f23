"""DART 1.1.1 as a TFDS builder: `array_record` files, read without TensorFlow.

    builder = Dart(source="dart/data/v1.1.1")               # the folder of the original files
    builder.download_and_prepare()
    source = builder.as_data_source("test")                 # random access: source[0]["context"]

`load` does that and returns the records of a split, which are those of `dart.read`. A folder
without the training set has the other splits.
"""

import functools

from lora_jax.data.sets import dart, originals_tfds

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


load = functools.partial(originals_tfds.load, Dart)
