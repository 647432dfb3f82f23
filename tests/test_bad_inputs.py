"""Every bad input of the tables is refused with a message that names the fault."""

import importlib

import pytest

from tests.bad_inputs import BadInput
from tests.paths import ROOT

TABLES = sorted((ROOT / "tests").glob("*/**/bad_inputs.py"))
ROWS = [
  pytest.param(row, id=f"{path.parent.relative_to(ROOT / 'tests')}: {row.name}")
  for path in TABLES
  for row in importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts)).ROWS
]


@pytest.mark.parametrize("row", ROWS)
def test_a_bad_input_is_refused(row: BadInput, tmp_path):
  with pytest.raises(row.error) as caught:
    row.call(tmp_path)
  message = str(caught.value)
  missing = [word for word in row.words if word not in message]
  assert not missing, f"the message lacks {missing}: {message}"


def test_the_tables_have_the_rows_that_were_tried():
  assert len(ROWS) >= 200
  assert len({row.id for row in ROWS}) == len(ROWS)
