"""Experiments: one file a command. They need the extra `experiments`."""

from lora_jax.extras import require

require("grain", "huggingface_hub", "jinja2", "matplotlib", "safetensors", "tokenizers", "tqdm")
