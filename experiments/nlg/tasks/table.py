"""The data sets by the names that `config.data.name` may have."""

from collections.abc import Mapping

from experiments.nlg.config import DataSet, Texts
from experiments.nlg.tasks.answers import ADDITION, E2E_REVERSED, MNLI_TEXT, SAMSUM, WIKISQL
from experiments.nlg.tasks.dial import DIAL
from experiments.nlg.tasks.e2e import E2E
from experiments.nlg.tasks.task import Task
from experiments.nlg.tasks.triples import DART, DART_DEV, WEBNLG

TASKS: Mapping[DataSet, Task] = {
  "e2e": E2E,
  "webnlg": WEBNLG,
  "dart": DART,
  "dart_dev": DART_DEV,
  "wikisql": WIKISQL,
  "samsum": SAMSUM,
  "mnli_text": MNLI_TEXT,
  "e2e_reversed": E2E_REVERSED,
  "addition": ADDITION,
  "dial": DIAL,
}


def title(texts: Texts) -> str:
  """Returns the name of results on a data set, which says if it is only a part of it."""
  return TASKS[texts.name].title + (", an excerpt" if texts.any_size else "")
