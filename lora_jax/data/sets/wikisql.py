"""WikiSQL's questions and queries (Zhong et al. 2017, arXiv 1709.00103), with rebuilt columns.

The files are JSON lines with the query as text; further fields are ignored:

    {"question": "What is the largest area?", "table_id": "1-10-1",
     "sql": "SELECT MAX [area (km²)] FROM table WHERE [name] = \"Lake Ann\" AND NO._FIELD > 3"}

They have no tables. A table's columns are rebuilt: all that its queries in the same file name,
filled up to eight with columns of the file's other tables, in random order. The questions are
WikiSQL's, the prompts are not, so results are named by `TITLE`: "WikiSQL, rebuilt columns".

    [name], NO._FIELD, ..., [area (km²)] Q: What is the largest area? A:

The data set is BSD-3-licensed. `wikisql_tfds.py` is the TFDS builder.
"""

import itertools
import os
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from lora_jax.data.sets import originals
from lora_jax.data.sets.e2e import Record
from lora_jax.files import parse_json, read_lines

TITLE = "WikiSQL, rebuilt columns"
SOURCE = (
  "https://github.com/salesforce/WikiSQL (BSD-3), as JSON lines with question, table_id and sql, "
  "the query as text with its columns' names"
)
FILES: dict[str, list[str]] = {
  "train": ["train.jsonl"],
  "valid": ["dev.jsonl"],
  "test": ["test.jsonl"],
}
SIZES = {"train": 56355, "valid": 8421, "test": 15878}
AGGREGATES = ("MAX", "MIN", "COUNT", "SUM", "AVG")
TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:[^\[\]]|\[[^\[\]]*\])*\]\S*|\S+')


class Question(NamedTuple):
  """A question about a table, and the query that answers it."""

  question: str
  table_id: str
  sql: str


class Condition(NamedTuple):
  """A column, `=`, `<` or `>`, and a value without its quotation marks."""

  column: str
  operator: str
  value: str


class Query(NamedTuple):
  """A parsed query; `aggregate` is empty where it selects the values themselves."""

  aggregate: str
  column: str
  conditions: tuple[Condition, ...]


def read(split: str, folder: str | os.PathLike[str], *, any_size: bool = False) -> list[Record]:
  """Returns the records of a split: prompts and queries, in the file's order.

  Args:
    split: `train`, `valid` or `test`.
    folder: has the split's file under its original name.
    any_size: whether another number of questions than was published is accepted. An excerpt's
      columns are rebuilt from its own questions.
  Raises:
    FileNotFoundError: if the file does not exist, saying where it can be got.
    ValueError: if a line cannot be read, naming file and line, or lines are missing.
  """
  return records(read_questions(split, folder, any_size=any_size))


def read_questions(
  split: str, folder: str | os.PathLike[str], *, any_size: bool = False
) -> list[Question]:
  """Returns the questions of a split; arguments and errors as in `read`."""
  originals.check_split(TITLE, split, FILES)
  path = originals.find_file(folder, FILES[split], TITLE, SOURCE)
  questions = []
  for where, line in read_lines(path):
    fields = originals.fields(parse_json(line, where), where, question=str, table_id=str, sql=str)
    try:
      parse_query(fields[2])
    except ValueError as error:
      raise ValueError(f"{where}: {error}") from None
    questions.append(Question(*fields))
  originals.check_count(path, len(questions), SIZES[split], "questions", any_size)
  return questions


def records(questions: Sequence[Question]) -> list[Record]:
  """Returns the prompt `COLUMNS Q: QUESTION A:` and the query of each question of a file."""
  columns = {table: ", ".join(names) for table, names in rebuilt_columns(questions).items()}
  return [
    Record(f"{columns[table_id]} Q: {question.strip()} A:", sql.strip())
    for question, table_id, sql in questions
  ]


def rebuilt_columns(questions: Sequence[Question], count: int = 8) -> dict[str, list[str]]:
  """Returns columns for each table of a file: its own, and others up to `count` in all.

  A column is drawn as often as tables of the file have it. The draws and the order depend only on
  the table's id and the questions.
  """
  columns: dict[str, list[str]] = {}
  for question in questions:
    query = parse_query(question.sql)
    names = columns.setdefault(question.table_id, [])
    for name in (query.column, *(condition.column for condition in query.conditions)):
      if name not in names:
        names.append(name)
  pool = [name for names in columns.values() for name in names]
  count = min(count, len(set(pool)))
  tables = {}
  for table, names in columns.items():
    draw = random.Random(table).random
    names = list(names)
    while len(names) < count:
      name = pool[int(draw() * len(pool))]
      if name not in names:
        names.append(name)
    tables[table] = sorted(names, key=lambda _: draw())
  return tables


def parse_query(sql: str) -> Query:
  """Returns the parts of a query; keywords may be in lower case.

  >>> parse_query('SELECT COUNT [year] FROM table WHERE [name] = "Ann" AND NO._FIELD > 3')[:2]
  ('COUNT', '[year]')

  Raises:
    ValueError: if it is not of the form `SELECT [AGGREGATE] COLUMN FROM table [WHERE COLUMN
      OPERATOR VALUE [AND ...]]`.
  """
  tokens = TOKEN.findall(sql)
  words = [token.upper() for token in tokens]
  has_aggregate = words[1:2] and words[1] in AGGREGATES
  place = 2 if has_aggregate else 1
  if words[:1] != ["SELECT"] or words[place + 1 : place + 3] != ["FROM", "TABLE"]:
    raise ValueError(f"expected a query 'SELECT COLUMN FROM table ...', got {sql!r:.200}")
  if not _is_column(tokens[place]):
    raise ValueError(f"expected a column '[NAME]' or 'NAME_FIELD', got {tokens[place]!r:.100}")
  starts = [
    i
    for i in range(place + 3, len(tokens))
    if words[i] == ("WHERE" if i == place + 3 else "AND")
    and _is_column("".join(tokens[i + 1 : i + 2]))
    and tokens[i + 2 : i + 3] in (["="], ["<"], [">"])
  ]
  parts = [tokens[i + 1 : j] for i, j in itertools.pairwise([*starts, len(tokens)])]
  if starts[:1] != [place + 3][: len(tokens) - place - 3] or any(len(part) < 3 for part in parts):
    raise ValueError(f"expected conditions 'WHERE COLUMN = VALUE AND ...', got {sql!r:.200}")
  conditions = [Condition(p[0], p[1], " ".join(map(_unquoted, p[2:]))) for p in parts]
  return Query(words[1] if has_aggregate else "", tokens[place], tuple(conditions))


def _is_column(token: str) -> bool:
  return token.startswith("[") or token.upper().endswith("_FIELD")


def _unquoted(token: str) -> str:
  if len(token) > 1 and token[0] == token[-1] == '"':
    return re.sub(r"\\(.)", r"\1", token[1:-1])
  return token


def logical_form(sql: str) -> Query | str:
  """Returns what logical-form accuracy compares: a query without case, spaces and order.

  Aggregate, column and the set of conditions count, values without quotation marks, as in WikiSQL's
  own evaluation. A text that is not a query is returned itself, and so equals no query.
  """
  try:
    query = parse_query(sql)
  except ValueError:
    return sql
  conditions = {
    Condition(*(" ".join(part.lower().split()) for part in c)) for c in query.conditions
  }
  return Query(query.aggregate, " ".join(query.column.lower().split()), tuple(sorted(conditions)))
