"""The parts of `experiments.paper_shapes`."""
