"""The Llama family: Llama 2 and 3, Mistral, Mixtral, Qwen 2 and 3, Gemma."""

from lora_jax.models.llama.model import Llama as Llama
from lora_jax.models.llama.model import LlamaConfig as LlamaConfig
