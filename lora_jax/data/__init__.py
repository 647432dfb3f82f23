"""Data sets, and token batches made from them; nothing else of lora_jax is needed."""
