"""The TFDS builder of E2E: every source, and no TensorFlow."""

import functools
import http.server
import json
import pickle
import subprocess
import sys
import threading

import pytest

from lora_jax.data.sets import e2e

pytest.importorskip("tensorflow_datasets", reason="needs tensorflow-datasets")

from lora_jax.data.sets import e2e_tfds, prepared

LINES = {
  "train": "name : A||It is A .\nname : Café||It is Café .\nname : A||This is A .\n",
  "valid": "name : B||It is B .\n",
  "test": "name : C||It is C .\nname : C||This is C .\n",
}


@pytest.fixture
def folder(tmp_path):
  folder = tmp_path / "originals"
  folder.mkdir()
  for split, text in LINES.items():
    (folder / f"{split}.txt").write_text(text)
  return folder


def test_records_of_a_folder_and_their_features(folder, tmp_path, capfd):
  builder = e2e_tfds.prepare("reference", folder, tmp_path / "tfds")
  source = builder.as_data_source("train")
  assert source[1] == {
    "context": "name : Café".encode(),
    "completion": "It is Café .".encode(),
    "input_id": 1,
  }
  assert [row["input_id"] for row in source] == [0, 1, 0]
  assert {path.suffix for path in builder.data_path.glob("e2e-*")} == {
    ".array_record-00000-of-00001"
  }
  for split in LINES:
    loaded = e2e_tfds.load(split, source=folder, data_dir=tmp_path / "tfds")
    assert list(loaded) == e2e.read(split, folder=folder)
  assert capfd.readouterr() == ("", "")


def test_records_are_read_when_they_are_accessed(folder, tmp_path, monkeypatch):
  records, expected = (
    e2e_tfds.load("train", "reference", folder, tmp_path),
    e2e.read("train", folder=folder),
  )
  source, numbers = type(records._source), []
  read = source.__getitems__
  monkeypatch.setattr(source, "__getitems__", lambda self, i: numbers.append(i) or read(self, i))
  assert len(records) == 3
  assert numbers == []
  assert records.take([2, 0]) == [expected[2], expected[0]]
  assert (records[-1], records[1:], records[::2]) == (expected[-1], expected[1:], expected[::2])
  assert numbers == [[2, 0], [2], [1, 2], [0, 2]]
  with pytest.raises(IndexError):
    records[3]


def test_a_changed_folder_is_prepared_again(folder, tmp_path):
  first = list(e2e_tfds.load("valid", source=folder, data_dir=tmp_path / "tfds"))
  (folder / "valid.txt").write_text("name : D||It is D .\n")
  second = list(e2e_tfds.load("valid", source=folder, data_dir=tmp_path / "tfds"))
  assert (first, second) == ([("name : B", "It is B .")], [("name : D", "It is D .")])


def test_bad_folders_are_named(folder, tmp_path):
  load = functools.partial(e2e_tfds.load, "test", source=folder, data_dir=tmp_path / "tfds")
  (folder / "train.txt").write_text("name : A||It is A .\nname : A\n")
  with pytest.raises(ValueError, match=r"train\.txt:2: expected 'context\|\|completion'"):
    load()
  (folder / "train.txt").write_text("")
  with pytest.raises(ValueError, match=r"train\.txt: expected at least one record"):
    load()
  (folder / "train.txt").unlink()
  with pytest.raises(FileNotFoundError, match=rf"train\.txt in the folder {folder}"):
    load()


def test_unknown_configs_and_sources_are_refused(tmp_path):
  with pytest.raises(ValueError, match="config must be one of reference, official, got 'csv'"):
    e2e_tfds.E2E(config="csv", data_dir=tmp_path)
  with pytest.raises(ValueError, match="only the official format can be downloaded"):
    e2e_tfds.E2E(source="download", data_dir=tmp_path)


def test_a_pickled_builder_finds_its_files(folder, tmp_path):
  builder = e2e_tfds.E2E(source=folder, data_dir=tmp_path / "tfds")
  assert pickle.loads(pickle.dumps(builder)).data_dir == builder.data_dir


def test_the_default_folder_follows_the_environment(monkeypatch, tmp_path):
  monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert prepared.default_data_dir() == tmp_path / "lora_jax" / "tfds"
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "other"))
  assert prepared.default_data_dir() == tmp_path / "other"


@pytest.mark.long
def test_two_processes_prepare_the_embedded_copy_at_once_without_tensorflow(tmp_path):
  code = (
    "import json, sys\n"
    "from lora_jax.data.sets import e2e, e2e_tfds\n"
    "same = [list(e2e_tfds.load(s, 'official', data_dir=sys.argv[1])) == e2e.read(s, 'official')\n"
    "        for s in ('valid', 'test')]\n"
    "print(json.dumps([same, 'tensorflow' in sys.modules]))\n"
  )
  command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
  runs = [subprocess.Popen(command, stdout=-1, stderr=-1, text=True) for _ in range(2)]
  for run in runs:
    out, err = run.communicate()
    assert json.loads(out or "null") == [[True, True], False], err
  with pytest.raises(FileNotFoundError, match=r"trainset\.csv is not embedded"):
    e2e_tfds.load("train", "official", data_dir=tmp_path)


def test_the_process_that_comes_second_takes_the_firsts_files(folder, tmp_path, monkeypatch):
  """The process loses the race: the other's files appear while it writes its own."""
  generate = e2e_tfds.E2E._split_generators

  def late(self, dl_manager):
    monkeypatch.setattr(e2e_tfds.E2E, "_split_generators", generate)
    e2e_tfds.prepare("reference", folder, tmp_path / "tfds")
    return generate(self, dl_manager)

  monkeypatch.setattr(e2e_tfds.E2E, "_split_generators", late)
  builder = e2e_tfds.prepare("reference", folder, tmp_path / "tfds")
  assert len(builder.as_data_source("train")) == 3
  assert not list(builder.data_path.parent.glob("incomplete*"))


@pytest.mark.long
def test_the_whole_embedded_copy(tmp_path):
  for split in LINES:
    assert list(e2e_tfds.load(split, data_dir=tmp_path)) == e2e.read(split)


@pytest.fixture
def server(tmp_path):
  """Serves the official files, a short training set among them, on this machine."""
  files = tmp_path / "served"
  files.mkdir()
  (files / "trainset.csv").write_text('mr,ref\n"name[A], area[B]",It is A.\n')
  for name in ("devset.csv", "testset_w_refs.csv"):
    (files / name).write_bytes(e2e.embedded_bytes(name))

  class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
      pass

  handler = functools.partial(Quiet, directory=files)
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()


def test_the_official_files_are_downloaded(server, tmp_path, monkeypatch):
  monkeypatch.setattr(e2e_tfds, "DOWNLOAD", server)
  load = functools.partial(
    e2e_tfds.load, form="official", source="download", data_dir=tmp_path / "tfds"
  )
  assert list(load("train")) == [("name[A], area[B]", "It is A.")]
  assert list(load("test")) == e2e.read("test", "official")


def test_a_download_that_differs_is_refused(server, tmp_path, monkeypatch):
  monkeypatch.setattr(e2e_tfds, "DOWNLOAD", server)
  infos = e2e_tfds.E2E.url_infos
  served = {f"{server}{info.filename}": info for info in infos.values()}
  monkeypatch.setattr(e2e_tfds.E2E, "url_infos", served)
  with pytest.raises(
    e2e_tfds.tfds.download.download_manager.NonMatchingChecksumError, match=r"trainset\.csv"
  ):
    e2e_tfds.load("test", "official", "download", tmp_path / "tfds")


def test_the_checksums_of_the_download_are_those_of_the_embedded_files():
  for name in e2e.FILES["official"].values():
    info = e2e_tfds.E2E.url_infos[e2e_tfds.DOWNLOAD + name]
    if name in e2e.EMBEDDED_SHA256:
      assert info.checksum == e2e.EMBEDDED_SHA256[name]
      assert info.size == len(e2e.embedded_bytes(name))
