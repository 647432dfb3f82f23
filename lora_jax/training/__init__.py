"""Training loops and checkpoints; they know only `Adaptation`."""
