"""The train step of a scanned model, partitioned over devices: what it gathers, sends and copies.

One step of a tiny model is compiled for 4 x 2 emulated devices; its HLO is read after partitioning
and after all optimizations. No two kinds of array have the same shape.
"""

import functools
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from experiments.plan.config import PlanLora
from experiments.plan.models import make_plan
from experiments.plan.step import Compiled, Step, bytes_of, compile_step, lower_step
from lora_jax.models.deberta.model import Deberta, DebertaConfig
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.models.llama.model import Llama, LlamaConfig, MixtureConfig
from lora_jax.models.parts.causal_lm import shapes_of
from lora_jax.training.mesh import make_mesh
from lora_jax.trees import leaves_with_path

LAYERS, D, MLP, ROWS, TOKENS, RANK, FSDP, TENSOR = 3, 64, 320, 8, 24, 2, 4, 2
SPLITS = (1, FSDP, TENSOR, FSDP * TENSOR)
LORA = PlanLora(RANK, 4.0, 0.0, r".*/attn/(query|value)/kernel")
ARRAY = re.compile(r"\w+\[([\d,]*)\]")
KINDS = "all-gather|all-reduce|reduce-scatter|(?:ragged-)?all-to-all|collective-[a-z]+"
COLLECTIVE = re.compile(rf" = (.*?) ({KINDS})(?:-start)?\(")
SHAPE: dict[str, Any] = {
  **{"vocab_size": 136, "num_positions": 40, "embed_dim": D, "num_layers": LAYERS, "num_heads": 4},
  **{"mlp_dim": MLP, "scan_layers": True, "remat": "nothing_saveable"},
}
EXPERTS = MixtureConfig(num_experts=20, experts_per_token=2, shared_dim=224)
MODELS = {
  "gpt2": lambda: GPT2(GPT2Config(**SHAPE)),
  "llama": lambda: Llama(LlamaConfig(**SHAPE, num_kv_heads=2)),
  "mixture": lambda: Llama(LlamaConfig(**SHAPE, num_kv_heads=2, mixture=EXPERTS)),
  "deberta": lambda: Deberta(DebertaConfig(**SHAPE, num_labels=3, conv_size=5)),
}
FAMILIES = ["gpt2", *(pytest.param(name, marks=pytest.mark.long) for name in list(MODELS)[1:])]
TRAINED_HEAD = {"deberta": {(D, D // TENSOR), (D // TENSOR, D)}}  # as large as a layer's kernel


def shapes(text):
  """Returns the shapes in a piece of HLO, without axes of size 1."""
  sizes = ([int(n) for n in axes.split(",") if n] for axes in ARRAY.findall(text))
  return [tuple(n for n in shape if n != 1) for shape in sizes]


def parts_of(kernel):
  """Returns the shapes of a kernel, whole and split over the mesh, in both orders."""
  *stack, rows, columns = kernel
  splits = [(i, j) for i in SPLITS for j in SPLITS if i * j <= FSDP * TENSOR]
  sizes = {(rows // i, columns // j) for i, j in splits if rows % i == columns % j == 0}
  return {(*stack, *size) for size in sizes | {size[::-1] for size in sizes}}


class Kernels(NamedTuple):
  """The shapes of a model's frozen weights, whole and split.

  Attributes:
    in_layers: of one layer's kernels, without the axis of layers.
    tables: of embeddings and of a head of its own.
    num_stacks: the number of stacked kernels.
  """

  in_layers: set[tuple[int, ...]]
  tables: set[tuple[int, ...]]
  num_stacks: int


def kernels_of(model) -> Kernels:
  leaves = leaves_with_path(shapes_of(model))
  stacks = [leaf.shape[1:] for _, leaf in leaves if leaf.shape[0] == LAYERS and leaf.ndim > 2]
  tables = [leaf.shape for _, leaf in leaves if leaf.ndim == 2 and leaf.shape[0] in (136, 40)]
  tables += [leaf.shape for path, leaf in leaves if path.startswith("lm_head") and leaf.ndim == 2]
  return Kernels(
    set().union(*map(parts_of, stacks)), set().union(*map(parts_of, tables)), len(stacks)
  )


class Program(NamedTuple):
  """A family's compiled step.

  Attributes:
    step: as it was traced.
    compiled: with the module after its partitioning.
    optimized: the module after all optimizations.
    collectives: kind, shapes of the results, whether in a loop.
    kernels: the frozen weights.
  """

  step: Step
  compiled: Compiled
  optimized: str
  collectives: list[tuple[str, list[tuple[int, ...]], bool]]
  kernels: Kernels


@functools.cache
def program(family) -> Program:
  model = MODELS[family]()
  planned = make_plan(model, lambda dtype: shapes_of(model))
  mesh = make_mesh(1, FSDP, TENSOR)
  step = lower_step(planned, "lora", "float32", LORA, ROWS, TOKENS, mesh)
  with tempfile.TemporaryDirectory() as name:
    compiled = compile_step(step.lowered, Path(name))
    texts = (path.read_text() for path in Path(name).glob("*after_optimizations.txt"))
    optimized = max(texts, key=len)
  collectives, in_entry = [], False
  for line in compiled.text.splitlines():
    if re.match(r"(ENTRY )?%?[\w.]+ \(", line):
      in_entry = line.startswith("ENTRY")
    if match := COLLECTIVE.search(line):
      collectives.append((match[2], shapes(match[1]), not in_entry))
  return Program(step, compiled, optimized, collectives, kernels_of(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_weight_is_gathered_in_its_layer_only(family):
  _, _, _, collectives, kernels = program(family)
  trained = TRAINED_HEAD.get(family, set())
  gathered = [(shape, is_loop) for _, results, is_loop in collectives for shape in results]
  in_layers = {shape for shape, is_loop in gathered if is_loop}
  assert in_layers & {(D, D // TENSOR), (D, MLP // TENSOR), (MLP // TENSOR, D)}
  for shape, is_loop in gathered:
    assert len(shape) < 3 or shape[0] != LAYERS, f"a stack {shape} is sent"
    assert is_loop or shape not in kernels.in_layers - trained, f"{shape} is sent outside a layer"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_of_a_frozen_weight_is_sent(family):
  """Neither summed nor moved, whether of a layer, of a table or of the head."""
  _, _, _, collectives, kernels = program(family)
  moved = [entry for entry in collectives if entry[0] != "all-gather"]
  summed = {shape for _, results, _ in moved for shape in results}
  assert summed & {(RANK, D // FSDP), (RANK, D // TENSOR), (RANK, D)}  # those of A and B are
  assert not summed & kernels.tables
  assert not {shape[1:] for shape in summed if shape[:1] == (LAYERS,)} & kernels.in_layers
  in_loops = {shape for _, results, is_loop in moved if is_loop for shape in results}
  assert not in_loops & kernels.in_layers
  assert not summed & (kernels.in_layers - TRAINED_HEAD.get(family, set()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_is_neither_copied_nor_stacked_again(family):
  _, _, optimized, _, kernels = program(family)
  stacks = 0
  for line in optimized.splitlines():
    match = re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (\w+\[\S+) ([\w-]+)\(", line)
    (shape,) = shapes(match[1].split("{")[0]) if match else [()]
    if match and shape[:1] == (LAYERS,) and shape[1:] in kernels.in_layers:
      assert match[2] in ("parameter", "get-tuple-element", "bitcast"), line
      stacks += 1
  assert stacks >= kernels.num_stacks


def test_each_device_has_its_rows_and_its_tokens_of_what_layers_keep():
  kept = (LAYERS, ROWS // FSDP, TOKENS // TENSOR, D)
  present = set(shapes(program("gpt2").compiled.text))
  assert kept in present
  of_all_rows = {shape for shape in present if shape[:2] == (ROWS, TOKENS)}
  assert of_all_rows <= {(ROWS, TOKENS), (ROWS, TOKENS, D // FSDP // TENSOR)}  # ids, and lookups


def test_hidden_states_and_their_gradient_are_gathered_once_in_a_pass():
  """Each gather of tokens is one before a layer: forward, recomputed, and of the gradient."""
  tokens = {(ROWS // FSDP * TOKENS, D), (ROWS // FSDP, TOKENS, D)}
  gathered = [
    shape
    for kind, results, is_loop in program("gpt2").collectives
    for shape in results
    if kind == "all-gather" and is_loop and shape in tokens
  ]
  assert len(gathered) == 3


def test_arguments_are_the_bytes_of_the_arithmetic():
  step, compiled, *_ = program("gpt2")
  assert compiled.arguments == bytes_of((step.state, step.frozen, step.batch))
  kept = 4 * LAYERS * (ROWS // FSDP) * (TOKENS // TENSOR) * D  # the layers' inputs, float32
  assert compiled.peak > compiled.arguments + kept
  trained = bytes_of(step.state.part)
  counter = 4
  assert bytes_of(step.state.opt_state) == 2 * trained + counter  # 8 bytes a float32 parameter
