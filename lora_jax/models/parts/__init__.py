"""Layers, masks and caches that several models of the zoo share."""
