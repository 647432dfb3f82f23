"""The base of the TFDS builders: `array_record` files in a folder of the source's content."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from lora_jax.files import cache_folder, local_path


class PreparedBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A builder whose files are prepared once, without TensorFlow.

  Args:
    folder: a name for the source's content, so that changed files are never read as prepared.
    data_dir: the folder of all prepared files; None is `default_data_dir()`.
    config: as in any TFDS builder.
    version: as in any TFDS builder.
    arguments: the further ones of the subclass, by which TFDS makes it again.
  """

  code_path = epath.Path(__file__)  # finding it needs a package that TFDS does not require
  pkg_dir_path = code_path.parent
  VERSION = tfds.core.Version("1.0.0")

  def __init__(
    self,
    folder: str,
    data_dir: str | os.PathLike[str] | None,
    config: Any,
    version: Any,
    **arguments: Any,
  ):
    root = default_data_dir() if data_dir is None else local_path(os.fspath(data_dir))
    super().__init__(
      data_dir=root / folder, config=config, version=version, file_format="array_record"
    )
    fields = {"data_dir": root, "config": config, "version": version}
    self._original_state = {**fields, **arguments}


def prepare(builder: PreparedBuilder) -> Any:
  """Returns the builder with its files in place; several processes may call it at once."""
  silence = io.StringIO()  # TFDS prints its progress, of about 3 seconds
  try:
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
      builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
      )
  except OSError:
    # TFDS writes to a folder of its own and renames it. The rename fails if another process was
    # the first, whose files are as good.
    if not builder.data_path.exists():
      raise
    builder = type(builder)(**builder._original_state)
  return builder


def default_data_dir() -> Path:
  """Returns `$TFDS_DATA_DIR`, or `lora_jax/tfds` in the user's folder for cached files."""
  if "TFDS_DATA_DIR" in os.environ:
    return local_path(os.environ["TFDS_DATA_DIR"])
  return cache_folder() / "tfds"
