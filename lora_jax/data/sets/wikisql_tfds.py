"""WikiSQL with rebuilt columns as a TFDS builder: `array_record` files, without TensorFlow.

    builder = WikiSQL(source="wikisql")                     # the folder of the JSON lines
    builder.download_and_prepare()
    source = builder.as_data_source("test")                 # random access: source[0]["context"]

`load` does that and returns the records of a split, which are those of `wikisql.read`: prompts
with the rebuilt columns, and queries.
"""

import functools

from lora_jax.data.sets import originals_tfds, wikisql

CITATION = """@article{zhong2017seq2sql,
  title = {{Seq2SQL}: Generating Structured Queries from Natural Language using Reinforcement
    Learning},
  author = {Zhong, Victor and Xiong, Caiming and Socher, Richard},
  year = {2017},
  note = {arXiv:1709.00103},
}"""


class WikiSQL(originals_tfds.FromOriginals):
  """WikiSQL with rebuilt columns; the splits are `train`, `valid` and `test`.

  Its arguments are those of `originals_tfds.FromOriginals`.
  """

  name = "wikisql_rebuilt_columns"
  READER = wikisql
  ABOUT = {  # noqa: RUF012 (a constant of the class)
    "description": "Questions about tables and their queries (Zhong et al. 2017), with columns "
    "that are rebuilt from the queries.",
    "homepage": "https://github.com/salesforce/WikiSQL",
    "citation": CITATION,
    "license": "BSD-3-Clause, https://github.com/salesforce/WikiSQL/blob/master/LICENSE",
  }


load = functools.partial(originals_tfds.load, WikiSQL)
