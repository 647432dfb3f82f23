"""The parts of `experiments/subspaces.py`: runs, figures and tables."""
