"""The settings that only some methods have, the same ones in every experiment."""

from ml_collections import ConfigDict

from experiments.configs import Config


def add_method_settings(config: Config) -> None:
  """Adds the sections of methods other than LoRA to a config."""
  config.top_layers = ConfigDict()
  config.top_layers.num_layers = 2  # k of method=top_layers; needs model.scan_layers=False

  config.random_subspace = ConfigDict()
  config.random_subspace.dim = 1000  # of method=random_subspace: its trained parameters
  config.random_subspace.layer_scales = False  # True also trains one scale for each weight (SAID)

  config.prefix = ConfigDict()  # of methods with prefix in their name
  config.prefix.num_prefix = 8  # trained vectors before a prompt; in encoders after [CLS]
  config.prefix.num_infix = 8  # between it and the text; in encoders after the last token

  config.bottleneck = ConfigDict()
  config.bottleneck.width = 16  # r of adapter_h, adapter_l, adapter_p and adapter_d
  config.bottleneck.num_dropped = 1  # layers without adapters, the first ones, of adapter_d
