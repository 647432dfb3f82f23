"""WebNLG 2017 as a TFDS builder: `array_record` files, read without TensorFlow.

    builder = WebNLG(source="webnlg_challenge_2017")        # the folder of the original files
    builder.download_and_prepare()
    source = builder.as_data_source("test_unseen")          # random access: source[0]["context"]

`load` does that and returns the records of a split, which are those of `webnlg.read`. Nothing is
downloaded: the files' licence is CC BY-NC-SA 4.0.
"""

import functools

from lora_jax.data.sets import originals_tfds, webnlg

CITATION = """@inproceedings{gardent2017webnlg,
  title = {Creating Training Corpora for {NLG} Micro-Planners},
  author = {Gardent, Claire and Shimorina, Anastasia and Narayan, Shashi and
    Perez-Beltrachini, Laura},
  booktitle = {Proceedings of the 55th Annual Meeting of the ACL},
  year = {2017},
  note = {ACL Anthology P17-1017},
}"""


class WebNLG(originals_tfds.FromOriginals):
  """WebNLG 2017; the splits are `train`, `valid`, `test`, `test_seen` and `test_unseen`.

  Its arguments are those of `originals_tfds.FromOriginals`.
  """

  name = "webnlg_from_files"
  READER = webnlg
  ABOUT = {  # noqa: RUF012 (a constant of the class)
    "description": "Facts of DBpedia as triples, and English texts (Gardent et al. 2017).",
    "homepage": "https://webnlg-challenge.loria.fr/challenge_2017/",
    "citation": CITATION,
    "license": "CC BY-NC-SA 4.0, https://creativecommons.org/licenses/by-nc-sa/4.0/",
  }


load = functools.partial(originals_tfds.load, WebNLG)
