"""Reads and writes adapters in the format of Hugging Face PEFT."""
