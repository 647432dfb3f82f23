"""Makes tests/golden/peft with PEFT: python -m tests.make_peft_golden [NAME ...]

Without names it makes all adapters.

Each folder is an adapter with random weights, written by PEFT's `save_pretrained`, for one of the
small models of tests/golden/gpt2, llama, bert and deberta. The file of the same name has the logits
of the adapted model.
"""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

MODELS = Path(__file__).parent / "golden"
GOLDEN = MODELS / "peft"
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
  "fused": ("gpt2/tied", {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"]}),
  "rslora": ("gpt2/tied", {"r": 3, "use_rslora": True, "target_modules": "all-linear"}),
  "expression": (
    "gpt2/tied",
    {
      "r": 4,
      "lora_alpha": 6,
      "target_modules": r".*\.h\.\d+\.(attn|mlp)\.c_(attn|proj)",
      "exclude_modules": ["h.0.attn.c_proj"],
      "rank_pattern": {"mlp.c_proj": 2, r"h\.1\.attn\.c_attn": 5},
      "alpha_pattern": {"mlp.c_proj": 12},
    },
  ),
  "layers": (
    "gpt2/tied",
    {"r": 2, "target_modules": ["c_attn", "c_fc"], "layers_to_transform": [1], "lora_bias": True},
  ),
  "biases": ("gpt2/tied", {"r": 2, "target_modules": ["c_attn"], "bias": "all"}),
  "own_biases": ("gpt2/tied", {"r": 2, "target_modules": ["attn.c_proj"], "bias": "lora_only"}),
  "saved": (
    "gpt2/untied",
    {"r": 2, "target_modules": ["wte", "c_fc"], "modules_to_save": ["lm_head", "ln_f"]},
  ),
  "llama": ("llama/llama3", {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
  "qwen": ("llama/qwen3", {"r": 3, "target_modules": "all-linear", "use_rslora": True}),
  "llama_saved": (
    "llama/llama_biased",
    {"r": 2, "target_modules": ["embed_tokens", "down_proj"], "modules_to_save": ["lm_head"]},
  ),
  "mixtral": ("llama/mixtral", {"r": 2, "target_modules": ["q_proj", "v_proj"]}),
  "experts": (
    "llama/mixtral",
    {
      "r": 3,
      "target_modules": ["k_proj"],
      "target_parameters": ["experts.gate_up_proj", "down_proj"],
      "rank_pattern": {"gate_up_proj": 2},
    },
  ),
  "one_parameter": (
    "llama/mixtral_fused",
    {
      "r": 2,
      "target_modules": [],
      "target_parameters": ["layers.1.mlp.experts.down_proj"],
      "use_rslora": True,
    },
  ),
  "router": (
    "llama/qwen3_moe",
    {"r": 2, "target_modules": [], "target_parameters": ["gate.weight", "gate_up_proj"]},
  ),
}
QUERY_VALUE = ["query", "value"]
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {  # PEFT adds modules_to_save=["classifier"]
  "bert": ("bert/bert_classifier", {"r": 4, "target_modules": QUERY_VALUE}),
  "bert_all": ("bert/bert_classifier", {"r": 3, "target_modules": "all-linear"}),
  "bert_embedding": (
    "bert/bert_classifier",
    {"r": 2, "target_modules": ["word_embeddings", "intermediate.dense"], "bias": "lora_only"},
  ),
  "roberta": ("bert/roberta_regression", {"r": 4, "target_modules": QUERY_VALUE}),
  "roberta_all": ("bert/roberta_regression", {"r": 2, "target_modules": "all-linear"}),
  "deberta": (
    "deberta/v3_classifier",
    {"r": 4, "target_modules": ["query_proj", "value_proj"], "bias": "all"},
  ),
  "deberta_all": ("deberta/v2_regression", {"r": 2, "target_modules": "all-linear"}),
  "deberta_conv": (
    "deberta/v2_regression",
    {"r": 3, "target_modules": ["conv.conv", "pooler.dense"]},
  ),
}
DORA: dict[str, tuple[str, dict[str, Any]]] = {
  "dora": (
    "llama/llama3",
    {
      "r": 4,
      "target_modules": ["q_proj", "v_proj", "down_proj"],
      "rank_pattern": {"down_proj": 2},
      "alpha_pattern": {"q_proj": 12},
      "use_rslora": True,
    },
  ),
  "dora_fused": (
    "gpt2/tied",
    {"r": 4, "target_modules": ["c_attn", "mlp.c_proj"], "bias": "lora_only"},
  ),
  "dora_embedding": (
    "llama/llama_biased",
    {"r": 2, "target_modules": ["embed_tokens", "o_proj"], "modules_to_save": ["lm_head"]},
  ),
  "dora_conv": (
    "deberta/v2_regression",
    {"r": 3, "target_modules": ["conv.conv", "pooler.dense", "word_embeddings"]},
  ),
}
DORA = {name: (base, settings | {"use_dora": True}) for name, (base, settings) in DORA.items()}


def is_encoder(name: str) -> bool:
  """Returns whether a small model is an encoder."""
  return name.startswith(("bert", "deberta"))


def base_model(name: str) -> Any:
  """Returns a small model of tests/golden in `transformers`."""
  import transformers

  kind = "SequenceClassification" if is_encoder(name) else "CausalLM"
  load = getattr(transformers, f"AutoModelFor{kind}").from_pretrained
  return load(MODELS / name).eval()


def tokens_of(name: str) -> np.ndarray:
  """Returns the tokens of the stored logits, (rows, time)."""
  arrays = load_file(MODELS / f"{name}.safetensors")
  return arrays["tokens" if "tokens" in arrays else "whole/tokens"]


def inputs_of(name: str) -> tuple[np.ndarray, ...]:
  """Returns the tokens, mask and token types of an encoder's stored logits, (rows, time)."""
  arrays = load_file(MODELS / f"{name}.safetensors")
  return arrays["tokens"], arrays["mask"], arrays["types"]


def logits(model: Any, *inputs: np.ndarray) -> np.ndarray:
  """Returns the logits of PEFT's model."""
  import torch

  names = ("input_ids", "attention_mask", "token_type_ids")[: len(inputs)]
  arrays = (torch.tensor(array.astype(np.int64)) for array in inputs)
  with torch.no_grad():
    return model(**dict(zip(names, arrays, strict=True))).logits.numpy()


def make_adapter(base: str, settings: dict[str, Any], seed: int) -> Any:
  """Returns PEFT's model with random factors, biases and saved modules."""
  import peft
  import torch

  torch.manual_seed(seed)
  task = "SEQ_CLS" if is_encoder(base) else "CAUSAL_LM"
  config = peft.LoraConfig(task_type=task, **{"lora_alpha": 8, **settings})
  model = peft.get_peft_model(base_model(base), config)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter.add_(0.3 * torch.randn(parameter.shape))
  return model.eval()


def write_adapters(
  folder: Path,
  adapters: Mapping[str, tuple[str, str, dict[str, Any]]],
  change: Callable[[Any, Any], Any],
) -> None:
  """Writes a file for each adapter: its tensors by PEFT's names, and the model's `logits`.

  Args:
    folder: of the files.
    adapters: by name, the base model, the class of the adapter's config, and its settings.
    change: takes a trained parameter and random numbers, and changes it.
  """
  import peft
  import torch

  folder.mkdir(exist_ok=True)
  for name, (base, kind, settings) in adapters.items():
    torch.manual_seed(0)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(base_model(base), config)
    with torch.no_grad():
      for parameter in model.parameters():
        if parameter.requires_grad:
          change(parameter, 0.3 * torch.randn(parameter.shape))
    arrays = {n: x.numpy() for n, x in peft.get_peft_model_state_dict(model).items()}
    file = folder / f"{name}.safetensors"
    save_file(arrays | {"logits": logits(model.eval(), tokens_of(base))}, file)
    file.chmod(0o644)


def main(names: Sequence[str]) -> None:
  adapters = ADAPTERS | ENCODERS | DORA
  if unknown := [name for name in names if name not in adapters]:
    raise ValueError(f"no adapter is called {', '.join(unknown)}; expected {', '.join(adapters)}")
  for seed, (name, (base, settings)) in enumerate(adapters.items()):
    if names and name not in names:
      continue
    shutil.rmtree(GOLDEN / name, ignore_errors=True)
    model = make_adapter(base, settings, seed)
    model.save_pretrained(GOLDEN / name, save_embedding_layers=False)
    (GOLDEN / name / "README.md").unlink(missing_ok=True)
    config = GOLDEN / name / "adapter_config.json"
    config.write_text(config.read_text().replace(str(MODELS), "golden") + "\n")
    inputs = inputs_of(base) if is_encoder(base) else (tokens_of(base),)
    save_file({"logits": logits(model, *inputs)}, GOLDEN / f"{name}.safetensors")
    for path in (GOLDEN / f"{name}.safetensors", GOLDEN / name / "adapter_model.safetensors"):
      path.chmod(0o644)


if __name__ == "__main__":
  main(sys.argv[1:])
