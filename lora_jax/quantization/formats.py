"""The formats of quantized weights, by name."""

from lora_jax.quantization.format import Format
from lora_jax.quantization.ggml import GGML
from lora_jax.quantization.int8 import INT8
from lora_jax.quantization.nf4 import NF4
from lora_jax.quantization.rtn import RTN2, RTN3

FORMATS: dict[str, Format] = {format_.name: format_ for format_ in (*GGML, INT8, NF4, RTN3, RTN2)}
