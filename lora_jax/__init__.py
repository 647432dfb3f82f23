"""Low-Rank Adaptation of any JAX function, as a transform of its parameters."""

from lora_jax.adaptation import Adaptation as Adaptation
from lora_jax.adapters.adapt import lora as lora
from lora_jax.adapters.config import LoraConfig as LoraConfig
from lora_jax.adapters.config import LoraRule as LoraRule
from lora_jax.adapters.delta import LoraWeight as LoraWeight
from lora_jax.adapters.shardings import shardings as shardings
from lora_jax.adapters.storage import pack as pack
from lora_jax.adapters.storage import unpack as unpack
from lora_jax.adapters.summary import merge_error as merge_error
from lora_jax.adapters.summary import summary as summary
from lora_jax.arithmetic.combination import align as align
from lora_jax.arithmetic.combination import weighted_sum as weighted_sum
from lora_jax.arithmetic.truncation import truncate_rank as truncate_rank
from lora_jax.axes import LoraAxes as LoraAxes
from lora_jax.flax_nnx import functional as functional
from lora_jax.methods.full import full_finetuning as full_finetuning
from lora_jax.methods.partial import partial_finetuning as partial_finetuning
from lora_jax.optimizer import freeze as freeze
from lora_jax.transform.factored import Factored as Factored
from lora_jax.transform.interpreter import UnsupportedOperation as UnsupportedOperation
from lora_jax.trees import combine as combine
from lora_jax.trees import label as label
from lora_jax.trees import match as match
from lora_jax.trees import partition as partition
from lora_jax.trees import trainable_mask as trainable_mask
