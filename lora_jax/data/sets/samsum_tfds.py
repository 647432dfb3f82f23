"""SAMSum as a TFDS builder: `array_record` files, read without TensorFlow.

    builder = SAMSum(source="samsum")                       # the folder of the original files
    builder.download_and_prepare()
    source = builder.as_data_source("test")                 # random access: source[0]["context"]

`load` does that and returns the records of a split, which are those of `samsum.read`. Nothing is
downloaded: the files' licence is CC BY-NC-ND 4.0.
"""

import functools

from lora_jax.data.sets import originals_tfds, samsum

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


load = functools.partial(originals_tfds.load, SAMSum)
