"""Commands that use an exported adapter or model: here, in other packages, in servers."""

from pathlib import Path

from lora_jax.models.checkpoints.gguf import is_gguf
from lora_jax.models.checkpoints.loaded_weights import weights_format

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM knows


def _load(base: str, param_dtype: str) -> str:
  """Returns the line that loads a base model, with its weights quantized as in training."""
  option = f", param_dtype={param_dtype!r}" if weights_format(param_dtype) else ""
  return f"base = lora_jax.models.zoo.load_causal_lm({base!r}{option})"


def in_lora_jax(base: str, adapter: str, param_dtype: str = "") -> list[str]:
  return [
    "import lora_jax, lora_jax.interop, lora_jax.models.zoo",
    _load(base, param_dtype),
    f"config, adapter = lora_jax.interop.load_peft({adapter!r}, base.stored, base.params)",
    "adapted = lora_jax.lora(base.call, config)  # .apply(base.params, adapter, tokens)",
  ]


def prompt_in_lora_jax(base: str, adapter: str, num_slots: int, param_dtype: str = "") -> list[str]:
  return [
    "import lora_jax, lora_jax.interop, lora_jax.models.zoo",
    _load(base, param_dtype),
    f"vectors = lora_jax.interop.load_peft_prompt({adapter!r}, base.stored, base.params)",
    f"slots = lora_jax.Slots({num_slots})  # tokens = slots.around(prompt)",
    f"adapted = lora_jax.prefix_embedding(base.call, {num_slots})"
    "  # .apply(base.params, vectors, tokens)",
  ]


def gguf_in_lora_jax(base: str, adapter: str, param_dtype: str = "") -> list[str]:
  return [
    "import lora_jax, lora_jax.interop, lora_jax.models.zoo",
    _load(base, param_dtype),
    "load = lora_jax.interop.load_gguf_adapter",
    f"config, adapter = load({adapter!r}, base.module.config, base.params)",
    "adapted = lora_jax.lora(base.call, config)  # .apply(base.params, adapter, tokens)",
  ]


def in_peft(base: str, path: Path, adapter: str) -> list[str]:
  """Returns lines of Python.

  Args:
    base: the base model's name.
    path: its local folder or GGUF file.
    adapter: the adapter's folder.
  """
  arguments = f"{base!r}"
  if is_gguf(path):
    arguments = f"{str(path.parent)!r}, gguf_file={path.name!r}"
  return [
    "import peft, transformers",
    f"model = transformers.AutoModelForCausalLM.from_pretrained({arguments})",
    f"model = peft.PeftModel.from_pretrained(model, {adapter!r})",
  ]


def in_vllm(base: str, adapter: str, rank: int) -> list[str]:
  """Returns a command; nothing if vLLM does not support the rank."""
  largest = next((known for known in RANKS if known >= rank), None)
  if largest is None:
    return []
  return [
    f"vllm serve {base} --enable-lora --max-lora-rank {largest} \\",
    f"  --lora-modules mine={adapter}",
  ]


def in_llama_server(base: str, adapter: str) -> list[str]:
  """Returns a command and a request without prompt cache, which mixes adapters (issue 26207)."""
  return [
    f"llama-server -m {base} --lora {adapter}",
    "curl http://localhost:8080/completion -d '{",
    '  "prompt": "...", "lora": [{"id": 0, "scale": 1.0}], "cache_prompt": false}\'',
  ]


def in_mlx(base: str, adapter: str) -> list[str]:
  return [f"mlx_lm.generate --model {base} --adapter-path {adapter} --prompt '...'"]


def in_ollama(modelfile: str) -> list[str]:
  return [f"ollama create mine -f {modelfile}", "ollama run mine"]
