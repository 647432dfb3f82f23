"""The runs of `python -m experiments.paper`: a study for each of the paper's tables.

docs/paper.md has the plan, the rules and the results. What may decide a result is fixed here before
the runs: the arms, the seeds, the examples, the margin. A study's learning rates are chosen by
validation loss with a seed that is not reported, for every arm on its own, until the best one is
between two others (experiments/reproduction/plan.py). The largest rank of the embedded base model
is its width, 256, and SmolLM2's is 576.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

from experiments.configs import (
  Config,
  addition,
  dart,
  dial,
  e2e_reversed,
  glue,
  mnli_text,
  samsum,
  variants,
  webnlg,
  wikisql,
)
from experiments.configs.smollm2_rates import BEST
from experiments.configs.variants import Changes
from experiments.harness.config import ALL_LINEAR
from lora_jax.metrics.nlg import METRICS

MARGIN = variants.MARGIN  # nats per token; on GLUE, of a score in [0, 1]: 2 points
RATE_SEED = 0  # not reported
MAX_ADDED_RATES = 4  # after which an arm without a bracketed learning rate is left out
SCALING = 2.0  # alpha / rank, held at every rank
SQUARE = r".*/(attn/(query|out)|mlp/(gate|up|down))/kernel"  # of SmolLM2; its k and v are narrower
WIDTH = {"embedded": 256, "smollm2": 576}


@dataclasses.dataclass(frozen=True)
class Arm:
  """One row of a study.

  Attributes:
    changes: the fields that differ from the study's config.
    rate: the learning rate that an earlier sweep has chosen and bracketed; None chooses it here.
    rate_changes: of the runs that choose it, instead of the study's.
    seeds: the number of reported runs; 0 is one for each seed of the study.
  """

  changes: Changes
  rate: float | None = None
  rate_changes: Changes | None = None
  seeds: int = 0


@dataclasses.dataclass(frozen=True)
class Study:
  """The runs for a part of the paper.

  Attributes:
    tables: the paper's tables or figures.
    title: the section's title in the report.
    base: the base model; MiniLM's runs are of `experiments.glue`, the others' of gpt2_e2e.
    make: returns the config that all its runs change.
    arms: by name.
    control: the arm that the others are compared with.
    rate_changes: the further changes of runs that choose learning rates.
    rate_points: learning rates of each arm, half a decade apart, before any are added.
    seeds: of the reported runs.
    metrics: the task's metrics in the report, the most important first; empty is the loss only.
    tokens: mean tokens of a training example, for the hours.
    folder: that its files must be in; "" needs none.
    by_size: whether the report plots results by the number of trained parameters.
    forgetting: whether the loss on Wikipedia is measured, too.
  """

  tables: str
  title: str
  base: Literal["embedded", "smollm2", "minilm"]
  make: Callable[[], Config]
  arms: Mapping[str, Arm]
  control: str
  tokens: float
  rate_changes: Changes = dataclasses.field(default_factory=dict)
  rate_points: int = 3
  seeds: tuple[int, ...] = (1, 2, 3)
  metrics: tuple[str, ...] = ()
  folder: str = ""
  by_size: bool = False
  forgetting: bool = False


def lora(rank: int, target: str = ALL_LINEAR, **fields: object) -> Changes:
  """Returns the changes of LoRA at a rank."""
  scaled: Changes = {"lora.rank": rank, "lora.alpha": SCALING * rank}
  return {"method": "lora", "lora.target": target, **scaled, **_dotted(fields)}


def other(method: str, **fields: object) -> Changes:
  """Returns the changes of another method; `data__num_epochs` is the field `data.num_epochs`."""
  return {"method": method, **_dotted(fields)}


def _dotted(fields: Mapping[str, object]) -> Changes:
  return {name.replace("__", "."): value for name, value in fields.items()}


def methods(*names: str, seeds: int = 0) -> dict[str, Arm]:
  """Returns an arm for each method, with its default settings, by its name."""
  return {name: Arm(other(name), seeds=seeds) for name in names}


FULL, FROZEN = (Arm(other(name)) for name in ("full_finetuning", "frozen_base"))
FLOOR = methods("floor")
ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "out"}


def attention(letters: str) -> str:
  """Returns the pattern of some attention weights.

  >>> attention("qv")
  '.*/attn/(query|value)/kernel'
  """
  return rf".*/attn/({'|'.join(ATTENTION[letter] for letter in letters)})/kernel"


# ---- the configs that runs change --------------------------------------------------------


def _e2e(base: str) -> Config:
  return variants.get_config(base)


def _task(make: Callable[[str], Config], variant: str) -> Config:
  """Returns a data set's config, evaluated at the end only."""
  config = make(variant)
  config.lora.update({"rank": 4, "alpha": 4 * SCALING, "target": ALL_LINEAR})
  config.data.num_valid_records = min(config.data.num_valid_records or 500, 500)
  config.optimizer.update({"warmup_steps": 0, "warmup_share": 0.1})
  config.fit.update({"eval_every_steps": 1_000_000, "checkpoint_every_steps": 1_000_000})
  return config


def _dial(percent: float) -> Config:
  config = _task(dial.get_config, "mini")
  config.data.update({"percent": percent, "num_epochs": 20, "num_valid_records": 0})
  return config


def _with(config: Config, **sections: Mapping[str, object]) -> Config:
  for name, fields in sections.items():
    config[name].update(fields)
  return config


def _greedy(make: Callable[[str], Config], folder: str) -> Config:
  return _with(_task(make, "smollm2"), data={"source": folder, "num_valid_records": 200})


def _dart_dev() -> Config:
  config = _greedy(dart.get_config, "data/dart")
  data = {"name": "dart_dev", "num_train_records": 2000}
  return _with(config, data=data, decoding={"num_inputs": 200})


def _glue(task: str) -> Config:
  config = glue.get_config(f"minilm,{task}")
  return _with(config, data={"source": "data/glue", "any_size": True})


# ---- the studies -------------------------------------------------------------------------

_THOUSAND: Changes = {"data.num_train_records": 1000, "decoding.num_inputs": 0}
_FEW: Changes = {"data.num_train_records": 500, "decoding.num_inputs": 0}
_FOUR_THOUSAND: Changes = {**_THOUSAND, "data.num_train_records": 4000}
_FEW_EPOCHS: Changes = {"data.num_epochs": 10}
_NO_DECODING: Changes = {"decoding.num_inputs": 0}
_KNOWN = Arm(other("full_finetuning"), BEST["full"])  # docs/smollm2.md: seed 0, bracketed


def _sizes(method: str, field: str, sizes: tuple[int, ...]) -> dict[str, Arm]:
  return {
    f"{method}_{size}": Arm({"method": method, f"{field}": size, **_infix(method)})
    for size in sizes
  }


def _infix(method: str) -> Changes:
  return {"prefix.num_infix": 0} if method.startswith("prefix") else {}


def _low_data() -> dict[str, Arm]:
  """Returns methods by the number of examples; epochs as in Table 17, but 10 for 1,000."""
  arms = {}
  for examples, epochs in ((100, 40), (1000, 10), (10_000, 2), (0, 1)):
    fields: Changes = {"data.num_train_records": examples, "data.num_epochs": epochs}
    few = None if examples in (100, 1000) else _FOUR_THOUSAND
    few_methods = [("full", FULL.changes), ("lora_r4", lora(4))]
    few_methods += [(name, other(name)) for name in ("prefix_embedding", "prefix_layer")]
    for name, changes in few_methods:
      shorter = _NO_DECODING if few is None else {**few, "data.num_epochs": 1}
      arms[f"{name}_{examples or 'all'}"] = Arm({**changes, **fields}, None, shorter)
  return arms


def _after_the_paper() -> dict[str, Arm]:
  """Returns LoRA by rank and layers, and full fine-tuning, with small and large batches."""
  arms = {}
  for batch in (8, 32):
    size: Changes = {"data.batch_size": batch}
    arms[f"full_batch{batch}"] = Arm({**other("full_finetuning"), **size})
    for rank in (1, 16, 256):
      arms[f"lora_r{rank}_batch{batch}"] = Arm({**lora(rank), **size})
    for name, target in (("attention", attention("qkvo")), ("mlp", r".*/mlp/(up|down)/kernel")):
      arms[f"lora_r16_{name}_batch{batch}"] = Arm({**lora(16, target), **size})
  return arms


def _ranks(*ranks: int) -> dict[str, Arm]:
  return {f"lora_r{rank}": Arm(lora(rank)) for rank in ranks}


def _table_4(
  title: str,
  make: Callable[[str], Config],
  folder: str,
  tokens: float,
  metrics: tuple[str, ...],
  floor: Mapping[str, Arm],
) -> Study:
  arms = {"full": dataclasses.replace(FULL, seeds=2), "lora_r4": Arm(lora(4), seeds=2)}
  return Study(
    *("4", f"{title}, SmolLM2", "smollm2", partial(_greedy, make, folder)),
    {**arms, "frozen": FROZEN, **floor},
    *("full", tokens, _FEW),
    metrics=metrics,
    folder=folder,
  )


_GLUE_ARMS = {
  "full": FULL,
  **methods("bitfit", "adapter_h", "head_only"),
  "lora_r8": Arm(other("lora")),
}
# Layers of which some are trained cannot be scanned, which `gpu_queue` does with the others.
_TOP_2 = other("top_layers", top_layers__num_layers=2, model__scan_layers=False)
_TRIPLES = ("bleu", "meteor", "mean_ter")  # Tables 13 and 14
_WEIGHTS = {"q": 8, "k": 8, "v": 8, "o": 8, "qk": 4, "qv": 4, "qkvo": 2}  # equal parameters

STUDIES: dict[str, Study] = {
  "rank": Study(
    *("6, 18", "Rank, E2E, embedded base model", "embedded", partial(_e2e, "embedded")),
    {**_ranks(1, 2, 4, 8, 64, 256), "full": FULL, "frozen": FROZEN},
    *("full", 80.0, _THOUSAND),
    by_size=True,
  ),
  "rank_addition": Study(
    *("6, 18", "Rank, 4-digit addition, embedded base model", "embedded"),
    partial(_task, addition.get_config, "mini"),
    {**_ranks(1, 4, 16, 64, 256), "full": FULL, "frozen": FROZEN},
    *("full", 14.0, _FOUR_THOUSAND),
    metrics=("exact",),
    by_size=True,
  ),
  "rank_dial": Study(
    *("6, 18", "Rank, Wikipedia with the whole vocabulary permuted, embedded", "embedded"),
    partial(_dial, 100.0),
    {**_ranks(1, 4, 16, 64, 256), "full": FULL, "frozen": FROZEN},
    *("full", 160.0, _FEW_EPOCHS),
    by_size=True,
  ),
  "rank_smollm2": Study(
    *("6, 18", "Rank, E2E, SmolLM2", "smollm2"),
    lambda: _with(_e2e("smollm2"), data={"num_train_records": 2000}),
    {
      **{f"lora_r{rank}": Arm(lora(rank, SQUARE), seeds=2) for rank in (1, 64, 576)},
      "lora_r4": Arm(lora(4, SQUARE), seeds=1),
      "full": dataclasses.replace(_KNOWN, seeds=2),
    },
    *("full", 55.0, _FEW),
    by_size=True,
  ),
  "weights": Study(
    *("5", "Which weights, at one number of parameters, E2E, embedded base model", "embedded"),
    partial(_e2e, "embedded"),
    {name: Arm(lora(rank, attention(name))) for name, rank in _WEIGHTS.items()},
    *("qv", 80.0, _THOUSAND),
  ),
  "sizes": Study(
    *("15; Figure 2", "Accuracy by trained parameters, E2E reversed, embedded", "embedded"),
    partial(_task, e2e_reversed.get_config, "mini"),
    {
      **_ranks(1, 4, 16, 64),
      **_sizes("adapter_h", "bottleneck.width", (1, 16, 64)),
      **_sizes("prefix_layer", "prefix.num_prefix", (2, 16)),
      **_sizes("prefix_embedding", "prefix.num_prefix", (8, 32)),
      **methods("bitfit", "lora_prefix_embedding", "lora_prefix_layer"),
      **{"full": FULL, "frozen": FROZEN},
      **FLOOR,
    },
    *("lora_r4", 80.0, _THOUSAND),
    seeds=(1, 2),
    metrics=("exact", "slots"),
    by_size=True,
  ),
  "low_data": Study(
    *("16", "Few examples, E2E reversed, embedded base model", "embedded"),
    lambda: _with(_task(e2e_reversed.get_config, "mini"), decoding={"num_inputs": 200}),
    {**_low_data(), "frozen": FROZEN, **FLOOR},
    *("full_all", 80.0, _THOUSAND),
    seeds=(1, 2),
    metrics=("exact", "slots"),
  ),
  "after": Study(
    *("after the paper", "LoRA and full fine-tuning by rank, batch and layers", "embedded"),
    partial(_e2e, "embedded"),
    {**_after_the_paper(), "frozen": FROZEN},
    *("full_batch8", 80.0, _THOUSAND),
    seeds=(1, 2),
    forgetting=True,
  ),
  "e2e_smollm2": Study(
    *("3", "E2E, SmolLM2", "smollm2"),
    lambda: _with(_e2e("smollm2"), decoding={"num_inputs": 200, "num_beams": 10}),
    {
      "full": _KNOWN,
      "lora_r4_qv": Arm(lora(4, attention("qv"))),
      "adapter_l_small": Arm(other("adapter_l", bottleneck__width=8), seeds=2),
      "adapter_l_large": Arm(other("adapter_l", bottleneck__width=256), seeds=1),
      "adapter_h_large": Arm(other("adapter_h", bottleneck__width=128), seeds=1),
      "ft_top2": Arm(_TOP_2, seeds=1),
      **methods("prefix_layer", seeds=2),
    },
    *("lora_r4_qv", 55.0, _THOUSAND),
    metrics=METRICS,
  ),
  "webnlg": Study(
    *("14", "WebNLG, SmolLM2", "smollm2"),
    lambda: _with(
      _greedy(webnlg.get_config, "data/webnlg"),
      data={"num_train_records": 2000},
      decoding={"num_inputs": 200},
    ),
    {
      "full": dataclasses.replace(FULL, seeds=2),
      "lora_r4_qv": Arm(lora(4, attention("qv")), seeds=2),
      **methods("adapter_l", "prefix_layer", seeds=1),
      "frozen": FROZEN,
      **FLOOR,
    },
    *("full", 70.0, _FEW),
    metrics=tuple(f"{name}{part}" for name in _TRIPLES for part in ("_unseen", "_seen", "")),
    folder="data/webnlg",
  ),
  "dart_dev": Study(
    *("13", "DART-dev, SmolLM2: a check run", "smollm2", _dart_dev),
    {
      "full": dataclasses.replace(FULL, seeds=2),
      "lora_r4_qv": Arm(lora(4, attention("qv")), seeds=2),
      "frozen": FROZEN,
      **FLOOR,
    },
    *("full", 64.0, _FEW),
    metrics=_TRIPLES,
    folder="data/dart",
  ),
  "wikisql": _table_4(
    "WikiSQL, rebuilt columns", wikisql.get_config, "data/wikisql", 57.0, ("logical_form",), {}
  ),
  "samsum": _table_4(
    *("SAMSum", samsum.get_config, "data/samsum", 156.0, ("rouge1", "rouge2", "rougeL"), FLOOR)
  ),
  "mnli_text": _table_4(
    "MNLI as text", mnli_text.get_config, "data/mnli", 50.0, ("accuracy",), FLOOR
  ),
  **{
    f"glue_{task}": Study(
      *("2, 9", f"GLUE, {task}, MiniLM", "minilm", partial(_glue, task), _GLUE_ARMS, "full"),
      tokens=0.0,
      rate_changes={"data.tuning": True},
      metrics=("score",),
      folder="data/glue",
    )
    for task in ("cola", "mrpc")
  },
}  # fmt: skip

TINY: Changes = {  # of every run, with --tiny: to see all parts work; the results say nothing
  "data.num_train_records": 48,
  "data.num_valid_records": 16,
  "decoding.num_inputs": 4,
  "decoding.num_beams": 1,
}
