"""Optional packages, which models, data and experiments need."""

import importlib.util


def require(*packages: str) -> None:
  """Raises ImportError with the command that installs them if packages are missing."""
  missing = [name for name in packages if importlib.util.find_spec(name) is None]
  if missing:
    raise ImportError(
      f"this part of lora_jax needs {', '.join(missing)}, which come with the extra "
      "'experiments': pip install 'lora-jax[experiments]' (in a checkout: pip install "
      "-e '.[experiments]')"
    )
