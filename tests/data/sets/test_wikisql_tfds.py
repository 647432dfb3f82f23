"""The TFDS builder of WikiSQL gives the reader's records."""

import pytest

pytest.importorskip("tensorflow_datasets", reason="needs tensorflow-datasets")

from lora_jax.data.sets import wikisql, wikisql_tfds

from tests.tiny_text_sets import write_wikisql


def test_records_are_those_of_the_reader(tmp_path):
  folder = write_wikisql(tmp_path)
  loaded = wikisql_tfds.load("test", folder, data_dir=tmp_path / "tfds", any_size=True)
  assert list(loaded) == wikisql.read("test", folder, any_size=True)
