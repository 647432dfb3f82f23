"""Variants of LoRA, one file a paper, its equation in the first lines."""
