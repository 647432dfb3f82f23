"""Decodes with a cache of keys and values, by three functions of any model."""

from lora_jax.decoding.beam import Hypotheses, beam_search
from lora_jax.decoding.beam_config import BeamConfig
from lora_jax.decoding.cached_model import CachedModel, adapted, adapted_by_row, from_linen
from lora_jax.decoding.sampling import SamplingConfig, generate

__all__ = [
  "BeamConfig",
  "CachedModel",
  "Hypotheses",
  "SamplingConfig",
  "adapted",
  "adapted_by_row",
  "beam_search",
  "from_linen",
  "generate",
]
