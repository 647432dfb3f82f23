"""Each leaf of each family of the zoo has a sharding rule, and each matrix of a layer is split."""

import dataclasses

import jax
import pytest

from lora_jax.models.bert.model import Bert, BertConfig
from lora_jax.models.deberta.model import Deberta, DebertaConfig
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.models.llama.model import Llama, LlamaConfig, MixtureConfig
from lora_jax.models.parts.causal_lm import shapes_of
from lora_jax.models.sharding import sharding_of
from lora_jax.training.mesh import make_mesh
from lora_jax.trees import leaves_with_path

LLAMA = LlamaConfig(qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True)
MIXTURE = MixtureConfig(num_experts=8, experts_per_token=2, shared_dim=64)
FAMILIES = {
  "gpt2": GPT2(GPT2Config(vocab_size=50304, tie_head=False)),
  "llama": Llama(LLAMA),
  "mixture": Llama(dataclasses.replace(LLAMA, mlp_bias=False, mixture=MIXTURE)),
  "bert": Bert(BertConfig(num_labels=3)),
  "roberta": Bert(BertConfig(kind="roberta", pooler=False, num_labels=3)),
  "deberta": Deberta(
    DebertaConfig(
      num_labels=3, conv_size=3, share_kernels=False, input_positions=True, num_token_types=2
    )
  ),
}
NARROW = ("router/kernel", "shared_gate/kernel", "head/out/kernel")  # a few columns


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_leaf_has_a_rule_and_every_large_one_is_split_over_all_devices(family, scan_layers):
  model = FAMILIES[family]
  shapes = shapes_of(
    model.clone(config=dataclasses.replace(model.config, num_layers=2, scan_layers=scan_layers))
  )
  shardings = leaves_with_path(sharding_of(make_mesh(data=1, fsdp=4, tensor=2))(shapes))
  for (path, leaf), (_, sharding) in zip(leaves_with_path(shapes), shardings, strict=True):
    is_matrix = len(leaf.shape) > 1 + (scan_layers and path.startswith(("h/", "layers/")))
    parts = leaf.size // jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype).size
    assert parts == (8 if is_matrix and not path.endswith(NARROW) else parts), path
    if scan_layers and path.startswith(("h/", "layers/")):
      assert sharding.spec[0] is None, f"{path} is split over its layers"


def test_a_leaf_without_a_rule_and_an_uneven_one_are_refused():
  mesh = make_mesh(fsdp=2, tensor=4)
  shapes = {"h_0": {"attn": {"query": {"kernel": jax.ShapeDtypeStruct((8, 8), "float32")}}}}
  unknown = shapes | {"gate": {"weight": jax.ShapeDtypeStruct((8,), "float32")}}
  with pytest.raises(ValueError, match="no sharding rule for gate/weight"):
    sharding_of(mesh)(unknown)
  head = {"lm_head": {"kernel": jax.ShapeDtypeStruct((768, 50257), "float32")}}
  with pytest.raises(ValueError, match=r"lm_head/kernel \(768, 50257\): an axis of 50257 .* 4 dev"):
    sharding_of(mesh)(shapes | head)
