"""Bad inputs of the experiments: values of configs, flags of commands, and files of runs.

A row builds a config or reads a folder's JSON; none loads a model.
"""

import functools
import json
import math
from pathlib import Path
from typing import Any

from experiments import e2e_template, evaluate, export, generate, glue_report
from experiments import report as reports
from experiments.classification.config import GlueConfig
from experiments.configs import e2e_budgets, finetune, glue, gpt2_e2e, gpt2_pretrain
from experiments.gpt2_e2e import floor
from experiments.harness import launch
from experiments.harness.config import check_attention, read_config, replace_fields
from experiments.nlg.config import E2EConfig, FinetuneConfig, PretrainConfig, TemplateConfig, Texts
from experiments.nlg.e2e import decoded_inputs, measure_parts
from experiments.nlg.finetuned import loading_options
from experiments.nlg.tasks.table import TASKS
from experiments.nlg.text_files import write_with
from lora_jax.training.mesh import make_mesh

from tests.bad_inputs import BadInput

KINDS: dict[str, tuple[Any, Any]] = {
  "e2e": (E2EConfig, gpt2_e2e.get_config),
  "finetune": (FinetuneConfig, finetune.get_config),
  "glue": (GlueConfig, glue.get_config),
  "pretrain": (PretrainConfig, gpt2_pretrain.get_config),
}
NAN, INFINITE = math.nan, math.inf


@functools.cache
def config_of(experiment: str) -> Any:
  kind, make = KINDS[experiment]
  return read_config(kind, make())


def shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) < 60 else f"{text[:50]}... ({len(text)} characters)"


def field(experiment: str, name: str, value: Any, *words: str) -> BadInput:
  """Returns the row of one field's value; the message must name both, and hold `words`."""
  return fields(experiment, {name: value}, name, *words)


def fields(experiment: str, changes: dict[str, Any], *words: str) -> BadInput:
  text = ", ".join(f"{name}={shown(value)}" for name, value in changes.items())
  return BadInput(
    f"{experiment}: {text}",
    lambda folder: replace_fields(config_of(experiment), changes),
    words,
  )


def steps(experiment: str, changes: dict[str, Any], *words: str) -> BadInput:
  """Returns the row of a training that is too short for its config: such a config can be read."""
  row = fields(experiment, changes, *words)

  def call(folder: Path) -> None:
    config = row.call(folder)
    assert isinstance(config, E2EConfig | PretrainConfig)
    config.check_steps()

  return row._replace(call=call)


OPTIMIZER = [
  field("e2e", "optimizer.learning_rate", -1e-3, "finite number in (0, inf)", "got -0.001"),
  field("finetune", "optimizer.learning_rate", 0.0, "finite number in (0, inf)", "got 0.0"),
  field("glue", "optimizer.learning_rate", NAN, "finite number in (0, inf)", "got nan"),
  field("pretrain", "optimizer.learning_rate", INFINITE, "finite number in (0, inf)", "got inf"),
  field("e2e", "optimizer.learning_rate", 10**400, "finite number", "bits"),
  field("e2e", "optimizer.learning_rate", True, "a number", "got True"),
  field("e2e", "optimizer.weight_decay", -0.1, "[0, inf)", "got -0.1"),
  field("e2e", "optimizer.eps", -1e-8, "(0, inf)", "got -1e-08"),
  field("e2e", "optimizer.eps", 0.0, "(0, inf)", "got 0.0"),
  field("finetune", "optimizer.clip_norm", -1.0, "[0, inf)", "got -1.0"),
  field("finetune", "optimizer.clip_norm", NAN, "[0, inf)", "got nan"),
  field("finetune", "optimizer.warmup_steps", -10, "an integer in [0, ", "got -10"),
  field("glue", "optimizer.warmup_ratio", 1.5, "[0, 1]", "got 1.5"),
  field("glue", "optimizer.warmup_ratio", -0.1, "[0, 1]", "got -0.1"),
  field("e2e", "optimizer.b1", 2.0, "[0, 1)", "got 2.0"),
  field("e2e", "optimizer.b2", 1.0, "[0, 1)", "got 1.0"),
  field("e2e", "optimizer.label_smoothing", 1.0, "[0, 1)", "got 1.0"),
  field("e2e", "optimizer.label_smoothing", -0.1, "[0, 1)", "got -0.1"),
  field("e2e", "optimizer.schedule", "linaer", "one of linear, cosine, constant", "'linaer'"),
]

LORA = [
  field("e2e", "lora.rank", 0, "an integer in [1, ", "got 0"),
  field("e2e", "lora.rank", -4, "an integer in [1, ", "got -4"),
  field("finetune", "lora.rank", 10**9, "an integer in [1, ", "got 1000000000"),
  field("e2e", "lora.alpha", 0.0, "(0, inf)", "got 0.0"),
  field("e2e", "lora.alpha", NAN, "(0, inf)", "got nan"),
  field("e2e", "lora.dropout", 1.0, "[0, 1)", "got 1.0"),
  field("e2e", "lora.dropout", -0.5, "[0, 1)", "got -0.5"),
  field("e2e", "lora.init", "zeros", "one of kaiming_uniform, gaussian, original_code", "'zeros'"),
  field("finetune", "lora.target", "(attn", "'(attn' is not a regular expression"),
  field("finetune", "lora.target", "", "must not be empty"),
  field("finetune", "lora.target", 5, "a string", "got 5"),
  field("glue", "model.head", "[", "'[' is not a regular expression"),
  field("glue", "lora.start", "gs://bucket/run", "gs:// address", "expected a local path"),
  field("finetune", "method", 3, "must be a string", "got 3"),
]

MODEL = [
  field("e2e", "model.dtype", "float23", "one of float32, bfloat16, float16", "'float23'"),
  field("e2e", "model.dtype", "auto", "one of float32, bfloat16, float16", "'auto'"),
  field("finetune", "model.param_dtype", "int4", "one of auto, float32, bfloat16", "'int4'"),
  field("glue", "model.dtype", "float64", "one of float32, bfloat16, float16", "'float64'"),
  field("pretrain", "model.dtype", "", "one of auto, float32", "got ''"),
  field("finetune", "model.remat", "everything", "'', nothing_saveable", "got 'everything'"),
  field("e2e", "model.attention", "flash", "one of compact, xla, cudnn", "got 'flash'"),
  field("e2e", "model.start", "scratch", "one of pretrained, random", "got 'scratch'"),
  field("e2e", "model.scan_layers", 1, "true or false", "got 1"),
  field("e2e", "model.folder", "a\0b", "without NUL", r"'a\x00b'"),
  field("finetune", "model.folder", "hf://org/model", "model.folder", "name, 'org/model'"),
  field("e2e", "model.folder", "https://huggingface.co/org/model/tree/main", "'org/model'"),
  field("glue", "model.folder", "gs://bucket/model", "gs:// address", "expected a local path"),
  field("finetune", "model.folder", "~/model", "a path in full", "$HOME/model"),
  field("glue", "model.hidden_dropout", 1.0, "[0, 1)", "got 1.0"),
  field("glue", "model.attention_dropout", NAN, "[0, 1)", "got nan"),
  field("glue", "model.head_dropout", -1.0, "[0, 1)", "got -1.0"),
  field("pretrain", "model.embed_dim", 0, "an integer in [1, 65_536]", "got 0"),
  field("pretrain", "model.num_layers", 10**9, "an integer in [1, 1_024]", "got 1000000000"),
  field("pretrain", "model.num_heads", -2, "an integer in [1, ", "got -2"),
  field("pretrain", "model.num_heads", 3, "3 must divide model.embed_dim=256"),
  field("pretrain", "model.num_positions", 10**8, "an integer in [1, 1_048_576]"),
  BadInput(
    "e2e: cuDNN on a CPU",
    lambda folder: check_attention("cudnn", "bfloat16"),
    ("model.attention=cudnn", "needs an NVIDIA GPU", "a CPU", "Choose compact or xla"),
  ),
  BadInput(
    "finetune: cuDNN on a CPU, before the model is planned",
    lambda folder: loading_options(
      replace_fields(config_of("finetune"), {"model.attention": "cudnn"}), make_mesh()
    ),
    ("model.attention=cudnn", "needs an NVIDIA GPU"),
  ),
]

DATA = [
  field("e2e", "data.form", "csv", "one of reference, official", "got 'csv'"),
  field("e2e", "data.source", "", "must not be empty"),
  field("e2e", "data.source", "s3://bucket/e2e", "s3:// address"),
  field("e2e", "data.num_train_records", -1, "an integer in [0, ", "got -1"),
  field("e2e", "data.num_valid_records", -500, "an integer in [0, ", "got -500"),
  field("glue", "data.num_train_records", -1, "an integer in [0, ", "got -1"),
  field("e2e", "data.num_epochs", 0, "an integer in [1, 10_000]", "got 0"),
  field("finetune", "data.num_epochs", 10**9, "an integer in [1, 10_000]", "got 1000000000"),
  field("glue", "fit.num_epochs", 0, "an integer in [1, 10_000]", "got 0"),
  field("e2e", "data.batch_size", 0, "an integer in [1, 1_048_576]", "got 0"),
  field("finetune", "data.batch_size", 10**9, "an integer in [1, 1_048_576]"),
  field("glue", "data.eval_batch_size", 0, "an integer in [1, ", "got 0"),
  field("e2e", "data.batch_size", 10**6, "192,000,000 tokens, expected at most 16,777,216"),
  field("pretrain", "data.batch_size", 10**5, "25,600,000 tokens, expected at most 16,777,216"),
  field("e2e", "data.row_length", 10**8, "an integer in [1, 1_048_576]", "got 100000000"),
  field("finetune", "data.row_length", -1, "an integer in [0, 1_048_576]", "got -1"),
  field("e2e", "data.loss_length", 193, "data.loss_length=193 must be at most data.row_length=192"),
  field("finetune", "data.file", "gs://bucket/mine.jsonl", "gs:// address"),
  field("finetune", "data.file", "x" * 300, "at most 255 bytes"),
  field("finetune", "data.valid_file", "~/valid.jsonl", "$HOME/valid.jsonl"),
  field("finetune", "data.valid_share", 1.0, "(0, 1)", "got 1.0"),
  field("finetune", "data.valid_share", -0.05, "(0, 1)", "got -0.05"),
  field("finetune", "data.valid_share", NAN, "(0, 1)", "got nan"),
  field("finetune", "data.chat_template", "a\0", "without NUL"),
  field("finetune", "data.today", "26 July", "a date such as 2024-07-26", "'26 July'"),
  field("finetune", "data.ignored_fields", "id", "a list", "got 'id'"),
  field("finetune", "data.ignored_fields", (1,), "data.ignored_fields[0] must be a string"),
  field("glue", "data.suite", "superglue", "one of glue, super_glue", "got 'superglue'"),
  field("glue", "data.task", "colla", "one of cola, sst2", "data.suite=glue", "got 'colla'"),
  fields("glue", {"data.suite": "super_glue"}, "data.task", "boolq", "got 'cola'"),
  field("glue", "data.tuning_share", 0.0, "(0, 1)", "got 0.0"),
  field("glue", "data.row_lengths", (), "increasing numbers of tokens", "()"),
  field("glue", "data.row_lengths", (64, 32), "increasing numbers of tokens", "(64, 32)"),
  fields("glue", {"data.row_lengths": (0, 32)}, "data.row_lengths[0]", "[1, 1_048_576]", "got 0"),
  field("glue", "data.window", 0, "an integer in [1, ", "got 0"),
  field("glue", "data.tfds_dir", "gs://tfds", "gs:// address"),
  field("pretrain", "data.folder", "gs://text", "gs:// address"),
  field("pretrain", "data.prepared", "", "must not be empty"),
  field("pretrain", "data.vocab_size", 256, "[257, 65_536]", "got 256"),
  field("pretrain", "data.vocab_size", 100_000, "[257, 65_536]", "got 100000"),
  field("pretrain", "data.held_out_every", 1, "[2, ", "got 1"),
  field("pretrain", "data.num_valid_rows", 0, "[1, ", "got 0"),
  field("pretrain", "data.num_train_tokens", 0, "[1, ", "got 0"),
  field("pretrain", "data.row_length", 512, "512 must be at most model.num_positions = 256"),
  BadInput(
    "e2e: more inputs than there are",
    lambda folder: decoded_inputs(Texts("reference", "embedded"), "test", 631),
    ("decoding.num_inputs=631", "630 distinct inputs of the test split"),
  ),
]


def in_files(name: str, split: Any, count: int, *words: str, error: Any = ValueError) -> BadInput:
  """Returns the row of decoded inputs from an empty folder, or of a data set without files."""

  def call(folder: Path) -> None:
    source = "embedded" if name in ("addition", "dial") else str(folder)
    decoded_inputs(Texts("reference", source, name), split, count)  # pyright: ignore

  return BadInput(f"{name}: {count} inputs of {split}", call, words, error)


def without_floor(changes: dict[str, Any], *words: str) -> BadInput:
  return BadInput(
    f"floor: {changes}",
    lambda folder: floor(replace_fields(config_of("e2e"), changes), folder),
    words,
  )


DATA_SETS = [
  field("e2e", "data.name", "webnlg2", "one of e2e, webnlg, dart", "got 'webnlg2'"),
  field("e2e", "data.name", "webnlg", "data.source=embedded", "do not come with lora_jax"),
  field("e2e", "data.any_size", True, "has no effect with data.name=e2e"),
  field("e2e", "data.percent", 5.0, "data.percent=5", "data.name is e2e"),
  field("e2e", "data.percent", 101.0, "finite number in [0, 100]", "got 101.0"),
  field("e2e", "data.max_length", 100, "an integer in [128, 1_048_576]", "got 100"),
  fields("e2e", {"data.name": "addition", "data.form": "official"}, "data.name is addition"),
  fields("e2e", {"data.name": "addition", "data.source": "x"}, "reads no files"),
  fields("e2e", {"data.name": "addition", "data.prompt": "chat"}, "for data.name=e2e"),
  fields("e2e", {"data.name": "addition", "decoding.tokenize": True}, "decoding.tokenize=True"),
  fields("e2e", {"data.name": "dial"}, "decoding.num_inputs=630", "decodes nothing"),
  fields(
    "e2e",
    {"data.name": "dial", "decoding.num_inputs": 0, "data.shuffled_completions": True},
    "data.shuffled_completions=True has no effect",
  ),
  in_files(
    "samsum", "test", 1, "the SAMSum file test.csv", "there is none", error=FileNotFoundError
  ),
  in_files("dart", "train", 1, "train.jsonl", "data.name=dart_dev", error=FileNotFoundError),
  in_files("dart_dev", "train", 1, "DART 1.1.1", "dev.jsonl", error=FileNotFoundError),
  in_files("mnli_text", "test", 1, "the MNLI, subset", "dev.json", error=FileNotFoundError),
  in_files("e2e_reversed", "test", 1, "the E2E file test.txt", error=FileNotFoundError),
  in_files("addition", "test", 1001, "=1001 must be at most the 1000 distinct inputs"),
  in_files("addition", "dev", 1, "split must be one of train, valid, test", "'dev'"),
  BadInput(
    "dial: a folder without text files",
    lambda folder: TASKS["dial"].load(Texts("reference", str(folder), "dial"), "train"),
    ("expected text files (*.txt",),
    FileNotFoundError,
  ),
  BadInput(
    "dial: texts to score",
    lambda folder: measure_parts([["a"]], [], Texts("reference", "embedded", "dial"), "test"),
    ("Wikipedia, permuted vocabulary is measured by its validation loss",),
  ),
  without_floor({"method": "floor"}, "data.name=e2e has no method=floor", "webnlg, dart"),
  without_floor(
    {"data.name": "e2e_reversed", "decoding.num_inputs": 0}, "decoding.num_inputs is 0"
  ),
]

FIT = [
  field("e2e", "fit.num_train_steps", -1, "[0, ", "got -1"),
  field("e2e", "fit.eval_every_steps", 0, "[1, ", "got 0"),
  field("glue", "fit.eval_every_steps", -1, "[0, ", "got -1"),
  field("e2e", "fit.checkpoint_every_steps", 0, "[1, ", "got 0"),
  field("e2e", "fit.checkpoint_every_steps", 1.5, "an integer", "got 1.5"),
  field("e2e", "fit.log_every_steps", -10, "[1, ", "got -10"),
  field("e2e", "fit.accumulation_steps", 0, "[1, ", "got 0"),
  fields("e2e", {"fit.accumulation_steps": 3}, "data.batch_size=8 must be a multiple", "= 3"),
  fields("glue", {"mesh.data": 3}, "data.batch_size=32 must be a multiple", "mesh.data", "= 3"),
  field("e2e", "fit.loss_chunk", 10**8, "[0, 1_048_576]", "got 100000000"),
  field("e2e", "fit.loss_chunk", 50, "fit.loss_chunk=50 must divide data.loss_length=112"),
  field("pretrain", "fit.loss_chunk", 7, "fit.loss_chunk=7 must divide data.row_length=256"),
  fields(
    "finetune",
    {"data.row_length": 128, "fit.loss_chunk": 129},
    "fit.loss_chunk=129 must be at most data.row_length = 128",
  ),
  field("finetune", "fit.keep", "first", "one of best, last", "got 'first'"),
  steps("e2e", {"fit.num_train_steps": 5}, "optimizer.warmup_steps=20", "the 5 steps"),
  steps("pretrain", {"data.num_train_tokens": 200_000}, "optimizer.warmup_steps=100", "24 steps"),
  field("e2e", "mesh.data", 0, "[1, ", "got 0"),
  field("e2e", "mesh.fsdp", -1, "[1, ", "got -1"),
  field("e2e", "mesh.tensor", "2", "an integer", "got '2'"),
  field("e2e", "keep_freed_memory", "yes", "true or false", "got 'yes'"),
]

RUN = [
  field("e2e", "seed", -1, "[0, 4_294_967_295]", "got -1"),
  field("finetune", "seed", 2**32, "[0, 4_294_967_295]", "got 4294967296"),
  field("glue", "seed", 10**40, "[0, 4_294_967_295]", "an integer of 133 bits"),
  field("pretrain", "seed", 1.0, "an integer", "got 1.0"),
  field("e2e", "workdir", "gs://bucket/run", "gs:// address"),
  field("e2e", "workdir", "~/run", "$HOME/run"),
  field("e2e", "workdir", "a\0b", "without NUL"),
  field("e2e", "workdir", f"runs/{'x' * 256}", "at most 255 bytes"),
  field("e2e", "variant", "../../elsewhere", "the run's folder", "'../../elsewhere'"),
  field("glue", "variant", "..", "the run's folder", "'..'"),
  field("e2e", "experiment", "glue", "a config of 'glue'", "python -m experiments.glue"),
  field("e2e", "colour", "red", "no field 'colour'"),
  BadInput("template: no folder", lambda folder: TemplateConfig(workdir=""), ("workdir", "empty")),
]

DECODING = [
  field("e2e", "decoding.num_beams", 0, "[1, 1_024]", "got 0"),
  field("e2e", "decoding.num_beams", 10**6, "[1, 1_024]", "got 1000000"),
  field("e2e", "decoding.length_penalty", NAN, "finite number in [-100, 100]", "got nan"),
  field("e2e", "decoding.no_repeat_ngram_size", -1, "[0, ", "got -1"),
  field("e2e", "decoding.max_new_tokens", 0, "[1, 65_536]", "got 0"),
  field("e2e", "decoding.max_new_tokens", 10**7, "[1, 65_536]", "got 10000000"),
  field("e2e", "decoding.scoring", "paper", "one of transformers, reference", "got 'paper'"),
  field("e2e", "decoding.split", "dev", "one of train, valid, test", "got 'dev'"),
  field("e2e", "decoding.num_inputs", -1, "[0, ", "got -1"),
  field("e2e", "decoding.batch_size", 0, "[1, ", "got 0"),
  fields(
    "e2e",
    {"decoding.num_beams": 1000, "decoding.max_new_tokens": 60_000},
    "decoding.num_beams=1000",
    "960,000,000 tokens at once, expected at most 16,777,216",
  ),
  field("finetune", "samples.count", -1, "[0, 10_000]", "got -1"),
  field("finetune", "samples.max_new_tokens", 0, "[1, 65_536]", "got 0"),
  field("finetune", "samples.max_new_tokens", 10**7, "[1, 65_536]", "got 10000000"),
  BadInput(
    "e2e: texts longer than the model's positions",
    lambda folder: replace_fields(
      config_of("e2e"), {"decoding.max_new_tokens": 256}
    ).check_positions(256),
    ("1 + decoding.max_new_tokens=257 must be at most the model's positions = 256",),
  ),
  BadInput(
    "finetune: rows longer than the model's positions",
    lambda folder: replace_fields(config_of("finetune"), {"data.row_length": 512}).check_positions(
      256, 256
    ),
    ("data.row_length=512 must be at most the model's longest sequence = 256",),
  ),
  BadInput(
    "finetune: answers longer than a sliding window",
    lambda folder: config_of("finetune").check_positions(256, 64),
    ("1 + samples.max_new_tokens=65 must be at most", "= 64"),
  ),
]


# ---- flags of commands, which name a folder ------------------------------------------------


def finished(folder: Path, **changes: Any) -> Path:
  """Writes the two files of a finished run of `gpt2_e2e` that commands read first."""
  stored = gpt2_e2e.get_config().to_dict()
  (folder / "config.json").write_text(json.dumps(stored | changes))
  result = {"method": "lora", "seed": 110, "valid_loss": 1.0, "num_train_records": 1}
  (folder / "result.json").write_text(json.dumps(result | {"trainable_parameters": 1}))
  return folder


def evaluated(name: str, value: Any, *words: str) -> BadInput:
  def call(folder: Path) -> None:
    run = finished(make_folder(folder / "run"))
    try:
      evaluate.evaluate_run(run, {name: value})
    finally:
      assert sorted(path.name for path in folder.iterdir()) == ["run"]
      assert not (run / "evaluations").exists()

  return BadInput(f"evaluate: --{name}={shown(value)}", call, words)


EVALUATE = [
  evaluated("scoring", "../../x", "decoding.scoring must be one of", "'../../x'"),
  evaluated("split", "../x", "decoding.split must be one of", "'../x'"),
  evaluated("checkpoint", "best/..", "fit.keep must be one of best, last"),
  evaluated("num_beams", 0, "decoding.num_beams", "[1, 1_024]", "got 0"),
  evaluated("length_penalty", NAN, "decoding.length_penalty", "finite number", "got nan"),
  evaluated("max_new_tokens", 10**7, "decoding.max_new_tokens", "got 10000000"),
  evaluated("no_repeat_ngram_size", -3, "decoding.no_repeat_ngram_size", "got -3"),
  evaluated("num_inputs", -1, "decoding.num_inputs", "got -1"),
  evaluated("num_inputs", 0, "--num_inputs=630"),
]


EVALUATE += [
  BadInput(
    f"evaluate: {name}",
    functools.partial(lambda folder, value: evaluate.evaluate_run(value, {}), value=value),
    words,
  )
  for name, value, words in (
    ("an empty folder", "", ("the folder of a run must not be empty",)),
    ("a folder that is a bucket's", "gs://bucket/run", ("the folder of a run", "gs:// address")),
    ("a folder with NUL", "a\0b", ("the folder of a run", "without NUL")),
  )
]


EVALUATE.append(
  BadInput(
    "evaluate: a floor",
    lambda folder: evaluate.evaluate_run(finished(folder, method="floor"), {}),
    ("is a run of floor, which has no model",),
  )
)


def reported(out: str, *words: str, error: type[Exception] = ValueError) -> BadInput:
  return BadInput(
    f"report: --out={shown(out)}",
    lambda folder: reports.report([finished(folder)], out.replace("FOLDER", str(folder))),
    words,
    error,
  )


def make_folder(path: Path) -> Path:
  path.mkdir()
  return path


def exported_below_a_file(folder: Path) -> None:
  (folder / "file").touch()
  write_with({}, folder / "file" / "export", lambda path: None)


def exported(out: str, *words: str, flags: tuple[str, ...] = ()) -> BadInput:
  """Returns the row of a run's export to a place or with flags that do not fit."""
  return BadInput(
    f"export: {' '.join((out, *flags))}",
    lambda folder: export.main([str(finished(folder)), out.replace("FOLDER", str(folder)), *flags]),
    words,
    SystemExit,
  )


REPORTS = [
  exported("FOLDER/new", "a file named *.gguf", "got", flags=("--format=gguf",)),
  exported("FOLDER/x.gguf", "--format=mlx writes a folder", flags=("--format=mlx",)),
  exported("FOLDER/x.gguf", "PEFT's format", "--format=gguf too", flags=("--server",)),
  exported("gs://bucket/x.gguf", "gs:// address", "local path"),
  BadInput("export: below a file", exported_below_a_file, ("cannot be a folder", "file is a file")),
  reported("", "--out must not be empty"),
  reported("a\0b", "--out must be a path without NUL"),
  reported("gs://bucket/report", "--out", "gs:// address"),
  reported("~/report", "--out", "$HOME/report"),
  reported("FOLDER/config.json/report", "--out", "config.json is a file, expected a folder"),
  BadInput(
    "report: a folder that is a bucket's",
    lambda folder: reports.report(["gs://bucket/run"], str(folder / "report")),
    ("gs:// address", "expected a local path"),
  ),
  BadInput(
    "report: --against='' ",
    lambda folder: reports.report([finished(folder)], str(folder / "report"), ""),
    ("--against must not be empty",),
  ),
  BadInput(
    "report: the folder is not a run's",
    lambda folder: reports.report([folder], str(folder / "report")),
    ("is not the folder of a run",),
    FileNotFoundError,
  ),
  BadInput(
    "glue_report: a run of another experiment",
    lambda folder: glue_report.report([finished(folder)]),
    ("is a run of gpt2_e2e, expected glue",),
  ),
  BadInput(
    "glue_report: --out is a folder",
    lambda folder: glue_report.main(
      [str(finished(folder)), f"--out={make_folder(folder / 'out')}"]
    ),
    ("--out", "out is a folder, expected a file"),
    SystemExit,
  ),
  BadInput(
    "e2e_template: --workdir=''",
    lambda folder: e2e_template.main(["--workdir="]),
    ("workdir must not be empty",),
    SystemExit,
  ),
  BadInput(
    "e2e_template: --workdir is a bucket's",
    lambda folder: e2e_template.main(["--workdir=gs://bucket/run"]),
    ("workdir", "gs:// address"),
    SystemExit,
  ),
]


def generated(name: str, arguments: tuple[str, ...], *words: str, **changes: Any) -> BadInput:
  return BadInput(
    f"generate: {name}",
    lambda folder: generate.main([str(finished(folder, **changes)), *arguments]),
    words,
    SystemExit,
  )


def unfinished(folder: Path) -> Path:
  (finished(folder) / "result.json").unlink()
  return folder


GENERATE = [
  generated("negative temperature", ("Hi", "--temperature=-1"), "--temperature", "[0, 100]"),
  generated("temperature nan", ("Hi", "--temperature=nan"), "--temperature", "got nan"),
  generated("temperature inf", ("Hi", "--temperature=inf"), "--temperature", "got inf"),
  generated("tiny temperature", ("Hi", "--temperature=1e-38"), "--temperature must be 0", "1e-6"),
  generated("top_p 0", ("Hi", "--top_p=0", "--temperature=1"), "--top_p", "(0, 1]", "got 0.0"),
  generated("top_p 1.5", ("Hi", "--top_p=1.5", "--temperature=1"), "--top_p", "got 1.5"),
  generated("top_p of greedy decoding", ("Hi", "--top_p=0.5"), "--top_p=0.5 has no effect"),
  generated("no new tokens", ("Hi", "--max_new_tokens=0"), "--max_new_tokens", "[1, 65_536]"),
  generated("endless", ("Hi", "--max_new_tokens=10000000"), "--max_new_tokens", "got 10000000"),
  generated("negative seed", ("Hi", "--seed=-1"), "--seed", "[0, 4_294_967_295]", "got -1"),
  generated("no batch", ("Hi", "--batch_size=0"), "--batch_size", "[1, ", "got 0"),
  generated("an empty prompt", ("Hi", " "), "prompt 2 must not be empty"),
  generated("a prompt that is not text", ("\udcff",), "prompt 1 must be text in UTF-8"),
  generated("a chat with GPT-2", ("Hi", "--chat"), "has no chat template; leave out --chat"),
  generated(
    "a classifier", ("Hi",), "is a run of glue, which generates no text", experiment="glue"
  ),
  generated("a floor", ("Hi",), "is a run of floor, which has no model", method="floor"),
  generated("no experiment", ("Hi",), "is a run of [1]", experiment=[1]),
  BadInput(
    "generate: an empty folder",
    lambda folder: generate.main(["", "Hi"]),
    ("the folder of a run must not be empty",),
    SystemExit,
  ),
  BadInput(
    "generate: a folder that is a bucket's",
    lambda folder: generate.main(["s3://bucket/run", "Hi"]),
    ("s3:// address",),
    SystemExit,
  ),
  BadInput(
    "generate: a folder that is not a run's",
    lambda folder: generate.main([str(folder), "Hi"]),
    ("is not the folder of a run",),
    SystemExit,
  ),
  BadInput(
    "generate: a run that is not finished",
    lambda folder: generate.main([str(unfinished(folder)), "Hi"]),
    ("is not finished: rerun its command",),
    SystemExit,
  ),
]


# ---- sweeps and variants -------------------------------------------------------------------


def swept(make: Any, module: Any, changes: dict[str, Any], *words: str) -> BadInput:
  def call(folder: Path) -> None:
    config = launch.apply(make(), changes)
    launch.sweep_runs(module, config, make(), set(changes))

  text = ", ".join(f"{name}={shown(value)}" for name, value in changes.items())
  return BadInput(f"sweep of {module.__name__}: {text}", call, words)


def sharded(shard: str) -> BadInput:
  return BadInput(
    f"--sweep_shard={shard}",
    lambda folder: launch._part([], shard),
    ("--sweep_shard must be i/n with 0 <= i < n", repr(shard)),
  )


SWEEPS = [
  swept(gpt2_e2e.get_config, gpt2_e2e, {"lora.rank": 0}, "lora.rank", "[1, ", "got 0"),
  swept(gpt2_e2e.get_config, gpt2_e2e, {"lora.alpha": NAN}, "lora.alpha", "got nan"),
  swept(
    *(finetune.get_config, finetune, {"optimizer.learning_rate": NAN}),
    *("optimizer.learning_rate", "got nan"),
  ),
  swept(
    *(gpt2_pretrain.get_config, gpt2_pretrain, {"data.num_train_tokens": -5}),
    *("data.num_train_tokens", "got -5"),
  ),
  swept(glue.get_config, glue, {"data.task": "colla"}, "data.task", "got 'colla'"),
  swept(e2e_budgets.get_config, e2e_budgets, {"seed": -1}, "seed", "got -1"),
  sharded("4/4"),
  sharded("0/0"),
  sharded("-1/2"),
  sharded("1"),
  sharded("a/b"),
  sharded(""),
  BadInput("e2e: variant", lambda folder: gpt2_e2e.get_config("huge"), ("mini, small", "'huge'")),
  BadInput(
    "budgets: variant", lambda folder: e2e_budgets.get_config("all"), (":rates or :seeds", "'all'")
  ),
  BadInput("glue: an unknown model", lambda folder: glue.get_config("t5,cola"), ("MODEL",)),
  BadInput("glue: an unknown task", lambda folder: glue.get_config("minilm,x"), ("TASK",)),
  BadInput(
    "glue: a recipe of minilm",
    lambda folder: glue.get_config("minilm,cola,paper"),
    ("minilm has no recipes",),
  ),
]

ROWS = [
  *OPTIMIZER,
  *LORA,
  *MODEL,
  *DATA,
  *DATA_SETS,
  *FIT,
  *RUN,
  *DECODING,
  *EVALUATE,
  *GENERATE,
  *REPORTS,
  *SWEEPS,
]
