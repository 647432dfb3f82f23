"""Every test runs on 8 emulated CPU devices, with strict shapes and jaxtyping checked."""

import gc
import os
import threading
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
  *("adapters.weights", "adapters.initializers", "models.parts.attention", "models.gpt2"),
  *("training.fingerprint", "training.loss", "training.classification"),
)
"""Modules with shapes in their annotations; the others check what users give them themselves."""

with install_import_hook([f"lora_jax.{name}" for name in CHECKED], "beartype.beartype"):
  import lora_jax.models.gpt2.model
  import lora_jax.training.classification
  import lora_jax.training.fingerprint
  import lora_jax.training.loss  # noqa: F401

import jax
from jax._src.interpreters import mlir

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)  # or each program gets its key: 2 %

if version("jax").startswith("0.10."):  # later ones do the same
  create_context, local = mlir.make_ir_context, threading.local()

  def make_ir_context():
    """Returns an MLIR context for a program; ten share one, which takes 5 ms to create."""
    local.uses = getattr(local, "uses", -1) + 1
    if local.uses % 10 == 0:
      local.context = create_context()
    return local.context

  mlir.make_ir_context = make_ir_context


gc.set_threshold(10_000, 20, 20)  # tracing makes many objects, and few cycles of them


def pytest_collection_finish():
  """Leaves the imported modules out of garbage collections: they are most of all objects."""
  gc.freeze()
