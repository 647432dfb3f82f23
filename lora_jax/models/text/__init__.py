"""Tokenizers and chat templates of model folders."""

from lora_jax.extras import require

require("tokenizers", "jinja2")
