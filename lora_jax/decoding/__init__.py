"""Decoding with a cache of keys and values; it knows no model, only three functions of one."""

from lora_jax.decoding.beam import Hypotheses, beam_search
from lora_jax.decoding.cached_model import CachedModel, from_linen
from lora_jax.decoding.sampling import SamplingConfig, generate
from lora_jax.decoding.scoring import BeamConfig

__all__ = [
  "BeamConfig",
  "CachedModel",
  "Hypotheses",
  "SamplingConfig",
  "beam_search",
  "from_linen",
  "generate",
]
