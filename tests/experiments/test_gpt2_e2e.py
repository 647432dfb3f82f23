"""The E2E experiment from end to end, on a tiny model and real lines."""

import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import gpt2_e2e
from experiments.configs import e2e_budgets
from experiments.configs import gpt2_e2e as configs
from experiments.harness.config import read_config
from experiments.harness.launch import apply
from experiments.harness.workdir import read_run
from experiments.nlg import e2e as nlg_e2e
from experiments.nlg.base import load_base, model_folder
from experiments.nlg.config import E2EConfig
from experiments.nlg.restore import load_run
from lora_jax.data.sets import e2e
from lora_jax.decoding import Hypotheses
from lora_jax.models.text.tokenizer import load_tokenizer
from lora_jax.training.checkpoint import Checkpoints
from lora_jax.training.mesh import make_mesh
from lora_jax.trees import leaves_with_path

from tests.tiny_e2e import EMBEDDED, tiny_config, tiny_folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "lora"
  return workdir, gpt2_e2e.run(tiny_config(workdir))


def test_a_run_writes_its_results(finished):
  workdir, result = finished
  names = {path.name for path in workdir.glob("[!.]*")}
  assert names == {
    *("adapter", "checkpoints", "config.json", "examples.json", "metrics.jsonl", "model.json"),
    *("predictions.txt", "result.json", "tensorboard"),
  }
  assert result == json.loads((workdir / "result.json").read_text())
  assert len((workdir / "predictions.txt").read_text().splitlines()) == 4
  assert result["num_inputs"] == 4
  assert result["trainable_parameters"] == 2 * 4 * (4 * (32 + 32) + 2 * (32 + 128))
  assert result["base_parameters"] == 32 * (8192 + 256) + 2 * (12 * 32**2 + 13 * 32) + 64
  assert result["num_train_records"] == 60
  assert set(result["scores"]) >= {"bleu", "nist", "meteor", "rouge_l", "cider"}
  losses = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [m["step"] for m in losses if "train/loss" in m] == list(
    range(1, result["num_train_steps"] + 1)
  )
  valid = {m["step"]: m["valid/loss"] for m in losses if "valid/loss" in m}
  assert result["valid_loss"] == min(valid.values()) == valid[result["best_step"]]


def test_the_report_shows_row_samples_and_paths(finished):
  workdir, result = finished
  text = gpt2_e2e.report(workdir, result)
  title, _, head, _, row = text.splitlines()[:5]
  assert title == result["data"] == "E2E NLG Challenge"
  assert all(name in head for name in ("BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr", "examples"))
  assert f"{result['trainable_parameters']:,}" in row
  assert text.count("\ninput ") == text.count("\ngenerated ") == 4
  for path in re.findall(r"^wrote +(.*)$", text, flags=re.MULTILINE):
    assert (workdir / path.split("/")[-1]).exists()
  assert f"{100 * result['trainable_parameters'] / result['base_parameters']:.2f} %" in text


def test_a_finished_run_is_not_repeated(finished, capsys):
  workdir, result = finished
  before = (workdir / "result.json").stat().st_mtime_ns
  assert gpt2_e2e.run(tiny_config(workdir)) == result
  assert (workdir / "result.json").stat().st_mtime_ns == before
  assert "is finished" in capsys.readouterr().out


def test_other_decoding_is_repeated_without_training(finished, tmp_path, monkeypatch):
  shutil.copytree(finished[0], tmp_path / "run")
  metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
  monkeypatch.setattr(
    gpt2_e2e,
    "decode_and_score",
    lambda config, base, params, mesh: {"decoded": config.decoding.num_inputs},
  )
  config = tiny_config(tmp_path / "run")
  config.decoding.num_inputs = 2
  result = gpt2_e2e.run(config)
  assert result["decoded"] == 2
  for name in ("train_seconds", "train_tokens", "best_step", "valid_loss", "base"):
    assert result[name] == finished[1][name]
  assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics
  assert read_run(E2EConfig, tmp_path / "run").decoding.num_inputs == 2


def test_a_finished_adapter_generates_the_runs_predictions(finished):
  workdir, _ = finished
  run = load_run(workdir)
  assert repr(run).startswith(f"Finished({workdir}, Base(GPT2, ")
  assert len(repr(run)) < len(str(workdir)) + 100
  contexts = [group.context for group in e2e.grouped(e2e.read("test"))[:4]]
  predicted = (workdir / "predictions.txt").read_text().splitlines()
  assert run.generate(contexts) == predicted
  # merged weights, not the base model's
  query = run.params["h_0"]["attn"]["query"]["kernel"]
  assert np.abs(query - run.base.params["h_0"]["attn"]["query"]["kernel"]).max() > 0


def test_a_text_is_one_line_up_to_an_empty_one(finished, monkeypatch):
  run = load_run(finished[0])
  ids = run.base.tokenizer.encode(" One\nline\r\nand more .\n\nAnother .").ids

  def search(*args, **kwargs):
    tokens = np.array([[ids]])
    none = np.zeros((1, 1))
    return Hypotheses(tokens, none.astype(int) + len(ids), none, none.astype(bool), np.zeros(1))

  monkeypatch.setattr(nlg_e2e, "beam_search", search)
  assert run.generate(["name : The Punter"]) == ["One line and more ."]


def test_the_checkpoints_hold_nothing_of_the_base(finished):
  workdir, result = finished
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    last = checkpoints.steps()[-1]
    assert last == result["num_train_steps"]
    shapes = checkpoints._about(last)["shapes"]
  assert not any("kernel" in name and "lora_" not in name for name in shapes)
  size = sum(p.stat().st_size for p in (workdir / "checkpoints" / str(last)).rglob("*"))
  assert size < 4 * result["base_parameters"]


@pytest.mark.parametrize(
  "changes",
  [
    {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
    pytest.param(
      {"method": "full_finetuning", "model.start": "random", "fit.keep": "last"},
      marks=pytest.mark.long,
    ),
    {"method": "frozen_base"},
  ],
  ids=lambda changes: next(iter(changes)) + str(next(iter(changes.values()))),
)
def test_other_methods_and_meshes(finished, tmp_path, changes):
  _, usual = finished
  config = apply(tiny_config(tmp_path / "run"), {**changes, "decoding.num_inputs": 0})
  result = gpt2_e2e.run(config)
  if "mesh.data" in changes:
    assert result["valid_loss"] == pytest.approx(usual["valid_loss"], rel=1e-4)
    assert result["trainable_parameters"] == usual["trainable_parameters"]
  elif config.method == "frozen_base":
    assert result["trainable_parameters"] == 0
    assert not (tmp_path / "run" / "checkpoints").exists()
  else:
    assert result["trainable_parameters"] == result["base_parameters"]
    assert result["valid_loss"] == result["last_valid_loss"]
  assert "scores" not in result
  assert gpt2_e2e.report(tmp_path / "run", result)


def test_the_papers_recipe_on_a_small_model(tmp_path):
  config = configs.get_config("medium")
  config.workdir = str(tmp_path / "run")
  config.model.folder = str(tiny_folder())
  config.data.update({"num_train_records": 16, "num_valid_records": 8, "num_epochs": 1})
  config.decoding.num_inputs = 0
  result = gpt2_e2e.run(config)
  assert result["num_train_steps"] == 2
  assert result["trainable_parameters"] == 2 * 2 * 4 * (32 + 32)


def test_variants_and_sweeps():
  counts = {"small": 147_456, "medium": 393_216, "large": 737_280}
  widths = {"small": (12, 768), "medium": (24, 1024), "large": (36, 1280)}
  for variant, (layers, width) in widths.items():
    config = configs.get_config(variant)
    assert 2 * layers * config.lora.rank * 2 * width == counts[variant]
    assert list(configs.sweep(config))[-1] == {"lora.rank": width, "lora.alpha": 32.0}
  with pytest.raises(ValueError, match="variant must be one of mini, small, medium, large"):
    configs.get_config("huge")
  for name in ("rates", "seeds"):
    config = e2e_budgets.get_config(name)
    for changes in e2e_budgets.sweep(config):
      apply(config, changes)  # raises for a field that there is not


def _fails(config, message, error=ValueError):
  with pytest.raises(error, match=message):
    gpt2_e2e.run(config)


def test_bad_input(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  config = tiny_config(tmp_path / "a")
  _fails(apply(config, {"experiment": "glue"}), "config of 'glue'.*python -m experiments.glue")
  _fails(apply(config, {"method": "lora_minus"}), "one of lora, .*full_finetuning, frozen_base")
  _fails(apply(config, {"optimizer.schedule": "step"}), "optimizer.schedule must be one of linear")
  _fails(apply(config, {"lora.target": ".*/q"}), "matches none of .* did you mean ")
  _fails(apply(config, {"lora.rank": 64}), "rank 64 is larger than the smaller dimension")
  _fails(
    apply(config, {"data.num_train_records": 99_999}), "=99999 must be at most the 42061 records"
  )
  _fails(apply(config, {"data.row_length": 32, "data.loss_length": 32}), "row_length of at least")
  with pytest.raises(ValueError, match=r"the config has no field 'lora\.rnk'"):
    apply(config, {"lora.rnk": 2})


def test_bad_data_files(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  folder = tmp_path / "data"
  folder.mkdir()
  lines = [f"{r.context}||{r.completion}\n" for r in e2e.read("test")[:70]]
  for name in ("train.txt", "valid.txt", "test.txt"):
    (folder / name).write_text("".join(lines), "utf-8")
  config = apply(tiny_config(tmp_path / "a"), {"data.source": str(folder)})
  (folder / "train.txt").write_text("".join([*lines[:2], "no separator\n"]), "utf-8")
  _fails(config, "train.txt:3: expected 'context\\|\\|completion', got 'no separator'")
  (folder / "train.txt").write_text("")
  _fails(config, "train.txt: expected at least one record, got none")
  (folder / "train.txt").unlink()
  _fails(config, "expected the E2E file train.txt", FileNotFoundError)


def test_bad_models(tmp_path):
  config, folder = tiny_config(tmp_path / "a"), tmp_path / "model"
  folder.mkdir()
  for path in tiny_folder().iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
  config.model.folder = str(folder)
  (folder / "model.safetensors").unlink()
  _fails(config, "the weights are missing", FileNotFoundError)
  (folder / "model.safetensors").write_bytes((tiny_folder() / "model.safetensors").read_bytes())
  written = json.loads((folder / "tokenizer.json").read_text())
  words = list(written["model"]["vocab"])[:-2000]
  written["model"]["vocab"] = {word: i for i, word in enumerate(words)}
  known = set(words)
  written["model"]["merges"] = [
    pair for pair in written["model"]["merges"] if {*pair, "".join(pair)} <= known
  ]
  (folder / "tokenizer.json").write_text(json.dumps(written))
  _fails(config, "do not belong together")


FULL_DISK = """
import resource, sys
from experiments import gpt2_e2e
from experiments.harness.launch import explained
from lora_jax.training.checkpoint import Checkpoints
from tests.tiny_e2e import tiny_config

save, saved = Checkpoints.save, []

def save_with_little_room(*args):
  saved.append(1)
  if len(saved) == 2:  # no file may be longer than this from now on
    resource.setrlimit(resource.RLIMIT_FSIZE, (12288, 12288))
  save(*args)

Checkpoints.save = save_with_little_room
config = tiny_config(sys.argv[1])
config.model.folder = sys.argv[2]
with explained():
  gpt2_e2e.run(config)
"""


@pytest.mark.long  # tests/training and harness/test_workdir.py fill up disks in `make test`
def test_a_disk_that_fills_up_during_a_run_loses_nothing(finished, tmp_path):
  """The run stops with a remedy; the same command later gives the uninterrupted result."""
  workdir = tmp_path / "run"
  # -B: Python puts a .pyc file that it could write in part alone in place of the whole one
  command = [sys.executable, "-B", "-c", FULL_DISK, workdir, tiny_folder()]
  run = subprocess.run(command, capture_output=True, text=True)
  assert run.returncode == 1, run.stderr
  assert "error: the checkpoint of step 3 could not be written" in run.stderr, run.stderr
  assert "Those of steps [2] are untouched. Make room" in run.stderr
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    assert checkpoints.steps() == [2]
  result, undisturbed = gpt2_e2e.run(tiny_config(workdir)), finished[1]
  assert result["valid_loss"] == undisturbed["valid_loss"]
  assert result["scores"] == undisturbed["scores"]


def test_the_embedded_base_is_the_default(tmp_path):
  config = tiny_config(tmp_path)
  config.model.folder = ""
  assert model_folder(read_config(E2EConfig, config)) == EMBEDDED
  assert load_tokenizer(EMBEDDED, 8192).get_vocab_size() == 8192


def test_the_sharding_rules_cover_the_model():
  config = tiny_config("unused")
  mesh = make_mesh(2, 2, 2)
  base = load_base(read_config(E2EConfig, config), mesh)
  specs = {path: leaf.sharding.spec for path, leaf in leaves_with_path(base.params)}
  assert specs["h_0/attn/query/kernel"] == jax.P("fsdp", "tensor")
  assert specs["h_1/mlp/down/kernel"] == jax.P("tensor", "fsdp")
  split = [leaf for leaf in jax.tree.leaves(base.params) if not leaf.is_fully_replicated]
  assert sum(x.size for x in split) > 0.99 * sum(x.size for x in jax.tree.leaves(base.params))


def test_a_runs_config_is_read_back(finished):
  workdir, _ = finished
  config = read_run(E2EConfig, workdir)
  assert config.lora.rank == 4
  assert config.workdir == str(workdir)
  with pytest.raises(FileNotFoundError, match="not the folder of a run"):
    read_run(E2EConfig, workdir / "checkpoints")
