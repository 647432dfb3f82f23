"""The paper's claims: their evidence there, the conditions of ours, and the function that decides.

The first condition is the nearest to the paper's, and gives the verdict; the others show where else
the claim holds or fails. All of them are of another base model than the paper's, except the counts.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.analysis.intrinsic import read_curves
from experiments.analysis.subspaces.plan import planned_runs
from experiments.analysis.subspaces.runs import (
  RANDOM_BASE,
  SHUFFLED,
  Study,
  arrange,
  load_runs,
)
from experiments.configs import intrinsic_dimension
from experiments.configs import subspaces as subspace_configs
from experiments.harness.workdir import read_result
from experiments.reproduction.decisions import (
  Outcome,
  Rule,
  Word,
  better,
  decide,
  decide_by_metric,
  decide_forgetting,
  equivalent,
  joined,
  on_par_or_better,
  reported,
  worse,
)
from experiments.reproduction.real_shapes import (
  ADAPTERS,
  MERGED,
  Ratio,
  Shape,
  fewer_operations,
  latency,
  less_memory,
  more_latency,
  same_latency,
  smaller_checkpoint,
)
from experiments.reproduction.runs import Record
from experiments.shapes.models import GPT3, count, num_weights
from experiments.shapes.rows import lora_of
from lora_jax.analysis import amplification, random_similarity, similarity

RESAMPLES = 4000


class Evidence(NamedTuple):
  """The runs that decide.

  Attributes:
    records: of the studies.
    root: the folder of all runs.
    tiny: whether they are cut to minutes.
  """

  records: Sequence[Record]
  root: Path
  tiny: bool = False


Decide = Callable[[Evidence], Outcome]


class Condition(NamedTuple):
  """Where a claim is decided: in words, by which stage, and by which function."""

  words: str
  stage: str
  decide: Decide

  @property
  def function(self) -> str:
    """The name of the function that decides."""
    return getattr(self.decide, "func", self.decide).__name__


class Claim(NamedTuple):
  """A claim, its evidence in the paper, and our conditions; the first one gives the verdict."""

  text: str
  evidence: str
  conditions: tuple[Condition, ...]


class Decided(NamedTuple):
  """A claim with the outcome of each of its conditions."""

  claim: Claim
  outcomes: tuple[Outcome, ...]

  @property
  def word(self) -> Word:
    return self.outcomes[0].word

  @property
  def failures(self) -> str:
    """The conditions under which the claim failed."""
    pairs = list(zip(self.claim.conditions, self.outcomes, strict=True))
    failed = [condition.words for condition, outcome in pairs if outcome.word == "fails"]
    decided = sum(outcome.word in ("holds", "fails") for _, outcome in pairs)
    if failed:
      return "; ".join(failed)
    if not decided:
      return "not decided anywhere yet"
    return f"none was found in {decided} of {len(pairs)} conditions that were decided"


def decide_all(evidence: Evidence) -> list[Decided]:
  """Returns all claims with their outcomes."""
  return [
    Decided(claim, tuple(condition.decide(evidence) for condition in claim.conditions))
    for claim in CLAIMS
  ]


# ---- functions that decide ---------------------------------------------------------------


def _loss(words: str, study: str, control: str, arms: Sequence[str], rule: Rule) -> Condition:
  def decided(evidence: Evidence) -> Outcome:
    return decide(evidence.records, study, control, arms, rule)

  decided.__name__ = f"decide, {rule.__name__}"
  return Condition(words, study, decided)


def _metric(words: str, study: str, metric: str, control: str, arms: Sequence[str]) -> Condition:
  def decided(evidence: Evidence) -> Outcome:
    return decide_by_metric(evidence.records, study, metric, control, arms)

  decided.__name__ = f"decide_by_metric, {metric}"
  return Condition(words, study, decided)


def _of_subspaces(words: str, decide_on: Callable[..., Outcome]) -> tuple[Condition, ...]:
  """Returns a condition for each base model whose subspaces are compared."""
  return tuple(
    Condition(f"{words}, {model}", "subspaces", partial(decide_on, model=model))
    for model in ("embedded", "smollm2")
  )


def forgetting(evidence: Evidence) -> Outcome:
  return decide_forgetting(evidence.records, "after", "full_batch8", ["lora_r16_batch8"])


def rate_ratio(evidence: Evidence) -> Outcome:
  """Decides that LoRA's best learning rate is about ten times that of full fine-tuning.

  Each is known to half a decade, so that the ratio is known to a decade.
  """
  runs = reported(evidence.records, "after")
  rates = [runs[arm][0]["rate"] for arm in ("lora_r16_batch8", "full_batch8") if arm in runs]
  if len(rates) < 2:
    return Outcome("not run")
  ratio = rates[0] / rates[1]
  low, high = ratio / 10**0.5, ratio * 10**0.5
  word: Word = "holds" if low <= 10 <= high else "fails"
  return Outcome(word, f"ratio {ratio:.3g} [{low:.2g}, {high:.2g}], of grids by half a decade")


def above(values: np.ndarray, limit: float) -> Outcome:
  """Decides that a mean over layers exceeds a limit, by a bootstrap over the layers."""
  draws = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(axis=1)
  low, high = np.quantile(draws, [0.025, 0.975])
  word: Word = "holds" if low > limit else "fails" if high < limit else "cannot be told"
  mean = f"{values.mean():.3g} [{low:.3g}, {high:.3g}]"
  return Outcome(word, f"mean over {len(values)} layers {mean}, limit {limit:.3g}")


def _study(evidence: Evidence, model: str) -> Study | None:
  """Returns the study of subspaces on a base model; None if its runs are not finished."""
  sizes = subspace_configs.TINY if evidence.tiny else subspace_configs.FULL
  folders = [evidence.root / "subspaces" / model / run.name for run in planned_runs(model, sizes)]
  if not all(read_result(folder) for folder in folders):
    return None
  return _arranged(tuple(folders))


@functools.cache  # several claims read the same adapters
def _arranged(folders: tuple[Path, ...]) -> Study:
  return arrange(load_runs(folders))


def first_directions(evidence: Evidence, model: str, *, seeds: bool) -> Outcome:
  """Decides whether the first directions of A agree, over the layers.

  Those of two ranks agree if φ(1, 1) is above 0.5 (Figure 3), and those of two seeds if it is above
  its expectation between random directions (Figure 4).
  """
  study = _study(evidence, model)
  if study is None:
    return Outcome("not run")
  pair = study.second if seeds else study.low
  assert pair is not None
  outcomes = []
  for kind in ("query", "value"):
    first, second = (run.subspaces[kind].a for run in (pair, study.high))
    limit = random_similarity(first.shape[-2], 1, 1).item() if seeds else 0.5
    outcomes.append((kind, above(similarity(first, second)[:, 0, 0], limit)))
  return _of_kinds(outcomes)


def shared_directions(evidence: Evidence, model: str) -> Outcome:
  """Decides that two seeds share more directions of A of query than of value, over the layers.

  Their number is the largest of i (φ(i, i) - i / d), the excess over random directions.
  """
  study = _study(evidence, model)
  if study is None:
    return Outcome("not run")
  assert study.second is not None
  numbers = []
  for kind in ("query", "value"):
    first, second = (run.subspaces[kind].a for run in (study.high, study.second))
    phi, dim = similarity(first, second), first.shape[-2]
    excess = phi - random_similarity(dim, *phi.shape[-2:])
    equal = np.diagonal(excess, axis1=-2, axis2=-1)
    numbers.append((np.arange(1, 1 + equal.shape[-1]) * equal).max(axis=-1))
  outcome = above(numbers[0] - numbers[1], 0.0)
  return dataclasses.replace(outcome, interval=f"directions, query - value: {outcome.interval}")


def other_directions(evidence: Evidence, model: str) -> Outcome:
  """Decides that W's norm along ΔW's directions is less than half of that along W's own first ones.

  The adapter is that of the smaller rank; the mean is over the layers.
  """
  study = _study(evidence, model)
  if study is None:
    return Outcome("not run")
  assert study.low is not None
  outcomes = []
  for kind in ("query", "value"):
    row = amplification(study.low.weights(kind), study.low.subspaces[kind])
    outcomes.append((kind, above(1 - row.along_delta / row.along_weight, 0.5)))
  return _of_kinds([(f"{kind}, 1 - ratio of norms", outcome) for kind, outcome in outcomes])


def amplifies(evidence: Evidence, model: str, null: str) -> Outcome:
  """Decides that the amplification factor exceeds a null's: mean log ratio over layers above 0."""
  study = _study(evidence, model)
  if study is None:
    return Outcome("not run")
  assert study.low is not None
  nulls = {(run.kind, run.rank): run for run in study.nulls}
  outcomes = []
  for kind in ("query", "value"):
    factors = [
      amplification(run.weights(kind), run.subspaces[kind]).factor
      for run in (study.low, nulls[null, study.low.rank])
    ]
    outcomes.append((f"{kind}, log of the ratio", above(np.log(factors[0] / factors[1]), 0.0)))
  return _of_kinds(outcomes)


def _of_kinds(outcomes: Sequence[tuple[str, Outcome]]) -> Outcome:
  words = "; ".join(f"{kind}: {outcome.interval}" for kind, outcome in outcomes)
  return Outcome(joined([outcome.word for _, outcome in outcomes]), words)


def dimension_falls(evidence: Evidence) -> Outcome:
  """Decides that d90 is smaller after the longest pretraining than after the shortest.

  d90 lies between the largest dimension without 90 % of the gain and the smallest with it; a claim
  needs brackets that do not overlap. There is one seed.
  """
  sizes = intrinsic_dimension.TINY if evidence.tiny else intrinsic_dimension.FULL
  bases = [name for name in intrinsic_dimension.BASES if name != "new weights"]
  curves, missing = read_curves(sizes, bases, evidence.root / "intrinsic_dimension")
  if missing or len(curves) < len(bases):
    return Outcome("not run")
  brackets = [
    (max((d for d in c.shares if d < (c.d90 or math.inf)), default=0), c.d90 or math.inf)
    for c in (curves[0], curves[-1])
  ]
  (shortest, longest) = brackets
  word: Word = "cannot be told"
  if longest[1] <= shortest[0]:
    word = "holds"
  elif shortest[1] <= longest[0]:
    word = "fails"
  text = "; ".join(
    f"{name}: {_bracket_text(*bracket)}"
    for name, bracket in zip((bases[0], bases[-1]), brackets, strict=True)
  )
  return Outcome(word, f"{text}; one seed")


def _bracket_text(low: float, high: float) -> str:
  if high < math.inf:
    return f"above {low:,}, at most {high:,}" if low else f"at most {high:,}"
  if low:
    return f"above {low:,}, the largest that was tried"
  return "not defined, as full fine-tuning gains nothing"


def fewer_parameters(evidence: Evidence) -> Outcome:
  """Decides that LoRA has 10,000 times fewer parameters than GPT-3: a count, without runs."""
  del evidence
  ratio = _parameter_ratio()
  word: Word = "holds" if round(math.log10(ratio)) == 4 else "fails"
  return Outcome(word, f"{ratio:,.0f} times, exactly; read as the nearest power of ten")


@functools.cache
def _parameter_ratio() -> float:
  return num_weights(GPT3) / count(GPT3, lora_of("qv", 4))


def _latency(shape: Shape, ways: Sequence[str], rule: Callable[[Ratio], Word]) -> Condition:
  def decided(evidence: Evidence) -> Outcome:
    return latency(evidence.root, shape, ways, rule)

  decided.__name__ = f"latency, {rule.__name__}"
  return Condition(f"GPT-2 M's shape, {shape} tokens", "benchmarks.latency", decided)


def _sizes(model: str, rule: Callable[[Path, str], Outcome]) -> Condition:
  def decided(evidence: Evidence) -> Outcome:
    return rule(evidence.root, model)

  decided.__name__ = rule.__name__
  return Condition(f"{model}'s real shape", "paper_shapes --steps", decided)


# ---- the claims --------------------------------------------------------------------------

_CASES = (Shape(16, 256), Shape(1, 128), Shape(32, 512, 9, 5), Shape(4, 256))  # of latency
_R4, _SMALL = ("lora_r4",), ("adapter_l_small", "prefix_layer")

CLAIMS: tuple[Claim, ...] = (
  Claim(
    "LoRA performs on par with full fine-tuning, or better",
    "Tables 2, 3, 4, 13 and 14: such as BLEU 70.4 against 68.2 on E2E, GPT-2 M",
    (
      _loss(
        "E2E, SmolLM2, rank 4 on q and v", "e2e_smollm2", "full", ["lora_r4_qv"], on_par_or_better
      ),
      _loss("E2E, embedded, rank 4", "rank", "full", _R4, on_par_or_better),
      _loss("WebNLG, SmolLM2", "webnlg", "full", ["lora_r4_qv"], on_par_or_better),
      _loss("DART-dev, SmolLM2", "dart_dev", "full", ["lora_r4_qv"], on_par_or_better),
      _loss("WikiSQL, rebuilt columns, SmolLM2", "wikisql", "full", _R4, on_par_or_better),
      _loss("SAMSum, SmolLM2", "samsum", "full", _R4, on_par_or_better),
      _loss("MNLI as text, SmolLM2", "mnli_text", "full", _R4, on_par_or_better),
      _loss("addition, embedded, rank 4", "rank_addition", "full", _R4, on_par_or_better),
      _loss("permuted Wikipedia, embedded, rank 4", "rank_dial", "full", _R4, on_par_or_better),
      _loss("CoLA, MiniLM", "glue_cola", "full", ["lora_r8"], on_par_or_better),
      _loss("MRPC, MiniLM", "glue_mrpc", "full", ["lora_r8"], on_par_or_better),
    ),
  ),
  Claim(
    "At a similar number of parameters, LoRA beats adapters and prefixes",
    "Table 3: BLEU 70.4 against 66.3 (Adapter_L, 0.37 M) and 69.7 (PreLayer)",
    (
      _loss("E2E, SmolLM2", "e2e_smollm2", "lora_r4_qv", _SMALL, worse),
      _loss(
        *("E2E reversed, embedded", "sizes", "lora_r4"),
        *(("adapter_h_16", "prefix_layer_16", "prefix_embedding_32", "bitfit"), worse),
      ),
      _loss("CoLA, MiniLM", "glue_cola", "lora_r8", ("bitfit", "adapter_h"), worse),
      _loss("MRPC, MiniLM", "glue_mrpc", "lora_r8", ("bitfit", "adapter_h"), worse),
    ),
  ),
  Claim(
    "Prefixes do not improve steadily with their number of parameters",
    "Figure 2 and Table 15: WikiSQL 63.1 at 256 tokens and 55.9 at 512 (PreEmbed)",
    (
      _loss(
        *("E2E reversed, PreEmbed of 32 against 8 tokens, embedded", "sizes"),
        *("prefix_embedding_8", ["prefix_embedding_32"], worse),
      ),
      _loss(
        *("E2E reversed, PreLayer of 16 against 2 tokens, embedded", "sizes"),
        *("prefix_layer_2", ["prefix_layer_16"], worse),
      ),
    ),
  ),
  Claim(
    "PreEmbed improves LoRA",
    "Table 15: WikiSQL 75.0 against 73.8, MNLI 91.4 against 91.6, rank 8 on q and v",
    (_loss("E2E reversed, embedded", "sizes", "lora_r4", ["lora_prefix_embedding"], better),),
  ),
  Claim(
    "PreLayer makes LoRA worse",
    "Table 15: WikiSQL 72.9 against 73.8, MNLI 90.2 against 91.6, rank 8 on q and v",
    (_loss("E2E reversed, embedded", "sizes", "lora_r4", ["lora_prefix_layer"], worse),),
  ),
  Claim(
    "On unseen categories, LoRA scores higher than full fine-tuning",
    "Table 14: BLEU 46.7 against 27.7 on WebNLG's unseen part, GPT-2 M",
    (
      _metric("WebNLG's unseen part, SmolLM2", "webnlg", "bleu_unseen", "full", ["lora_r4_qv"]),
      _metric("WebNLG's seen part, SmolLM2", "webnlg", "bleu_seen", "full", ["lora_r4_qv"]),
    ),
  ),
  Claim(
    "A rank of one is as good as a rank of 64",
    "Table 6: WikiSQL 73.4 and 73.5, MNLI 91.3 and 91.4, on q and v of GPT-3",
    (
      _loss("E2E, embedded", "rank", "lora_r64", ["lora_r1"], on_par_or_better),
      _loss("E2E, SmolLM2", "rank_smollm2", "lora_r64", ["lora_r1"], on_par_or_better),
      _loss("addition, embedded", "rank_addition", "lora_r64", ["lora_r1"], on_par_or_better),
      _loss(
        *("permuted Wikipedia, embedded", "rank_dial", "lora_r64", ["lora_r1"], on_par_or_better)
      ),
    ),
  ),
  Claim(
    "At its largest rank, LoRA roughly converges to full fine-tuning",
    "Section 4.1, without an experiment",
    (
      _loss("E2E, embedded, r/d = 1", "rank", "full", ["lora_r256"], equivalent),
      _loss("E2E, SmolLM2, r/d = 1", "rank_smollm2", "full", ["lora_r576"], equivalent),
      _loss("addition, embedded, r/d = 1", "rank_addition", "full", ["lora_r256"], equivalent),
      _loss(
        "permuted Wikipedia, embedded, r/d = 1", "rank_dial", "full", ["lora_r256"], equivalent
      ),
    ),
  ),
  Claim(
    "At one number of parameters, q or k alone is worse than q and v",
    "Table 5: WikiSQL 70.4 and 70.0 against 73.7",
    (_loss("E2E, embedded", "weights", "qv", ("q", "k"), worse),),
  ),
  Claim(
    "At one number of parameters, all four attention weights are as good as q and v",
    "Table 5: WikiSQL 73.7 and 73.7, MNLI 91.7 and 91.3",
    (_loss("E2E, embedded", "weights", "qv", ["qkvo"], on_par_or_better),),
  ),
  Claim(
    "With few examples, LoRA is on par with full fine-tuning, or better",
    "Table 16: 63.8 against 60.2 with 100 examples of MNLI, 85.6 against 85.8 with 1,000",
    tuple(
      _loss(
        *(f"E2E reversed, {words}, embedded", "low_data", f"full_{size}"),
        *([f"lora_r4_{size}"], on_par_or_better),
      )
      for size, words in (
        *(("100", "100 examples"), ("1000", "1,000 examples"), ("10000", "10,000 examples")),
        ("all", "all examples"),
      )
    ),
  ),
  Claim(
    "With few examples, prefixes are worse than full fine-tuning",
    "Table 16: 37.6 (PreEmbed) and 48.3 (PreLayer) against 60.2 with 100 examples",
    tuple(
      _loss(
        *(f"E2E reversed, {size} examples, embedded", "low_data", f"full_{size}"),
        *([f"prefix_embedding_{size}", f"prefix_layer_{size}"], worse),
      )
      for size in ("100", "1000")
    ),
  ),
  Claim(
    "Ranks 8 and 64 share their first direction: φ(1, 1) above 0.5",
    "Figure 3, layer 48 of GPT-3",
    _of_subspaces("A of q and v, E2E", partial(first_directions, seeds=False)),
  ),
  Claim(
    "Two seeds share directions, more than random ones do",
    "Figure 4, layer 48 of GPT-3, rank 64",
    _of_subspaces("A of q and v, E2E", partial(first_directions, seeds=True)),
  ),
  Claim(
    "ΔWq has a higher intrinsic rank than ΔWv: two seeds share more of its directions",
    "Section 7.2 and Figure 4, layer 48 of GPT-3, rank 64",
    _of_subspaces("A, E2E", shared_directions),
  ),
  Claim(
    "ΔW does not repeat the top directions of W",
    "Section 7.3, Table 7 and Figure 8: a norm of 0.32 along ΔW's directions, 21.67 along W's own",
    _of_subspaces("q and v, E2E", other_directions),
  ),
  Claim(
    "ΔW amplifies directions that W does not emphasize",
    "Table 7: a factor of 21.5 at rank 4, on one weight; without a null",
    tuple(
      Condition(
        f"q and v against {null}, {model}", "subspaces", partial(amplifies, model=model, null=null)
      )
      for model in ("embedded", "smollm2")
      for null in (SHUFFLED, RANDOM_BASE)
    ),
  ),
  Claim(
    "More pretraining lowers the intrinsic dimension",
    "Sections 1 and 4.1, by Aghajanyan et al. 2020 (arXiv 2012.13255)",
    (Condition("E2E, embedded shape, 0.2 M to 20 M tokens", "intrinsic", dimension_falls),),
  ),
  Claim(
    "LoRA on all layers learns as well as full fine-tuning at small batches",
    "After the paper: Schulman et al. 2025, LoRA Without Regret",
    (
      _loss(
        *("E2E, embedded, rank 16, 8 rows", "after", "full_batch8"),
        *(["lora_r16_batch8"], on_par_or_better),
      ),
      _loss(
        *("E2E, embedded, rank 16, 32 rows", "after", "full_batch32"),
        *(["lora_r16_batch32"], on_par_or_better),
      ),
      _loss(
        *("E2E, embedded, rank 1, 8 rows", "after", "full_batch8"),
        *(["lora_r1_batch8"], on_par_or_better),
      ),
    ),
  ),
  Claim(
    "LoRA on attention only is worse than on the MLPs",
    "After the paper: Schulman et al. 2025",
    tuple(
      _loss(
        *(f"E2E, embedded, rank 16, {batch} rows", "after", f"lora_r16_mlp_batch{batch}"),
        *([f"lora_r16_attention_batch{batch}"], worse),
      )
      for batch in (8, 32)
    ),
  ),
  Claim(
    "LoRA's best learning rate is ten times that of full fine-tuning",
    "After the paper: Schulman et al. 2025",
    (Condition("E2E, embedded, rank 16, 8 rows", "after", rate_ratio),),
  ),
  Claim(
    "LoRA forgets less than full fine-tuning",
    "After the paper: Biderman et al. 2024 (arXiv 2405.09673)",
    (Condition("Wikipedia after E2E, embedded, rank 16, 8 rows", "after", forgetting),),
  ),
  Claim(
    "LoRA has 10,000 times fewer trained parameters than GPT-3",
    "Section 4.2: rank 4 on q and v of 175 B parameters",
    (Condition("real shape, counted without weights", "paper_shapes", fewer_parameters),),
  ),
  Claim(
    "Merged, LoRA adds no latency",
    "Section 4.1 and Table 1: 1449.4, 338.0 and 19.8 ms, as full fine-tuning",
    tuple(_latency(shape, [MERGED], same_latency) for shape in _CASES),
  ),
  Claim(
    "Adapters add latency",
    "Table 1: 2.2 to 30.3 % on GPT-2 M, the most at 1 x 128 tokens",
    tuple(_latency(shape, ADAPTERS, more_latency) for shape in _CASES),
  ),
  Claim(
    "LoRA needs three times less memory for training",
    "Abstract and section 4.2: 350 GB against 1.2 TB, GPT-3",
    tuple(_sizes(model, less_memory) for model in ("GPT-3", "GPT-2 M", "DeBERTa XXL")),
  ),
  Claim(
    "LoRA trains 25 % faster than full fine-tuning: here, by the operations of a step",
    "Section 4.2: 43.1 against 32.5 tokens/s on a V100, GPT-3",
    tuple(_sizes(model, fewer_operations) for model in ("GPT-3", "GPT-2 M", "DeBERTa XXL")),
  ),
  Claim(
    "LoRA's checkpoint is 10,000 times smaller",
    "Section 4.2: 35 MB against 350 GB, GPT-3, rank 4 on q and v",
    (_sizes("GPT-3", smaller_checkpoint),),
  ),
)
