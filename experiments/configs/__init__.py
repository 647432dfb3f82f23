"""The config files: every field of a run, with its default and what it means."""

from typing import Any

Config = Any  # a ConfigDict, whose fields no type checker knows; at an experiment's `run` it ends
