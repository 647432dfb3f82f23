"""A finished run in the forms of other packages.

    python -m experiments.export runs/gpt2_e2e/mini FOLDER            # the adapter, as PEFT has it
    python -m experiments.export runs/gpt2_e2e/mini FOLDER --server   # as adapter servers read it
    python -m experiments.export runs/gpt2_e2e/mini FOLDER --merged   # a model for `transformers`

The adapter of separate query, key and value goes onto GPT-2's fused c_attn exactly; ranks add up
there. A merged model works without any adapter, and without LoRA: its method may be any. Of a LoRA
run it is the base's own folder, with its dtype, and what rounding to that has cost is printed.

A run of `experiments.finetune` has its adapter in PEFT's form already, for servers too, in `peft/`.
Of a run of `experiments.glue` the new head goes along, which the form for servers has no place for.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.classification.restore import load_encoder
from experiments.finetune import weights_digests
from experiments.harness.launch import explained
from experiments.harness.recipe import lora_config
from experiments.harness.workdir import Config, check_experiment, read_config, read_result
from experiments.nlg.gpt2 import load_base, model_folder
from experiments.nlg.restore import load_adapter, load_run
from lora_jax.interop import load_peft, save_merged, save_peft
from lora_jax.models.checkpoints.hub import find_folder
from lora_jax.models.gpt2.folder import save_gpt2, stored_tensors
from lora_jax.models.zoo import plan_causal_lm
from lora_jax.training.mesh import make_mesh


def export_adapter(folder: str | Path, out: str | Path, for_server: bool = False) -> None:
  """Writes the adapter of a finished LoRA run in PEFT's form.

  Raises:
    FileExistsError: if there is such a folder.
    ValueError: if the run was of another method, or PEFT has no form for its adapter.
  """
  config: Config = read_config(folder)
  if config.experiment == "finetune":
    raise ValueError(f"the adapter of {folder} is in PEFT's form already: {folder}/peft")
  base_model = config.model.folder or None
  if config.experiment == "glue":
    load_encoder(folder).save_adapter(out, base_model, for_server)
    return
  check_experiment(config, "gpt2_e2e")
  if config.model.start == "random":
    raise ValueError(f"{folder} adapts new weights, which no one else has. Export it with --merged")
  base = load_base(config, make_mesh())
  save_peft(
    out,
    lora_config(config),
    load_adapter(folder, base),
    stored_tensors(base.config),
    base.params,
    base_model=base_model,
    for_server=for_server,
  )


def export_merged(folder: str | Path, out: str | Path) -> dict[str, float]:
  """Writes a finished run's model, what was trained merged into it, for `transformers`.

  Returns:
    What rounding to the base's dtype cost each leaf, as `save_merged` has it; of runs without
    LoRA or without a base's folder nothing: their weights are written as they are.
  Raises:
    FileExistsError: if there is such a folder.
    ValueError: if the run is not finished.
  """
  config: Config = read_config(folder)
  if config.experiment == "finetune":
    return _merge_finetuned(Path(folder), config, out)
  if config.experiment == "glue":
    return load_encoder(folder).save_merged(out)
  check_experiment(config, "gpt2_e2e")
  if config.method == "lora" and config.model.start != "random":
    base = load_base(config, make_mesh())
    adapter, stored = load_adapter(folder, base), stored_tensors(base.config)
    lora = lora_config(config)
    return save_merged(out, model_folder(config), lora, adapter, stored, base.params)
  run = load_run(folder)
  source, end = model_folder(run.config), run.base.end_of_text
  save_gpt2(out, run.base.config, run.params, tokenizer_from=source, end_of_text_id=end)
  return {}


def _merge_finetuned(folder: Path, config: Config, out: str | Path) -> dict[str, float]:
  """Writes the merged model of a run of `experiments.finetune`; loads no weights but one by one."""
  result = read_result(folder)
  if result is None:
    raise ValueError(f"{folder} is not finished: start its command again, which goes on with it")
  model = plan_causal_lm(config.model.folder)
  lora, adapter = load_peft(folder / "peft", model.stored, model.params)
  base = find_folder(config.model.folder)  # with its weights
  changed = result.get("weights", {}).items() - weights_digests(base).items()
  if changed:
    raise ValueError(
      f"{folder} was trained on other weights than {base} has by now: "
      f"{', '.join(sorted(name for name, _ in changed))}. Restore them; on others the adapter "
      "means nothing"
    )
  return save_merged(out, base, lora, adapter, model.stored_in_folder(), model.params)


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.export",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("folder", help="of a finished run")
  parser.add_argument("out", help="the folder to make")
  form = parser.add_mutually_exclusive_group()
  form.add_argument("--merged", action="store_true", help="the whole model, for transformers")
  form.add_argument("--server", action="store_true", help="one rank and one alpha for all")
  parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
  given = parser.parse_args(arguments)
  errors: dict[str, float] = {}
  with explained():
    if given.merged:
      errors = export_merged(given.folder, given.out)
    else:
      export_adapter(given.folder, given.out, given.server)
  print(f"wrote {given.out}")
  if errors:
    worst = max(errors, key=lambda path: errors[path])
    print(f"rounding to the base's dtype changed {len(errors)} weights by at most")
    print(f"{errors[worst]:.1e} of their largest element ({worst})")


if __name__ == "__main__":
  main()
