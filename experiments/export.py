"""A finished run in the formats of other packages.

    python -m experiments.export runs/gpt2_e2e/mini FOLDER            # the adapter, as PEFT has it
    python -m experiments.export runs/gpt2_e2e/mini FOLDER --server   # as adapter servers read it
    python -m experiments.export runs/gpt2_e2e/mini FOLDER --merged   # a model for `transformers`

The adapter of separate query, key and value goes onto GPT-2's fused c_attn exactly; ranks add up
there. A merged model works without any adapter, and without LoRA: its method may be any. Of a LoRA
run it is the base's own folder, with its dtype, and what rounding to that has cost is printed.

A run of `experiments.finetune` has its adapter in PEFT's format already, for servers too, in
`peft/`, and its model in `model/` if that was fully trained. Of a run of `experiments.glue` the new
head goes along, which the format for servers has no place for.

Time: seconds for the embedded base; a merged model is read and written one weight at a time.
Expect: a folder whose model computes what the run's own does.
"""

from collections.abc import Sequence
from pathlib import Path

from experiments.classification.config import GlueConfig
from experiments.classification.restore import load_encoder
from experiments.harness.launch import explained, make_parser
from experiments.harness.methods import find_method, lora_config
from experiments.harness.workdir import read_finished, read_run, stored_config
from experiments.nlg.config import E2EConfig, FinetuneConfig
from experiments.nlg.finetuned import export_folder, weights_digests
from experiments.nlg.gpt2 import load_base, model_folder
from experiments.nlg.restore import load_adapter, load_run
from lora_jax.interop import load_peft, save_merged, save_peft
from lora_jax.models.checkpoints.hub import find_folder
from lora_jax.models.gpt2.folder import save_gpt2, stored_tensors
from lora_jax.models.zoo import load_causal_lm, plan_causal_lm
from lora_jax.training.mesh import make_mesh

EXPORTED = {kind.NAME: kind for kind in (E2EConfig, GlueConfig, FinetuneConfig)}


def export_adapter(folder: str | Path, out: str | Path, for_server: bool = False) -> None:
  """Writes the adapter of a finished run in PEFT's format.

  Raises:
    FileExistsError: if there is such a folder.
    ValueError: if the run's method has no adapter, or PEFT has no format for it.
  """
  config = _config_of(folder)
  base_model = config.model.folder or None
  if isinstance(config, FinetuneConfig):
    raise ValueError(_written_already(config))
  if isinstance(config, GlueConfig):
    load_encoder(folder).save_adapter(out, base_model, for_server)
    return
  if config.model.start == "random":
    raise ValueError(f"{folder} adapts new weights, which no one else has. Export it with --merged")
  base = load_base(config, make_mesh())
  save_peft(
    out,
    lora_config(config),
    load_adapter(config, base),
    stored_tensors(base.config),
    base.params,
    base_model=base_model,
    for_server=for_server,
  )


def export_merged(folder: str | Path, out: str | Path) -> dict[str, float]:
  """Writes a finished run's model, what was trained merged into it, for `transformers`.

  Returns:
    What rounding to the base's dtype cost each leaf, as `save_merged` has it; of runs without
    an adapter or a base's folder nothing: their weights are written as they are.
  Raises:
    FileExistsError: if there is such a folder.
    ValueError: if the run is not finished.
  """
  config = _config_of(folder)
  if isinstance(config, FinetuneConfig):
    return _merge_finetuned(config, out)
  if isinstance(config, GlueConfig):
    return load_encoder(folder).save_merged(out)
  if find_method(config.method).exports_adapter and config.model.start != "random":
    base = load_base(config, make_mesh())
    adapter, stored = load_adapter(config, base), stored_tensors(base.config)
    lora = lora_config(config)
    return save_merged(out, model_folder(config), lora, adapter, stored, base.params)
  run = load_run(folder)
  source, end = model_folder(run.config), run.base.end_of_text
  save_gpt2(out, run.base.config, run.params, tokenizer_from=source, end_of_text_id=end)
  return {}


def _config_of(folder: str | Path) -> E2EConfig | GlueConfig | FinetuneConfig:
  experiment = stored_config(folder)["experiment"]
  if experiment not in EXPORTED:
    raise ValueError(
      f"{folder} is a run of {experiment!r}; those that can be exported are of "
      f"{', '.join(EXPORTED)}"
    )
  return read_run(EXPORTED[experiment], folder)


def _written_already(config: FinetuneConfig) -> str:
  return f"{config.workdir} has written it already: {export_folder(config)}"


def _merge_finetuned(config: FinetuneConfig, out: str | Path) -> dict[str, float]:
  """Writes the merged model of a run of `experiments.finetune`, one weight after another.

  LoRA needs of the base no more than its shapes to read an adapter; its variants need the weights.
  """
  result, method = read_finished(config.workdir), find_method(config.method)
  if not method.exports_adapter:
    raise ValueError(_written_already(config))
  model = (plan_causal_lm if method.variant is None else load_causal_lm)(config.model.folder)
  lora, adapter = load_peft(export_folder(config), model.stored, model.params)
  base = find_folder(config.model.folder)  # with its weights
  changed = result.get("weights", {}).items() - weights_digests(base).items()
  if changed:
    raise ValueError(
      f"{config.workdir} was trained on other weights than {base} has by now: "
      f"{', '.join(sorted(name for name, _ in changed))}. Restore them; on others the adapter "
      "means nothing"
    )
  return save_merged(out, base, lora, adapter, model.stored_in_folder(), model.params)


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = make_parser("export", __doc__)
  parser.add_argument("folder", help="of a finished run")
  parser.add_argument("out", help="the folder to make")
  form = parser.add_mutually_exclusive_group()
  form.add_argument("--merged", action="store_true", help="the whole model, for transformers")
  form.add_argument("--server", action="store_true", help="one rank and one alpha for all")
  options = parser.parse_args(arguments)
  errors: dict[str, float] = {}
  with explained():
    if options.merged:
      errors = export_merged(options.folder, options.out)
    else:
      export_adapter(options.folder, options.out, options.server)
  print(f"wrote {options.out}")
  if errors:
    worst = max(errors, key=lambda path: errors[path])
    print(f"rounding to the base's dtype changed {len(errors)} weights by at most")
    print(f"{errors[worst]:.1e} of their largest element ({worst})")


if __name__ == "__main__":
  main()
