"""WikiSQL with rebuilt columns: queries, prompts, errors of bad lines, and the real files."""

import pytest

from lora_jax.data.sets import wikisql
from lora_jax.data.sets.wikisql import Query, Question, logical_form, parse_query

from tests.paths import SHARED
from tests.tiny_text_sets import QUESTIONS, write_wikisql

REAL = SHARED / "data" / "wikisql"


@pytest.fixture
def folder(tmp_path):
  return write_wikisql(tmp_path)


@pytest.mark.parametrize(
  ("number", "query"),
  [
    (0, ("MAX", "[area (km²)]", ())),
    (1, ("", "[depth]", (("[name]", "=", "Lake Ann"), ("[country]", "=", "Peru")))),
    (3, ("", "NO._IN_SET_FIELD", (("[title]", "=", '"Rain"'),))),
    (4, ("", "[writer [b ]]", (("NO._IN_SET_FIELD", "=", "4"),))),
    (
      5,
      ("", "[title]", (("[score [a ] (sum)]", "=", "7 + 8 = 15"), ("NO._IN_SET_FIELD", "<", "9"))),
    ),
  ],
)
def test_a_query_has_an_aggregate_a_column_and_conditions(number, query):
  assert parse_query(QUESTIONS[number][2]) == query


@pytest.mark.parametrize(
  "text",
  [
    "select [depth] from table where [country] = peru and [name] = 'no'",
    'SELECT [depth]  FROM table WHERE [country] = peru AND [name] = "lake  ann" ',
  ],
)
def test_the_logical_form_ignores_case_spaces_order_and_quotation_marks(text):
  expected = logical_form(QUESTIONS[1][2])
  assert (logical_form(text) == expected) == ("no" not in text)


@pytest.mark.parametrize(
  ("old", "new"),
  [
    ("SELECT", "SELECT COUNT"),
    ("[depth]", "[name]"),
    ("Ann", "Bob"),
    ('[name] = "', '[name] < "'),
    (" AND [country] = Peru", ""),
  ],
)
def test_the_logical_form_shows_every_other_difference(old, new):
  sql = QUESTIONS[1][2]
  assert old in sql
  assert logical_form(sql.replace(old, new)) != logical_form(sql)


def test_a_text_that_is_no_query_is_its_own_logical_form():
  assert [logical_form(text) for text in ("", "SELECT", "I am sure .")] == [
    "",
    "SELECT",
    "I am sure .",
  ]


def test_columns_are_the_tables_own_and_others_up_to_eight():
  questions = [Question(*row) for row in QUESTIONS]
  columns = wikisql.rebuilt_columns(questions)
  own = {"[area (km²)]", "[depth]", "[name]", "[country]"}
  assert own < set(columns["1-1-1"])
  assert {len(names) for names in columns.values()} == {8}
  assert {len(set(names)) for names in columns.values()} == {8}
  assert set(wikisql.rebuilt_columns(questions, count=2)["1-1-1"]) == own
  assert wikisql.rebuilt_columns(questions) == columns
  alone = wikisql.rebuilt_columns(questions[:3])
  assert set(alone["1-1-1"]) == own  # no other table has any


def test_a_columns_place_says_nothing():
  """Both own columns of each of 400 tables have places of the same mean, that of the others."""
  questions = [
    Question("?", str(i), f"SELECT [a{i}] FROM table WHERE [b{i}] = 1") for i in range(400)
  ]
  columns = wikisql.rebuilt_columns(questions)
  places = [[columns[str(i)].index(f"[{x}{i}]") for i in range(400)] for x in "ab"]
  assert [sum(row) / 400 for row in places] == pytest.approx([3.5, 3.5], abs=0.35)  # 3 deviations


def test_a_record_is_a_prompt_and_a_query(folder):
  records = wikisql.read("test", folder, any_size=True)
  columns = wikisql.rebuilt_columns([Question(*row) for row in QUESTIONS])
  assert records[3] == (
    f"{', '.join(columns['2-7-1'])} Q: What number is the song called “Rain”? A:",
    'SELECT NO._IN_SET_FIELD FROM table WHERE [title] = "\\"Rain\\""',
  )
  assert len(records) == len(QUESTIONS)


GOOD = '{"question": "a", "table_id": "b", "sql": "SELECT [c] FROM table"}'


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (GOOD.replace("[c]", "c"), r"dev\.jsonl:2: expected a column .*got 'c'"),
    (GOOD.replace("FROM", "OF"), r"dev\.jsonl:2: expected a query 'SELECT COLUMN FROM table"),
    (GOOD.replace('table"}', 'table WHERE [d] ="}'), r"dev\.jsonl:2: expected conditions"),
    (GOOD.replace('table"}', 'table AND [d] = 1"}'), r"dev\.jsonl:2: expected conditions"),
    (GOOD.replace('table"}', 'table [d] = 1"}'), r"dev\.jsonl:2: expected conditions"),
    (GOOD.replace('"a"', '" "'), r"dev\.jsonl:2: expected question to be a text that is not empty"),
    (GOOD.replace('"a"', "3"), r"dev\.jsonl:2: expected question to be a text"),
    (GOOD.replace("sql", "SQL"), r"dev\.jsonl:2: expected the field sql, got the fields question"),
    ("[1]", r"dev\.jsonl:2: expected an object"),
    (GOOD[:-1], r"dev\.jsonl:2 is not JSON"),
    ("", r"dev\.jsonl:2 is not JSON"),
    (GOOD.replace('"a"', '"\xe9"'), r"dev\.jsonl:2: expected UTF-8, got byte 0xe9"),
  ],
)
def test_bad_lines_are_named(tmp_path, line, message):
  (tmp_path / "dev.jsonl").write_bytes(f"{GOOD}\n{line}\n".encode("latin-1"))
  with pytest.raises(ValueError, match=message):
    wikisql.read("valid", tmp_path, any_size=True)


def test_missing_lines_files_and_splits_are_named(folder):
  with pytest.raises(ValueError, match=r"test\.jsonl: expected 15,878 questions, got 8\."):
    wikisql.read("test", folder)
  with pytest.raises(FileNotFoundError, match=r"WikiSQL, rebuilt columns file dev\.jsonl.*github"):
    wikisql.read("valid", folder)
  with pytest.raises(ValueError, match="must be one of train, valid, test, got 'dev'"):
    wikisql.read("dev", folder)


@pytest.mark.skipif(not REAL.is_dir(), reason="WikiSQL's files are not beside this checkout")
@pytest.mark.parametrize(
  ("split", "count"), [("valid", 8421), pytest.param("train", 56355, marks=pytest.mark.long)]
)
def test_the_real_files(split, count):
  records = wikisql.read(split, REAL)
  assert len(records) == count
  for context, completion in records[:300]:
    query = parse_query(completion)
    assert isinstance(query, Query)
    columns, _, question = context.partition(" Q: ")
    assert query.column in columns
    assert question.endswith(" A:")
    assert all(condition.column in columns for condition in query.conditions)
    assert logical_form(completion.lower()) == logical_form(completion)
