"""The train step of a scanned model, partitioned over devices: what it gathers, sends and copies.

One step of a tiny GPT-2 is compiled for 4 x 2 emulated devices; its HLO is read after partitioning
and after all optimizations. No two kinds of array have the same shape.
"""

import re

import pytest

from experiments.plan.config import PlanLora
from experiments.plan.models import TARGETS, TOKEN_INPUTS, Planned
from experiments.plan.step import bytes_of, compile_step, lower_step
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.models.parts.causal_lm import shapes_of
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import make_mesh

LAYERS, D, MLP, ROWS, TOKENS, RANK, FSDP, TENSOR = 3, 64, 320, 8, 24, 2, 4, 2
KERNELS = {(D, D), (D, MLP), (MLP, D)}
LORA = PlanLora(RANK, 4.0, 0.0, r".*/attn/(query|value)/kernel")
ARRAY = re.compile(r"\w+\[([\d,]*)\]")


def shapes(text):
  """Returns the shapes in a piece of HLO, without axes of size 1."""
  sizes = ([int(n) for n in axes.split(",") if n] for axes in ARRAY.findall(text))
  return [tuple(n for n in shape if n != 1) for shape in sizes]


def parts_of(kernel):
  """Returns the shapes of a layer's kernel, whole and split over the mesh, in both orders."""
  rows, columns = kernel
  splits = (1, FSDP, TENSOR, FSDP * TENSOR)
  sizes = {(rows // i, columns // j) for i in splits for j in splits}
  return sizes | {size[::-1] for size in sizes}


WEIGHTS = set().union(*map(parts_of, KERNELS))


@pytest.fixture(scope="module")
def step():
  config = GPT2Config(
    vocab_size=96,
    num_positions=TOKENS,
    embed_dim=D,
    num_layers=LAYERS,
    num_heads=4,
    mlp_dim=MLP,
    scan_layers=True,
    remat="nothing_saveable",
  )
  model = GPT2(config)
  planned = Planned(
    lambda dtype: shapes_of(model),
    language_model_loss(model),
    (),
    TOKENS,
    TOKEN_INPUTS | TARGETS,
    {},
  )
  mesh = make_mesh(1, FSDP, TENSOR)
  return lower_step(planned, "lora", "float32", LORA, ROWS, TOKENS, mesh)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("hlo")


@pytest.fixture(scope="module")
def compiled(step, folder):
  return compile_step(step.lowered, folder)


@pytest.fixture(scope="module")
def collectives(compiled):
  """Returns (kind, shapes of the results, whether in a loop) of each collective."""
  rows, in_entry = [], False
  for line in compiled.text.splitlines():
    if re.match(r"(ENTRY )?%?[\w.]+ \(", line):
      in_entry = line.startswith("ENTRY")
    if match := re.search(r" = (.*?) (all-\w+|reduce-scatter|collective-permute)\(", line):
      rows.append((match[2], shapes(match[1]), not in_entry))
  return rows


def test_a_frozen_weight_is_gathered_in_its_layer_only(collectives):
  gathered = [(shape, is_loop) for _, results, is_loop in collectives for shape in results]
  in_layers = {shape for shape, is_loop in gathered if is_loop}
  assert in_layers & {(D, D // TENSOR), (D, MLP // TENSOR), (MLP // TENSOR, D)}
  for shape, is_loop in gathered:
    assert len(shape) < 3 or shape[0] != LAYERS, f"a stack {shape} is sent"
    assert is_loop or shape not in WEIGHTS, f"{shape} is sent outside its layer"


def test_no_gradient_of_a_frozen_weight_is_sent(collectives):
  kinds = ("all-reduce", "reduce-scatter")
  summed = {shape for kind, results, _ in collectives if kind in kinds for shape in results}
  assert summed & {(RANK, D // FSDP), (RANK, D // TENSOR), (RANK, D)}  # those of A and B are
  assert not summed & WEIGHTS


def test_the_base_is_neither_copied_nor_stacked_again(compiled, folder):
  del compiled  # its module is in the folder
  optimized = max((p.read_text() for p in folder.glob("*after_optimizations.txt")), key=len)
  stacks = 0
  for line in optimized.splitlines():
    match = re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (\w+\[\S+) ([\w-]+)\(", line)
    (shape,) = shapes(match[1].split("{")[0]) if match else [()]
    if match and shape[:1] == (LAYERS,) and shape[1:] in WEIGHTS:
      assert match[2] in ("parameter", "get-tuple-element", "bitcast"), line
      stacks += 1
  assert stacks >= 6  # kernels of a layer


def test_each_device_has_its_rows_and_its_tokens_of_what_layers_keep(compiled):
  kept = (LAYERS, ROWS // FSDP, TOKENS // TENSOR, D)
  present = set(shapes(compiled.text))
  assert kept in present
  of_all_rows = {shape for shape in present if shape[:2] == (ROWS, TOKENS)}
  assert of_all_rows <= {(ROWS, TOKENS), (ROWS, TOKENS, D // FSDP // TENSOR)}  # ids, and lookups


def test_hidden_states_and_their_gradient_are_gathered_once_in_a_pass(collectives):
  """Each gather of tokens is one before a layer: forward, recomputed, and of the gradient."""
  tokens = {(ROWS // FSDP * TOKENS, D), (ROWS // FSDP, TOKENS, D)}
  gathered = [
    shape
    for kind, results, is_loop in collectives
    for shape in results
    if kind == "all-gather" and is_loop and shape in tokens
  ]
  assert len(gathered) == 3


def test_arguments_are_the_bytes_of_the_arithmetic(compiled, step):
  assert compiled.arguments == bytes_of((step.state, step.frozen, step.batch))
  kept = 4 * LAYERS * (ROWS // FSDP) * (TOKENS // TENSOR) * D  # the layers' inputs, float32
  assert compiled.peak > compiled.arguments + kept
  trained = bytes_of(step.state.part)
  counter = 4
  assert bytes_of(step.state.opt_state) == 2 * trained + counter  # 8 bytes a float32 parameter
