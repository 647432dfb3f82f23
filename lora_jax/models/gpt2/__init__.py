"""GPT-2 (Radford et al. 2019)."""

from lora_jax.models.gpt2.model import GPT2 as GPT2
from lora_jax.models.gpt2.model import GPT2Config as GPT2Config
