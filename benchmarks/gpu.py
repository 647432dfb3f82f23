"""LoRA on one GPU: training steps, concurrent runs, latency and decoding; time and memory.

    python -m benchmarks.gpu --out FOLDER
    python -m benchmarks.gpu --out FOLDER --only matmul "gpt2 medium"  # prefixes of the names
    JAX_PLATFORMS=cpu python -m benchmarks.gpu --out FOLDER --tiny     # toy sizes, no GPU

Needs jax, flax, optax, torch, transformers and peft, and what they bring. Weights and tokens are
random. Each section runs in a separate process, so that peak memory is measured per section.
FOLDER/figures.json is written after each one, and tiny.json with `--tiny`; a later run adds its
sections to the file. Training steps are the library's own: `make_train_step` and
`make_concurrent_step`. Sections run in the order of the table until `--minutes` are over; those
left out have a row that says so. Attention is cuDNN's; if cuDNN fails, XLA's is measured and the
row says so.

    matmul       bfloat16, (8192, 8192) @ (8192, 8192)
    llama8b      Llama 3 8B, bfloat16, rows of 4096 tokens; rank 16 on all linear layers; AdamW.
                 LoRA, unless the name says DoRA. int8 and fp8: the adapted weights are stored so,
                 and cast to bfloat16 where they are used
    gpt2 medium  float32 weights, bfloat16 computation, 16 rows of 512 tokens; rank 4 on query and
                 value; AdamW. PEFT with torch.compile: rank 8 on the fused query, key, value layer.
                 "packed": rows of several examples as long as E2E's, a loss on their completions;
                 otherwise full rows with a loss at every token
    concurrent   16 runs of GPT-2 medium, 8 rows each, in one step (step_s) and one after another;
                 each with its own learning rate
    merged       a prompt through GPT-2 medium, bfloat16: the base model (step_s), merged LoRA, LoRA
    beam         beam search with GPT-2 medium, float32: 64 prompts (step_s), and transformers

    step_s    seconds of a step, median
    tokens/s  tokens of a step, without padding, over step_s
    peak_gb   peak memory of the allocator, weights included; of `concurrent`, `merged` and beam
              search, that of all ways together, as they take turns in one process
    tflop/s   matmul operations that the gradient needs, without recomputation: 4 per frozen weight
              and token, 6 per adapter weight and token, 3 times the forward of causal attention.
              Elementwise operations and DoRA's norms are not counted
    nemo      tflop/s by NVIDIA NeMo's count: 4 per frozen weight, 2 times the forward of attention
    share     tflop/s over that of `matmul`

If LoRA and DoRA were both measured, the last line has the ratios of DoRA to LoRA.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import lora_jax as lj
from benchmarks.gpu_figures import Figures
from benchmarks.gpu_inference import measure_beam, measure_merged
from benchmarks.gpu_training import (
  measure_concurrent,
  measure_gpt2,
  measure_llama,
  measure_matmul,
  measure_peft,
)
from lora_jax.files import make_folder, read_json_if_present

DOTS = "dots_with_no_batch_dims_saveable"
LORA = "llama8b rows=1 nothing_saveable"
DORA = "llama8b rows=1 nothing_saveable, DoRA"
BEAM = "beam search"
SECTIONS: dict[str, Callable[[bool, str], Figures]] = {
  "matmul": lambda tiny, attention: measure_matmul(tiny),
  "llama8b rows=1 dots": functools.partial(measure_llama, rows=1, remat=DOTS),
  "llama8b rows=1 dots, int8": functools.partial(measure_llama, rows=1, remat=DOTS, base="int8"),
  "llama8b rows=1 dots, fp8": functools.partial(measure_llama, rows=1, remat=DOTS, base="fp8"),
  "gpt2 medium packed, lora_jax": functools.partial(measure_gpt2, packed=True),
  "gpt2 medium packed, PEFT": lambda tiny, attention: measure_peft(tiny, packed=True),
  "concurrent, length 64": functools.partial(measure_concurrent, length=64),
  "concurrent, length 512": functools.partial(measure_concurrent, length=512),
  "merged, 1 x 128": functools.partial(measure_merged, rows=1, length=128),
  "merged, 16 x 256": functools.partial(measure_merged, rows=16, length=256),
  BEAM: lambda tiny, attention: measure_beam(tiny),
  LORA: functools.partial(measure_llama, rows=1, remat="nothing_saveable"),
  DORA: functools.partial(measure_llama, rows=1, remat="nothing_saveable", adapt=lj.dora),
  "gpt2 medium, lora_jax": measure_gpt2,
  "gpt2 medium, PEFT": lambda tiny, attention: measure_peft(tiny),
  "llama8b rows=2 nothing_saveable": functools.partial(
    measure_llama, rows=2, remat="nothing_saveable"
  ),
}
WITHOUT_CHOICE = ("matmul", "gpt2 medium packed, PEFT", "gpt2 medium, PEFT", BEAM)
"""Sections without a choice of attention."""
REMEDY = "Remove it, or choose another folder for --out"


def measure_apart(name: str, tiny: bool, attention: str, limit: float) -> Figures:
  """Returns the figures of a section, measured in a separate process, or its error."""
  command = [sys.executable, "-m", "benchmarks.gpu", "--run", name, "--attention", attention]
  command += ["--tiny"] if tiny else []
  shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if name == BEAM else {}  # torch is there too
  try:
    process = subprocess.run(
      command, capture_output=True, text=True, timeout=limit, env={**os.environ, **shared}
    )
  except subprocess.TimeoutExpired:
    return {"error": f"not finished within {limit:.4g} s"}
  if process.returncode:
    return {"error": process.stderr[-2000:].strip() or f"exit status {process.returncode}"}
  return json.loads(process.stdout.splitlines()[-1])


def measure_section(name: str, tiny: bool, limit: float) -> Figures:
  """Returns the figures of a section, with XLA's attention if cuDNN's fails.

  Args:
    limit: of its time, both attempts together, seconds.
  """
  begin = time.perf_counter()
  if tiny or name in WITHOUT_CHOICE:
    figures = measure_apart(name, tiny, "xla", limit)
  else:
    figures = measure_apart(name, tiny, "cudnn", limit)
    left = limit - (time.perf_counter() - begin)
    if "error" in figures and left > 0:
      figures = measure_apart(name, tiny, "xla", left) | {"error_of_cudnn": figures["error"]}
  return figures | {"section_s": time.perf_counter() - begin}


def print_table(figures: Mapping[str, Figures]) -> None:
  """Prints a row for each section, and the ratios of DoRA to LoRA."""
  matmul_tflops = figures.get("matmul", {}).get("tflops")
  print(
    f"{'section':38}{'attention':>10}{'step_s':>9}{'tokens/s':>10}{'peak_gb':>9}{'tflop/s':>9}"
    f"{'nemo':>7}{'share':>7}"
  )
  for name, values in figures.items():
    if "error" in values:
      print(f"{name:38} failed: {values['error'].strip().splitlines()[-1][:60]}")
      continue

    def cell(key: str, width: int, digits: int, values: Figures = values) -> str:
      return f"{values[key]:{width}.{digits}f}" if values.get(key) else " " * width

    share = (
      f"{values['tflops'] / matmul_tflops:7.2f}" if matmul_tflops and "tflops" in values else ""
    )
    print(
      f"{name:38}{values.get('attention', ''):>10}{cell('step_s', 9, 4)}"
      f"{cell('tokens_per_s', 10, 0)}{cell('peak_gb', 9, 1)}{cell('tflops', 9, 1)}"
      f"{cell('nemo_tflops', 7, 1)}{share:>7}  {values.get('note', '')}".rstrip()
    )
  lora, dora = figures.get(LORA, {}), figures.get(DORA, {})
  if "step_s" in lora and "step_s" in dora:
    memory = f", peak {dora['peak_gb'] / lora['peak_gb']:.3f}" if lora["peak_gb"] else ""
    print(f"DoRA / LoRA: step {dora['step_s'] / lora['step_s']:.3f}{memory}")


def read_figures(path: Path) -> dict[str, Figures]:
  """Returns the figures in a file; empty without a file.

  Raises:
    ValueError: if it has something else.
  """
  try:
    figures = read_json_if_present(path)
  except (OSError, ValueError) as error:
    raise ValueError(f"{path} is not a file of figures: {error}. {REMEDY}") from error
  if not all(isinstance(row, dict) for row in figures.values()):
    raise ValueError(f"{path} has no object for each section. {REMEDY}")
  return figures


def write_figures(path: Path, figures: Mapping[str, Figures]) -> None:
  """Writes figures to a file, whole or not at all."""
  temporary = path.with_name(f".{path.name}.new")
  temporary.write_text(json.dumps(figures, indent=2) + "\n")
  temporary.replace(path)


def main(arguments: Sequence[str] | None = None) -> dict[str, Figures]:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=Path, help="folder for figures.json, or tiny.json")
  parser.add_argument("--tiny", action="store_true", help="toy sizes, for a CPU")
  parser.add_argument("--only", nargs="*", default=[""], help="prefixes of the sections' names")
  parser.add_argument("--minutes", type=float, default=12.0, help="time limit of all sections")
  parser.add_argument("--limit", type=float, default=120.0, help="time limit of a section, seconds")
  parser.add_argument("--run", choices=SECTIONS, help=argparse.SUPPRESS)
  parser.add_argument("--attention", default="xla", help=argparse.SUPPRESS)
  options = parser.parse_args(arguments)
  if options.run:
    print(json.dumps(SECTIONS[options.run](options.tiny, options.attention)))
    return {}
  if options.out is None:
    parser.error("--out is required")
  names = [name for name in SECTIONS if name.startswith(tuple(options.only))]
  unknown = [only for only in options.only if not any(name.startswith(only) for name in SECTIONS)]
  if unknown or not names:
    parser.error(f"--only must be prefixes of {', '.join(SECTIONS)}; got {unknown}")
  path = options.out / ("tiny.json" if options.tiny else "figures.json")
  try:
    make_folder(options.out)
    figures = read_figures(path)
  except ValueError as error:
    parser.error(str(error))
  end = time.perf_counter() + 60 * options.minutes
  for name in names:
    left = min(options.limit, end - time.perf_counter())
    if left > 0:
      figures[name] = measure_section(name, options.tiny, left)
    else:
      figures.setdefault(name, {"error": f"not run: {options.minutes:g} minutes were over"})
    write_figures(path, figures)
  print_table(figures)
  return figures


if __name__ == "__main__":
  main()
