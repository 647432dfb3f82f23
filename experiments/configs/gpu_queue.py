"""All runs of SmolLM2 that are worth a GPU: whole data sets, ranks, the paper's tables, variants.

    python -m experiments.gpt2_e2e --sweep --config=experiments/configs/gpu_queue.py
    python -m experiments.gpt2_e2e --sweep --config=experiments/configs/gpu_queue.py:tiny

The most useful runs come first, so the queue can be stopped at any time; the same command resumes
it and skips finished runs. Learning rates are those of smollm2_rates.py; `RANKS` keep the scaling
of rank 16. Then come the arms of paper.py's studies, on all examples of their data sets, which are
read from data/ (docs/data_sets.md). They have E2E's learning rates, which were not tuned on these
sets. LoRA of rank 4 has the alpha with which its learning rate was tuned, 32, and not paper.py's 8;
in the study of ranks, all have the scaling and learning rate of rank 16. Other methods' learning
rates are multiples of LoRA's by the methods table. The nulls of `experiments.subspaces` follow.
LoRA's variants come last, with the sizes and learning rates of variants.py; those without a
learning rate there are left out, and named. Layers are scanned, except where the last ones are
trained (FT-Top2). `tiny` takes one step of every run on a few examples, on a CPU, as a check; only
its dtype is another, float32.

`python -m lora_jax.models.checkpoints.gguf_split` writes the model's file in two parts of less than
64 MiB, for machines that take no larger ones; `--config.model.folder=` takes the first.
"""

from collections.abc import Iterator

from experiments.analysis.subspaces.plan import RANDOM, SHUFFLED
from experiments.comparison.plan import changes_of
from experiments.configs import Config, gpt2_e2e, subspaces, variants
from experiments.configs.gpt2_e2e import QUERY_AND_VALUE
from experiments.configs.paper import STUDIES, Study
from experiments.configs.smollm2_rates import ARMS, Changes, best_rate
from experiments.harness.config import ALL_LINEAR, flat, read_config
from experiments.harness.methods import default_learning_rate, find_method
from experiments.nlg.config import E2EConfig

FULL = ARMS["full"]["method"]
SEEDS = (1, 2, 3, 4, 5)
RANKS = (1, 2, 4, 8, 32, 64)
STUDY_SEEDS = (1, 2, 3)
NUM_INPUTS = {  # that are decoded: the test sets, of WikiSQL's 15,878 a part
  **{"e2e_smollm2": 630, "webnlg": 1862, "wikisql": 2000, "mnli_text": 1000, "samsum": 819},
  **{"dart_dev": 4159, "rank_smollm2": 630},
}
"""The studies of paper.py, the most useful first."""
OF_TASK = (
  *(f"data.{name}" for name in ("name", "source", "max_length", "row_length", "loss_length")),
  *(f"decoding.{name}" for name in ("num_beams", "length_penalty", "no_repeat_ngram_size")),
  *("decoding.max_new_tokens", "decoding.official_references", "optimizer.weight_decay"),
)
"""The fields by which a data set's config differs from E2E's, besides its sizes."""


def get_config(size: str = "full") -> Config:
  """Returns the config that the runs change."""
  if size not in ("full", "tiny"):
    raise ValueError(f"expected gpu_queue.py or gpu_queue.py:tiny, got {size!r}")
  config = gpt2_e2e.get_config("smollm2")
  config.workdir = f"runs/smollm2/gpu_{size}"
  config.seed = SEEDS[0]
  config.keep_freed_memory = False
  config.data.update({"num_train_records": 0, "num_valid_records": 0})
  config.data.update({"batch_size": 32, "loss_length": 80})
  config.decoding.batch_size = 64
  config.model.scan_layers = True
  if size == "full":
    # Weights stay float32: bfloat16 would lose the small updates of full fine-tuning.
    config.model.dtype = "bfloat16"
  else:
    config.data.update({"num_train_records": 16, "num_valid_records": 4, "batch_size": 2})
    config.fit.num_train_steps = 1
    config.decoding.update({"num_inputs": 1, "num_beams": 2, "max_new_tokens": 4})
  return config


def sweep(config: Config) -> Iterator[Changes]:
  """Yields the changed fields of each run: methods and ranks, studies, then variants."""
  read_config(E2EConfig, config)
  scaling = config.lora.alpha / config.lora.rank
  rate = best_rate("LoRA, rank 16")
  for seed in SEEDS:
    for arm, changes in ARMS.items():
      yield {**changes, "optimizer.learning_rate": best_rate(arm), "seed": seed}
    for rank in RANKS:
      alpha = {"lora.rank": rank, "lora.alpha": scaling * rank}
      yield {**alpha, "optimizer.learning_rate": rate, "seed": seed}
  for study, num_inputs in NUM_INPUTS.items():
    inputs = num_inputs if config.workdir.endswith("full") else config.decoding.num_inputs
    yield from study_runs(STUDIES[study], inputs)
  yield from null_runs(scaling)
  yield from variant_runs()


def study_runs(study: Study, num_inputs: int) -> Iterator[Changes]:
  """Yields the changed fields of the runs of a study's arms that are not in the queue by E2E's.

  A floor needs no GPU, and the base model itself no seeds.
  """
  make, e2e = flat(study.make()), flat(gpt2_e2e.get_config("smollm2"))
  task = {name: make[name] for name in OF_TASK if make[name] != e2e[name]}
  is_e2e = "data.name" not in task
  if is_e2e:  # with all the queue's settings
    task = {}
  in_queue = {(e2e["lora.target"], rank) for rank in (*RANKS, 16)} | {(QUERY_AND_VALUE, 4)}
  for seed in STUDY_SEEDS:
    for arm in study.arms.values():
      method = str(arm.changes["method"])
      weights = arm.changes.get("lora.target"), arm.changes.get("lora.rank")
      known = is_e2e and (method == FULL or weights in in_queue)
      once = not find_method(method).trains
      if known or find_method(method).is_floor or (once and seed != STUDY_SEEDS[0]):
        continue
      sizes = {"decoding.num_inputs": num_inputs, "seed": seed}
      changes = {
        **task,
        **arm.changes,
        **_tuned(method, arm.changes, e2e["lora.alpha"]),
        **sizes,
      }
      yield {name: value for name, value in changes.items() if find_method(method).uses(name)}


def _tuned(method: str, changes: Changes, alpha: float) -> Changes:
  """Returns the learning rate of an arm on E2E, or its method's default multiple of LoRA's.

  LoRA of rank 4 has the alpha of its sweep; the other ranks have the scaling of rank 16.
  """
  targets = {QUERY_AND_VALUE: "LoRA, rank 4, q,v", ALL_LINEAR: "LoRA, rank 4"}
  arm = targets.get(str(changes.get("lora.target")))
  if arm is not None and changes["lora.rank"] == 4:
    return {"optimizer.learning_rate": best_rate(arm), "lora.alpha": alpha}
  if method == FULL:
    return {"optimizer.learning_rate": best_rate("full")}
  rate = default_learning_rate(best_rate("LoRA, rank 16"), "lora", method)
  return {"optimizer.learning_rate": rate}


def null_runs(scaling: float) -> Iterator[Changes]:
  """Yields the changed fields of the nulls of `experiments.subspaces`, of ranks 8 and 64."""
  for null in (SHUFFLED, RANDOM):
    for rank in subspaces.FULL.ranks:
      size = {"lora.rank": rank, "lora.alpha": scaling * rank}
      yield {**null, **size, "optimizer.learning_rate": best_rate("LoRA, rank 16"), "seed": 1}


def variant_runs() -> Iterator[Changes]:
  """Yields the changed fields of the runs of LoRA's variants, and names those left out."""
  if unknown := [arm for arm, rate in variants.BEST.items() if rate is None]:
    print(f"left out, as their learning rates are not known yet: {', '.join(unknown)}")
  for seed in SEEDS:
    for arm, best in variants.BEST.items():
      if best is not None:
        settings = {"optimizer.learning_rate": best, "optimizer.warmup_share": 0.1, "seed": seed}
        yield changes_of(arm, "smollm2", settings)
