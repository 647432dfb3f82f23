"""The paper's baselines, each an `Adaptation` as `lora_jax.lora` returns it."""
