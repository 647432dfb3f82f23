"""A subset of MNLI as a TFDS builder: `array_record` files, read without TensorFlow.

    builder = MNLISubset(source="subset10k/MNLI")           # the folder of the JSON files
    builder.download_and_prepare()
    source = builder.as_data_source("valid")                # random access: source[0]["context"]

`load` does that and returns the records of a split, which are those of `mnli_text.read`. All of
MNLI is `mnli_text.prompts(glue_tfds.load("mnli", split, source))`.
"""

import os

from lora_jax.data.sets import mnli_text, originals_tfds
from lora_jax.data.sets.e2e_tfds import Records

CITATION = """@inproceedings{williams2018mnli,
  title = {A Broad-Coverage Challenge Corpus for Sentence Understanding through Inference},
  author = {Williams, Adina and Nangia, Nikita and Bowman, Samuel},
  booktitle = {Proceedings of NAACL-HLT 2018},
  year = {2018},
  note = {arXiv:1704.05426},
}"""


class MNLISubset(originals_tfds.FromOriginals):
  """10,000 rows of MNLI as text; the splits are `train` and `valid`.

  Its arguments are those of `originals_tfds.FromOriginals`.
  """

  name = "mnli_subset_from_files"
  READER = mnli_text
  ABOUT = {  # noqa: RUF012 (a constant of the class)
    "description": "Premises, hypotheses and the word of a label (Williams et al. 2018).",
    "homepage": "https://cims.nyu.edu/~sbowman/multinli/",
    "license": "that of the Open American National Corpus; for fiction, several others",
    "citation": CITATION,
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
    split: `train` or `valid`.
    source: the folder of the subset's files.
    data_dir: the folder of the prepared files; None is `default_data_dir()`.
    any_size: whether another number of rows is accepted, as in an excerpt.
  Raises:
    FileNotFoundError, ValueError: as in `mnli_text.read`.
  """
  return originals_tfds.load(MNLISubset, split, source, data_dir, any_size)
