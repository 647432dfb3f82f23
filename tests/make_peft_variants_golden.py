"""Makes tests/golden/peft_variants with PEFT: python -m tests.make_peft_variants_golden [NAME ...]

Each folder is an adapter with random weights of one of PEFT's methods other than LoRA, or of a form
of LoRA that they need, written by `save_pretrained` for a small model of tests/golden. The file of
the same name has the logits of the adapted model. Without names it makes all.
"""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.make_peft_golden import (
  MODELS,
  base_model,
  inputs_of,
  is_encoder,
  logits,
  tokens_of,
)

GOLDEN = MODELS / "peft_variants"
LLAMA, GPT2, BERT = "llama/llama_biased", "gpt2/tied", "bert/bert_classifier"
SOME = ["q_proj", "v_proj", "down_proj"]
FUSED = ["c_attn", "mlp.c_proj"]
TOKENS = [3, 17, 60]
ADAPTERS: dict[str, tuple[str, str, dict[str, Any]]] = {
  "ia3": (
    LLAMA,
    "IA3Config",
    {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
  ),
  "ia3_fused": (
    GPT2,
    "IA3Config",
    {"target_modules": FUSED, "feedforward_modules": r".*\.mlp\.c_proj"},
  ),
  "hira": (LLAMA, "HiraConfig", {"r": 3, "target_modules": [*SOME, "embed_tokens"]}),
  "hira_fused": (
    GPT2,
    "HiraConfig",
    {"r": 3, "target_modules": FUSED, "rank_pattern": {"mlp.c_proj": 2}},
  ),
  "loha": (
    LLAMA,
    "LoHaConfig",
    {"r": 2, "alpha": 4, "target_modules": SOME, "alpha_pattern": {"q_proj": 3}},
  ),
  "lokr": (
    LLAMA,
    "LoKrConfig",
    {"r": 2, "alpha": 4, "decompose_factor": 4, "target_modules": SOME},
  ),
  "lokr_whole": (
    LLAMA,
    "LoKrConfig",
    {"r": 8, "rank_pattern": {"v_proj": 3}, "target_modules": SOME},
  ),
  "lokr_both": (
    LLAMA,
    "LoKrConfig",
    {"r": 1, "alpha": 2, "decompose_both": True, "target_modules": SOME},
  ),
  "miss": (LLAMA, "MissConfig", {"r": 3, "target_modules": SOME, "bias": "MiSS_only"}),
  "miss_mini": (
    LLAMA,
    "MissConfig",
    {"r": 3, "mini_r": 4, "init_weights": "mini", "target_modules": SOME},
  ),
  "miss_bat": (LLAMA, "MissConfig", {"r": 2, "init_weights": "bat", "target_modules": SOME}),
  "vera": (
    LLAMA,
    "VeraConfig",
    {"r": 6, "target_modules": SOME, "layers_to_transform": [1], "bias": "vera_only"},
  ),
  "adalora": (
    LLAMA,
    "AdaLoraConfig",
    {"init_r": 4, "lora_alpha": 6, "total_step": 9, "target_modules": SOME},
  ),
  "adalora_fused": (
    GPT2,
    "AdaLoraConfig",
    {"init_r": 3, "total_step": 9, "target_modules": FUSED, "modules_to_save": ["ln_f"]},
  ),
  "tokens": (GPT2, "TrainableTokensConfig", {"token_indices": TOKENS, "target_modules": ["wte"]}),
  "tokens_untied": (LLAMA, "TrainableTokensConfig", {"token_indices": TOKENS}),
  "lora_and_tokens": (
    GPT2,
    "LoraConfig",
    {"r": 2, "target_modules": ["c_fc"], "trainable_token_indices": TOKENS},
  ),
  "lora_and_words": (
    BERT,
    "LoraConfig",
    {"r": 2, "target_modules": ["query"], "trainable_token_indices": [5, 17, 3]},
  ),
  "norms": (GPT2, "LNTuningConfig", {"target_modules": ["ln_1", "ln_f"]}),
  "norms_and_head": (
    LLAMA,
    "LNTuningConfig",
    {"target_modules": r".*norm", "modules_to_save": ["lm_head"]},
  ),
  "pissa": (
    LLAMA,
    "LoraConfig",
    {"r": 2, "lora_alpha": 3, "target_modules": SOME, "init_lora_weights": "pissa"},
  ),
}
CONVERTED = ("pissa",)  # by the initial adapter, to plain LoRA


def tokens_only(base: str) -> tuple[np.ndarray]:
  return (tokens_of(base),)


def _prune(model: Any) -> None:
  """Prunes triplets of AdaLoRA as its allocator does: all of one weight, and some of others."""
  import torch

  pattern = {}
  for name, parameter in model.base_model.model.named_parameters():
    if "lora_E" in name:
      kept = torch.rand(len(parameter)) < 0.6 if pattern else torch.zeros(len(parameter)) > 0
      parameter.data.masked_fill_(~kept[:, None], 0.0)
      pattern[name] = kept.tolist()
  model.peft_config["default"].rank_pattern = pattern


def make(name: str) -> None:
  """Writes one adapter and its logits."""
  import peft
  import torch

  base, kind, settings = ADAPTERS[name]
  torch.manual_seed(0)
  task, inputs = ("SEQ_CLS", inputs_of) if is_encoder(base) else ("CAUSAL_LM", tokens_only)
  config = getattr(peft, kind)(task_type=task, **settings)
  model = peft.get_peft_model(base_model(base), config)
  shutil.rmtree(GOLDEN / name, ignore_errors=True)
  with tempfile.TemporaryDirectory() as initial:
    if name in CONVERTED:
      model.save_pretrained(initial)
    with torch.no_grad():
      for parameter in model.parameters():
        if parameter.requires_grad:
          parameter.add_(0.3 * torch.randn(parameter.shape))
    if kind == "AdaLoraConfig":
      _prune(model)
    expected = logits(model.eval(), *inputs(base))
    options = {"path_initial_model_for_weight_conversion": initial} if name in CONVERTED else {}
    model.save_pretrained(GOLDEN / name, save_embedding_layers=False, **options)
  (GOLDEN / name / "README.md").unlink(missing_ok=True)
  written = GOLDEN / name / "adapter_config.json"
  written.write_text(written.read_text().replace(str(MODELS), "golden") + "\n")
  save_file({"logits": expected}, GOLDEN / f"{name}.safetensors")
  for path in (GOLDEN / f"{name}.safetensors", GOLDEN / name / "adapter_model.safetensors"):
    path.chmod(0o644)


def main(names: Sequence[str]) -> None:
  if unknown := [name for name in names if name not in ADAPTERS]:
    raise ValueError(f"no adapter is called {', '.join(unknown)}; expected {', '.join(ADAPTERS)}")
  GOLDEN.mkdir(exist_ok=True)
  for name in names or ADAPTERS:
    make(name)


if __name__ == "__main__":
  main(sys.argv[1:])
