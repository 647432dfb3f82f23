"""The methods of adaptation that experiments can run, in one table; no other code has their names.

A new method is one row. Other code reads its fields: the label of results, the config fields that
matter, what is saved and exported.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray, PyTree

import lora_jax as lj
from experiments.harness.config import AdaptationConfig
from lora_jax.adapters.start import fold_path
from lora_jax.files import read_json

TOKENS = "lora.tokens"
WIDTH, DROPPED = "bottleneck.width", "bottleneck.num_dropped"
SETTINGS = ("top_layers", "random_subspace", "prefix", WIDTH, DROPPED, TOKENS)
"""The sections and fields of a config that have an effect on those methods only that name them."""

RANKS = "ranks.json"
"""In a run's folder: by path, the ranks that a method has chosen from data."""

COPIED = "copied_blocks"
"""The value of `lora.init` by which all layers start with the same A."""

FROM_DATA = ("gpt2_e2e", "finetune")
"""The experiments that initialize adapters from data."""

EMBEDDINGS = ("wte/embedding", "token_embedding/embedding")
EMBEDDING = "|".join(EMBEDDINGS)
"""The embedding of a language model's tokens, GPT-2's or another's."""

Adapt = Callable[[Callable[..., Any]], lj.Adaptation]
MakeSchedule = Callable[[int], optax.Schedule]
"""From a number of steps to the config's schedule of the learning rate."""


class Setup(NamedTuple):
  """What the optimizer of a run may depend on.

  Attributes:
    config: the run's config.
    params: the base params, or their shapes.
    trainable: the initial trainable tree, or its shapes.
    num_train_steps: number of updates.
  """

  config: Any  # an AdaptationConfig; pretraining's has no such sections
  params: PyTree
  trainable: PyTree
  num_train_steps: int


def _config_schedule(make: MakeSchedule, num_train_steps: int) -> optax.Schedule:
  return make(num_train_steps)


@dataclasses.dataclass(frozen=True)
class Method:
  """A row of the table.

  Attributes:
    label: the name in tables and plots.
    make: returns, for a run's config, a function that adapts a function; None trains nothing.
    ignores: config fields, or whole sections, that have no effect on its runs.
    settings: the sections and fields among `SETTINGS` that have one.
    owns_base: the trainable tree is the base model itself, whose arrays training donates.
    merges: whether the trained tree can be merged into the base model's params.
    variant: the variant of LoRA; None is LoRA itself.
    target: the weights that it adapts, instead of `lora.target`.
    rules: settings of some of them.
    extra: the leaves that it trains fully, where it adapts no weights and PEFT has it.
    exports_adapter: whether PEFT has a format for its adapters, or for the LoRA that they are.
    is_prompt: whether its adapters are PEFT's prompt tuning, if all slots are before the prompt.
    has_conv1d: whether also for GPT-2's layers, which are not linear layers in `transformers`.
    has_servers: whether adapter servers such as vLLM read that format: plain LoRA.
    is_floor: whether its texts come from the data set, without a model.
    corrects_quantization: whether the adapter starts from the base model's quantization error.
    from_data: returns the config whose adapter is initialized from batches, as `lj.eva_config`.
    num_batches: the number of training batches that it takes, the first ones.
    num_cycles: the number of pairs that are trained one after another, each of the config's rank.
    wrap: returns the method's optimizer, from that of the config.
    schedule: returns the schedule of the learning rate, from the config's and the number of steps.
    learning_rate: the default, as a multiple of the config file's.
    tried_learning_rates: those of tuning sweeps, as multiples of one that all methods share.
    experiments: the experiments that have it; None is all that adapt a base model.
  """

  label: str
  make: Callable[[AdaptationConfig], Adapt] | None
  ignores: tuple[str, ...] = ()
  settings: tuple[str, ...] = ()
  owns_base: bool = False
  merges: bool = True
  variant: lj.Variant | None = None
  target: str | None = None
  rules: tuple[lj.LoraRule, ...] = ()
  extra: str | None = None
  exports_adapter: bool = False
  is_prompt: bool = False
  has_conv1d: bool = True
  has_servers: bool = False
  is_floor: bool = False
  corrects_quantization: bool = False
  from_data: Callable[..., lj.LoraConfig] | None = None
  num_batches: int = 8
  num_cycles: int = 1
  wrap: Callable[[optax.GradientTransformation, Setup], optax.GradientTransformation] | None = None
  schedule: Callable[[MakeSchedule, int], optax.Schedule] = _config_schedule
  learning_rate: float = 1.0
  tried_learning_rates: tuple[float, ...] = (1.0, 3.0, 10.0)
  experiments: tuple[str, ...] | None = None

  @property
  def trains(self) -> bool:
    return self.make is not None

  @property
  def saves_adapter(self) -> bool:
    """Whether a run's `adapter/` holds the trained tree; otherwise its checkpoints do."""
    return self.trains and not self.owns_base

  @property
  def shares_step(self) -> bool:
    """Whether its runs can be trained in one program: plain LoRA from a random start."""
    is_plain = self.has_servers and self.make is _low_rank  # DyLoRA draws up to the padded rank
    is_plain = is_plain and self.variant is None and self.wrap is None
    return is_plain and self.from_data is None and not self.corrects_quantization

  def remaining_base(self, params: PyTree, trained: PyTree) -> PyTree:
    """Returns the base model's params after training; the trained ones if it owns them."""
    if not self.owns_base:
      return params
    return lj.full_finetuning(lambda params: None).merge(params, trained)  # in params' dtypes

  def uses(self, field: str) -> bool:
    """Tells whether runs depend on a field of the config, or on a section, by dotted name."""
    for name in SETTINGS:
      if _is_in(field, name):
        return name in self.settings
    return not any(_is_in(field, name) for name in self.ignores)

  @property
  def needs_tokens(self) -> bool:
    """Whether `lora.tokens` are all that it trains."""
    return self.target == EMBEDDING


def _is_in(field: str, name: str) -> bool:
  """Tells whether a field is the one of this dotted name, or in that section."""
  return field == name or field.startswith(f"{name}.")


def lora_config(config: AdaptationConfig) -> lj.LoraConfig:
  """Returns the `LoraConfig` of a run, with its variant and its fully trained head.

  The ranks of a method that is initialized from data are those in the run's folder, if it has some.
  The tokens of `lora.tokens` are ids; their rows are trained together with the target.

  Raises:
    ValueError: if `lora.init` is not for the run's method.
  """
  lora, method = config.lora, METHODS[config.method]
  if lora.init == COPIED and config.method != "lora":
    raise ValueError(
      f"lora.init={COPIED} is for method=lora, and method is {config.method}. Choose another init"
    )
  if method.extra is not None:
    return lj.LoraConfig(1, 1.0, target=(), extra=(method.extra, *_head(config)))
  ranks = Path(config.workdir) / RANKS
  target, rules = [method.target or lora.target], method.rules
  if lora.token_ids:
    variant = lj.trainable_tokens_variant(lora.token_ids)
    target, rules = (
      [*target, EMBEDDING],
      (*rules, lj.LoraRule(EMBEDDING, dropout=0.0, variant=variant)),
    )
  whole = lj.LoraConfig(
    lora.rank,
    lora.alpha,
    target=target[0] if len(set(target)) == 1 else target,
    dropout=lora.dropout if method.uses("lora.dropout") else 0.0,
    init="kaiming_uniform" if lora.init == COPIED else lora.init,  # pyright: ignore[reportArgumentType]
    rules=rules,
    extra=config.head,
    variant=method.variant,
  )
  if method.num_cycles > 1:
    return lj.relora_config(whole, method.num_cycles)
  if method.from_data is None or not ranks.exists():
    return whole
  rules = [
    lj.LoraRule(re.escape(path), rank, lora.alpha * rank / lora.rank)
    for path, rank in read_json(ranks).items()
  ]
  return dataclasses.replace(whole, target=[rule.pattern for rule in rules], rules=rules)


def slots_of(config: AdaptationConfig) -> lj.Slots:
  """Returns the slots around each prompt of a run; those of other methods are none."""
  if not METHODS[config.method].uses("prefix"):
    return lj.Slots()
  return lj.Slots(config.prefix.num_prefix, config.prefix.num_infix)


def is_prompt_tuning(config: AdaptationConfig) -> bool:
  """Tells whether a run's adapter is PEFT's prompt tuning, which has no slots after the prompt."""
  return METHODS[config.method].is_prompt and config.prefix.num_infix == 0


def needs_weights(config: AdaptationConfig) -> bool:
  """Tells whether reading a run's adapter needs the base model's weights, not only their shapes."""
  return METHODS[config.method].variant is not None or bool(config.lora.token_ids)


def has_servers(config: AdaptationConfig) -> bool:
  """Tells whether adapter servers read a run's adapter: plain LoRA, and no trained tokens."""
  return METHODS[config.method].has_servers and not config.lora.token_ids


def exported_adapter(
  config: AdaptationConfig, trained: PyTree, params: PyTree
) -> tuple[lj.LoraConfig, PyTree]:
  """Returns a run's adapter as it is exported: as plain LoRA if its method's adapters are that.

  PEFT has a method of its own for some of these, which fewer programs read.

  Args:
    config: of the run.
    trained: its trained tree.
    params: the base model's, or their shapes.
  """
  lora, method = lora_config(config), METHODS[config.method]
  if not method.has_servers or method.variant is None:
    return lora, trained
  plain, trained = lj.to_lora(lora, trained, params)
  return dataclasses.replace(plain, dropout=lora.dropout), trained


def _without_data(variant: lj.Variant) -> lj.Variant:
  """Returns a variant that starts from zeros, for adapters that are read from a run's folder."""

  def zeros(key: PRNGKeyArray, site: lj.Site) -> dict[str, jax.Array]:
    del key
    return {
      name: jnp.zeros(site.array_shape(words), jnp.float32)
      for name, words in variant.arrays.items()
    }

  return variant._replace(start=zeros)


def _low_rank(config: AdaptationConfig) -> Adapt:
  lora = lora_config(config)
  if config.lora.init == COPIED:
    lora = dataclasses.replace(lora, variant=_copied_blocks(config.seed))
  return functools.partial(lj.lora, config=lora)


@functools.cache
def _copied_blocks(seed: int) -> lj.Variant:
  """Returns LoRA with one initial A for all layers, as in today's code of Hu et al. 2021.

  It builds a model's layers by `copy.deepcopy` of one, whose A is drawn before.
  """

  def start(key: PRNGKeyArray, site: lj.Site) -> dict[str, jax.Array]:
    del key  # it depends on the layer
    path = re.sub(r"_\d+/", "_/", site.path)
    arrays = lj.LORA.start(fold_path(jax.random.key(seed), path), site)
    a = arrays["lora_a"]
    if site.axes.batch:  # of scanned layers
      a = jnp.broadcast_to(a[:1], a.shape)
    return {**arrays, "lora_a": a}

  return lj.LORA._replace(start=start)


def _dylora(config: AdaptationConfig) -> Adapt:
  return functools.partial(lj.dylora, config=lora_config(config))


def _as_lora(label: str, variant: lj.Variant | None, **fields: Any) -> Method:
  """Returns the row of a variant whose adapters are exported as plain LoRA, exactly."""
  row = Method(label, _low_rank, variant=variant, exports_adapter=True, has_servers=True)
  return dataclasses.replace(row, **fields)


def _of_linear(label: str, variant: lj.Variant) -> Method:
  """Returns the row of a variant that PEFT has for linear layers, and not for GPT-2's."""
  return Method(
    label,
    make=_low_rank,
    ignores=("lora.init",),
    variant=variant,
    exports_adapter=True,
    has_conv1d=False,
  )


def _head(config: AdaptationConfig) -> tuple[str, ...]:
  return (config.head,) if isinstance(config.head, str) else config.head


def _ln_tuning(config: AdaptationConfig) -> Adapt:
  return functools.partial(lj.ln_tuning, train=lora_config(config).extra)


def _bitfit(config: AdaptationConfig) -> Adapt:
  return functools.partial(lj.bitfit, train=(lj.BIASES, *_head(config)))


def _top_layers(config: AdaptationConfig) -> Adapt:
  num_layers = config.top_layers.num_layers
  return functools.partial(lj.top_layers, num_layers=num_layers, extra=config.head)


def _random_subspace(config: AdaptationConfig) -> Adapt:
  fields = dataclasses.asdict(config.random_subspace)
  return functools.partial(lj.random_subspace, **fields, extra=config.head)


def _prefix(
  method: Callable[..., lj.Adaptation], with_lora: bool, config: AdaptationConfig
) -> Adapt:
  """Returns prefix tuning, of the experiment's head too, or LoRA together with prefix tuning."""
  prefix = functools.partial(method, num_slots=slots_of(config).count)
  if with_lora:
    return lambda fn: lj.compose(fn, _low_rank(config), prefix)
  if not config.head:
    return prefix
  head = functools.partial(lj.partial_finetuning, train=config.head)
  return lambda fn: lj.compose(fn, head, prefix)


def _of_prefix(
  label: str,
  method: Callable[..., lj.Adaptation],
  learning_rate: float,
  with_lora: bool = False,
  **fields: Any,
) -> Method:
  """Returns the row of a prefix method, alone or with LoRA."""
  return Method(
    label,
    make=functools.partial(_prefix, method, with_lora),
    ignores=("lora.start",) if with_lora else ("lora",),
    settings=("prefix",),
    merges=False,
    learning_rate=learning_rate,
    **fields,
  )


def _adapter(make: Callable[..., lj.BottleneckConfig], config: AdaptationConfig) -> Adapt:
  adapter = make(config.bottleneck.width, extra=config.head)
  return functools.partial(lj.bottleneck_adapter, config=adapter)


def _adapter_drop(config: AdaptationConfig) -> Adapt:
  num_dropped = config.bottleneck.num_dropped
  return _adapter(functools.partial(lj.adapter_drop_config, num_dropped=num_dropped), config)


def _of_adapter(
  label: str, make: Callable[[AdaptationConfig], Adapt], settings: tuple[str, ...] = (WIDTH,)
) -> Method:
  """Returns the row of a bottleneck adapter."""
  return Method(
    label,
    make=make,
    ignores=("lora",),
    settings=settings,
    merges=False,
    learning_rate=0.5,  # Hu et al. 2021, Table 12: 1e-4 for Adapter_H, and 2e-4 for LoRA
  )


def _lora_plus(optimizer: optax.GradientTransformation, run: Setup) -> optax.GradientTransformation:
  """Multiplies the optimizer's updates of B by the ratio, as if B had a faster learning rate."""
  del run
  times = functools.partial(optax.scale_by_learning_rate, flip_sign=False)
  return optax.chain(optimizer, lj.lora_plus(times, 1.0))


def _lora_fa(optimizer: optax.GradientTransformation, run: Setup) -> optax.GradientTransformation:
  return lj.lora_fa_optimizer(optimizer, lora_config(run.config), run.trainable, run.params)


def _adalora(optimizer: optax.GradientTransformation, run: Setup) -> optax.GradientTransformation:
  """Wraps the optimizer; the shares of the steps are those of the authors' command for MNLI.

  There, 8,000 and 50,000 of 86,000 steps are the first and the last ones, with a choice every 100.
  """
  steps = run.num_train_steps
  budget = lj.AdaLoraBudget(
    target_rank=max(round(run.config.lora.rank / 1.5), 1),
    num_train_steps=steps,
    initial_steps=round(0.09 * steps),
    final_steps=round(0.58 * steps),
    interval=max(round(0.001 * steps), 1),
  )
  return lj.adalora_optimizer(optimizer, budget)


CYCLES = 4  # of ReLoRA's runs of 20,000 steps in its authors' commands; also for Chain of LoRA


def _cycle_steps(num_train_steps: int) -> int:
  return math.ceil(num_train_steps / CYCLES)


def _relora(optimizer: optax.GradientTransformation, run: Setup) -> optax.GradientTransformation:
  steps = _cycle_steps(run.num_train_steps)
  return lj.relora_optimizer(optimizer, num_cycles=CYCLES, cycle_steps=steps)


def _chain_of_lora(
  optimizer: optax.GradientTransformation, run: Setup
) -> optax.GradientTransformation:
  steps = _cycle_steps(run.num_train_steps)
  return lj.chain_of_lora_optimizer(optimizer, num_cycles=CYCLES, cycle_steps=steps)


def _relora_schedule(make: MakeSchedule, num_train_steps: int) -> optax.Schedule:
  """Returns the config's schedule with warmups of 2 % of a cycle, as in its authors' commands.

  A cycle of one step has none: its learning rate would be 0.
  """
  steps = _cycle_steps(num_train_steps)
  warmup = min(math.ceil(0.02 * steps), steps - 1)
  return lj.relora_schedule(make(num_train_steps), cycle_steps=steps, warmup_steps=warmup)


def _chain_of_lora_schedule(make: MakeSchedule, num_train_steps: int) -> optax.Schedule:
  """Returns the config's schedule of a cycle, repeated; Chain of LoRA counts from each restart."""
  steps = _cycle_steps(num_train_steps)
  schedule = make(steps)

  def repeated(step: Any) -> Any:
    return schedule(step % steps)

  return repeated


METHODS: Mapping[str, Method] = {
  "lora": _as_lora("LoRA", None, settings=(TOKENS,)),
  "dora": Method("DoRA", make=_low_rank, variant=lj.DORA, exports_adapter=True, settings=(TOKENS,)),
  "qa_lora": _as_lora("QA-LoRA", lj.QA_LORA, experiments=("gpt2_e2e", "finetune")),
  "pissa": _as_lora("PiSSA", lj.PISSA, ignores=("lora.init",)),
  "olora": _as_lora("OLoRA", lj.OLORA, ignores=("lora.init",)),
  "milora": _as_lora("MiLoRA", lj.MILORA, ignores=("lora.init",)),
  "lora_xs": _as_lora("LoRA-XS", lj.LORA_XS, ignores=("lora.init",)),
  "eva": _as_lora(
    "EVA", None, ignores=("lora.init",), from_data=lj.eva_config, experiments=FROM_DATA
  ),
  "lora_ga": _as_lora(
    "LoRA-GA",
    _without_data(lj.LORA_GA),
    ignores=("lora.init",),
    from_data=lj.lora_ga_config,
    experiments=FROM_DATA,
  ),
  "corda": _as_lora(
    "CorDA",
    _without_data(lj.CORDA),
    ignores=("lora.init",),
    from_data=lj.corda_config,
    experiments=FROM_DATA,
  ),
  "loftq": _as_lora(
    "LoftQ",
    None,
    ignores=("lora.init",),
    corrects_quantization=True,
    experiments=("gpt2_e2e", "finetune"),
  ),
  "vera": _as_lora("VeRA", lj.VERA, ignores=("lora.alpha", "lora.init")),
  "rand_lora": Method(
    "RandLoRA",
    make=_low_rank,
    ignores=("lora.dropout", "lora.init"),
    variant=lj.RAND_LORA,
  ),
  "uni_lora": _as_lora("Uni-LoRA", lj.UNI_LORA, ignores=("lora.init",)),
  "tiny_lora": _as_lora("TinyLoRA", lj.TINY_LORA, ignores=("lora.init",)),
  "hira": Method(
    "HiRA", make=_low_rank, ignores=("lora.dropout",), variant=lj.HIRA, exports_adapter=True
  ),
  "loha": _of_linear("LoHa", lj.LOHA),
  "lokr": _of_linear("LoKr", lj.LOKR),
  "miss": _of_linear("MiSS", lj.MISS),
  "miss_mini": _of_linear("MiSS mini", lj.miss_mini_variant(1)),  # PEFT's default
  "ia3": Method(
    "(IA)^3",
    make=_low_rank,
    ignores=("lora",),
    variant=lj.IA3,
    target=r".*/(attn/(key|value)|mlp/(shared/)?down)/kernel",
    rules=(lj.LoraRule(r".*/mlp/(shared/)?down/kernel", variant=lj.IA3_FEEDFORWARD),),
    exports_adapter=True,
  ),
  "trainable_tokens": Method(
    "trainable tokens",
    make=_low_rank,
    ignores=("lora",),
    settings=(TOKENS,),
    target=EMBEDDING,
    exports_adapter=True,
    experiments=("gpt2_e2e", "finetune"),
  ),
  "lora_plus": _as_lora("LoRA+", None, wrap=_lora_plus, learning_rate=0.1),  # A's; B's is 1.6
  "lora_fa": _as_lora("LoRA-FA", lj.LORA_FA, wrap=_lora_fa),
  "asymmetry_lora": _as_lora("AsymmetryLoRA", lj.LORA_FA),
  "adalora": _as_lora("AdaLoRA", lj.ADALORA, ignores=("lora.init",), wrap=_adalora),
  "relora": _as_lora(
    "ReLoRA",
    None,
    ignores=("lora.dropout",),
    num_cycles=CYCLES,
    wrap=_relora,
    schedule=_relora_schedule,
  ),
  "chain_of_lora": _as_lora(
    "Chain of LoRA",
    None,
    ignores=("lora.dropout",),
    num_cycles=CYCLES,
    wrap=_chain_of_lora,
    schedule=_chain_of_lora_schedule,
  ),
  "dylora": _as_lora("DyLoRA", None, make=_dylora),
  "ln_tuning": Method(
    "LayerNorm tuning", make=_ln_tuning, ignores=("lora",), extra=lj.NORMS, exports_adapter=True
  ),
  "bitfit": Method(
    "BitFit",
    make=_bitfit,
    ignores=("lora",),
    learning_rate=8.0,  # Hu et al. 2021, Table 12: 1.6e-3, and 2e-4 for LoRA
  ),
  "top_layers": Method(
    "FT-Top-k",
    make=_top_layers,
    ignores=("lora",),
    settings=("top_layers",),
    learning_rate=0.1,  # as full fine-tuning's
    tried_learning_rates=(0.03, 0.1, 0.3),
  ),
  "random_subspace": Method(
    "random subspace",
    make=_random_subspace,
    ignores=("lora",),
    settings=("random_subspace",),
    tried_learning_rates=(1.0, 10.0, 100.0),
  ),
  # The rates relative to LoRA's are those of Hu et al. 2021, Table 12.
  "prefix_embedding": _of_prefix("PreEmbed", lj.prefix_embedding, 2.5, is_prompt=True),
  "prefix_layer": _of_prefix("PreLayer", lj.prefix_layer, learning_rate=0.5),
  "lora_prefix_embedding": _of_prefix("LoRA+PE", lj.prefix_embedding, 1.0, with_lora=True),
  "lora_prefix_layer": _of_prefix("LoRA+PL", lj.prefix_layer, 1.0, with_lora=True),
  "adapter_h": _of_adapter("Adapter_H", functools.partial(_adapter, lj.houlsby_config)),
  "adapter_l": _of_adapter("Adapter_L", functools.partial(_adapter, lj.lin_config)),
  "adapter_p": _of_adapter("Adapter_P", functools.partial(_adapter, lj.pfeiffer_config)),
  "adapter_d": _of_adapter("Adapter_D", _adapter_drop, (WIDTH, DROPPED)),
  "full_finetuning": Method(
    "full fine-tuning",
    make=lambda config: lj.full_finetuning,
    ignores=("lora",),
    owns_base=True,
    learning_rate=0.1,  # Schulman et al. 2025, "LoRA Without Regret": LoRA's is ten times this
    tried_learning_rates=(0.03, 0.1, 0.3),
  ),
  "head_only": Method(
    "head only",
    make=lambda config: functools.partial(lj.partial_finetuning, train=config.head),
    ignores=("lora",),
    experiments=("glue",),
  ),
  "frozen_base": Method(
    "frozen base",
    make=None,
    ignores=("lora", "optimizer", "fit", "data.num_train_records", "data.num_epochs"),
    experiments=("gpt2_e2e",),
  ),
  "floor": Method(
    "floor",
    make=None,
    ignores=(
      *("variant", "seed", "keep_freed_memory", "model", "lora", "optimizer", "fit", "mesh"),
      *(f"data.{name}" for name in ("num_train_records", "num_valid_records", "num_epochs")),
      *(f"data.{name}" for name in ("packing", "batch_size", "row_length", "loss_length")),
      *(f"data.{name}" for name in ("prompt", "max_length", "shuffled_completions", "percent")),
      *(f"decoding.{name}" for name in ("num_beams", "length_penalty", "no_repeat_ngram_size")),
      *(f"decoding.{name}" for name in ("max_new_tokens", "scoring", "batch_size", "num_shots")),
    ),
    is_floor=True,
    experiments=("gpt2_e2e",),
  ),
  "template": Method(
    "template", make=None, ignores=("experiment", "variant"), experiments=("e2e_template",)
  ),
}


def names(experiment: str | None = None, trains: bool = False) -> list[str]:
  """Returns the methods of an experiment, or all; with `trains` only those that train."""
  return [
    name
    for name, method in METHODS.items()
    if (experiment is None or method.experiments is None or experiment in method.experiments)
    and (method.trains or not trains)
  ]


def find_method(name: str, experiment: str | None = None) -> Method:
  """Returns the row of a method; raises ValueError if the experiment does not have it."""
  known = names(experiment)
  if name not in known:
    raise ValueError(f"method must be one of {', '.join(known)}, got {name!r}")
  return METHODS[name]


def adapt(config: AdaptationConfig) -> Adapt:
  """Returns a function that adapts any function of the params by the config's method.

  Raises:
    ValueError: if the experiment does not have it, or it trains nothing.
  """
  method = find_method(config.method, config.NAME)
  if method.make is None:
    raise ValueError(
      f"method={config.method} trains nothing; expected one of "
      f"{', '.join(names(config.NAME, trains=True))}"
    )
  return method.make(config)


def check_used(name: str, changed: Mapping[str, Any], experiment: str) -> None:
  """Raises ValueError if a field that was changed, by dotted name, has no effect on a method.

  The error names the experiment's methods that use it.
  """
  for field, value in changed.items():
    if not find_method(name, experiment).uses(field):
      users = [other for other in names(experiment, trains=True) if METHODS[other].uses(field)]
      raise ValueError(
        f"{field}={value!r} has no effect with method={name}: leave it out, or choose a method "
        f"that uses it: {', '.join(users)}"
      )


def default_learning_rate(learning_rate: float, tuned_for: str, name: str) -> float:
  """Returns a method's default learning rate, given that of another method."""
  ratio = find_method(name).learning_rate / find_method(tuned_for).learning_rate
  return multiples(learning_rate, [ratio])[0]


def multiples(learning_rate: float, factors: Iterable[float]) -> list[float]:
  """Returns multiples of a learning rate, rounded to six digits.

  >>> multiples(1e-3, (0.03, 0.1, 0.3))
  [3e-05, 0.0001, 0.0003]
  """
  return [float(f"{learning_rate * factor:.6g}") for factor in factors]
