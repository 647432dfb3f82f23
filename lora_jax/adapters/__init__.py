"""The trained parameters of every variant: targets, nodes, checks, storage, shardings."""
