"""The TFDS builder of MNLI's subset gives the reader's records."""

import pytest

pytest.importorskip("tensorflow_datasets", reason="needs tensorflow-datasets")

from lora_jax.data.sets import mnli_text, mnli_text_tfds

from tests.tiny_text_sets import write_mnli_subset


def test_records_are_those_of_the_reader(tmp_path):
  folder = write_mnli_subset(tmp_path)
  loaded = mnli_text_tfds.load("valid", folder, data_dir=tmp_path / "tfds", any_size=True)
  assert list(loaded) == mnli_text.read("valid", folder, any_size=True)
