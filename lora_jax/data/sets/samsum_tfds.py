"""SAMSum as a TFDS builder: `array_record` files, read without TensorFlow.

    builder = SAMSum(source="samsum")                       # the folder of the original files
    builder.download_and_prepare()
    source = builder.as_data_source("test")                 # random access: source[0]["context"]

`load` does that and returns the records of a split, which are those of `samsum.read`. Nothing is
downloaded: the files' licence is CC BY-NC-ND 4.0.
"""

import os

from lora_jax.data.sets import originals_tfds, samsum
from lora_jax.data.sets.e2e_tfds import Records

CITATION = """@inproceedings{gliwa2019samsum,
  title = {{SAMSum} Corpus: A Human-annotated Dialogue Dataset for Abstractive Summarization},
  author = {Gliwa, Bogdan and Mochol, Iwona and Biesek, Maciej and Wawer, Aleksander},
  booktitle = {Proceedings of the 2nd Workshop on New Frontiers in Summarization},
  year = {2019},
  note = {arXiv:1911.12237},
}"""


class SAMSum(originals_tfds.FromOriginals):
  """SAMSum; the splits are `train`, `valid` and `test`.

  Its arguments are those of `originals_tfds.FromOriginals`.
  """

  name = "samsum_from_files"
  READER = samsum
  ABOUT = {  # noqa: RUF012 (a constant of the class)
    "description": "Chats in English and a summary of each (Gliwa et al. 2019).",
    "homepage": "https://arxiv.org/abs/1911.12237",
    "citation": CITATION,
    "license": "CC BY-NC-ND 4.0, https://creativecommons.org/licenses/by-nc-nd/4.0/",
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
    split: `train`, `valid` or `test`.
    source: the folder of the original files.
    data_dir: the folder of the prepared files; None is `default_data_dir()`.
    any_size: whether another number of chats is accepted, as in an excerpt.
  Raises:
    FileNotFoundError, ValueError: as in `samsum.read`.
  """
  return originals_tfds.load(SAMSum, split, source, data_dir, any_size)
