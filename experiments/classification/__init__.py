"""Parts of the experiments that classify text."""
