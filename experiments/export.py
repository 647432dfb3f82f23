"""Exports a finished run to the formats of other packages.

    python -m experiments.export runs/gpt2_e2e/mini FOLDER            # the adapter, for PEFT
    python -m experiments.export runs/gpt2_e2e/mini FOLDER --server   # the adapter, for servers
    python -m experiments.export runs/gpt2_e2e/mini adapter.gguf      # the adapter, for llama.cpp
    python -m experiments.export runs/gpt2_e2e/mini FOLDER --format=mlx
    python -m experiments.export runs/gpt2_e2e/mini FOLDER --merged   # a model for `transformers`
    python -m experiments.export runs/finetune/qa merged.gguf --merged   # a model for llama.cpp

An adapter of separate query, key and value is written for GPT-2's fused c_attn exactly; their ranks
add up. `--format=peft-experts` gives each expert of a mixture its own factors, for servers. Runs of
`prefix_embedding` with `prefix.num_infix=0` are written as PEFT's prompt tuning.

A merged model needs no adapter and no LoRA: the run's method may be any. It has the files and the
dtype of the base model's folder, and the error of rounding to that dtype is printed. For a base
model of GGUF, or one that the run quantized (int8, nf4) or rounded, it is in float32 instead, with
the weights that the run was trained on: it equals the run's own model.

`merged.gguf` is for runs of QA-LoRA (`--config.method=qa_lora`) on a GGUF file of Q4_1 or Q5_1. It
equals that file except for the minima of the adapted blocks; their rounding error is printed.

Every adapter comes with a model card, README.md, and `adapter.gguf` with a Modelfile for Ollama.
Tokenizer, chat template and end tokens are exported too, as they were in training.

A run of `experiments.finetune` has written its adapter in PEFT's format, for servers too, to
`peft/`, or its fully trained model to `model/`. A run of `experiments.glue` exports its new head
too, which only PEFT's format has.

Time: seconds for the embedded base model; a merged model is read and written one weight at a time.
Expect: files from which other packages compute the same outputs as the run's model.
"""

from collections.abc import Sequence
from pathlib import Path

import lora_jax as lj
from experiments.classification.config import GlueConfig
from experiments.classification.encoder import model_folder as encoder_folder
from experiments.classification.restore import load_encoder
from experiments.harness.config import AdaptationConfig
from experiments.harness.launch import explained, make_parser
from experiments.harness.methods import (
  find_method,
  is_prompt_tuning,
  lora_config,
)
from experiments.harness.model_card import CARD, BaseModel, model_card
from experiments.harness.workdir import read_finished, read_run, stored_config
from experiments.nlg.adapters import FORMATS, Format, RunAdapter, write_adapter
from experiments.nlg.base import Base, load_base, model_folder, other_weights
from experiments.nlg.config import E2EConfig, FinetuneConfig
from experiments.nlg.finetuned import (
  base_of_adapter,
  check_weights,
  export_folder,
  has_model,
  load_exported,
  weights_digests,
)
from experiments.nlg.merged_gguf import export_merged_gguf
from experiments.nlg.prompts import end_ids
from experiments.nlg.restore import load_adapter, load_run
from experiments.nlg.text_files import (
  end_token_ids,
  exported_text_files,
  text_files,
  write_with,
)
from lora_jax.files import local_path
from lora_jax.interop import load_peft, save_merged
from lora_jax.models.checkpoints.gguf import is_gguf
from lora_jax.models.text.tokenizer import tokenizer_files
from lora_jax.training.mesh import make_mesh

EMBEDDED = "lora_jax/assets/gpt2"
LARGE_ERROR = 0.1  # of an update's norm
EXPORTED = {kind.NAME: kind for kind in (E2EConfig, GlueConfig, FinetuneConfig)}


def export_adapter(folder: str | Path, out: str | Path, form: Format = "peft") -> None:
  """Writes the adapter of a finished run, with a model card.

  Args:
    folder: the run's folder.
    out: the folder to make, or for `gguf` the file.
    form: the format, as in `write_adapter`.
  Raises:
    FileExistsError: if there is such a file or folder.
    ValueError: if the run's method has no adapter, or the format cannot express it.
  """
  config = _config_of(folder)
  _check_exportable(config, merged=False)
  if find_method(config.method).corrects_quantization:
    raise ValueError(
      f"{config.workdir} is a run of {config.method}: its adapter starts from the error of "
      "quantization, and on any other weights than the run's it is another model. Export it "
      "--merged, as float32 weights"
    )
  if isinstance(config, GlueConfig):
    _export_encoder(config, out, form)
  elif isinstance(config, E2EConfig):
    write_adapter(_e2e_adapter(config), out, form)
  elif form in ("peft", "server"):
    raise ValueError(_written_already(config))
  else:
    write_adapter(load_exported(config), out, form)


def _e2e_adapter(config: E2EConfig) -> RunAdapter:
  """Returns the adapter of a run of `experiments.gpt2_e2e`."""
  if not (find_method(config.method).exports_adapter or is_prompt_tuning(config)):
    raise ValueError(
      f"{config.workdir} is a run of {config.method}, which has no adapter that other packages "
      "read. Export it --merged"
    )
  if config.model.start == "random":
    raise ValueError(
      f"{config.workdir} adapts random weights, which no one else has. Export it --merged"
    )
  base = load_base(config, make_mesh())
  adapter, result = load_adapter(config, base), read_finished(config.workdir)
  name, digests = config.model.folder or EMBEDDED, {"fingerprint": result["base"]}
  if is_gguf(base.model.folder):
    digests = weights_digests(base.model.folder) | digests
  decode = base.tokenizer.decode
  return RunAdapter(
    config,
    result,
    lora_config(config),
    adapter,
    base.model,
    BaseModel(name, base.model.folder, digests, other_weights(config)),
    _text_files(config, base),
    tuple(decode([token], skip_special_tokens=False) for token in end_ids(base)),
    is_chat=base.prompt == "chat",
  )


def _export_encoder(config: GlueConfig, out: str | Path, form: Format) -> None:
  """Writes the adapter of a run of `experiments.glue`, in PEFT's format."""
  if form not in ("peft", "server"):
    raise ValueError(
      f"{config.workdir} adapts an encoder with a new head, which only PEFT's format has: leave "
      f"out --format={form}"
    )
  run, source = load_encoder(config.workdir), encoder_folder(config)
  name, result = config.model.folder, read_finished(config.workdir)
  base = BaseModel(name, source, {"fingerprint": result["base"]} if "base" in result else {})
  usage = ["See docs/peft.md of lora_jax: PEFT loads the adapter with its head, as SEQ_CLS."]
  card = model_card("peft", base, config, result, usage, task="text-classification")

  def write(path: Path) -> None:
    run.save_adapter(path, name or None, form == "server")
    (path / CARD).write_text(card, "utf-8")

  write_with(tokenizer_files(source), out, write)


def export_merged(folder: str | Path, out: str | Path) -> dict[str, float]:
  """Writes a finished run's model for `transformers`, with its adapter merged.

  Returns:
    The error of rounding each leaf to the base model's dtype, as in `save_merged`; empty if the
    weights are written in float32, since the run has no adapter or has adapted other weights than
    those of a folder.
  Raises:
    FileExistsError: if there is such a folder.
    ValueError: if the run is not finished.
  """
  config = _config_of(folder)
  _check_exportable(config, merged=True)
  if isinstance(config, FinetuneConfig):
    return _merge_finetuned(config, out)
  if isinstance(config, GlueConfig):
    return load_encoder(folder).save_merged(out)
  has_adapter = find_method(config.method).exports_adapter and not other_weights(config)
  if has_adapter and not is_gguf(model_folder(config)):
    base = load_base(config, make_mesh())
    adapter, stored = load_adapter(config, base), base.model.stored
    lora, source = lora_config(config), model_folder(config)
    return write_with(
      _text_files(config, base),
      out,
      lambda path: save_merged(path, source, lora, adapter, stored, base.params),
    )
  run = load_run(folder)
  model, end_id = run.base.model, run.base.end_of_text
  write_with(
    _text_files(config, run.base),
    out,
    lambda path: model.save(path, run.params, end_of_text_id=end_id),
  )
  return {}


def _text_files(config: E2EConfig, base: Base) -> dict[str, bytes]:
  return text_files(model_folder(config), base.tokenizer, [base.end_of_text])


def _config_of(folder: str | Path) -> E2EConfig | GlueConfig | FinetuneConfig:
  experiment = stored_config(folder)["experiment"]
  if experiment not in EXPORTED:
    raise ValueError(f"{folder} is a run of {experiment!r}, expected one of {', '.join(EXPORTED)}")
  return read_run(EXPORTED[experiment], folder)


def _check_exportable(config: AdaptationConfig, merged: bool) -> None:
  """Raises ValueError if other packages have no format for a run, and it cannot be merged."""
  method = find_method(config.method)
  is_prompt = method.is_prompt and not isinstance(config, GlueConfig)
  if method.merges or method.exports_adapter:
    return
  if is_prompt and is_prompt_tuning(config) and not merged:
    return
  other = "there is no format for it in other packages"
  if is_prompt:
    number = config.prefix.num_infix
    other = f"PEFT reads it without --merged, and with prefix.num_infix=0 (here {number})"
  raise ValueError(
    f"{config.workdir} is a run of {config.method}: its adapter cannot be merged, and {other}. Use "
    f"it here: {_use_here(config)}"
  )


def _use_here(config: AdaptationConfig) -> str:
  if isinstance(config, GlueConfig):
    return "experiments.classification.restore.load_encoder(folder).classify(texts)"
  return f'python -m experiments.generate {config.workdir} "PROMPT"'


def _written_already(config: FinetuneConfig) -> str:
  return f"{config.workdir} has written it already: {export_folder(config)}"


def _merge_finetuned(config: FinetuneConfig, out: str | Path) -> dict[str, float]:
  """Writes the merged model of a run of `experiments.finetune`, one weight after another.

  Reading an adapter of LoRA needs only the base model's shapes; its variants need the weights.
  """
  read_finished(config.workdir)  # raises if it is not
  if has_model(config):
    raise ValueError(_written_already(config))
  base = model_folder(config)
  in_floats = is_gguf(base) or bool(other_weights(config))  # neither holds a merged weight
  model = base_of_adapter(config, with_weights=in_floats)
  lora, adapter = load_peft(export_folder(config), model.stored, model.params)
  check_weights(config, base)
  files = exported_text_files(export_folder(config))
  if config.data.chat_template and "chat_template.jinja" not in files:
    raise ValueError(
      f"{export_folder(config)} lacks chat_template.jinja, with which the run was trained "
      f"({config.data.chat_template}). Copy it there"
    )
  if in_floats:
    params = lj.lora(model.call, lora).merge(lj.dequantize(model.params), adapter)
    end_id = end_token_ids(export_folder(config))[0]
    write_with(files, out, lambda path: model.save(path, params, end_of_text_id=end_id))
    return {}
  stored = model.stored_in_folder()
  return write_with(
    files, out, lambda path: save_merged(path, base, lora, adapter, stored, model.params)
  )


def format_of(out: str, name: str | None, is_for_servers: bool) -> Format:
  """Returns the format of an adapter: the one named, or the suffix's.

  Raises:
    ValueError: if the two disagree.
  """
  is_file = out.lower().endswith(".gguf")
  form = name or ("gguf" if is_file else "peft")
  if is_file != (form == "gguf"):
    expected = "a file named *.gguf" if form == "gguf" else "a folder"
    raise ValueError(f"--format={form} writes {expected}, got {out}")
  if is_for_servers and form != "peft":
    raise ValueError(f"--server is PEFT's format with one rank and alpha, got --format={form} too")
  return "server" if is_for_servers else form  # pyright: ignore[reportReturnType]


def _merge_into_gguf(folder: str, out: str) -> None:
  config = _config_of(folder)
  if isinstance(config, GlueConfig):
    raise ValueError(f"{folder} adapts an encoder, which has no GGUF file. Give a folder to make")
  _check_exportable(config, merged=True)
  errors = export_merged_gguf(config, out)
  print(f"wrote {out}")
  worst = max(errors, key=errors.__getitem__)
  print(f"rounding the minima of {len(errors)} weights to float16 changed each update by at most")
  print(f"{errors[worst]:.1%} of its norm ({worst})")
  if errors[worst] > LARGE_ERROR:
    print("note: an update this small is partly lost. Train longer or with a higher learning rate,")
    print("or export the adapter instead, without --merged: it is exact")


def _about_weights(folder: str) -> str:
  """Returns a line on the weights that a run was merged into; "" if they are its base model's."""
  config = _config_of(folder)
  weights = "" if isinstance(config, GlueConfig) else other_weights(config)
  if weights in ("", "random"):
    return ""
  return f"merged into the {weights} weights of its training, dequantized to float32: exact\n"


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = make_parser("export", __doc__)
  parser.add_argument("folder", help="of a finished run")
  parser.add_argument("out", help="the folder or the file *.gguf to make")
  parser.add_argument("--format", choices=FORMATS, help="of the adapter; default: by OUT's suffix")
  formats = parser.add_mutually_exclusive_group()
  formats.add_argument("--merged", action="store_true", help="the whole model, not the adapter")
  formats.add_argument("--server", action="store_true", help="one rank and one alpha for all")
  options = parser.parse_args(arguments)
  if options.merged and options.format:
    parser.error("argument --format: not allowed with argument --merged")
  errors: dict[str, float] = {}
  with explained():
    if local_path(options.out).exists():
      raise FileExistsError(f"{options.out} exists; nothing is overwritten")
    if options.merged and options.out.lower().endswith(".gguf"):
      _merge_into_gguf(options.folder, options.out)
      return
    if options.merged:
      errors = export_merged(options.folder, options.out)
    else:
      form = format_of(options.out, options.format, options.server)
      export_adapter(options.folder, options.out, form)
  print(f"wrote {options.out}")
  print(_about_weights(options.folder) if options.merged else "", end="")
  worst = max(errors, key=errors.__getitem__, default="")
  if worst and errors[worst] == 0:
    print("merged in the base model's dtype, without rounding")
  elif worst:
    print(f"rounding to the base model's dtype changed {len(errors)} weights by at most")
    print(f"{errors[worst]:.1e} of their largest element ({worst})")


if __name__ == "__main__":
  main()
