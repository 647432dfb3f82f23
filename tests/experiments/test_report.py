"""The report: groups over seeds, labels, tables, the paper's values, comparisons, the plot."""

import csv
import json
import re

import numpy as np
import pytest

from experiments import gpt2_e2e
from experiments import report as reports
from experiments.configs import e2e_budgets, finetune
from experiments.configs import gpt2_e2e as configs
from experiments.e2e_template import describe
from experiments.harness import paper as paper_tables
from experiments.harness.config import ALL_LINEAR
from experiments.harness.launch import apply
from experiments.harness.runs import read_runs
from experiments.harness.workdir import write_json
from experiments.nlg.config import DecodedInputs, Texts
from experiments.nlg.e2e import score
from experiments.nlg.groups import by_rank, by_rate, group_runs, target
from experiments.nlg.scores import markdown
from experiments.nlg.tasks.e2e import E2E
from experiments.report import compare, report
from lora_jax.data.sets import e2e
from lora_jax.metrics import paired_bootstrap
from lora_jax.metrics.slots import parse_slots

from tests.tiny_e2e import tiny_config

INPUTS = e2e.grouped(e2e.read("test"))[:4]
REFERENCES = [group.references for group in INPUTS]
TRAINED_RUNS = {"lora1": {"seed": 1}, "full": {"seed": 1, "method": "full_finetuning"}}
DERIVED_RUNS = {  # which run, the config's fields, the result's, the texts
  "lora2": ("lora1", {"seed": 2}, {"seed": 2, "valid_loss": 8.5}, [refs[0] for refs in REFERENCES]),
  "rank8": ("lora1", {"lora.rank": 8}, {"valid_loss": 8.25}, [refs[-1] for refs in REFERENCES]),
  "frozen": (
    "full",
    {"method": "frozen_base"},
    {"method": "frozen_base", "trainable_parameters": 0, "num_train_records": 0},
    [describe(parse_slots(group.context)) for group in INPUTS],
  ),
}
NAMES = ("lora1", "lora2", "rank8", "full", "frozen")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Finished runs: TRAINED_RUNS are trained, the others derived."""
  root = tmp_path_factory.mktemp("runs")
  for name, changes in TRAINED_RUNS.items():
    gpt2_e2e.run(apply(tiny_config(root / name), changes))
  for name, (source, config, of_result, texts) in DERIVED_RUNS.items():
    folder = changed(root / source, root / name, config, of_result)
    decoded = score(texts, INPUTS, folder, Texts("reference", "embedded"), DecodedInputs("test", 4))
    write_json(folder / "result.json", result(root, name) | decoded)
  return root


def folders(root, *names):
  return [root / name for name in names or NAMES]


def test_runs_of_finetune_are_compared_by_their_loss(tmp_path):
  config = json.loads(finetune.get_config().to_json())
  fields = {"method": "lora", "variant": "", "trainable_parameters": 3, "num_train_records": 4}
  for seed, loss in ((1, 1.0), (2, 2.0)):
    (tmp_path / str(seed)).mkdir()
    write_json(tmp_path / str(seed) / "config.json", config | {"seed": seed})
    write_json(tmp_path / str(seed) / "result.json", fields | {"seed": seed, "valid_loss": loss})
  folders = [tmp_path / "1", tmp_path / "2"]
  text = report(folders, tmp_path / "r")
  assert text.startswith("# finetune: 2 runs in 1 groups")
  assert rows(text, "Results")["LoRA"]["valid loss"] == "1.500 ± 0.707"
  assert (tmp_path / "r.png").exists()
  write_json(tmp_path / "2" / "config.json", config | {"experiment": "glue"})
  with pytest.raises(ValueError, match=r"2 is a run of glue; expected one of gpt2_e2e, .*finetune"):
    report(folders, tmp_path / "r")


def rows(text, title):
  """Returns the cells of a section's table by their row's first cell."""
  section = text.split(f"## {title}")[1].split("\n## ")[0]
  lines = [line for line in section.splitlines() if line.startswith("|")]
  cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
  return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


def result(root, name):
  return json.loads((root / name / "result.json").read_text())


def changed(source, folder, config, of_result):
  """Writes a run's folder again, with other fields in its config and its result."""
  folder.mkdir(parents=True)
  stored = json.loads((source / "config.json").read_text())
  for name, value in config.items():
    part, _, field = name.rpartition(".")
    (stored[part] if part else stored)[field] = value
  write_json(folder / "config.json", stored)
  write_json(folder / "result.json", json.loads((source / "result.json").read_text()) | of_result)
  if (source / "predictions.txt").is_file():
    (folder / "predictions.txt").write_bytes((source / "predictions.txt").read_bytes())
  return folder


def test_a_report_of_methods(runs, tmp_path):
  text = report(folders(runs), tmp_path / "new" / "report")
  assert (tmp_path / "new" / "report.md").read_text("utf-8") == text
  cells = rows(text, "Results")
  assert list(cells) == ["LoRA, rank 4", "LoRA, rank 8", "full fine-tuning", "frozen base"]
  lora = cells["LoRA, rank 4"]
  values = [result(runs, name)["valid_loss"] for name in ("lora1", "lora2")]
  assert lora["valid loss"] == f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
  assert lora["seeds"] == "2"
  assert lora["examples"] == "60"
  assert lora["trainable"] == f"{result(runs, 'lora1')['trainable_parameters']:,}"
  assert lora["METEOR"] == lora["CIDEr"] == ""
  assert cells["LoRA, rank 8"]["valid loss"] == f"{result(runs, 'rank8')['valid_loss']:.3f}"
  assert cells["frozen base"]["learning rate"] == ""
  assert cells["frozen base"]["examples"] == cells["frozen base"]["trainable"] == "0"
  assert "no METEOR: Java was not found" in text


def test_intervals_are_the_first_seeds(runs, tmp_path):
  cells = rows(report(folders(runs), tmp_path / "r"), "Over the inputs")["LoRA, rank 4"]
  first = result(runs, "lora1")
  low, high = first["intervals"]["nist"]
  assert cells["seed"] == "1"
  assert cells["inputs"] == "4"
  assert cells["NIST"] == f"{first['scores']['nist']:.3f} [{low:.3f}, {high:.3f}]"
  assert result(runs, "lora2")["scores"]["nist"] > first["scores"]["nist"]
  assert cells["METEOR"] == ""


def test_the_papers_values_are_separate(runs, tmp_path):
  text = report(folders(runs), tmp_path / "r")
  paper = rows(text, "The paper's Table 3")
  assert paper["GPT-2 M, LoRA"]["BLEU"] == "70.4 ± 0.1"
  assert paper["GPT-2 M, LoRA"]["CIDEr"] == "2.53 ± 0.02"
  assert paper["GPT-2 M, FT*"]["ROUGE-L"] == "71.0"
  assert not set(paper) & set(rows(text, "Results"))
  assert "These are other models than those above: GPT-2 mini." in text
  medium = changed(runs / "lora1", tmp_path / "m", {"variant": "medium"}, {"variant": "medium"})
  assert "The runs of GPT-2 medium above adapt one of these" in report([medium], tmp_path / "r")


def test_differences_are_the_paired_bootstraps(runs, tmp_path):
  text = report(folders(runs, "rank8", "lora1", "full", "frozen"), tmp_path / "r")
  cells = rows(text, "Against LoRA, rank 8, seed 1")  # the LoRA with the smallest loss
  assert list(cells) == ["LoRA, rank 4", "full fine-tuning", "frozen base"]

  def texts(name):
    return (runs / name / "predictions.txt").read_text("utf-8").splitlines()

  for name, row in {"frozen": "frozen base", "full": "full fine-tuning"}.items():
    expected = paired_bootstrap(texts(name), texts("rank8"), REFERENCES)["nist"]
    assert expected is not None
    cell = f"{expected.difference:+.3f} [{expected.low:+.3f}, {expected.high:+.3f}]"
    assert cells[row]["NIST"].rstrip("°") == cell
    assert cells[row]["NIST"].endswith("°") == (expected.low <= 0 <= expected.high)
  assert not cells["full fine-tuning"]["NIST"].endswith("°")


def test_a_run_differs_from_itself_by_nothing(runs):
  finished, _ = read_runs(folders(runs, "full"))
  difference = compare(finished, finished[0])[0]["nist"]
  assert difference is not None
  assert (difference.difference, difference.low, difference.high) == (0, 0, 0)


def test_against_a_named_run(runs, tmp_path):
  text = report(folders(runs), tmp_path / "r", against=f"{runs}/full/")
  cells = rows(text, "Against full fine-tuning, seed 1")
  assert list(cells) == ["LoRA, rank 4", "LoRA, rank 8", "frozen base"]
  assert cells["LoRA, rank 4"]["BLEU"] == "+0.00 [+0.00, +0.00]°"  # neither has a 4-gram right
  assert not cells["LoRA, rank 8"]["BLEU"].endswith("°")
  with pytest.raises(ValueError, match="must be one of the runs that decoded texts"):
    report(folders(runs, "lora1", "lora2"), tmp_path / "r", against=runs / "full")


def test_other_inputs_are_not_compared(runs, tmp_path):
  other = changed(runs / "full", tmp_path / "other", {"decoding.split": "valid"}, {})
  text = report([*folders(runs, "lora1", "frozen"), other], tmp_path / "r")
  assert list(rows(text, "Against LoRA, split test, seed 1")) == ["frozen base, split test"]
  assert "Left out, since they decoded other inputs: full fine-tuning, split valid." in text


def test_predictions_that_do_not_fit_the_inputs(runs, tmp_path):
  broken = changed(runs / "full", tmp_path / "broken", {}, {})
  (broken / "predictions.txt").write_text("one\n")
  with pytest.raises(ValueError, match=r"broken/predictions.txt: expected 4 lines.*got 1"):
    report([*folders(runs, "lora1"), broken], tmp_path / "r")


def test_unfinished_runs_are_named(runs, tmp_path):
  broken = changed(runs / "lora1", tmp_path / "broken", {"seed": 3}, {})
  (broken / "result.json").unlink()
  text = report([*folders(runs, "lora1"), broken], tmp_path / "r")
  assert f"Not finished: `{broken}`." in text
  assert rows(text, "Results")["LoRA"]["seeds"] == "1"
  with pytest.raises(ValueError, match="none of the 1 runs is finished"):
    report([broken], tmp_path / "r")


def test_folders_that_are_not_runs_are_refused(runs, tmp_path):
  with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
    report([*folders(runs), tmp_path], tmp_path / "r")
  copy = changed(runs / "lora1", tmp_path / "copy", {}, {})
  with pytest.raises(ValueError, match=r"lora1 and .*copy are the same run"):
    report([*folders(runs), copy], tmp_path / "r")


def test_the_rank_sweep_is_compared_with_table_18(runs, tmp_path):
  text = report(folders(runs), tmp_path / "r")
  cells = rows(text, "By rank")
  assert list(cells) == ["4", "8"]
  assert cells["4"]["BLEU (paper)"] == "70.38"
  assert cells["8"]["valid loss (paper)"] == "1.170"
  assert cells["8"]["valid loss"] == f"{result(runs, 'rank8')['valid_loss']:.3f}"
  assert "METEOR" not in cells["4"]  # there is none to show
  assert paper_tables.TABLE_18[4]["meteor"] == 46.89


def test_each_methods_ranks_have_its_name(runs, tmp_path):
  run_folders = [runs / "lora1", runs / "rank8"]
  for folder in list(run_folders):
    dora = changed(folder, tmp_path / folder.name, {"method": "dora"}, {"method": "dora"})
    run_folders.append(dora)
  text = report(run_folders, tmp_path / "r")
  headings = [line for line in text.splitlines() if line.startswith("## By rank")]
  assert headings == ["## By rank: LoRA", "## By rank: DoRA"]


def test_all_patterns_of_all_layers_are_one_group(runs, tmp_path):
  """GPT-2's own pattern, the zoo's, and `all-linear`, which older runs stored."""
  run_folders = [runs / "lora1"]
  for seed, pattern in enumerate(("all-linear", ALL_LINEAR), 2):
    changes = {"lora.target": pattern, "seed": seed}
    run_folders.append(changed(runs / "lora1", tmp_path / str(seed), changes, {"seed": seed}))
  (group,) = group_runs(read_runs(run_folders)[0])
  assert len(group.runs) == 3
  assert group.method_label == "LoRA, rank 4, all linear"


def test_ranks_of_other_layers_are_not_a_sweep(runs, tmp_path):
  other = {"lora.rank": 2, "lora.target": configs.QUERY_AND_VALUE}
  folder = changed(runs / "lora1", tmp_path / "qv", other, {})
  groups = group_runs(read_runs([runs / "lora1", folder])[0])
  assert by_rank(groups) == []
  assert [group.label for group in groups] == ["LoRA, rank 2, q,v", "LoRA, rank 4, all linear"]


def test_methods_by_the_pretraining_of_their_base(runs, tmp_path):
  variations = {}
  for tokens, lora, full in ((0, 9.0, 8.0), (1000, 7.5, 7.25), (2000, 6.0, 6.5)):
    start = {"model.start": "pretrained" if tokens else "random", "model.folder": f"base{tokens}"}
    for source, rate, loss in (("lora1", 1e-2, lora), ("lora1", 3e-2, 9.9), ("full", 1e-2, full)):
      name = f"{source}{tokens}{rate}"
      of_result = {"pretraining_tokens": tokens, "valid_loss": loss}
      variations[name] = changed(
        runs / source, tmp_path / name, {**start, "optimizer.learning_rate": rate}, of_result
      )
  text = report([*variations.values(), runs / "frozen"], tmp_path / "r")
  lora, full = "LoRA, rank 4, all linear", "full fine-tuning"
  cells = rows(text, "By pretraining")
  assert list(cells["0"]) == ["pretraining tokens"] + [
    f"{label}: {value}" for value in ("valid loss", "BLEU") for label in (lora, full)
  ]
  losses = [[row[f"{label}: valid loss"] for label in (lora, full)] for row in cells.values()]
  assert losses == [["9.000", "8.000"], ["7.500", "7.250"], ["6.000", "6.500"]]
  (gap,) = compare(
    read_runs([variations["full10000.01"]])[0], read_runs([variations["lora110000.01"]])[0][0]
  )
  assert gap["bleu"] is not None
  gaps = rows(text, "Full fine-tuning against the other methods, by pretraining")
  assert gaps["1,000 tokens"][lora].startswith(f"{gap['bleu'].difference:+.2f} [")


def test_adapters_of_rounded_weights_by_bits(runs, tmp_path):
  own_weights = {"valid_loss": 8.0, "trained_on": "the model's weights"}
  variations = []
  for name, config, of_result in (
    ("q8", {"model.rounded_to": "Q8_0"}, {"valid_loss": 7.0}),
    ("q3", {"model.rounded_to": "rtn3"}, {"valid_loss": 7.5}),
    ("q3_fast", {"model.rounded_to": "rtn3", "optimizer.learning_rate": 0.1}, {"valid_loss": 9.0}),
    ("served", {"model.rounded_to": "rtn3"}, own_weights),
  ):
    variations.append(changed(runs / "lora1", tmp_path / name, config, of_result))
  text = report([*variations, runs / "lora1"], tmp_path / "r")
  section = text.split("## By bits of the base model's linear weights")[1].split("\n## ")[0]
  lines = [line.strip("|").split("|") for line in section.splitlines() if "|" in line]
  cells = [[cell.strip() for cell in line] for line in lines]
  own = result(runs, "lora1")["valid_loss"]
  assert [row[1:4] for row in cells[2:]] == [
    ["rtn3", "4", "8.000"],
    ["rtn3", "4", "7.500"],
    ["Q8_0", "8.5", "7.000"],
    ["", "", f"{own:.3f}"],
  ]
  assert cells[2][0] == "LoRA, rank 4, all linear, trained on the model's weights"
  assert cells[3][0] == cells[4][0] == "LoRA, rank 4, all linear, trained on the rounded weights"
  assert (tmp_path / "r.png").stat().st_size > 10_000


def test_a_rank_is_shown_at_its_best_learning_rate(runs, tmp_path):
  variations = {  # alpha / rank is the same in all of them
    "slow": ({"lora.rank": 64, "lora.alpha": 512.0, "optimizer.learning_rate": 1e-3}, 7.5),
    "fast": ({"lora.rank": 64, "lora.alpha": 512.0, "optimizer.learning_rate": 5e-3}, 9.5),
  }
  for name, (config, loss) in variations.items():
    changed(runs / "lora1", tmp_path / name, config, {"valid_loss": loss})
  text = report([*map(tmp_path.joinpath, variations), runs / "lora1"], tmp_path / "r")
  cells = rows(text, "By rank")
  assert [(rank, row["learning rate"]) for rank, row in cells.items()] == [
    ("4", "0.01"),
    ("64", "0.001"),
  ]
  assert cells["64"]["valid loss"] == "7.500"
  assert next(iter(rows(text, "Results"))).startswith("LoRA, rank 4")


def sweep_of_rates(runs, root):
  """Writes undecoded runs with the configs of the sweep of learning rates."""
  config = e2e_budgets.get_config("rates")
  config.seed = 1
  losses = iter(np.linspace(3, 2, 99))
  for number, changes in enumerate(e2e_budgets.sweep(config)):
    folder = root / str(number)
    folder.mkdir(parents=True)
    stored = apply(config, changes).to_dict()
    tokens = re.search("tokens=([0-9]+)", str(changes["model.folder"]))
    of_result = result(runs, "lora1") | {
      "method": stored["method"],
      "valid_loss": next(losses),
      "pretraining_tokens": 0 if "model.start" in changes else int(tokens[1]),
    }
    for name in ("scores", "intervals", "num_inputs"):
      del of_result[name]
    write_json(folder / "config.json", stored)
    write_json(folder / "result.json", of_result)
  return sorted(root.iterdir(), key=lambda path: int(path.name))


def test_a_sweep_of_learning_rates(runs, tmp_path):
  """The losses fall from run to run, so that each method's last learning rate is its best."""
  folders_of_rates = sweep_of_rates(runs, tmp_path / "rates")
  text = report(folders_of_rates, tmp_path / "r")
  table = rows(text, "By learning rate")
  assert len(table) == len(e2e_budgets.ARMS) * len(e2e_budgets.BASES)
  for cells in table.values():
    assert sum(cell.startswith("**") for cell in cells.values()) == 1
  best = table["LoRA, q,v, base of 2,000,000 tokens"]
  assert best["0.1"].startswith("**")
  assert best["0.001"] == ""
  assert table["full fine-tuning, base of 0 tokens"]["0.01"].startswith("**")
  assert "At an end of the learning rates that were tried: " in text
  assert "Table 3" not in text
  assert "BLEU" not in text
  assert (tmp_path / "r.png").stat().st_size > 10_000
  with pytest.raises(ValueError, match="none of the runs has decoded any"):
    report(folders_of_rates, tmp_path / "r", against=folders_of_rates[0])


def test_seeds_are_not_learning_rates(runs):
  assert by_rate(group_runs(read_runs(folders(runs))[0])) == {}


def test_labels_name_the_learning_rate_if_nothing_else_differs(runs, tmp_path):
  change = {"optimizer.learning_rate": 0.5}
  folder = changed(runs / "lora1", tmp_path / "r", change, {})
  labels = [
    group.label for group in group_runs(read_runs([runs / "lora1", folder, runs / "full"])[0])
  ]
  rate = configs.get_config().optimizer.learning_rate
  assert labels == [f"LoRA, rate {rate:g}", "LoRA, rate 0.5", "full fine-tuning"]


def test_methods_ignore_unused_settings(runs, tmp_path):
  folder = changed(runs / "full", tmp_path / "r", {"lora.rank": 99, "seed": 7}, {"seed": 7})
  groups = group_runs(read_runs([folder, runs / "full"])[0])
  assert [run.seed for run in groups[0].runs] == [1, 7]


def test_csv_and_plot(runs, tmp_path):
  report(folders(runs), tmp_path / "r")
  with (tmp_path / "r.csv").open(encoding="utf-8", newline="") as file:
    lines = list(csv.DictReader(file))
  groups = [row for row in lines if row["source"] == "runs"]
  assert groups[0]["run"] == "LoRA, rank 4"
  values = [result(runs, name)["valid_loss"] for name in ("lora1", "lora2")]
  assert float(groups[0]["valid_loss"]) == np.mean(values)
  assert float(groups[0]["valid_loss_deviation"]) == pytest.approx(np.std(values, ddof=1))
  interval = result(runs, "rank8")["intervals"]["nist"]
  assert [float(groups[1][f"nist_{end}"]) for end in ("low", "high")] == interval
  assert groups[0]["meteor"] == groups[0]["meteor_low"] == groups[1]["valid_loss_deviation"] == ""
  assert sum(row["source"] == "paper, Table 3" for row in lines) == 12
  assert {row["rank"] for row in lines if row["source"] == "paper, Table 18"} > {"1", "1024"}
  assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
  assert (tmp_path / "r.png").stat().st_size > 10_000


def test_the_command(runs, tmp_path, capsys):
  reports.main([*map(str, folders(runs, "lora1")), f"--out={tmp_path / 'r'}"])
  assert f"wrote {tmp_path / 'r'}.md" in capsys.readouterr().out
  with pytest.raises(SystemExit, match=r"error: .*is not the folder of a run"):
    reports.main([str(tmp_path)])


def test_tables_are_markdown(runs, tmp_path):
  text = report(folders(runs), tmp_path / "r")
  for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
    assert len({len(line) for line in block.splitlines()}) == 1
    assert len({line.count("|") for line in block.splitlines()}) == 1
  row = markdown([result(runs, "full")], E2E.metrics).splitlines()[-1]
  assert row.startswith("| GPT-2 mini, full fine-tuning |")


@pytest.mark.parametrize(
  ("pattern", "name"),
  [
    (configs.GPT2_LINEAR, "all linear"),
    (configs.QUERY_AND_VALUE, "q,v"),
    (r".*/mlp/up/kernel", "up"),
    (r"h_3/attn/query/kernel", r"h_3/attn/query/kernel"),
  ],
)
def test_targets_have_short_names(pattern, name):
  assert target(pattern) == name
