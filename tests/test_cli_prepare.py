"""`cdetr prepare`: what it says and refuses; whole runs, by TFDS's own coco builder, where TFDS is installed.

The archives come from a server on this machine that takes the place of COCO's, as a proxy.
"""

import collections
import fcntl
import http.server
import json
import re
import shutil
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from coco_archives import FILE_NAMES, write_archives

from cdetr_jax.cli.main import run


def fails(capsys, *arguments):
    """Runs the command, which must fail; returns its last line on standard error, of which there is no traceback."""
    with pytest.raises(SystemExit) as error:
        run(["prepare", *map(str, arguments)])
    assert error.value.code == 1
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    return found.err.strip().splitlines()[-1]


def test_help(capsys):
    with pytest.raises(SystemExit):
        run(["prepare", "--help"])
    assert "--archives=from_a_disk" in capsys.readouterr().out


def test_without_tfds(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.setitem(sys.modules, "array_record", None)
    line = fails(capsys, "--dataset=coco/2017", f"--data_dir={tmp_path}")
    assert line.startswith("cdetr prepare: error: TFDS sets need a package that is not installed")
    assert line.endswith("pip install cdetr_jax[tfds]")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- with TFDS and TensorFlow


USAGE = collections.namedtuple("USAGE", "total used free")


@pytest.fixture
def tfds(monkeypatch):
    """TFDS, on a machine with much room."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: USAGE(10**12, 0, 10**12))
    for name in ("tensorflow", "array_record", "importlib_resources"):
        pytest.importorskip(name)
    return pytest.importorskip("tensorflow_datasets")


def rewrite(archives, folder, name, change):
    """Copies the archives, with the members of one of them changed."""
    folder.mkdir(exist_ok=True)
    for file in FILE_NAMES:
        shutil.copy(archives / file, folder)
    with zipfile.ZipFile(archives / name) as old, zipfile.ZipFile(folder / name, "w") as new:
        for member in old.namelist():
            new.writestr(member, change(member, old.read(member)))


def all_are_dogs(_, content):
    instances = json.loads(content)
    for annotation in instances["annotations"]:
        annotation["category_id"] = 18
    return json.dumps(instances)


@pytest.fixture
def rev_set(tfds):
    """A set with two configs, registered with TFDS; needs no download."""

    class RevSet(tfds.core.GeneratorBasedBuilder):
        """Three pictures of trees."""

        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="first"), tfds.core.BuilderConfig(name="second")]  # noqa: RUF012

        def _info(self):
            objects = {"bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(names=["oak", "elm"])}
            features = {"image": tfds.features.Image(), "objects": tfds.features.Sequence(objects)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            box = {"label": "elm", "bbox": tfds.features.BBox(0.1, 0.1, 0.5, 0.5)}
            for i in range(3):
                yield i, {"image": np.full((40, 50, 3), i, np.uint8), "objects": [box]}

    yield RevSet
    tfds.core.registered._DATASET_REGISTRY.pop("rev_set")


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """A folder with COCO's archives in small."""
    folder = tmp_path_factory.mktemp("published")
    write_archives(folder)
    return folder


@pytest.fixture
def server(archives, monkeypatch):
    """Serves the archives. `asked` counts requests by file; the first two for a file in `cut` end in the middle."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rsplit("/", 1)[1]
            if not self.path.startswith("http://images.cocodataset.org/"):
                return self.send_error(404)
            content = (archives / name).read_bytes()
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            server.asked[name].append(start)
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            is_cut = name in server.cut and len(server.asked[name]) <= 2
            self.wfile.write(content[start : start + len(content) // 3] if is_cut else content[start:])
            return None

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.cut = collections.defaultdict(list), set()
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setattr("time.sleep", lambda _: None)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_download_and_prepare(tfds, server, archives, tmp_path, capsys, caplog):
    server.cut = {"train2017.zip"}
    downloads, version = tmp_path / "downloads" / "archives", tmp_path / "coco" / "2017"
    downloads.mkdir(parents=True)
    whole = (archives / "val2017.zip").read_bytes()
    (downloads / "val2017.zip.part").write_bytes(whole[:5000])  # of a process that was killed,
    (version / "incomplete.XYZABC_1.1.0").mkdir(parents=True)  # and another one
    (tmp_path / "downloads" / "incomplete.unpacked" / "ZIP.val2017.zip").mkdir(parents=True)
    arguments = ["prepare", "--dataset=coco/2017", f"--data_dir={tmp_path}", "--any-archives"]
    run(arguments)
    found = capsys.readouterr()
    third = len((archives / "train2017.zip").read_bytes()) // 3
    assert server.asked["train2017.zip"] == [0, third, 2 * third]
    assert server.asked["val2017.zip"] == [5000]
    assert {path.name for path in downloads.iterdir()} == set(FILE_NAMES)
    assert not (tmp_path / "downloads" / "incomplete.unpacked").exists()
    assert all((downloads / name).read_bytes() == (archives / name).read_bytes() for name in FILE_NAMES)
    assert f"coco/2017:1.1.0 is prepared in {version}/1.1.0\npictures: train 6, validation 9, test 1\n" in found.out
    assert f"--config.data.tfds_name=coco/2017:1.1.0 --config.data.tfds_data_dir={tmp_path}" in found.out
    assert "27.1 GB to download, about 27.1 GB to unpack and" in caplog.text
    caplog.clear()
    assert [path.name for path in version.iterdir()] == ["1.1.0"]
    assert (version / "1.1.0" / "cdetr-validation.npz").exists()

    asked = sum(map(len, server.asked.values()))
    shutil.rmtree(tmp_path / "downloads")
    run(arguments)
    found = capsys.readouterr()
    assert found.out.startswith(f"coco/2017:1.1.0 was prepared in {version}/1.1.0\npictures: train 6, validation 9,")
    assert "to download" not in caplog.text
    assert sum(map(len, server.asked.values())) == asked


def test_without_a_network(tfds, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.delenv("no_proxy", raising=False)
    line = fails(capsys, "--dataset=coco/2017", f"--data_dir={tmp_path}")
    assert line.startswith("cdetr prepare: error: cannot download http://images.cocodataset.org/zips/")
    assert "Connection refused" in line
    assert f"without a network bring these files to {tmp_path}/downloads/archives (or name their folder with" in line
    assert all(name in line for name in FILE_NAMES)


def test_a_file_that_is_not_there(tfds, server, tmp_path, capsys):
    line = fails(capsys, "--dataset=voc/2007", f"--data_dir={tmp_path}")
    assert "cannot download https://" in line


def test_archives_from_elsewhere(tfds, server, archives, tmp_path, caplog):
    run(["prepare", "--dataset=coco/2017", f"--data_dir={tmp_path}", f"--archives={archives}", "--any-archives"])
    assert "0.0 MB to download" in caplog.text
    assert not server.asked
    assert {path.name for path in archives.glob("*.zip")} == set(FILE_NAMES)


def test_archives_that_are_not_the_published_ones(tfds, archives, tmp_path, capsys, monkeypatch):
    line = fails(capsys, "--dataset=coco/2017", f"--data_dir={tmp_path}", f"--archives={archives}")
    size = (archives / "train2017.zip").stat().st_size
    assert f"{archives}/train2017.zip has {size} bytes, the published file 19336861798: is it complete?" in line

    from cdetr_jax.data import tfds_prepare

    monkeypatch.setattr(tfds_prepare, "check_sizes", lambda *_: None)  # of the same size, but of other content
    line = fails(capsys, "--dataset=coco/2017", f"--data_dir={tmp_path}", f"--archives={archives}")
    assert "2017.zip, has wrong checksum, so it is not the published file: delete it and call again" in line
    assert line.endswith("with --any-archives")
    assert not any((tmp_path / "coco" / "2017").iterdir())


def test_a_damaged_archive(tfds, archives, tmp_path, capsys):
    for name in FILE_NAMES:
        shutil.copy(archives / name, tmp_path)
    content = (tmp_path / "val2017.zip").read_bytes()
    (tmp_path / "val2017.zip").write_bytes(content[: len(content) // 2])
    line = fails(
        capsys, "--dataset=coco/2017", f"--data_dir={tmp_path}/tfds", f"--archives={tmp_path}", "--any-archives"
    )
    assert "val2017.zip" in line
    assert "zip" in line.split("val2017.zip")[-1]
    assert line.endswith("delete it and call again to have it downloaded")


def test_archives_of_the_same_names_but_other_content(tfds, archives, tmp_path, monkeypatch):
    from cdetr_jax.data.tfds_source import TfdsSource

    extracted = []
    extract = tfds.core.download.extractor._Extractor.extract
    monkeypatch.setattr(
        tfds.core.download.extractor._Extractor,
        "extract",
        lambda self, path, *rest: (extracted.append(Path(path).name), extract(self, path, *rest))[1],
    )
    rewrite(archives, tmp_path / "other", "annotations_trainval2017.zip", all_are_dogs)
    arguments = ["prepare", "--dataset=coco/2017", f"--data_dir={tmp_path}", "--any-archives"]
    for folder, count, labels in (
        (archives, 5, {1, 13, 27, 90}),
        (archives, 0, {1, 13, 27, 90}),  # of a process that was killed while it wrote records
        (tmp_path / "other", 5, {18}),
    ):
        extracted.clear()
        run([*arguments, f"--archives={folder}"])
        assert len(extracted) == count
        records = TfdsSource("coco/2017", tmp_path, "validation").records
        assert {label for record in records for label in record.category_ids.tolist()} == labels
        shutil.rmtree(tmp_path / "coco")
    rewrite(archives, tmp_path / "other", "annotations_trainval2017.zip", lambda _, content: content)
    run([*arguments, f"--archives={tmp_path / 'other'}"])
    records = TfdsSource("coco/2017", tmp_path, "validation").records
    assert {label for record in records for label in record.category_ids.tolist()} == {1, 13, 27, 90}


def test_a_picture_without_a_size(tfds, archives, tmp_path, capsys):
    from cdetr_jax.data.tfds_source import find_prepared

    with zipfile.ZipFile(archives / "val2017.zip") as content:
        bad = content.namelist()[4]
    rewrite(archives, tmp_path / "bad", "val2017.zip", lambda name, content: content[: 100 if name == bad else None])
    arguments = ["--dataset=coco/2017", f"--data_dir={tmp_path}", f"--archives={tmp_path}/bad", "--any-archives"]
    folder = tmp_path / "coco" / "2017" / "1.1.0"
    for _ in range(2):
        line = fails(capsys, *arguments)
        assert f"coco/2017:1.1.0 validation: {Path(bad).name}: cannot read this picture" in line
        assert f"delete {folder} and prepare" in line
        assert line.endswith(f"It was deleted just now: put sound archives in {tmp_path}/bad, call again")
        assert not any(folder.parent.iterdir())
    shutil.copy(archives / "val2017.zip", tmp_path / "bad")
    run(["prepare", *arguments])
    assert Path(find_prepared("coco/2017", tmp_path)) == folder


@pytest.mark.parametrize("step", ["unpacking", "records"])
def test_a_disk_that_becomes_full(tfds, archives, tmp_path, capsys, monkeypatch, step):
    arguments = ["--dataset=coco/2017", f"--data_dir={tmp_path}", f"--archives={archives}", "--any-archives"]

    def write(*_, **__):
        raise RuntimeError("INTERNAL: write failed: No space left on device")

    with monkeypatch.context() as patch:
        if step == "unpacking":
            patch.setattr("tensorflow_datasets.core.download.extractor._copy", write)
        else:
            patch.setattr("tensorflow_datasets.core.writer.Writer.finalize", write)
        line = fails(capsys, *arguments)
    assert f"the disk of {tmp_path} became full, 1000.0 GB are free now; free some more and call the same" in line
    run(["prepare", *arguments])
    assert "is prepared" in capsys.readouterr().out


def test_too_little_space(tfds, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: USAGE(10**12, 0, 70 * 10**9))
    line = fails(capsys, "--dataset=coco/2017", f"--data_dir={tmp_path}")
    assert "coco/2017:1.1.0 needs about 81.2 GB" in line
    assert "only 70.0 GB are free; free 11.2 GB or name another --data_dir" in line
    assert not server.asked


def test_two_at_once(tfds, tmp_path, capsys):
    with (tmp_path / ".cdetr-prepare.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        line = fails(capsys, "--dataset=coco/2017", f"--data_dir={tmp_path}")
    assert f"another `cdetr prepare` is at work in {tmp_path}" in line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cocoo/2017", "TFDS has no set 'cocoo/2017'"),
        ("coco/2018", "TFDS cannot make 'coco/2018'"),
        ("mnist", "mnist:3.0.1 cannot be trained on: it needs the features image, objects/bbox and objects/label"),
    ],
)
def test_sets_that_cannot_be_made(tfds, tmp_path, capsys, name, message):
    assert message in fails(capsys, f"--dataset={name}", f"--data_dir={tmp_path}/new")
    assert not Path(tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "config"),
    [("rev_set", "first"), ("RevSet/second", "second"), ("rev_set/second:1.*.*", "second"), ("rev_set:1.0.0", "first")],
)
def test_names_are_resolved(rev_set, tmp_path, capsys, name, config):
    from cdetr_jax.data.tfds_source import TfdsSource

    for was in ("is", "was"):
        run(["prepare", f"--dataset={name}", f"--data_dir={tmp_path}"])
        out = capsys.readouterr().out
        assert out.startswith(f"rev_set/{config}:1.0.0 {was} prepared in {tmp_path}/rev_set/{config}/1.0.0\n")
    (given,) = re.findall(r"--config\.data\.tfds_name=(\S+)", out)
    assert len(TfdsSource(given, tmp_path, "train")) == 3


def test_a_set_that_is_there_as_tfrecord(rev_set, tmp_path, capsys):
    rev_set(data_dir=str(tmp_path), config="second", file_format="tfrecord").download_and_prepare()
    line = fails(capsys, "--dataset=rev_set/second", f"--data_dir={tmp_path}")
    assert f"error: {tmp_path}/rev_set/second/1.0.0 holds the set as tfrecord files, which cannot be read at" in line
    assert line.endswith("name another --data_dir to prepare it there")


def test_not_a_local_folder(tmp_path, capsys):
    line = fails(capsys, "--dataset=coco/2017", "--data_dir=gs://bucket/tfds")
    assert "gs://bucket/tfds is not a local folder" in line
