"""The benchmark of a GPU, at toy size on a CPU."""

import json

import pytest

from benchmarks import gpu

LLAMA = "llama8b rows=1 nothing_saveable"


def test_the_benchmark_measures_prints_and_keeps_earlier_figures(capsys, monkeypatch, tmp_path):
  def in_this_process(name, tiny, attention, limit):
    return gpu.SECTIONS[name](tiny, attention)

  monkeypatch.setattr(gpu, "measure_apart", in_this_process)
  for name in ("matmul", LLAMA):
    figures = gpu.main(["--out", str(tmp_path), "--tiny", "--only", name])
  assert figures == json.loads((tmp_path / "figures.json").read_text())
  assert list(figures) == ["matmul", LLAMA]
  header, matmul, llama = capsys.readouterr().out.splitlines()[-3:]
  assert header.split()[0] == "section"
  assert matmul.split()[-1] == "1.00"
  assert llama.removeprefix(LLAMA).split()[0] == "xla"
  step, lora = figures[LLAMA]["step_s"], figures[LLAMA]
  assert lora["fastest_s"] <= step <= lora["slowest_s"]
  assert lora["tokens_per_s"] == pytest.approx(64 / step)


def test_operations_are_those_of_the_shapes():
  config = gpu.LlamaConfig(**gpu.TINY_LLAMA)
  params = gpu.random_params(gpu.Llama(config))
  attention, mlp = 64 * (64 + 32 + 32 + 64), 3 * 64 * 128
  assert gpu.count_matmul_weights(config, params) == 2 * (attention + mlp) + 64 * 512
  tied = gpu.GPT2Config(**gpu.TINY_GPT2, num_positions=16)
  params = gpu.random_params(gpu.GPT2(tied))
  assert gpu.count_matmul_weights(tied, params) == 2 * 12 * 64**2 + 64 * 512
  assert gpu.training_flops(100, 10, num_layers=2, embed_dim=8, length=4) == 400 + 60 + 384


def test_cudnn_that_fails_is_reported_beside_the_figures_by_xla(monkeypatch):
  def without_cudnn(name, tiny, attention, limit):
    return {"error": "no cuDNN"} if attention == "cudnn" else {"attention": attention}

  monkeypatch.setattr(gpu, "measure_apart", without_cudnn)
  expected = {"attention": "xla", "error_of_cudnn": "no cuDNN"}
  assert gpu.measure_section(LLAMA, tiny=False, limit=1.0) == expected


def test_a_failed_section_has_a_row(capsys):
  gpu.print_table({"matmul": {"error": "Traceback\nRuntimeError: out of memory\n"}})
  assert "failed: RuntimeError: out of memory" in capsys.readouterr().out


def test_a_section_runs_in_a_process_of_its_own():
  figures = gpu.measure_apart("matmul", tiny=True, attention="xla", limit=300.0)
  assert figures["device"] == "cpu"
  assert figures["tflops"] > 0
  assert "not finished" in gpu.measure_apart("matmul", True, "xla", limit=0.01)["error"]
