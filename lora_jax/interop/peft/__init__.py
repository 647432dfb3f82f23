"""Adapters in the format of Hugging Face PEFT, both ways."""
