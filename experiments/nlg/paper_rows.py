"""The paper's results on a data set, for reports that have runs on it."""

from collections.abc import Iterable
from typing import NamedTuple

from experiments.harness import paper
from experiments.nlg.config import DataSet
from lora_jax.metrics.nlg import METRICS

PAPER = "Hu et al. 2021, arXiv 2106.09685v2"
GPT2 = "GPT-2 medium (355 M parameters) and large (774 M), trained on all examples for 5 epochs"
_TER = (
  ". METEOR and TER there are rounded to two digits; TER counts edits by another program "
  "(docs/data_sets.md)"
)


class PaperTable(NamedTuple):
  """One of the paper's tables, or its part on a data set.

  Attributes:
    name: such as "Table 3".
    about: the models and their training.
    rows: with scores in our units.
  """

  name: str
  about: str
  rows: tuple[paper.ScoreRow, ...]

  @property
  def metrics(self) -> list[str]:
    return list(self.rows[0].scores)


def _table_3(rows: Iterable[paper.Row]) -> tuple[paper.ScoreRow, ...]:
  return tuple(
    paper.ScoreRow(row.label, row.trainable, dict(zip(METRICS, row[2:], strict=True)))
    for row in rows
  )


TABLES: dict[DataSet, PaperTable] = {
  "e2e": PaperTable("Table 3", f"{GPT2}. * is from earlier work", _table_3(paper.TABLE_3)),
  "dart": PaperTable("Table 13", f"{GPT2}{_TER}", paper.TABLE_13),
  "webnlg": PaperTable("Table 14", f"{GPT2}{_TER}", paper.TABLE_14),
  "samsum": PaperTable("Table 4", "GPT-3 (175 B parameters)", paper.TABLE_4_SAMSUM),
}
