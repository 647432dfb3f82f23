"""The TFDS builder of SAMSum gives the reader's records."""

import pytest

pytest.importorskip("tensorflow_datasets", reason="needs tensorflow-datasets")

from lora_jax.data.sets import samsum, samsum_tfds

from tests.tiny_text_sets import write_samsum


def test_records_are_those_of_the_reader(tmp_path):
  folder, prepared = write_samsum(tmp_path), tmp_path / "tfds"
  loaded = samsum_tfds.load("test", folder, data_dir=prepared, any_size=True)
  assert list(loaded) == samsum.read("test", folder, any_size=True)
  with pytest.raises(FileNotFoundError, match=r"validation\.csv"):
    samsum_tfds.load("valid", folder, data_dir=prepared, any_size=True)
  with pytest.raises(ValueError, match="expected 14,731 chats, got 5"):
    samsum_tfds.load("test", folder, data_dir=prepared)
