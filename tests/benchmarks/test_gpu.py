"""The benchmark of a GPU, at toy size on a CPU."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu

LLAMA = "llama8b rows=1 nothing_saveable"


@pytest.mark.long
def test_the_benchmark_measures_prints_and_keeps_earlier_figures(capsys, monkeypatch, tmp_path):
  def in_this_process(name, tiny, attention, limit):
    return gpu.SECTIONS[name](tiny, attention)

  monkeypatch.setattr(gpu, "measure_apart", in_this_process)
  for name in ("matmul", LLAMA):
    figures = gpu.main(["--out", str(tmp_path), "--tiny", "--only", name])
  assert figures == json.loads((tmp_path / "figures.json").read_text())
  assert list(figures) == ["matmul", LLAMA, gpu.DORA]
  header, matmul, llama, dora, ratio = capsys.readouterr().out.splitlines()[-5:]
  assert header.split()[0] == "section"
  assert matmul.split()[-1] == "1.00"
  assert llama.removeprefix(LLAMA).split()[0] == "xla"
  assert dora.removeprefix(gpu.DORA).split()[0] == "xla"
  assert ratio.startswith("DoRA / LoRA: step ")
  step, lora = figures[LLAMA]["step_s"], figures[LLAMA]
  assert lora["fastest_s"] <= step <= lora["slowest_s"]
  assert lora["tokens_per_s"] == pytest.approx(64 / step)


def params_shapes(model):
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def test_operations_are_those_of_the_shapes():
  config = gpu.LlamaConfig(**gpu.TINY_LLAMA)
  params = params_shapes(gpu.Llama(config))
  attention, mlp = 64 * (64 + 32 + 32 + 64), 3 * 64 * 128
  assert gpu.count_matmul_weights(config, params) == 2 * (attention + mlp) + 64 * 512
  tied = gpu.GPT2Config(**gpu.TINY_GPT2, num_positions=16)
  params = params_shapes(gpu.GPT2(tied))
  assert gpu.count_matmul_weights(tied, params) == 2 * 12 * 64**2 + 64 * 512
  assert gpu.training_flops(100, 10, num_layers=2, embed_dim=8, length=4) == 400 + 60 + 384


def test_dora_trains_all_but_its_constant_and_its_operations_are_those_of_a_and_b():
  config = gpu.LlamaConfig(**gpu.TINY_LLAMA, num_positions=16, scan_layers=True)
  model, batch = gpu.Llama(config), gpu.make_batch(512, 1, 16)
  dora = gpu.measure_lora(model, batch, 4, gpu.QUERY_VALUE, None, 1, gpu.lj.dora)
  matrices = 2 * 4 * ((64 + 64) + (64 + 32))  # layers, rank, in + out of query and of value
  magnitudes = 2 * (64 + 32)  # of two layers' query and value; norm_squared is not among them
  assert dora["adapter_parameters"] == matrices + magnitudes
  weights = gpu.count_matmul_weights(config, params_shapes(model))
  assert dora["flops_per_token"] == gpu.training_flops(weights, matrices, 2, 64, 16)


def test_a_line_compares_dora_with_lora(capsys):
  figures = {"attention": "cudnn", "tflops": 1.0, "tokens_per_s": 1.0}
  lora, dora = {"step_s": 0.4, "peak_gb": 20.0}, {"step_s": 0.5, "peak_gb": 21.0}
  gpu.print_table({LLAMA: figures | lora, gpu.DORA: figures | dora})
  assert capsys.readouterr().out.splitlines()[-1] == "DoRA / LoRA: step 1.250, peak 1.050"
  gpu.print_table({LLAMA: figures | lora, gpu.DORA: {"error": "out of memory"}})
  assert "DoRA / LoRA" not in capsys.readouterr().out


def test_a_failure_of_cudnn_is_reported_with_the_figures_of_xla(monkeypatch):
  def without_cudnn(name, tiny, attention, limit):
    return {"error": "no cuDNN"} if attention == "cudnn" else {"attention": attention}

  monkeypatch.setattr(gpu, "measure_apart", without_cudnn)
  expected = {"attention": "xla", "error_of_cudnn": "no cuDNN"}
  assert gpu.measure_section(LLAMA, tiny=False, limit=1.0) == expected


def test_a_failed_section_has_a_row(capsys):
  gpu.print_table({"matmul": {"error": "Traceback\nRuntimeError: out of memory\n"}})
  assert "failed: RuntimeError: out of memory" in capsys.readouterr().out


def test_a_section_runs_in_a_separate_process():
  figures = gpu.measure_apart("matmul", tiny=True, attention="xla", limit=300.0)
  assert figures["device"] == "cpu"
  assert figures["tflops"] > 0
  assert "not finished" in gpu.measure_apart("matmul", True, "xla", limit=0.01)["error"]
