"""Data sets, one file each, and their TFDS builders."""
