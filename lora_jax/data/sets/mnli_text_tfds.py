"""A subset of MNLI as a TFDS builder: `array_record` files, read without TensorFlow.

    builder = MNLISubset(source="subset10k/MNLI")           # the folder of the JSON files
    builder.download_and_prepare()
    source = builder.as_data_source("valid")                # random access: source[0]["context"]

`load` does that and returns the records of a split, which are those of `mnli_text.read`. All of
MNLI is `mnli_text.prompts(glue_tfds.load("mnli", split, source))`.
"""

import functools

from lora_jax.data.sets import mnli_text, originals_tfds

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


load = functools.partial(originals_tfds.load, MNLISubset)
