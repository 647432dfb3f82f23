"""DeBERTa-v2 and v3 (He et al. 2021)."""

from lora_jax.models.deberta.model import Deberta as Deberta
from lora_jax.models.deberta.model import DebertaConfig as DebertaConfig
