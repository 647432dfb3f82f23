"""GLUE and SuperGLUE (Hu et al. 2021, Tables 2, 9 and 10).

    python -m experiments.glue --config=experiments/configs/glue.py:MODEL,TASK[,RECIPE] \\
      --config.data.source=FOLDER                     # of the original files: FOLDER/CoLA/train.tsv
    ... --config.method=full_finetuning               # or head_only
    ... --config.data.tuning=True --sweep             # learning rates, on part of train
    ... --config.optimizer.tuned_in=FOLDER --sweep    # methods and seeds at the best of these

MODEL is `minilm`, from the package of the extra `minilm`, for CPUs; or one of the paper's, from the
hub or a folder (`--config.model.folder=`): `roberta_base`, `roberta_large`, `deberta_xxl`. TASK is
cola, sst2, mrpc, stsb, rte, wnli, qnli, qqp, mnli; or of SuperGLUE boolq, cb, copa, multirc,
record, super_rte, wic, wsc. RECIPE, for the paper's models: `paper` follows its tables, `scripts`
its code, `dagger` the rows of RoBERTa large with a dagger. docs/glue.md has the expected scores and
times.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments.classification.config import GlueConfig
from experiments.configs import Config
from experiments.configs.method_settings import add_method_settings
from experiments.harness.config import read_config, with_pattern
from experiments.harness.methods import METHODS, multiples, names
from experiments.harness.workdir import read_result, stored_config
from lora_jax.data.sets import glue, superglue

QUERY_AND_VALUE = r".*/attn/(query|value)/kernel"
TUNED_RATE = 1e-3  # each method tries multiples of it, by harness/methods.py
PAPER_TASKS = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
FROM_MNLI = ("mrpc", "rte", "stsb")
FOLDERS = {
  "minilm": "",  # the package's folder
  "roberta_base": "FacebookAI/roberta-base",
  "roberta_large": "FacebookAI/roberta-large",
  "deberta_xxl": "microsoft/deberta-v2-xxlarge",
}


class Recipe(NamedTuple):
  """A column of the paper's Tables 9 and 10."""

  batch_size: int
  num_epochs: int
  learning_rate: float
  max_length: int


def _table(*rows: tuple[float, ...]) -> dict[str, Recipe]:
  """Returns the recipe of each task from the rows of a table."""
  batch, epochs, rates, lengths = rows
  return {
    task: Recipe(int(batch[i]), int(epochs[i]), rates[i], int(lengths[i]))
    for i, task in enumerate(PAPER_TASKS)
  }


PAPER = {  # Tables 9 and 10
  "roberta_base": _table(
    (16, 16, 16, 32, 32, 16, 32, 16),
    (30, 60, 30, 80, 25, 25, 80, 40),
    (5e-4, 5e-4, 4e-4, 4e-4, 4e-4, 5e-4, 5e-4, 4e-4),
    (512,) * 8,
  ),
  "roberta_large": _table(
    (4, 4, 4, 4, 4, 4, 8, 8),
    (10, 10, 20, 20, 10, 20, 20, 30),
    (3e-4, 4e-4, 3e-4, 2e-4, 2e-4, 3e-4, 4e-4, 2e-4),
    (128, 128, 512, 128, 512, 512, 512, 512),
  ),
  "deberta_xxl": _table(
    (8, 8, 32, 4, 6, 8, 4, 4),
    (5, 16, 30, 10, 8, 11, 11, 10),
    (1e-4, 6e-5, 2e-4, 1e-4, 1e-4, 1e-4, 2e-4, 2e-4),
    (256, 128, 128, 64, 512, 320, 320, 128),
  ),
}
DAGGER = _table(  # Table 9, the rows of RoBERTa large with a dagger: not initialized from MNLI
  (4,) * 8,
  (10, 10, 20, 20, 10, 20, 20, 10),
  (3e-4, 4e-4, 3e-4, 2e-4, 2e-4, 3e-4, 4e-4, 2e-4),
  (128,) * 8,
)
SCRIPTS: dict[str, dict[str, dict[str, float]]] = {  # values of the code's scripts that differ
  "roberta_base": {},
  "roberta_large": {
    "sst2": {"batch_size": 8, "max_length": 512},
    "cola": {"learning_rate": 3e-4},  # collapses, by the code's issue 149; 2e-4 does not
    "stsb": {"batch_size": 4, "num_epochs": 10, "learning_rate": 3e-4, "max_length": 128},
  },
  "deberta_xxl": {"cola": {"learning_rate": 1.3e-4}, "rte": {"learning_rate": 2.6e-4}},
}
RANK_AND_ALPHA = {  # (paper, scripts)
  "roberta_base": ((8, 8.0), (8, 16.0)),  # the released adapters need 16 (issue 151)
  "roberta_large": ((8, 16.0), (8, 16.0)),
  "deberta_xxl": ((8, 8.0), (16, 32.0)),  # the paper's count of 4.7 M is rank 16's
}
DEBERTA = {  # Table 10 and the scripts: (weight decay, dropout of the head, warmup steps)
  "mnli": (0.0, 0.15, 1000),
  "sst2": (0.01, 0.0, 1000),
  "mrpc": (0.01, 0.0, 0),  # 0: a tenth of the steps, in the script as in the paper
  "cola": (0.0, 0.1, 100),
  "qnli": (0.01, 0.1, 500),
  "qqp": (0.01, 0.2, 10000),
  "rte": (0.01, 0.2, 50),
  "stsb": (0.1, 0.2, 100),
}


def get_config(variant: str = "minilm,cola") -> Config:
  """Returns the config of a variant, `MODEL,TASK` or `MODEL,TASK,RECIPE`."""
  model, task, recipe = _parts(variant)
  config: Config = ConfigDict()
  config.experiment = "glue"
  config.variant = variant
  config.workdir = ""  # "" is runs/glue/<variant and what differs from this file>
  config.seed = 0  # of the head, A and B, the order of the data and dropout; the scripts have 0
  config.keep_freed_memory = True  # on CPUs: faster, and more memory
  config.method = "lora"  # of harness/methods.py: full_finetuning, head_only, ...

  config.model = ConfigDict()
  config.model.name = model
  config.model.folder = FOLDERS[model]  # a folder, or a hub repository
  config.model.dtype = "float32"  # of the computation; bfloat16 on GPUs and TPUs
  config.model.param_dtype = "float32"  # of the frozen weights
  config.model.scan_layers = False  # True compiles deep models faster
  config.model.remat = ""  # a policy such as nothing_saveable: less memory, more time
  config.model.hidden_dropout = 0.1  # the models' own dropout, only in training
  config.model.attention_dropout = 0.1
  config.model.head_dropout = 0.1
  # Fully trained with every method: everything outside the encoder. BERT's pooler counts as part
  # of the head, as DeBERTa's does in the paper's code; RoBERTa has none.
  config.model.head = r"(pooler|head)/.*"

  config.lora = ConfigDict()
  config.lora.rank = 8
  config.lora.alpha = 16.0
  config.lora.dropout = 0.0
  config.lora.target = QUERY_AND_VALUE
  config.lora.init = "kaiming_uniform"  # A random, B zero; see gpt2_e2e.py for the others
  config.lora.start = ""  # the folder of a finished run, whose A and B are the initial ones

  add_method_settings(config)  # of methods other than LoRA: method_settings.py

  config.data = ConfigDict()
  config.data.suite = "glue" if task in glue.TASKS else "super_glue"
  config.data.task = task.removeprefix("super_")
  config.data.source = ""  # the folder of the benchmark's original files; or tfds
  config.data.tfds_dir = ""  # where TFDS keeps what it prepares; "" is its default
  config.data.skip_malformed = task == "qqp"  # QQP's files have malformed lines
  config.data.any_size = False  # True accepts files with another number of rows than published
  config.data.tuning = False  # True evaluates on a part of train, and trains on the rest
  config.data.tuning_share = 0.1
  config.data.num_train_records = 0  # the first ones; 0 is all
  config.data.batch_size = 32  # examples; in the scripts per device, of 8 (in Table 9 too?)
  config.data.eval_batch_size = 64
  config.data.row_lengths = (32, 64, 128)  # tokens that batches are padded to; the last truncates
  config.data.window = 50  # batches that are sorted by length together; 1, the paper's, is none

  config.optimizer = ConfigDict()
  config.optimizer.learning_rate = 1e-3
  config.optimizer.tuned_in = ""  # for --sweep: the folder of the tuning sweep
  config.optimizer.weight_decay = 0.1  # as in RoBERTa's scripts; not of biases
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.999
  config.optimizer.eps = 1e-8  # this and clip_norm are defaults of the scripts' Trainer
  config.optimizer.schedule = "linear"  # to 0 after the warmup; or cosine, or constant
  config.optimizer.warmup_ratio = 0.06  # of the steps; 0 uses warmup_steps
  config.optimizer.warmup_steps = 0
  config.optimizer.clip_norm = 1.0  # of the gradient; 0 disables clipping

  config.fit = ConfigDict()
  config.fit.num_epochs = 10
  config.fit.eval_every_steps = 0  # 0 is every epoch
  config.fit.checkpoint_every_steps = 1_000_000  # in addition to one after each evaluation
  config.fit.checkpoint_every_seconds = 300.0  # at a line of the log; 0 saves by steps only
  config.fit.log_every_steps = 50
  config.fit.accumulation_steps = 1

  config.mesh = ConfigDict()
  config.mesh.data = 1
  config.mesh.fsdp = 1
  config.mesh.tensor = 1

  config.distributed = ConfigDict()  # several processes that do one run together: docs/scale.md
  config.distributed.coordinator_address = ""  # HOST:PORT of process 0; auto is what JAX detects
  config.distributed.num_processes = 0  # 0 is what JAX detects
  config.distributed.process_id = -1  # of this process; -1 is what JAX detects

  if model == "minilm":
    _minilm(config, task)
  else:
    _paper(config, model, task, recipe)
  return config


def _parts(variant: str) -> tuple[str, str, str]:
  model, task, recipe, *rest = (*variant.split(","), "", "")
  if any(rest) or (recipe and model == "minilm"):
    raise ValueError(
      f"expected glue.py:MODEL,TASK[,RECIPE], got {variant!r}; minilm has no recipes"
    )
  recipe = recipe or "paper"
  super_tasks = ["super_rte" if name == "rte" else name for name in superglue.TASKS]
  for name, value, known in (
    ("MODEL", model, FOLDERS),
    ("TASK", task, (*glue.TASKS, *super_tasks)),
    ("RECIPE", recipe, ("paper", "scripts", "dagger")),
  ):
    if value not in known:
      raise ValueError(
        f"expected glue.py:MODEL,TASK[,RECIPE], got {variant!r}: {name} must be one of "
        f"{', '.join(known)}"
      )
  if recipe == "dagger" and model != "roberta_large":
    raise ValueError(f"{variant!r}: only roberta_large has rows with a dagger")
  return model, task, recipe


MINILM = {  # epochs, examples, row lengths that hold the task's texts with little padding
  "cola": (3, 0, (16, 48)),
  "mrpc": (2, 0, (48, 80, 128)),
  "rte": (2, 0, (64, 128)),
  "sst2": (1, 8000, (16, 32, 80)),
}


def _minilm(config: Config, task: str) -> None:
  """Sets budgets for 2 CPU cores; docs/glue.md has the times."""
  epochs, records, lengths = MINILM.get(task, (2, 8000, (32, 64, 128)))
  config.model.update({"hidden_dropout": 0.0, "attention_dropout": 0.0})  # for speed
  config.fit.num_epochs = epochs
  config.data.num_train_records = records
  config.data.row_lengths = lengths
  config.optimizer.weight_decay = 0.01


def _paper(config: Config, model: str, task: str, recipe: str) -> None:
  """Sets the recipe of the paper's Tables 9 and 10, or of its code's scripts.

  Tasks without a recipe use RTE's.
  """
  column = task if task in PAPER_TASKS else "rte"
  chosen = (DAGGER if recipe == "dagger" else PAPER[model])[column]
  if recipe == "scripts":
    chosen = chosen._replace(**SCRIPTS[model].get(column, {}))  # pyright: ignore[reportArgumentType]
  config.data.batch_size = chosen.batch_size
  config.fit.num_epochs = chosen.num_epochs
  config.optimizer.learning_rate = chosen.learning_rate
  lengths = (64, 128, 256, 512)
  shorter = [length for length in lengths if length < chosen.max_length]
  config.data.row_lengths = (*shorter, chosen.max_length)
  config.data.window = 1
  config.keep_freed_memory = False
  rank, alpha = RANK_AND_ALPHA[model][recipe == "scripts"]
  config.lora.update({"rank": rank, "alpha": alpha})
  if task in FROM_MNLI and recipe != "dagger":
    config.lora.start = "required"
  if model == "deberta_xxl":
    decay, head_dropout, warmup = DEBERTA[column]
    config.optimizer.weight_decay, config.model.head_dropout = decay, head_dropout
    config.optimizer.warmup_ratio = 0.1  # as in the paper; the scripts give steps
    if recipe == "scripts" and warmup:
      config.optimizer.update({"warmup_ratio": 0.0, "warmup_steps": warmup})


def sweep(config: Config) -> Iterator[dict[str, object]]:
  """Yields the changed fields of each run.

  With `data.tuning` these are each method's learning rates. Otherwise they are seeds: for the
  paper's models five, with the recipe's method and learning rate; with `optimizer.tuned_in`, and
  for `minilm`, with each method at its best learning rate.
  """
  read_config(GlueConfig, config)
  if config.data.tuning:
    for method in names("glue"):
      for rate in tuned_rates(method):
        yield {"method": method, "optimizer.learning_rate": rate}
    return
  if config.model.name != "minilm" and not config.optimizer.tuned_in:  # the recipe's own rate
    for seed in range(5):
      yield {"seed": seed}
    return
  rates = best_rates(config)
  few = (0,) if config.data.task == "sst2" else (0, 1, 2)
  for seed in few if config.model.name == "minilm" else range(5):
    for method, rate in rates.items():
      yield {"method": method, "optimizer.learning_rate": rate, "seed": seed}


def tuned_rates(method: str) -> list[float]:
  """Returns the learning rates that the tuning sweep tries, equally many for each method."""
  return multiples(TUNED_RATE, METHODS[method].tried_learning_rates)


def best_rates(config: Config) -> dict[str, float]:
  """Returns the best learning rate of each method in the tuning sweep.

  Prints the methods that the sweep lacks: it may be older than a method.

  Raises:
    ValueError: if there are no runs, or as in `best_rate`.
  """
  runs = _tuning_runs(config)
  tuned = {run.config.method for run in runs}
  left_out = [method for method in names("glue") if method not in tuned]
  if tuned and left_out:
    folder = config.optimizer.tuned_in
    print(f"{folder} has no tuning runs of {config.variant} by {', '.join(left_out)}: left out")
  return {m: _best_rate(config, m, runs) for m in names("glue") if m in tuned or not tuned}


class _TuningRun(NamedTuple):
  """A run of the tuning sweep; its result is None if it is not finished."""

  folder: Path
  config: Config
  result: dict[str, Any] | None


def _tuning_runs(config: Config) -> list[_TuningRun]:
  """Returns the tuning sweep's runs of a variant."""
  if not config.optimizer.tuned_in:
    return []
  folders = [path.parent for path in sorted(Path(config.optimizer.tuned_in).glob("*/config.json"))]
  runs: list[tuple[Path, Config]] = [(path, ConfigDict(stored_config(path))) for path in folders]
  return [
    _TuningRun(folder, run, read_result(folder))
    for folder, run in runs
    if run.variant == config.variant and run.data.tuning
  ]


def best_rate(config: Config, method: str) -> float:
  """Returns a method's learning rate with the best score in the tuning sweep.

  Further learning rates in its folder count too.

  Raises:
    ValueError: if a run is missing or not finished, or has another model or recipe.
  """
  return _best_rate(config, method, _tuning_runs(config))


def _best_rate(config: Config, method: str, runs: Iterable[_TuningRun]) -> float:
  if not config.optimizer.tuned_in:
    raise ValueError(
      "the learning rates are not tuned. First run --sweep --config.data.tuning=True "
      "--config.workdir=FOLDER, then give --config.optimizer.tuned_in=FOLDER"
    )
  folder = Path(config.optimizer.tuned_in)
  scores: dict[float, float] = {}
  for path, tuned, result in runs:
    if result and tuned.method == method:
      _check_same_recipe(config, tuned, path)
      scores[tuned.optimizer.learning_rate] = result["score"]
  missing = [rate for rate in tuned_rates(method) if rate not in scores]
  if missing:
    raise ValueError(
      f"{folder} has no finished tuning runs of {config.variant}, {method} with the learning "
      f"rates {', '.join(f'{rate:g}' for rate in missing)}. First run --sweep "
      "--config.data.tuning=True --config.workdir=FOLDER, then give it as "
      "--config.optimizer.tuned_in=FOLDER"
    )
  return max(sorted(scores), key=scores.__getitem__)


def _check_same_recipe(config: Config, tuned: Config, folder: Path) -> None:
  """Raises ValueError if a tuning run has another model or recipe.

  The amount of data and the fields that its method ignores may differ.
  """
  config = ConfigDict(with_pattern(config.to_dict()))
  for section in ("model", "lora", "optimizer", "data"):
    names = ("batch_size",) if section == "data" else config[section].keys()
    for name in sorted({*names} - {"learning_rate", "tuned_in"}):
      stored, current = tuned[section][name], config[section][name]
      if stored != current and METHODS[tuned.method].uses(f"{section}.{name}"):
        raise ValueError(
          f"{folder} was tuned with {section}.{name}={stored!r}, but this sweep has {current!r}, "
          "which may need another learning rate. Use the same value, or tune in another folder"
        )
