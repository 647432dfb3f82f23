"""The engine: pushes a jaxpr through factored weights; knows no variant and no config."""
