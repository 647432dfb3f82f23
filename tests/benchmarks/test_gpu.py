"""The benchmark of a GPU, at toy size on a CPU."""

import importlib.util
import json
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu, gpu_figures, gpu_training
from benchmarks.e2e_epoch import PEERS
from benchmarks.gpu_figures import TINY_GPT2, TINY_LLAMA
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.models.llama.model import Llama, LlamaConfig

LLAMA = "llama8b rows=1 nothing_saveable"
OF_PEERS = ("gpt2 medium packed, PEFT", "gpt2 medium, PEFT", gpu.BEAM)
without_peers = any(importlib.util.find_spec(name) is None for name in PEERS)
ONLY_THE_COMMAND = """
import sys

class Missing:
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in ("ml_collections", "tensorflow_datasets", "grain", "tensorboardX"):
      raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
from benchmarks import decode, e2e_epoch, gpu, gpu_figures, gpu_inference, gpu_training, turns
gpu.main(["--run", SECTION, "--tiny"])
"""


def in_this_process(name, tiny, attention, limit):
  return gpu.SECTIONS[name](tiny, attention)


@pytest.mark.long
def test_the_benchmark_measures_prints_and_keeps_earlier_figures(capsys, monkeypatch, tmp_path):
  monkeypatch.setattr(gpu, "measure_apart", in_this_process)
  for name in ("matmul", LLAMA):
    figures = gpu.main(["--out", str(tmp_path), "--tiny", "--only", name])
  assert figures == json.loads((tmp_path / "tiny.json").read_text())
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
  assert lora["nemo_tflops"] < lora["tflops"]


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in gpu.SECTIONS if name != "matmul"])
def test_every_section_runs_at_toy_size(name, capsys, monkeypatch, tmp_path):
  if name in OF_PEERS and without_peers:
    pytest.skip(f"needs {', '.join(PEERS)}")
  monkeypatch.setattr(gpu, "measure_apart", in_this_process)
  monkeypatch.setattr(gpu, "SECTIONS", {name: gpu.SECTIONS[name]})
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # those of transformers
    (figures,) = gpu.main(["--out", str(tmp_path), "--tiny"]).values()
  (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(name))
  assert "failed" not in row
  assert figures["step_s"] > 0
  assert figures["tokens_per_s"] > 0
  if name.startswith("concurrent"):
    assert figures["loss_difference"] < 1e-3  # bfloat16
    assert "3 runs: " in row
  if name == gpu.BEAM:
    assert figures["equal_outputs"] == 3


def params_shapes(model):
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def test_operations_are_those_of_the_shapes():
  config = LlamaConfig(**TINY_LLAMA)
  params = params_shapes(Llama(config))
  attention, mlp = 64 * (64 + 32 + 32 + 64), 3 * 64 * 128
  assert gpu_figures.count_matmul_weights(config, params) == 2 * (attention + mlp) + 64 * 512
  tied = GPT2Config(**TINY_GPT2, num_positions=16)
  params = params_shapes(GPT2(tied))
  assert gpu_figures.count_matmul_weights(tied, params) == 2 * 12 * 64**2 + 64 * 512
  assert gpu_figures.training_flops(100, 10, num_layers=2, embed_dim=8, length=4) == 400 + 60 + 384
  assert gpu_figures.nemo_flops(100, num_layers=2, embed_dim=8, length=4) == 400 + 256


def test_the_count_of_nemo_is_that_of_llama_3_8b():
  model = Llama(LlamaConfig(**gpu_figures.LLAMA_8B))
  weights = gpu_figures.count_matmul_weights(model.config, gpu_training.shapes_of(model))
  assert gpu_figures.nemo_flops(weights, 32, 4096, 4096) == pytest.approx(32.17e9, rel=1e-3)


def test_packed_rows_are_filled_with_examples_of_which_a_part_is_supervised():
  batch = gpu_figures.gpt2_batch(tiny=True, packed=True)
  used = np.count_nonzero(batch["segment_ids"])
  assert batch["segment_ids"].max(axis=1).tolist() == [2, 2]
  assert 0.6 * batch["tokens"].size < used < batch["tokens"].size
  assert 0.3 * used < batch["target_weights"].sum() < 0.7 * used


@pytest.mark.parametrize(("base", "dtype"), [("int8", "int8"), ("fp8", "float8_e4m3fn")])
def test_only_adapted_weights_are_stored_in_eight_bits(base, dtype):
  params = {
    "h": {"attn": {"query": {"kernel": jnp.ones((2, 8, 4), jnp.bfloat16)}}},
    "lm_head": {"kernel": jnp.ones((8, 4), jnp.bfloat16)},
  }
  stored = gpu_training.store(params, base)
  assert str(jax.tree.leaves(stored["h"])[0].dtype) == dtype
  assert stored["lm_head"]["kernel"] is params["lm_head"]["kernel"]
  assert gpu_training.store(params, "bfloat16") is params


def test_dora_trains_all_but_its_constant_and_its_operations_are_those_of_a_and_b():
  config = LlamaConfig(**TINY_LLAMA, num_positions=16, scan_layers=True)
  model, batch = Llama(config), gpu_figures.make_batch(512, 1, 16)
  params = gpu_figures.random_params(model)
  dora = gpu_training.measure_lora(
    model, params, batch, 4, gpu_training.QUERY_VALUE, None, 1, gpu.lj.dora
  )
  matrices = 2 * 4 * ((64 + 64) + (64 + 32))  # layers, rank, in + out of query and of value
  magnitudes = 2 * (64 + 32)  # of two layers' query and value; norm_squared is not among them
  assert dora["adapter_parameters"] == matrices + magnitudes
  weights = gpu_figures.count_matmul_weights(config, params_shapes(model))
  assert dora["flops_per_token"] == gpu_figures.training_flops(weights, matrices, 2, 64, 16)


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
  figures = gpu.measure_section(LLAMA, tiny=False, limit=1.0)
  assert figures.pop("section_s") < 1.0
  assert figures == {"attention": "xla", "error_of_cudnn": "no cuDNN"}


def test_sections_after_the_time_limit_have_a_row_that_says_so(capsys, monkeypatch, tmp_path):
  monkeypatch.setattr(gpu, "measure_section", lambda name, tiny, limit: {"step_s": limit})
  figures = gpu.main(["--out", str(tmp_path), "--only", "matmul", "--minutes", "1"])
  assert 59 < figures["matmul"]["step_s"] <= 60
  figures = gpu.main(["--out", str(tmp_path), "--only", "matmul", "merged", "--minutes", "0"])
  assert figures["matmul"]["step_s"] > 59  # an earlier figure is kept
  printed = capsys.readouterr().out
  assert printed.count("failed: not run: 0 minutes were over") == 2


def test_toy_sizes_are_kept_apart_from_the_figures(monkeypatch, tmp_path):
  monkeypatch.setattr(gpu, "measure_section", lambda name, tiny, limit: {"step_s": 1.0 + tiny})
  gpu.main(["--out", str(tmp_path), "--only", "matmul"])
  gpu.main(["--out", str(tmp_path), "--only", "matmul", "--tiny"])
  assert json.loads((tmp_path / "figures.json").read_text()) == {"matmul": {"step_s": 1.0}}
  assert json.loads((tmp_path / "tiny.json").read_text()) == {"matmul": {"step_s": 2.0}}


@pytest.mark.parametrize("names", [["llama70b"], ["matmul", "llama70b"]])
def test_a_section_that_does_not_exist_is_refused(names, capsys, tmp_path):
  with pytest.raises(SystemExit):
    gpu.main(["--out", str(tmp_path), "--only", *names])
  printed = capsys.readouterr().err
  assert "--only must be prefixes of matmul, llama8b rows=1 dots" in printed
  assert "got ['llama70b']" in printed


@pytest.mark.parametrize("content", ['{"matmul": {"step_s"', "[1]", '{"matmul": 1}', "\x00"])
def test_a_file_without_figures_is_refused_and_kept(content, capsys, tmp_path):
  path = tmp_path / "tiny.json"
  path.write_text(content)
  with pytest.raises(SystemExit):
    gpu.main(["--out", str(tmp_path), "--tiny", "--only", "matmul"])
  printed = capsys.readouterr().err
  assert str(path) in printed
  assert gpu.REMEDY in printed
  assert path.read_text() == content


def test_a_file_as_the_folder_is_refused(capsys, tmp_path):
  path = tmp_path / "file"
  path.touch()
  with pytest.raises(SystemExit):
    gpu.main(["--out", str(path), "--only", "matmul"])
  assert "cannot be a folder" in capsys.readouterr().err


def test_figures_are_written_whole_or_not_at_all(monkeypatch, tmp_path):
  path = tmp_path / "figures.json"
  gpu.write_figures(path, {"matmul": {"step_s": 1.0}})

  def interrupted(self, text):
    with self.open("w") as file:
      file.write(text[:5])
    raise OSError("no space left on device")

  monkeypatch.setattr(gpu.Path, "write_text", interrupted)
  with pytest.raises(OSError, match="no space"):
    gpu.write_figures(path, {"matmul": {"step_s": 2.0}})
  assert gpu.read_figures(path) == {"matmul": {"step_s": 1.0}}


def test_a_failed_section_has_a_row(capsys):
  gpu.print_table({"matmul": {"error": "Traceback\nRuntimeError: out of memory\n"}})
  assert "failed: RuntimeError: out of memory" in capsys.readouterr().out


def test_a_section_that_is_killed_without_a_word_has_a_row(capsys, monkeypatch):
  killed = subprocess.CompletedProcess([], -9, "", "")
  monkeypatch.setattr(gpu.subprocess, "run", lambda *args, **options: killed)
  gpu.print_table({"matmul": gpu.measure_apart("matmul", True, "xla", 1.0)})
  assert "failed: exit status -9" in capsys.readouterr().out


@pytest.mark.parametrize(
  "name", ["matmul", pytest.param("concurrent, length 64", marks=pytest.mark.long)]
)
def test_the_command_needs_no_package_of_the_experiments(name):
  command = [sys.executable, "-c", ONLY_THE_COMMAND.replace("SECTION", repr(name))]
  process = subprocess.run(command, capture_output=True, text=True, check=True)
  assert json.loads(process.stdout)["step_s"] > 0


def test_a_section_that_takes_too_long_is_stopped():
  assert "not finished" in gpu.measure_apart("matmul", True, "xla", limit=0.01)["error"]
