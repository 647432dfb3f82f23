"""Variants of LoRA: one file per paper, its equation in the first lines."""
