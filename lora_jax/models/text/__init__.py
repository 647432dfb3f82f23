"""Tokenizers and chat templates of model folders."""
