"""The page: its tables are the summary's, it needs no network, and works in a real browser."""

import dataclasses
import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from experiments.comparison.page import COLUMNS, markdown, page, write_page
from experiments.comparison.summary import Summary, summarize
from experiments.configs.variants import FULL

from tests.experiments.comparison.records import record, records

BROWSER = next(
  filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


@pytest.fixture(scope="module")
def summary():
  return summarize(records())


def rows_of(text, title):
  """Returns the rows of a Markdown section's first table by their first cell."""
  section = text.split(f"{title}\n")[1]
  table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
  assert table is not None
  lines = [
    [cell.strip() for cell in line.strip("| \n").split(" | ")] for line in table[0].splitlines()
  ]
  return {line[0]: dict(zip(lines[0], line, strict=False)) for line in lines[2:]}


def test_the_markdown_has_every_arm_and_its_verdict(summary):
  text = markdown(summary)
  rows = rows_of(text, "## The embedded base model")
  assert list(rows) == ["LoRA", "full fine-tuning", "DoRA", "LoRA, rank 1, v only"]
  assert rows["LoRA"]["against LoRA"] == "the control"
  assert rows["DoRA"]["against LoRA"] == "worse"
  assert rows["DoRA"]["difference in loss"].startswith("+0.1")
  assert rows["full fine-tuning"]["against LoRA"] == "not ranked: its own size"
  assert rows["full fine-tuning"]["difference in loss"] == ""
  assert rows["LoRA"]["forgetting, nats/token"] == "+0.200"
  assert rows["LoRA"]["bytes on disk"] == "4,000"
  assert rows["LoRA"]["learning rates tried"] == "3"
  assert "Worse than LoRA: DoRA." in text
  assert "would be detected in 80 % of such experiments" in text
  rates = rows_of(text, "### Validation loss by learning rate")
  assert rates["DoRA"]["0.003"] == "**1.900**"
  draws = rows_of(text, "### Expected best loss by the number of random draws")
  assert draws["LoRA"] == {"draws": "LoRA", "1": "1.900", "2": "1.833", "3": "1.800"}


def test_what_cannot_be_told_is_stated():
  text = markdown(summarize(records({"lora": 0.0, "dora": 0.001})))
  assert "Equivalent to LoRA within 0.02 nats per token: DoRA." in text
  noisy = records({"lora": 0.0, "dora": 0.02}, spread=0.03)
  assert "Cannot be told apart from LoRA, nor shown to be equivalent: DoRA." in markdown(
    summarize(noisy)
  )


def test_a_failed_seed_gives_no_verdict():
  made = records()
  made.append(record("seeds", "dora", 3e-3, 9, 5.0, status="failed"))
  (table,) = summarize(made).tables
  row = next(row for row in table.rows if row.label == "DoRA")
  assert row.verdict == "failed with 1 of 4 seeds"
  assert (row.failed, row.runs) == (1, 10)
  assert row.difference is None


def with_bleu(made, arms):
  """Adds BLEU's statistics of three inputs to the reported runs of some arms."""
  generator = np.random.default_rng(0)
  for run in made:
    if run["stage"] == "seeds" and run["arm"] in arms:
      matches = generator.integers(5, 10, (3, 4))
      rows = np.hstack([np.full((3, 1), 12), np.full((3, 1), 12), matches, matches + 4])
      run |= {"bleu": 40.0, "bleu_rows": rows.tolist()}
  return made


def test_bleu_has_intervals_where_the_loss_has_some():
  made = with_bleu(records(), ("lora", "dora", "full_finetuning"))
  rows = {row.label: row for row in summarize(made).tables[0].rows}
  assert rows["DoRA"].bleu_low < rows["DoRA"].bleu_high
  assert rows["full fine-tuning"].bleu == 40.0
  assert rows["full fine-tuning"].bleu_difference is None  # not ranked
  made.append(record("seeds", "dora", 3e-3, 9, 5.0, status="failed"))
  rows = {row.label: row for row in summarize(made).tables[0].rows}
  assert rows["DoRA"].bleu_difference is None


def test_an_arm_of_another_size_is_marked_and_not_ranked():
  made = [r | {"parameters": 875} if r["arm"] == "dora" else r for r in records()]
  row = next(row for row in summarize(made).tables[0].rows if row.label == "DoRA")
  assert row.verdict == "not ranked: no rank fits (-12.5% parameters)"
  assert row.difference is None


def test_the_page_of_a_part_of_the_runs_names_what_is_missing():
  made = [r for r in records() if not (r["stage"] == "seeds" and r["arm"] == "dora")]
  made = [r for r in made if r["stage"] != "effort" or r["arm"] == "lora"]
  (table,) = summarize(made, dataclasses.replace(FULL, rate_points={"embedded": 2})).tables
  assert {row.label: row.verdict for row in table.rows}["DoRA"] == "not run yet"
  assert table.missing["seeds"].startswith("0 of 3 runs of DoRA, PiSSA, ")
  assert "3 runs of LoRA," not in table.missing["seeds"]
  assert table.missing["effort"].startswith("3 of 12 runs of LoRA; 0 of 12 runs of DoRA, ")
  assert table.missing["rates"].startswith("the best is not bracketed for PiSSA, ")
  text = markdown(Summary([table], ["1 x cpu"], ["0123456789ab"], 1.0))
  assert f"Missing runs (seeds): {table.missing['seeds']}." in text
  complete = dataclasses.replace(table, missing={})
  assert "Missing runs" not in markdown(Summary([complete], [], [], 0.0))


def test_a_control_that_failed_gives_no_verdicts():
  made = [r | {"status": "failed"} if r["arm"] == "lora" else r for r in records()]
  (table,) = summarize(made).tables
  assert {row.verdict for row in table.rows} == {"the control failed"}


@pytest.mark.parametrize("rate", [3e-3, 1e-3])
def test_two_reported_runs_of_a_seed_are_refused(rate):
  again = record("seeds", "dora", rate, 1, 1.7)
  with pytest.raises(ValueError, match=r"dora has reported runs of the seeds \[1, 1, 2, 3\]"):
    summarize([*records(), again])


def test_other_inputs_cannot_be_compared():
  made = records()
  made[-2]["stage"] = "rates"
  next(r for r in made if r["arm"] == "dora" and "input_tokens" in r)["input_tokens"] = [21] * 60
  with pytest.raises(ValueError, match="evaluated on different inputs"):
    summarize(made)


class Links(html.parser.HTMLParser):
  """Collects the tags that would load something, and the cells of table bodies."""

  def __init__(self):
    super().__init__()
    self.loads, self.ids = [], []

  def handle_starttag(self, tag, attrs):
    fields = dict(attrs)
    self.loads += [value for name, value in attrs if name in ("src", "href")]
    self.loads += [tag] if tag in ("link", "iframe", "object") else []
    self.ids += [fields["id"]] if "id" in fields else []


def test_the_html_is_self_contained(summary):
  text = page(summary)
  links = Links()
  links.feed(text)
  assert links.loads == []
  assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(|fetch\(", text)
  assert len(set(links.ids)) == len(links.ids)
  assert "@@" not in text
  for column in COLUMNS:
    if column.name != "bleu":
      assert column.label in text


def test_a_label_cannot_end_the_script(summary):
  summary.tables[0].rows[1].label = "</script><b>&"
  try:
    text = page(summary)
  finally:
    summary.tables[0].rows[1].label = "full fine-tuning"
  assert text.count("</script>") == 2
  assert "&lt;/script&gt;&lt;b&gt;&amp;" in text


CLICKS = """<script>
const log = [];
const all = selector => [...document.querySelectorAll(selector)];
const names = () => all("table.sortable tbody th").map(cell => cell.textContent);
const heads = all("table.sortable thead th");
const head = heads.find(h => h.textContent.startsWith("trained parameters"));
head.querySelector("button").click(); log.push(names().join("|"), head.ariaSort);
head.querySelector("button").click(); log.push(names().join("|"), head.ariaSort);
const difference = heads.find(h => h.textContent.startsWith("difference"));
difference.querySelector("button").click(); log.push(names().join("|"), head.ariaSort);
const caption = document.querySelector("figcaption");
log.push(caption.textContent);
const x = document.querySelector("select[name=x]");
x.value = "adapter_bytes"; x.dispatchEvent(new Event("change"));
document.querySelector("input[name=logx]").click();
log.push(document.querySelector("svg").getAttribute("aria-label"));
log.push(all("svg circle.ranked").length, all("svg rect.own").length);
log.push([...x.options].filter(o => o.disabled).map(o => o.value).join("|"));
document.body.dataset.log = JSON.stringify(log);
</script>"""


def browse(path, *flags):
  """Returns the page's text after its scripts ran in a browser, without a network."""
  command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-extensions"]
  command += [f"--user-data-dir={path.parent / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
  command += [*flags, path.as_uri()]
  run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
  assert "Uncaught" not in run.stderr, run.stderr
  return run.stdout


@pytest.mark.long
@pytest.mark.skipif(not BROWSER, reason="no browser: apt-get install chromium")
def test_a_browser_sorts_and_plots(summary, tmp_path):
  write_page(summary, tmp_path / "variants")
  path = tmp_path / "variants.html"
  path.write_text(path.read_text("utf-8").replace("</body>", f"{CLICKS}</body>"), "utf-8")
  text = browse(path, "--dump-dom", "--enable-logging=stderr")
  found = re.search(r'data-log="([^"]*)"', text)
  assert found is not None, text[-2000:]
  log = json.loads(html.unescape(found[1]))
  ascending = "LoRA, rank 1, v only|LoRA|DoRA|full fine-tuning"
  assert log[:2] == [ascending, "ascending"]
  assert log[2:4] == ["full fine-tuning|DoRA|LoRA|LoRA, rank 1, v only", "descending"]
  assert log[4].startswith("DoRA|")  # the only difference; arms without one come last
  assert log[5] is None
  front = "LoRA, rank 1, v only; LoRA; full fine-tuning"
  assert f"smaller trained parameters, smaller loss): {front}." in log[6]
  assert log[7].startswith("loss, nats/token against bytes on disk. On the Pareto front")
  assert log[8:10] == [2, 2]
  assert log[10] == "bleu"
