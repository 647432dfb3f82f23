"""Parts of the experiments that generate text."""
