"""The model zoo: Flax Linen modules that know nothing of adaptation."""
