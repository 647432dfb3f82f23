"""PEFT's methods other than LoRA, one file for each family: its tensors, and our arrays."""
