"""Measurements that explain the comparison: sharpness, intruder dimensions, capacity."""
