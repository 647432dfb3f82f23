"""Exchanges adapters with other packages."""

from lora_jax.interop.gguf import load_gguf_adapter, save_gguf_adapter
from lora_jax.interop.gguf_merged import save_merged_gguf
from lora_jax.interop.merged import merged_params, save_merged
from lora_jax.interop.mlx import save_mlx
from lora_jax.interop.peft.load import load_peft
from lora_jax.interop.peft.prompts import load_peft_prompt, save_peft_prompt
from lora_jax.interop.peft.save import save_peft

__all__ = [
  "load_gguf_adapter",
  "load_peft",
  "load_peft_prompt",
  "merged_params",
  "save_gguf_adapter",
  "save_merged",
  "save_merged_gguf",
  "save_mlx",
  "save_peft",
  "save_peft_prompt",
]
