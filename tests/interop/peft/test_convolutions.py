"""Adapters of convolutions over one axis and two, from and to PEFT, in a made-up model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.interop import load_peft, save_peft
from lora_jax.models.checkpoints.hub import StoredTensor

from tests.toy_models import relative_difference

WINDOWS = [pytest.param((5,), id="one_axis"), pytest.param((3, 5), id="two_axes")]
STORED = [
  StoredTensor("conv.weight", ("conv/kernel",), transposed=True),
  StoredTensor("conv.bias", ("conv/bias",)),
  StoredTensor("dense.weight", ("dense/kernel",), transposed=True),
  StoredTensor("dense.bias", ("dense/bias",)),
]


def model(params, images):
  """A convolution, a nonlinearity, the mean over the image, and a dense layer."""
  space = "HW"[: images.ndim - 2]
  dimensions = (f"N{space}C", f"{space}IO", f"N{space}C")
  kernel, strides = params["conv"]["kernel"], [1] * len(space)
  y = jax.lax.conv_general_dilated(images, kernel, strides, "SAME", dimension_numbers=dimensions)
  y = jax.nn.gelu(y + jnp.broadcast_to(params["conv"]["bias"], y.shape), approximate=False)
  y = y.mean(axis=tuple(range(1, images.ndim - 1)))
  return y @ params["dense"]["kernel"] + jnp.broadcast_to(params["dense"]["bias"], (len(y), 4))


def base(window):
  draw = np.random.default_rng(0).standard_normal
  params = {
    "conv": {"kernel": draw((*window, 3, 8)), "bias": draw(8)},
    "dense": {"kernel": draw((8, 4)), "bias": draw(4)},
  }
  images = draw((2, *[6, 7][: len(window)], 3))
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, images))


def adapter(params, images):
  config = lj.LoraConfig(rank=2, alpha=6.0, target="(conv|dense)/kernel")
  trainable = lj.lora(model, config).init(jax.random.key(0), params, images)
  keys = iter(jax.random.split(jax.random.key(1), 8))
  return config, jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), trainable)


@pytest.mark.parametrize("window", WINDOWS)
def test_names_and_shapes_are_pefts_and_read_back(window, tmp_path):
  params, images = base(window)
  config, trainable = adapter(params, images)
  save_peft(tmp_path / "peft", config, trainable, STORED, params)
  written = load_file(tmp_path / "peft" / "adapter_model.safetensors")
  assert {name: array.shape for name, array in written.items()} == {
    "base_model.model.conv.lora_A.weight": (2, 3, *window),
    "base_model.model.conv.lora_B.weight": (8, 2, *[1] * len(window)),
    "base_model.model.dense.lora_A.weight": (2, 8),
    "base_model.model.dense.lora_B.weight": (4, 2),
  }
  lora, loaded = load_peft(tmp_path / "peft", STORED, params)
  expected = lj.lora(model, config).apply(params, trainable, images)
  assert relative_difference(lj.lora(model, lora).apply(params, loaded, images), expected) < 1e-5
  assert relative_difference(model(params, images), expected) > 1e-2
  with pytest.raises(ValueError, match=r"lora_A\.weight has shape .*, expected \(2, 3, .*7\)"):
    load_peft(tmp_path / "peft", STORED, base((*window[:-1], 7))[0])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers
def test_parity_with_peft_there_and_back(window, tmp_path):
  peft = pytest.importorskip("peft", reason="peft is not installed")
  import torch

  def net():
    params, images = base(window)
    kind = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d}[len(window)]

    class Net(torch.nn.Module):
      def __init__(self):
        super().__init__()
        self.conv, self.dense = kind(3, 8, window, padding="same"), torch.nn.Linear(8, 4)

      def forward(self, x):
        return self.dense(torch.nn.functional.gelu(self.conv(x)).flatten(2).mean(dim=2))

    net_copy = Net()
    with torch.no_grad():
      kernel = np.moveaxis(np.asarray(params["conv"]["kernel"]), (-1, -2), (0, 1))
      net_copy.conv.weight.copy_(torch.tensor(kernel.copy()))
      net_copy.conv.bias.copy_(torch.tensor(np.asarray(params["conv"]["bias"])))
      net_copy.dense.weight.copy_(torch.tensor(np.asarray(params["dense"]["kernel"]).T.copy()))
      net_copy.dense.bias.copy_(torch.tensor(np.asarray(params["dense"]["bias"])))
    return net_copy, torch.tensor(np.moveaxis(np.asarray(images), -1, 1).copy())

  params, images = base(window)
  torch.manual_seed(0)
  lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["conv", "dense"])
  plain, inputs = net()
  peer = peft.get_peft_model(plain, lora).eval()
  with torch.no_grad():
    for name, parameter in peer.named_parameters():
      if "lora_B" in name:
        parameter.normal_()
    expected = peer(inputs).numpy()
  peer.save_pretrained(tmp_path / "theirs")
  config, trainable = load_peft(tmp_path / "theirs", STORED, params)
  got = lj.lora(model, config).apply(params, trainable, images)
  assert relative_difference(got, jnp.asarray(expected)) < 1e-5
  merged = lj.lora(model, config).merge(params, trainable)
  assert relative_difference(model(merged, images), jnp.asarray(expected)) < 1e-5
  save_peft(tmp_path / "ours", config, trainable, STORED, params)
  reread = peft.PeftModel.from_pretrained(net()[0], tmp_path / "ours").eval()
  with torch.no_grad():
    back = reread(inputs).numpy()
  assert relative_difference(jnp.asarray(back), jnp.asarray(expected)) < 1e-5
