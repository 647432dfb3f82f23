"""The TFDS builders of WebNLG and DART: the records of their readers, and no TensorFlow."""

import subprocess
import sys

import pytest

pytest.importorskip("tensorflow_datasets", reason="needs tensorflow-datasets")

from lora_jax.data.sets import dart, dart_tfds, webnlg, webnlg_tfds

from tests.tiny_triples import write_dart, write_webnlg

SETS = {
  "webnlg": (webnlg, webnlg_tfds, write_webnlg, list(webnlg.FILES)),
  "dart": (dart, dart_tfds, write_dart, ["valid", "test", "dev_train", "dev_valid"]),
}


@pytest.mark.parametrize("name", SETS)
def test_the_builder_has_the_records_of_the_files(tmp_path, name):
  reader, builders, write, splits = SETS[name]
  folder = write(tmp_path / "originals")
  options = {"data_dir": tmp_path / "tfds", "any_size": True}
  for split in splits:
    expected = reader.read(split, folder, any_size=True)
    loaded = builders.load(split, folder, **options)
    assert list(loaded) == expected
    assert loaded.take([-1 % len(expected)]) == [expected[-1]]
  (prepared,) = (tmp_path / "tfds").glob("folder-*")  # prepared once
  files = [path.name for path in prepared.rglob("*") if "array_record" in path.name]
  assert len(files) == len(splits)


def test_records_have_the_number_of_their_input(tmp_path):
  folder = write_dart(tmp_path / "originals")
  builder = dart_tfds.Dart(source=folder, data_dir=tmp_path / "tfds", any_size=True)
  dart_tfds.originals_tfds.prepare(builder)
  assert [row["input_id"] for row in builder.as_data_source("test")] == [0, 1, 1, 1, 2]
  assert "MIT" in builder.info.redistribution_info.license


def test_a_changed_folder_is_prepared_again_and_a_missing_split_is_named(tmp_path):
  folder = write_webnlg(tmp_path / "originals")
  options = {"data_dir": tmp_path / "tfds", "any_size": True}
  first = list(webnlg_tfds.load("test_unseen", folder, **options))
  text = (folder / "test.json").read_text().replace("plays jazz", "sings")
  (folder / "test.json").write_text(text)
  second = list(webnlg_tfds.load("test_unseen", folder, **options))
  assert [records[0].completion for records in (first, second)] == [
    "Eve É plays jazz.",
    "Eve É sings.",
  ]
  (folder / "train.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"WebNLG 2017 file train\.json in .*microsoft/LoRA"):
    webnlg_tfds.load("train", folder, **options)
  with pytest.raises(ValueError, match="expected 872 entries, got 1"):
    webnlg_tfds.load("test", folder, data_dir=tmp_path / "tfds")
  with pytest.raises(ValueError, match="split of WebNLG 2017 must be one of"):
    webnlg_tfds.load("dev", folder, **options)


def test_a_folder_without_files_says_where_they_are(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"dart-v1\.1\.1-full-train\.json.*Yale-LILY/dart"):
    dart_tfds.Dart(source=tmp_path, data_dir=tmp_path / "tfds")


@pytest.mark.long
def test_no_tensorflow_is_imported(tmp_path):
  code = (
    "import sys\nfrom lora_jax.data.sets import dart_tfds\n"
    "dart_tfds.load('test', sys.argv[1], data_dir=sys.argv[2], any_size=True)\n"
    "print('tensorflow' in sys.modules)\n"
  )
  folder = write_dart(tmp_path / "originals")
  command = [sys.executable, "-c", code, str(folder), str(tmp_path / "tfds")]
  run = subprocess.run(command, capture_output=True, text=True, check=True)
  assert run.stdout.strip() == "False"
