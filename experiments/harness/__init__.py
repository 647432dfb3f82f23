"""Code shared by all experiments; none of it is a command."""
