"""The data sets of the experiments that generate text, as tasks: `table.py` lists them."""
