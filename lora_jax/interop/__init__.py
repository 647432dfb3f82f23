"""Adapters in the forms of other packages."""

from lora_jax.interop.merged import merged_params, save_merged
from lora_jax.interop.peft_load import load_peft
from lora_jax.interop.peft_save import save_peft

__all__ = ["load_peft", "merged_params", "save_merged", "save_peft"]
