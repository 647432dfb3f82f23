"""Adapters summed, truncated, converted to plain LoRA, padded to one shape, and stacked."""

from lora_jax.arithmetic.bank import Bank as Bank
from lora_jax.arithmetic.bank import bank as bank
from lora_jax.arithmetic.combination import align as align
from lora_jax.arithmetic.combination import weighted_sum as weighted_sum
from lora_jax.arithmetic.conversion import convert as convert
from lora_jax.arithmetic.conversion import to_lora as to_lora
from lora_jax.arithmetic.rows import by_row as by_row
from lora_jax.arithmetic.truncation import drop_zero_ranks as drop_zero_ranks
from lora_jax.arithmetic.truncation import truncate_rank as truncate_rank
