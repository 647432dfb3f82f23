"""BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019)."""

from lora_jax.models.bert.model import Bert as Bert
from lora_jax.models.bert.model import BertConfig as BertConfig
