"""The plan of a pod: its table, its advice, its topologies, and one small plan from the command."""

import importlib.util
import types

import jax
import pytest

from experiments import gpt3_plan
from experiments.configs.gpt3_plan import get_config
from experiments.harness.config import read_config, replace_fields
from experiments.harness.fit import count
from experiments.plan import step
from experiments.plan.chips import CHIPS, GIB, find_devices
from experiments.plan.config import PlanConfig
from experiments.plan.models import MODELS, find_model
from experiments.plan.step import Costs, bytes_of, params_shapes
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.training.mesh import make_mesh

CONFIG = read_config(PlanConfig, get_config())
SMALL = GPT2Config(vocab_size=64, num_positions=16, embed_dim=32, num_layers=2, num_heads=4)
FULL = Costs(
  trained_parameters=1000,
  weights=20 * GIB,
  optimizer=40 * GIB,
  gradients=20 * GIB,
  arguments=60 * GIB,
  peak=100 * GIB,
  flops=459e12,
  sent={"all-gather": 300e9, "all-reduce": 600e9},
  seconds=7.0,
  fits=True,
)
LORA = FULL._replace(
  trained_parameters=10, gradients=0.0, arguments=5 * GIB, peak=20 * GIB, sent={}
)


def result_of(**methods):
  costs = {name: cost._asdict() for name, cost in methods.items()}
  return {"mesh": {"data": 1, "fsdp": 16, "tensor": 4}, "batch_size": 32, "methods": costs}


def test_the_table_has_each_method_and_its_floors():
  text = gpt3_plan.report(CONFIG, result_of(lora=LORA, full_finetuning=FULL))
  rows = {
    row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]]
    for row in text.splitlines()
    if row.startswith("|")
  }
  assert rows["per chip"] == ["LoRA", "full fine-tuning"]
  assert rows["trained parameters"] == ["10", "1,000"]
  assert rows["arguments of all chips"][0] == f"{64 * 5 * GIB / 1e9:.2f} GB"
  assert rows["floor by operations"] == ["1000 ms", "1000 ms"]
  assert rows["floor by links"] == ["0 ms", "1500 ms"]
  assert rows["- all-reduce"] == ["0.00 MB", "600.00 GB"]
  assert rows["tokens/s at the highest floor"] == [f"{32 * 512:,}", f"{32 * 512 / 1.5:,.0f}"]
  assert "peak memory of LoRA: 0.200 of that of full fine-tuning" in text
  assert "full fine-tuning: needs 100.0 GiB of the 95 GiB of a chip" in text
  assert "LoRA: needs" not in text
  assert (
    "memory in section 4.2 of the paper: LoRA 350.00 GB, full fine-tuning 1.20 TB; arguments of "
    f"all chips here: LoRA {64 * 5 * GIB / 1e9:.2f} GB, full fine-tuning 4.12 TB" in text
  )
  other = gpt3_plan.report(replace_fields(CONFIG, {"model": "llama3_8b"}), result_of(lora=LORA))
  assert "section 4.2" not in other


@pytest.mark.parametrize(
  ("message", "needed"),
  [
    ("Used 1.50T of 15.75G hbm. Exceeded hbm capacity by 1.48T", 1536 * GIB),
    (
      # of libtpu 0.0.42.1, for full fine-tuning of llama3_8b on v5e:2x2; the same step on v5p:2x2x1
      # has a peak of 32.33 GiB, of which 22.43 are arguments
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
      "temporaries (32.22G) exceeds available HBM (15.75G).",
      32.22 * GIB,
    ),
  ],
)
def test_a_step_that_the_compiler_cannot_place_has_a_peak(message, needed, monkeypatch, tmp_path):
  def fails(compiler_options):
    raise jax.errors.JaxRuntimeError(message)

  lowered = types.SimpleNamespace(compile=fails)
  monkeypatch.setattr(step, "_partitioned", lambda folder: "a module")
  compiled = step.compile_step(lowered, tmp_path)
  assert compiled == step.Compiled(0.0, pytest.approx(needed), False, "a module")
  message = "INTERNAL: another error"
  with pytest.raises(jax.errors.JaxRuntimeError, match="another"):
    step.compile_step(lowered, tmp_path)


@pytest.mark.parametrize(
  ("changes", "cost", "words"),
  [
    ({}, FULL, ("fewer rows than 2", "--config.data.loss_chunk=64", "--config.mesh.tensor=8")),
    ({"remat": ""}, FULL, ("--config.remat=nothing_saveable",)),
    (
      {},
      FULL._replace(arguments=120 * GIB, peak=150 * GIB),
      ("gradients are 140.0 GiB: take at least 105 chips", "--base=int8 or nf4"),
    ),
    (
      {"topology": "v5e:8x8"},
      LORA._replace(arguments=25 * GIB, peak=28 * GIB, fits=False),
      ("28.0 GiB of the 16 GiB", "at least 112 chips;", "take as many chips of v5p or v6e"),
    ),
  ],
)
def test_what_does_not_fit_is_said_with_what_may(changes, cost, words):
  text = gpt3_plan.report(replace_fields(CONFIG, changes), result_of(lora=cost))
  assert all(word in text for word in words), text


def test_tensor_grows_with_the_chips_where_it_takes_them_all():
  result = result_of(lora=FULL) | {"mesh": {"data": 1, "fsdp": 1, "tensor": 4}}
  assert "--config.mesh.tensor=8, on twice the chips" in gpt3_plan.report(CONFIG, result)


def test_logits_in_chunks_are_no_advice_for_a_classifier():
  text = gpt3_plan.report(replace_fields(CONFIG, {"model": "deberta_xxl"}), result_of(lora=FULL))
  assert "fewer rows than 2" in text
  assert "loss_chunk" not in text


@pytest.mark.long
@pytest.mark.parametrize("base", ["bfloat16", "int8"])
def test_a_small_plan_from_its_config(base, monkeypatch, tmp_path, capsys):
  monkeypatch.setitem(MODELS, "small", (GPT2, SMALL))
  config = get_config()
  config.topology, config.model, config.workdir = "cpu:4", "small", str(tmp_path)
  config.methods, config.data.row_length, config.mesh.tensor = ("lora",), 8, 2
  config.base = base
  result = gpt3_plan.run(config)
  costs = result["methods"]["lora"]
  assert result["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
  assert costs["trained_parameters"] == 2 * 2 * 2 * 32 * 4
  assert costs["weights"] + costs["optimizer"] < costs["arguments"] < costs["peak"]
  assert costs["sent"]["all-gather"] > 0 < costs["flops"]
  assert "| trained parameters" in capsys.readouterr().out
  assert gpt3_plan.run(config) == result  # stored


def test_the_weights_of_gpt3_by_arithmetic():
  model, mesh = find_model("gpt3", None, scan_layers=True), make_mesh(1, 4, 2)
  bfloat16, int8, nf4 = (params_shapes(model, base, mesh) for base in ("bfloat16", "int8", "nf4"))
  d, num_layers, rows = 12288, 96, 50257 + 2048
  assert count(bfloat16) == rows * d + num_layers * (12 * d**2 + 13 * d) + 2 * d
  part = bytes_of(bfloat16)
  assert 2 * count(bfloat16) / 8 <= part < 2.01 * count(bfloat16) / 8  # norms are on all devices
  assert 0.50 < bytes_of(int8) / part < 0.51
  assert 0.25 < bytes_of(nf4) / part < 0.28


def test_bad_topologies_meshes_and_batches_are_refused(monkeypatch):
  for topology in ("v5p", "v5p:4x", "v9:2x2", "cpu:0"):
    with pytest.raises(ValueError, match="topology must be one of v5e, v5p, v6e"):
      find_devices(topology)
  with pytest.raises(ValueError, match="at most 8 devices, got 16"):
    find_devices("cpu:16")
  for size in ("4x2", "100000"):
    with pytest.raises(ValueError, match=f"at most 1024 devices, such as 8, got '{size}'"):
      find_devices(f"cpu:{size}")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(RuntimeError, match=r"pip install 'lora-jax\[tpu-plan\]'"):
    find_devices("v5p:4x4x4")
  for changes, message in (
    ({"mesh.tensor": 3}, r"mesh.data=1 x mesh.tensor=3 must divide the 8 chips of cpu:8"),
    ({"data.batch_size": 3}, "data.batch_size=3 must be a multiple of the 2 parts"),
    ({"methods": ()}, "methods must be some of lora, full_finetuning, each once, got"),
    ({"methods": ("lora", "lora")}, "methods must be some of lora, full_finetuning, each once"),
    ({"model": "deberta_xxl", "data.loss_chunk": 8}, "data.loss_chunk=8 has no effect on deb"),
    (
      {"data.row_length": 10_000},
      "data.row_length=10000 must be at most the model's 2048 positions",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      gpt3_plan._run(replace_fields(CONFIG, {"topology": "cpu:8"} | changes))


def test_an_unknown_model_is_refused_with_the_names_of_shapes():
  with pytest.raises(FileNotFoundError, match=r"/llama3-70b .*folder: gpt3, gpt2_medium, "):
    find_model("./llama3-70b", None)


def test_the_chips_of_the_page_are_those_of_the_table():
  assert set(CHIPS) == {"v5e", "v5p", "v6e"}
  for chip in CHIPS.values():  # links are slower than memory, memory slower than matmuls
    assert chip.link_rate < chip.memory_rate < chip.flops / 100
