"""What is trained, whatever the variant: targets, nodes, checks, storage, shardings."""
