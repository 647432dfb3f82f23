"""The command of the comparison: its page of published lines, and what it refuses."""

import re

import pytest

from experiments import variants
from experiments.comparison.runs import write_lines

from tests.experiments.comparison.records import records


def test_the_page_of_published_lines(tmp_path, capsys):
  lines = tmp_path / "runs.jsonl"
  write_lines(lines, records())
  variants.main([f"--lines={lines}", f"--out={tmp_path}/new/page"])
  printed = capsys.readouterr().out
  assert (tmp_path / "new" / "page.md").read_text("utf-8") in printed
  assert "<table" in (tmp_path / "new" / "page.html").read_text("utf-8")


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--report"], r"has no finished runs: leave out --report"),
    (["--lines={root}/missing"], r"there is no file .*missing"),
    (["--stage=seeds", "--arms=dora"], r"no learning rates of lora, dora are known: run --stage"),
    (["--stage=rates", "--arms=dura"], r"the arms must be of lora, dora.*got 'dura'"),
    (["--out={root}"], r"--out.*"),
  ],
)
def test_what_cannot_be_done_is_refused(flags, message, tmp_path, capsys):
  (tmp_path / "x.html").mkdir()
  flags = [flag.format(root=tmp_path / "x" if "out" in flag else tmp_path) for flag in flags]
  with pytest.raises(SystemExit) as exit:
    variants.main([*flags, "--tiny", f"--root={tmp_path}/root"])
  assert re.search(message, str(exit.value))


@pytest.mark.long
def test_all_parts_in_minutes(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(variants, "keep_freed_memory", lambda: None)  # it is for whole processes
  flags = ["--tiny", "--arms=full_finetuning", f"--root={tmp_path}"]
  variants.main(flags)
  text = (tmp_path / "variants.md").read_text("utf-8")
  assert "not ranked: its own size" in text
  assert "### Expected best loss by the number of random draws" in text
  files = {path.parent.name for path in tmp_path.glob("seeds/*/measured.json")}
  assert len(files) == 4
  before = sorted(path.stat().st_mtime_ns for path in tmp_path.glob("*/*/result.json"))
  variants.main(flags)  # nothing is repeated
  assert sorted(path.stat().st_mtime_ns for path in tmp_path.glob("*/*/result.json")) == before
