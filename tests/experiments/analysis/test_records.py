"""Measurements are appended as JSON lines with their origin, and recognized by their settings."""

import json

import pytest

from experiments.analysis.records import Planned, carry_out, read_records

PLANNED = Planned("capacity", "lora", {"pairs": 4, "rate": 0.1})


def test_a_record_has_its_origin_and_is_found_again(tmp_path):
  path = tmp_path / "new" / "lines.jsonl"
  assert read_records(path) == []
  record = carry_out(
    PLANNED, lambda planned: {"bits": planned.settings["pairs"]}, "a command", path
  )
  assert record["bits"] == 4
  assert {"seed", "command", "commit", "device", "jax", "seconds"} <= record.keys()
  (read,) = read_records(path)
  assert read == record == PLANNED.find([read])
  assert PLANNED._replace(settings={"pairs": 8, "rate": 0.1}).find([read]) is None
  assert PLANNED._replace(arm="dora").find([read]) is None


def test_training_that_is_not_finite_is_a_result_and_other_errors_are_not(tmp_path):
  path = tmp_path / "lines.jsonl"

  def overflows(planned):
    raise FloatingPointError("the loss of step 3 is nan")

  def is_wrong(planned):
    raise ValueError("a mistake")

  assert carry_out(PLANNED, overflows, "", path)["reason"] == "the loss of step 3 is nan"
  with pytest.raises(ValueError, match="a mistake"):
    carry_out(PLANNED, is_wrong, "", path)
  with pytest.raises(ValueError, match="not JSON compliant"):
    carry_out(PLANNED, lambda planned: {"bits": float("nan")}, "", path)
  assert [record["status"] for record in read_records(path)] == ["failed"]


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ('{"measure": "capa', r"lines.jsonl:2: .* Remove the line: its measurement is then repeated"),
    ("[1]", r"lines.jsonl:2: expected a measurement's record, got '\[1\]'"),
    (
      json.dumps({"measure": "depth", "arm": "lora", "settings": {}, "status": "finished"}),
      r"lines.jsonl:2: measure must be one of sharpness, intruders, capacity, got 'depth'",
    ),
  ],
)
def test_lines_that_cannot_be_read(line, message, tmp_path):
  path = tmp_path / "lines.jsonl"
  carry_out(PLANNED, lambda planned: {}, "", path)
  path.write_text(path.read_text() + line + "\n")
  with pytest.raises(ValueError, match=message):
    read_records(path)
