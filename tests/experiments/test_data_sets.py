"""The data sets other than E2E: their records, scores and floors, and runs on tiny files."""

import csv
import dataclasses
import importlib
import importlib.util
import json
import shutil
from typing import get_args

import numpy as np
import pytest

from experiments import evaluate, gpt2_e2e
from experiments import report as reports
from experiments.configs import gpt2_e2e as e2e_configs
from experiments.harness.config import read_config, replace_fields
from experiments.harness.launch import apply, single_run, sweep_runs
from experiments.harness.runs import read_runs
from experiments.harness.workdir import write_json
from experiments.nlg import e2e as nlg_e2e
from experiments.nlg.base import Base
from experiments.nlg.config import DataSet, E2EConfig, Texts
from experiments.nlg.e2e import decoded_inputs, examples_of, last_tokens
from experiments.nlg.generation import load_generator
from experiments.nlg.groups import group_runs
from experiments.nlg.tasks.dial import WORDS
from experiments.nlg.tasks.table import TASKS, title
from experiments.nlg.user_data import load_text
from experiments.report import report
from lora_jax.data.sets import addition, e2e, permuted
from lora_jax.metrics import data_to_text
from lora_jax.models.zoo import plan_causal_lm

from tests import tiny_text_sets, tiny_triples
from tests.test_layout import DATA_SETS
from tests.tiny_e2e import tiny_config, tiny_folder

REVERSED = (  # lines of E2E's format: the last one's price is in the text by another word
  ("name : Aromi | Type : pub", "Aromi is a pub ."),
  ("name : Cotto | price : cheap", "Cotto is cheap ."),
  ("name : Strada | price : cheap", "Strada costs little ."),
)
WRITERS = {
  "webnlg": tiny_triples.write_webnlg,
  "dart_dev": tiny_triples.write_dart,
  "samsum": tiny_text_sets.write_samsum,
  "wikisql": tiny_text_sets.write_wikisql,
  "mnli_text": tiny_text_sets.write_mnli_subset,
}


@pytest.fixture(scope="module", autouse=True)
def no_java_and_an_empty_cache(tmp_path_factory):
  """METEOR takes seconds to start."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("PATH", "")
    patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
    yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
  """The value of data.source by data set; splits that a writer leaves out are its test set."""
  root = tmp_path_factory.mktemp("sources")
  folders = {"addition": "embedded", "dial": "embedded"}
  for name in ("e2e_reversed", *WRITERS):
    (root / name).mkdir()
    folders[name] = str(root / name)
  for name, write in WRITERS.items():
    write(root / name)
  shutil.copy(root / "samsum" / "test.csv", root / "samsum" / "validation.csv")
  shutil.copy(root / "wikisql" / "test.jsonl", root / "wikisql" / "dev.jsonl")
  for split in ("train", "valid", "test"):
    lines = "".join(f"{context}||{text}\n" for context, text in REVERSED)
    (root / "e2e_reversed" / f"{split}.txt").write_text(lines, "utf-8")
  return folders


def texts_of(sources, name):
  return Texts("reference", sources[name], name, any_size=name in WRITERS)


def task_config(sources, name, workdir, **changes):
  """Returns the config of a tiny run: 2 training steps, two inputs, greedy."""
  fields = {f"data.{field}": x for field, x in dataclasses.asdict(texts_of(sources, name)).items()}
  decoded = 0 if name == "dial" else 2
  decoding = {"num_inputs": decoded, "num_beams": 1, "max_new_tokens": 4}
  sizes = {"num_train_records": 2, "num_valid_records": 1, "batch_size": 2}
  sizes |= dict.fromkeys(("max_length", "row_length", "loss_length"), 128)
  fields |= {f"decoding.{field}": value for field, value in decoding.items()}
  fields |= {f"data.{field}": value for field, value in sizes.items()}
  fields |= {"optimizer.warmup_steps": 0, "fit.num_train_steps": 2, "data.num_epochs": 2}
  return apply(tiny_config(workdir), fields | changes)


def test_every_data_set_has_a_task_and_a_command():
  assert list(TASKS) == list(get_args(DataSet))
  assert set(TASKS) == {*DATA_SETS, "e2e", "dart_dev"}
  assert all(metrics for name, (_, _, _, metrics, *_) in TASKS.items() if name != "dial")


@pytest.mark.parametrize("name", DATA_SETS)
def test_the_config_file_of_a_data_set(name):
  module = importlib.import_module(f"experiments.configs.{name}")
  variants = ("smollm2",) if name in ("wikisql", "samsum", "mnli_text") else ("mini", "smollm2")
  for variant in variants:
    config = module.get_config(variant)
    assert config.data.name == read_config(E2EConfig, config).data.name == name
    run = single_run(config, config, ())
    assert run.workdir == f"runs/{name}/{variant}"
    for swept in sweep_runs(module, config, config, ()):
      assert read_config(E2EConfig, swept).workdir.startswith(f"runs/{name}/sweep/")
  with pytest.raises(ValueError, match=r"variant must be one of .*smollm2"):
    module.get_config("huge")


def test_the_papers_recipes():
  webnlg, dart = (
    importlib.import_module(f"experiments.configs.{name}").get_config("medium")
    for name in ("webnlg", "dart")
  )
  usual = e2e_configs.get_config("medium")
  assert webnlg.decoding.length_penalty == dart.decoding.length_penalty == 0.8
  assert webnlg.optimizer == usual.optimizer
  assert (dart.optimizer.weight_decay, dart.optimizer.label_smoothing, dart.lora.dropout) == (
    0,
  ) * 3
  assert dart.optimizer.learning_rate == usual.optimizer.learning_rate
  wikisql = importlib.import_module("experiments.configs.wikisql").get_config("medium")
  assert (wikisql.data.batch_size, wikisql.data.num_epochs) == (128, 2)
  assert wikisql.optimizer.weight_decay == 0.1
  assert wikisql.data.loss_length >= 170  # tokens of the longest query, which may not be cut


@pytest.mark.parametrize("variant", ["mini", "smollm2"])
def test_a_warmup_fits_every_size_of_a_sweep(variant):
  """A hundred examples are 6 steps: 20 of warmup would be all of them."""
  config = importlib.import_module("experiments.configs.e2e_reversed").get_config(variant)
  assert config.optimizer.warmup_steps == 0
  assert 0 < config.optimizer.warmup_share < 1


def test_titles_say_what_is_missing(sources):
  assert title(texts_of(sources, "webnlg")) == "WebNLG 2017, an excerpt"
  assert title(Texts("reference", "x", "dart_dev")) == "DART-dev"
  assert title(Texts("reference", "x", "wikisql")) == "WikiSQL, rebuilt columns"


def test_inputs_are_in_a_fixed_random_order_and_e2es_in_the_files(sources):
  texts = texts_of(sources, "samsum")
  whole = decoded_inputs(texts, "test", 5)
  assert decoded_inputs(texts, "test", 3) == whole[:3]
  in_file = e2e.grouped(TASKS["samsum"].load(texts, "test"))
  assert sorted(whole) == sorted(in_file)
  assert whole != in_file
  of_e2e = decoded_inputs(Texts("reference", sources["e2e_reversed"]), "test", 3)
  assert [(group.context, *group.references) for group in of_e2e] == list(REVERSED)


def test_prompts_that_are_too_long_lose_their_start_and_are_counted(capsys):
  assert last_tokens([[1, 2, 3], [4]], 2) == [[2, 3], [4]]
  assert "1 of 2 prompts are longer than 2 tokens, and lose their start" in capsys.readouterr().out


def test_splits_that_are_parts_of_one_file_have_nothing_in_common(sources):
  load = TASKS["mnli_text"].load
  texts = texts_of(sources, "mnli_text")
  train, valid, test = ([*load(texts, split)] for split in ("train", "valid", "test"))
  assert (len(train), len(valid), len(test)) == (3, 1, 4)
  assert test == train + valid  # of these files, which are the same
  sums = Texts("reference", "embedded", "addition")
  assert [*TASKS["addition"].load(sums, "test")] == addition.read("test", 1000)
  train, valid = (
    {
      record.completion
      for record in TASKS["dial"].load(Texts("reference", "embedded", "dial"), split)
    }
    for split in ("train", "valid")
  )
  assert train
  assert valid
  assert not train & valid
  assert max(len(piece.split()) for piece in train) == WORDS


@pytest.fixture(scope="module")
def floors(sources, tmp_path_factory):
  """The floors' folders and results by data set, on all inputs."""
  root = tmp_path_factory.mktemp("floors")
  counts = {"webnlg": 3, "samsum": 5, "mnli_text": 4, "e2e_reversed": 3}
  return {
    name: (
      root / name,
      gpt2_e2e.run(
        task_config(sources, name, root / name, **{"method": "floor", "decoding.num_inputs": count})
      ),
    )
    for name, count in counts.items()
  }


def test_floors_need_no_model(floors):
  scores = {name: result["scores"] for name, (_, result) in floors.items()}
  assert scores["mnli_text"]["accuracy"] == 50  # two of four are contradictions
  assert scores["e2e_reversed"]["exact"] == pytest.approx(100 * 2 / 3)
  assert scores["e2e_reversed"]["slots"] == pytest.approx(100 * 5 / 6)
  if importlib.util.find_spec("rouge_score") is None:
    assert "pip install lora-jax[metrics]" in scores["samsum"]["missing"]["rouge1"]
  else:
    assert 0 < scores["samsum"]["rouge2"] < scores["samsum"]["rouge1"] < 100
  for folder, result in floors.values():
    assert len((folder / "predictions.txt").read_text("utf-8").splitlines()) == result["num_inputs"]
    assert result["valid_loss"] is None
    assert result["data"].endswith(("an excerpt", "E2E reversed"))
    assert "without a model" in gpt2_e2e.report(folder, result)


def test_webnlgs_parts_are_scored_from_the_same_texts(floors, sources):
  folder, result = floors["webnlg"]
  inputs = decoded_inputs(texts_of(sources, "webnlg"), "test", 3)
  texts = (folder / "predictions.txt").read_text("utf-8").splitlines()
  words = {"Dtown river Bee .", "Eve É genre Jazz .", "Fay party None ."}
  assert set(texts) == words, "the floor copies the triples"
  seen = [group.context.startswith("Dtown") for group in inputs]
  for part, members in {"seen": seen, "unseen": [not x for x in seen]}.items():
    references = [group.references for group, x in zip(inputs, members, strict=True) if x]
    chosen = [text for text, x in zip(texts, members, strict=True) if x]
    (expected,) = data_to_text.measure([chosen], references)
    for name, columns in expected.statistics.items():
      assert result["scores"][f"{name}_{part}"] == pytest.approx(columns.score())
  assert result["scores"]["ter_seen"] != result["scores"]["ter_unseen"]
  assert result["scores"]["meteor"] is result["scores"]["meteor_seen"] is None
  low, high = result["intervals"]["mean_ter_unseen"]
  assert low <= result["scores"]["mean_ter_unseen"] <= high


def test_the_dial_permutes_tokens_after_encoding(sources, tmp_path):
  lengths = {"data.max_length": 256, "data.row_length": 256}
  config = read_config(E2EConfig, task_config(sources, "dial", tmp_path, **lengths))
  model = plan_causal_lm(tiny_folder())
  base = Base(model, load_text(model, False), "separator", None)
  plain = examples_of(config, base, "valid")
  moved = examples_of(replace_fields(config, {"data.percent": 50.0}), base, "valid")
  ids = permuted.permutation(8192, 50, 0, {base.end_of_text})
  for before, after in zip(plain, moved, strict=True):
    assert np.array_equal(after.tokens, ids[before.tokens])
    assert np.array_equal(after.targets, ids[before.targets])
    assert len(after.targets) == len(after.tokens)  # every token is supervised, and the end
    assert after.tokens[0] == after.targets[-1] == base.end_of_text
    assert (after.tokens != before.tokens).mean() > 0.2


# ---- reports -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(floors, tmp_path_factory):
  """Folders of runs: the floors', and runs of LoRA with texts of their own."""
  root = tmp_path_factory.mktemp("stored")
  folders = {name: folder for name, (folder, _) in floors.items()}
  for name, source, accuracy in (
    ("poor", "mnli_text", [0.0, 60.0]),
    ("good", "mnli_text", [60.0, 100.0]),
  ):
    folder = root / name
    shutil.copytree(floors[source][0], folder)
    config = json.loads((folder / "config.json").read_text())
    rank = 4 if name == "poor" else 8
    write_json(
      folder / "config.json", config | {"method": "lora", "lora": config["lora"] | {"rank": rank}}
    )
    result = json.loads((folder / "result.json").read_text())
    changes = {"method": "lora", "variant": "mini", "valid_loss": 1.0, "num_train_records": 2}
    of_scores = {
      "scores": {"accuracy": accuracy[1], "missing": {}},
      "intervals": {"accuracy": accuracy},
    }
    write_json(folder / "result.json", result | changes | of_scores)
    folders[name] = folder
  return folders


def test_data_sets_never_share_a_table(stored, tmp_path):
  text = report(list(stored.values()), tmp_path / "r")
  heads = [line for line in text.splitlines() if line.startswith("# ")]
  assert heads == [
    "# WebNLG 2017, an excerpt: 1 runs in 1 groups",
    "# SAMSum, an excerpt: 1 runs in 1 groups",
    "# MNLI, subset of 10,000, an excerpt: 3 runs in 3 groups",
    "# E2E reversed: 1 runs in 1 groups",
  ]
  for block in text.split("\n# ")[1:]:
    columns = [name for name in ("BLEU", "ROUGE-1", "accuracy", "slots") if f" {name} " in block]
    assert len(columns) == 1
  assert "The paper's" not in text  # has no results on excerpts
  names = {path.name for path in tmp_path.iterdir()}
  plots = {"r-webnlg-excerpt.png", "r-samsum-excerpt.png", "r-mnli_text-excerpt.png"}
  assert names == {"r.md", "r.csv", "r-e2e_reversed.png", *plots}


def test_scores_that_reach_the_floor_are_marked(stored, tmp_path):
  text = report([stored[name] for name in ("mnli_text", "poor", "good")], tmp_path / "r")
  lines = {
    line.split("|")[1].strip(): line
    for line in text.split("## Over")[1].split("## Against")[0].splitlines()
    if "|" in line
  }
  assert lines["LoRA, rank 4"].rstrip("| ").endswith("[0.00, 60.00]⌊")
  assert lines["LoRA, rank 8"].rstrip("| ").endswith("[60.00, 100.00]")
  assert "⌊" not in lines["floor"]
  assert "the training set's most frequent label" in text
  against = text.split("## Against LoRA, rank")[1]
  assert "| floor " in against
  with pytest.raises(ValueError, match="must be one of the runs that decoded texts"):
    report([stored["poor"]], tmp_path / "r", against=stored["good"])


def test_a_floor_on_other_inputs_marks_nothing(stored, tmp_path):
  for name in ("mnli_text", "poor"):
    shutil.copytree(stored[name], tmp_path / name)
  config = json.loads((tmp_path / "mnli_text" / "config.json").read_text())
  fewer = config | {"decoding": config["decoding"] | {"num_inputs": 2}}
  write_json(tmp_path / "mnli_text" / "config.json", fewer)
  folders = [tmp_path / "mnli_text", tmp_path / "poor"]
  text = report(folders, tmp_path / "r")
  assert "[0.00, 60.00]⌊" not in text
  assert "Without a floor on the same inputs: LoRA." in text
  text = report([*folders, stored["mnli_text"]], tmp_path / "r")  # a floor that comes second
  assert "[0.00, 60.00]⌊" in text
  assert "Without a floor" not in text


def test_excerpts_have_names_of_their_own_in_the_csv_file(stored, tmp_path):
  report([stored["webnlg"], stored["e2e_reversed"]], tmp_path / "r")
  rows = csv.DictReader((tmp_path / "r.csv").read_text().splitlines())
  assert [row["data"] for row in rows] == ["webnlg-excerpt", "e2e_reversed"]


def test_a_smaller_error_rate_is_above_the_floor(stored):
  (floor,), _ = read_runs([stored["webnlg"]])
  level = floor.result["scores"]["mean_ter_seen"]
  for interval, reaches in (([0.0, level - 1], False), ([level - 2, level + 1], True)):
    run = floor._replace(result=floor.result | {"intervals": {"mean_ter_seen": interval}})
    assert reports._reaches(run, "mean_ter_seen", floor) is reaches


def test_the_papers_table_is_that_of_the_data_set(stored, tmp_path):
  folder = tmp_path / "whole"
  shutil.copytree(stored["samsum"], folder)
  config = json.loads((folder / "config.json").read_text())
  write_json(folder / "config.json", config | {"data": config["data"] | {"any_size": False}})
  text = report([folder], tmp_path / "r")
  assert "## The paper's Table 4" in text
  assert "53.8" in text
  assert "Table 3" not in text
  lines = (tmp_path / "r.csv").read_text().splitlines()
  assert sum(line.startswith('"paper, Table 4"') for line in lines) == 8


def test_a_run_stored_without_newer_fields_is_one_of_e2e_with_their_defaults(stored, tmp_path):
  config = json.loads((stored["poor"] / "config.json").read_text())
  names = [field.name for field in dataclasses.fields(Texts)]
  data = {name: value for name, value in config["data"].items() if name not in names}
  data |= {"form": "reference", "source": "embedded"}
  new = config | {"data": data | {"name": "e2e", "any_size": False}}
  old = config | {"data": data}
  for section, name in (("lora", "tokens"), ("model", "rounded_to"), ("decoding", "num_shots")):
    old[section] = {field: value for field, value in config[section].items() if field != name}
    assert old[section] != config[section]
  for seed, stored_config in ((1, old), (2, new)):
    shutil.copytree(stored["poor"], tmp_path / str(seed))
    write_json(tmp_path / str(seed) / "config.json", stored_config)
    result = json.loads((stored["poor"] / "result.json").read_text())
    write_json(tmp_path / str(seed) / "result.json", result | {"seed": seed})
  (group,) = group_runs(read_runs([tmp_path / "1", tmp_path / "2"])[0])
  assert len(group.runs) == 2


# ---- whole runs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
  "name",
  [
    "dial",
    *(
      pytest.param(name, marks=pytest.mark.long)
      for name in (
        "webnlg",
        "dart_dev",
        "samsum",
        "wikisql",
        "mnli_text",
        "e2e_reversed",
        "addition",
      )
    ),
  ],
)
def test_a_run_on_a_data_set(sources, tmp_path, name):
  if name == "samsum":
    pytest.importorskip("rouge_score")
  config = task_config(sources, name, tmp_path / "run")
  result = gpt2_e2e.run(config)
  assert result["data"] == title(texts_of(sources, name))
  assert result["num_train_records"] == 2
  assert np.isfinite(result["valid_loss"])
  if name == "dial":
    assert "scores" not in result
    with pytest.raises(ValueError, match="permuted vocabulary"):
      load_generator(tmp_path / "run")
    return
  assert len((tmp_path / "run" / "predictions.txt").read_text("utf-8").splitlines()) == 2
  assert result["scores"][TASKS[name].metrics[0]] is not None
  again = evaluate.evaluate_run(tmp_path / "run", {"num_inputs": 1})
  assert again["data"] == result["data"]
  text = report([tmp_path / "run"], tmp_path / "r")
  assert text.startswith(f"# {result['data']}: 1 runs")
  assert len(load_generator(tmp_path / "run").encode(["a"])) == 1


def test_a_base_model_is_decoded_and_scored(sources, tmp_path, monkeypatch):
  """A query counts whatever the case of its keywords; the search is not tested here."""
  config = task_config(
    sources, "wikisql", tmp_path / "run", **{"method": "frozen_base", "decoding.num_inputs": 8}
  )
  answers = {group.context: group.references[0] for group in _inputs(config)}
  monkeypatch.setattr(
    nlg_e2e,
    "generate",
    lambda config, base, params, contexts, mesh: [
      answers[context].replace("SELECT", "select") if i else "SELECT"
      for i, context in enumerate(contexts)
    ],
  )
  result = gpt2_e2e.run(config)
  assert result["scores"]["logical_form"] == 100 * 7 / 8
  assert result["intervals"]["logical_form"][1] == 100


def _inputs(config):
  return nlg_e2e.inputs_of(read_config(E2EConfig, config))
