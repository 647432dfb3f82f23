"""Test vectors for variants of LoRA, computed in NumPy from the papers' formulas; see README.md.

No code is shared with `lora_jax`, which is one of the implementations that they test.
"""
