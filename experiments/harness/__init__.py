"""What experiments share; nothing here can be run."""
