"""Weights of other packages: where they are stored, and their tensors, read strictly."""

from lora_jax.extras import require

require("huggingface_hub", "safetensors")
