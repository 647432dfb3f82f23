"""Every test runs on 8 emulated CPU devices, with strict shapes and jaxtyping checked."""

import os
from importlib.metadata import version

FLAGS = [
  "--xla_force_host_platform_device_count=8",
  "--xla_backend_optimization_level=0",  # of LLVM: tests compile much and compute little
  "--xla_llvm_disable_expensive_passes=true",
  "--xla_cpu_parallel_codegen_split_count=1",  # programs are small: 5 % of the time
]
if version("jaxlib").startswith("0.10."):  # later ones have no other emitters
  FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # a third of the time to compile
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["KERAS_BACKEND"] = "jax"

from jaxtyping import install_import_hook

CHECKED = (
  *("transform", "adapters.weights", "adapters.initializers", "adapters.shardings", "placement"),
  *("models.parts.attention", "models.gpt2", "training.fingerprint", "training.loss"),
  "training.classification",
)
"""The modules of array functions; the others check what users give them themselves."""

with install_import_hook([f"lora_jax.{name}" for name in CHECKED], "beartype.beartype"):
  import lora_jax.models.gpt2.model
  import lora_jax.training.classification
  import lora_jax.training.fingerprint
  import lora_jax.training.loss  # noqa: F401

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
