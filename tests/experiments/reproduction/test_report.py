"""The report: of no runs, and of a few whose files are those of the real writers."""

import html
import json
import re
import shutil

import pytest

from experiments.configs.paper import STUDIES
from experiments.harness.sharing import PLANNED
from experiments.reproduction import plan, runs
from experiments.reproduction.claims import Evidence
from experiments.reproduction.report import FLOOR, blocks, study_blocks, write_report
from experiments.reproduction.runs import carry_out, collect

from tests.experiments.comparison.test_page import BROWSER, browse
from tests.experiments.reproduction.studies import make_runs, patched, planned, small

MEASURE = """<script>
const all = selector => [...document.querySelectorAll(selector)];
document.body.dataset.log = JSON.stringify({
  width: document.documentElement.scrollWidth,
  tables: all(".scroll > table").length,
  images: all("img").map(image => image.naturalWidth),
  headings: all("h1, h2").map(heading => heading.textContent),
});
</script>"""
LOSSES = {"lora_r1": 1.6, "lora_r4": 1.5, "full": 1.5, "frozen": 3.0}


def test_without_runs_everything_is_not_run_and_no_value_is_made_up(tmp_path):
  write_report(Evidence([], tmp_path), tmp_path / "paper")
  text = (tmp_path / "paper.md").read_text("utf-8")
  assert "data:image" not in text
  ours = [
    line for line in text.splitlines() if re.match(r"\| (lora_r\d|full +\||adapter_[hl]_)", line)
  ]
  assert len(ours) > 20
  for line in ours:
    values = [cell for cell in line.split("|")[3:] if cell.strip() not in ("", "not run")]
    assert not values, line
  assert "70.4 ± 0.1" in text  # the paper's own
  sections = {part.partition("\n")[0]: part for part in text.split("\n## ")}
  assert "as printed" not in sections["Table 4: WikiSQL, rebuilt columns, SmolLM2"]
  assert "53.8" in sections["Table 4: SAMSum, SmolLM2"]


@pytest.fixture
def root(tmp_path, monkeypatch):
  """Runs of rank on E2E, and of E2E reversed with its floor."""
  study = small(STUDIES["rank"], LOSSES, metrics=("exact",), seeds=(1, 2))
  patched(monkeypatch, {"rank": study})
  make_runs(monkeypatch, tmp_path, "rank", LOSSES, {"lora_r1": 2.0, "lora_r4": 60.0, "full": 60.0})
  return tmp_path


def rows(parts):
  """Returns the rows of a study's first table by arm, as cells by header."""
  head, *body = next(part.rows for part in parts if type(part).__name__ == "Table")
  return {row[0]: dict(zip(head, row, strict=True)) for row in body}


def test_a_study_of_real_folders(root):
  records = collect(root)
  assert {record["kind"] for record in records} == {"rates", "reported"}
  parts = list(study_blocks("rank", records))
  table = rows(parts)
  assert table["lora_r1"]["r/d"] == "0.00391"  # 1 / 256
  assert table["lora_r1"]["learning rate"] == "0.01"
  assert float(table["lora_r1"]["nats/token"][:5]) == pytest.approx(1.6, abs=0.03)
  value, low, high = map(float, re.findall(r"[-+]\d\.\d+", table["lora_r1"]["against full"]))
  assert low <= value <= high
  assert value == pytest.approx(0.1, abs=0.02)
  assert table["full"]["against full"] == ""
  assert table["frozen"]["status"] == "another base, not trained"
  assert table["lora_r4"]["status"] == "another base"
  (image,) = [part for part in parts if type(part).__name__ == "Image"]
  assert image.content.startswith(b"\x89PNG")
  assert "another base" in image.caption


def test_a_score_at_the_floor_is_marked_and_not_ranked(root):
  table = rows(study_blocks("rank", collect(root)))
  assert table["lora_r1"]["exact"].endswith(f" {FLOOR}")
  assert table["lora_r1"]["exact, against full"] == ""
  assert FLOOR not in table["lora_r4"]["exact"]
  assert re.match(r"[-+]\d+\.\d\d \[", table["lora_r4"]["exact, against full"])


def test_scores_of_glue_are_compared_over_seeds(monkeypatch):
  patched(monkeypatch, {"glue_cola": small(STUDIES["glue_cola"], ["full", "lora_r8"])})
  made = [
    {
      **{"study": "glue_cola", "arm": arm, "kind": "reported", "seed": seed, "rate": 1e-3},
      **{"status": "finished", "valid_loss": -score, "scores": {"score": 100 * score}},
      "intervals": {},
    }
    for arm, mean in (("full", 0.5), ("lora_r8", 0.4))
    for seed, score in enumerate((mean - 0.01, mean, mean + 0.01), 1)
  ]
  table = rows(study_blocks("glue_cola", made))
  assert table["lora_r8"]["score, against full"].startswith("-10.00 [-1")
  assert "nats/token" not in table["full"]


def test_a_result_without_a_field_is_named(root):
  path = next(root.glob("rank/reported,lora_r1*/result.json"))
  result = json.loads(path.read_text())
  del result["trainable_parameters"]
  path.write_text(json.dumps(result))
  with pytest.raises(ValueError, match=r"result\.json lacks the field 'trainable_parameters'"):
    collect(root)


def test_missing_seeds_are_counted_and_not_compared(root):
  (folder,) = root.glob("rank/reported,lora_r1,*seed=2")
  shutil.rmtree(folder)
  row = rows(study_blocks("rank", collect(root)))["lora_r1"]
  assert row["status"] == "another base, 1 of 2 seeds"
  assert row["against full"] == ""


def test_html_has_the_same_tables_and_plots(root, monkeypatch):
  monkeypatch.setattr("experiments.reproduction.report.decide_all", lambda evidence: [])
  write_report(Evidence(collect(root), root), root / "paper")
  page, text = ((root / f"paper.{kind}").read_text("utf-8") for kind in ("html", "md"))
  assert page.count("<table>") == text.count("| :--")
  assert page.count("data:image/png") == 1
  (figure,) = re.findall(r"!\[.*\]\((.*)\)", text)
  assert (root / figure).read_bytes().startswith(b"\x89PNG")
  assert not re.search(r"(src|href)=\"http", page)


@pytest.mark.long
@pytest.mark.skipif(not BROWSER, reason="no browser: apt-get install chromium")
def test_a_browser_shows_the_report(root, monkeypatch):
  """Every table is as wide as the page or scrolls in its own box, and every plot is loaded."""
  monkeypatch.setattr("experiments.reproduction.report.decide_all", lambda evidence: [])
  write_report(Evidence(collect(root), root), root / "paper")
  path = root / "paper.html"
  path.write_text(path.read_text("utf-8").replace("</body>", f"{MEASURE}</body>"), "utf-8")
  text = browse(path, "--dump-dom", "--enable-logging=stderr", "--window-size=1000,800")
  (log,) = re.findall(r'data-log="([^"]*)"', text)
  shown = json.loads(html.unescape(log))
  assert shown["width"] <= 1000
  assert shown["tables"] == text.count("<table>") > 3
  assert len(shown["images"]) == 1
  assert min(shown["images"]) >= 600
  assert shown["headings"][:2] == ["The experiments of Hu et al. 2021", "Claims"]


def test_pages_of_other_commands_are_included(tmp_path, monkeypatch):
  folder = tmp_path / "intrinsic_dimension"
  folder.mkdir()
  (folder / "page.md").write_text("Status: x\n\n| a | b |\n| :-- | --: |\n| c | 4 |\n")
  (folder / "figure.png").write_bytes(b"\x89PNG")
  monkeypatch.setattr("experiments.reproduction.report.decide_all", lambda evidence: [])
  parts = list(blocks(Evidence([], tmp_path)))
  assert [["a", "b"], ["c", "4"]] in [p.rows for p in parts if type(p).__name__ == "Table"]
  assert b"\x89PNG" in [p.content for p in parts if type(p).__name__ == "Image"]


def test_a_failed_run_is_a_result(tmp_path, monkeypatch):
  patched(monkeypatch, {"rank": small(STUDIES["rank"], ["lora_r1", "full"], seeds=(1, 2))})
  make_runs(monkeypatch, tmp_path, "rank", {"lora_r1": float("nan"), "full": 1.5})
  records = collect(tmp_path)
  losses = plan.losses_of(records, "rank")
  assert set(losses["lora_r1"].values()) == {float("inf")}
  parts = list(study_blocks("rank", records))
  assert rows(parts)["lora_r1"]["status"] == "not run"
  rates = [part.rows for part in parts if type(part).__name__ == "Table"][1]
  assert {row[0]: row[-2:] for row in rates[1:]} == {
    "lora_r1": ["none", "no"],
    "full": ["0.001", "yes"],
  }


def test_a_finished_run_is_not_repeated_and_keeps_its_settings(root, monkeypatch):
  def refuse(study):
    raise AssertionError("a run was repeated")

  done = planned(rate=1e-2, seed=1)
  assert (root / "rank" / done.name / PLANNED).exists()
  assert carry_out([done], root, refuse) == []
  study = STUDIES["rank"]

  def fewer():
    config = study.make()
    config.data.num_train_records = 7
    return config

  monkeypatch.setitem(STUDIES, "rank", small(study, LOSSES, make=fewer))
  with pytest.raises(ValueError, match="other settings than are planned now"):
    carry_out([done], root, refuse)


def test_a_run_that_breaks_is_named_and_the_others_go_on(tmp_path, monkeypatch):
  monkeypatch.setattr(runs, "measure", lambda folder, study: {"rows": {}})
  done = []

  def run(config):
    done.append(config.workdir)
    if len(done) == 1:
      raise RuntimeError("no memory")
    return {"valid_loss": 1.0}

  broken = carry_out([planned(seed=1), planned(seed=2)], tmp_path, lambda study: run)
  assert broken == done[:1]
  assert len(done) == 2
  (written,) = tmp_path.glob(f"*/*/{PLANNED}")
  assert json.loads(written.read_text())["seed"] == 2
