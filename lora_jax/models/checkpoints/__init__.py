"""Weights of other packages: where they are stored, and their tensors, read strictly."""
