"""The parts of `python -m experiments.paper`: planned runs, decisions, the claims, the report."""
