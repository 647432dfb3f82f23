"""QA-LoRA beside PEFT's, whose linear layer can be called without a GPTQ model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj


def test_the_output_is_pefts_times_a_scaling():
  peft = pytest.importorskip("peft", reason="peft is not installed")
  import torch
  from peft.tuners.lora.layer import Linear
  from peft.tuners.lora.variants import QALoraLinearVariant

  settings = peft.LoraConfig(r=2, lora_alpha=4, use_qalora=True, qalora_group_size=16)
  layer = torch.nn.Linear(64, 6, bias=False)
  adapted = Linear(layer, "a", config=peft.LoraConfig(r=2, lora_alpha=4), r=2, lora_alpha=4)
  QALoraLinearVariant.init(adapted, "a", settings)
  torch.nn.init.normal_(adapted.lora_B["a"].weight)
  x = torch.randn(3, 64)
  with torch.no_grad():
    expected = QALoraLinearVariant.forward(adapted, "a", x, layer(x)).numpy()
  weights = (layer.weight, adapted.lora_A["a"].weight, adapted.lora_B["a"].weight)
  w, a, b = (jnp.asarray(weight.detach().numpy().T) for weight in weights)

  config = lj.LoraConfig(rank=2, alpha=4.0, target="w")
  qa_lora = lj.qa_lora(lambda params, x: x @ params["w"], config, group_size=16)
  trainable = qa_lora.init(jax.random.key(0), {"w": w}, jnp.asarray(x.numpy()))
  trainable = {"w": trainable["w"].replace(lora_a=a, lora_b=b)}
  scaling = 2.0 * 64 / 16**2
  got = qa_lora.apply({"w": w}, trainable, jnp.asarray(x.numpy()), scaling=scaling)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
