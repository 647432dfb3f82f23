"""The paper's baselines, each the same triple as `lora_jax.lora`."""
