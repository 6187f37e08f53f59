"""Work that is gone on with: entries on the disk, and whole runs that are stopped anywhere."""

import errno
import os
import random
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from star_core import resume
from star_core.resume import (
    Work,
    cached_hash,
    hash_of,
    identity_of,
    tensor_hash,
    work_folder,
)
from tests.core.test_long_clips import STEPS, handed
from tests.core.test_pipeline import changing, clip_of, run

__all__ = ["changing"]  # a fixture

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "empty": torch.zeros(0, 2)}


@pytest.fixture
def work(tmp_path):
    with Work(tmp_path / "work", keep=True) as work:
        work.begin("run")
        yield work


def entries(work):
    return sorted(work.folder.glob("*.safetensors"))


def test_what_was_kept_is_recalled_bit_by_bit(work):
    assert work.recall("0000") is None
    work.keep("0000", TENSORS)
    work.keep("0000-001", {"b": torch.ones(1)})
    recalled = work.recall("0000")
    assert recalled.keys() == TENSORS.keys()
    assert all(torch.equal(recalled[key], TENSORS[key]) for key in TENSORS)
    work.forget("0000-*")
    assert work.recall("0000-001") is None and work.recall("0000")


@pytest.mark.parametrize("damage", [lambda data: data[:40], lambda data: data[:-1] + b"!"])
def test_damaged_entries_are_found_and_thrown_away(work, damage, caplog):
    work.keep("0000", TENSORS)
    (path,) = entries(work)
    path.write_bytes(damage(path.read_bytes()))
    assert work.recall("0000") is None
    assert not path.exists() and "damaged" in caplog.text


def test_a_full_disk_leaves_no_part_and_says_how_to_go_on(work, monkeypatch):
    work.keep("0000", TENSORS)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left.*continues from here"):
        work.keep("0001", TENSORS)
    assert [path.name.split(".")[1] for path in entries(work)] == ["0000"]
    assert not list(work.folder.glob("*.part"))


def test_another_run_begins_anew_and_the_work_of_the_first_stays_until_it_has_some(work, caplog):
    work.keep("0000", TENSORS)
    leftover = work.folder / ".star-0123.mkv"
    leftover.write_bytes(b"half a video")
    work.begin("run")
    assert work.recall("0000") and not leftover.exists()
    work.begin("other")
    assert work.recall("0000") is None
    assert "starting from scratch. To continue that run" in caplog.text
    work.begin("run")  # as the message says
    assert work.recall("0000")
    work.begin("other")
    work.keep("0000-001", TENSORS)
    work.begin("run")
    assert work.recall("0000")
    work.begin("other")
    work.finish("0000", TENSORS)
    assert work.recall("0000-001") is None
    work.begin("run")
    assert work.recall("0000") is None


def test_a_second_run_with_the_same_output_is_refused_and_workers_are_not(tmp_path):
    folder, out = tmp_path / "work", tmp_path / "o.mkv"
    with Work(folder, out=out) as work:
        work.begin("run")
        work.keep("0000", TENSORS)
        with (
            pytest.raises(ValueError, match="another run is writing .*o.mkv"),
            Work(folder, out=out),
        ):
            pass
    with Work(folder, out=out):
        pass


def test_workers_share_a_folder_and_other_runs_are_refused_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "_PATIENCE", 0.1)
    folder, out = tmp_path / "work", tmp_path / "o.mkv"
    refused = pytest.raises(ValueError, match="another run is writing .*o.mkv")
    with Work(folder, out=out, shared=True) as first:
        first.begin("run")
        with Work(folder, out=out, shared=True) as second:
            second.begin("run")
            second.keep("0000", TENSORS)
        assert first.recall("0000")
        with refused, Work(folder, out=out):
            pass
    (folder / "in use by a worker that died").touch()
    with Work(folder, out=out) as work:
        work.begin("run")
        assert work.recall("0000")
        with refused, Work(folder, out=out, shared=True):
            pass


def test_the_folder_goes_when_the_work_is_done_or_there_is_none(tmp_path):
    folder = tmp_path / "work"
    with Work(folder) as work:
        work.begin("run")
        work.keep("0000", TENSORS)
    assert not folder.exists()
    with pytest.raises(KeyboardInterrupt), Work(folder) as work:
        work.begin("run")
        raise KeyboardInterrupt
    assert not folder.exists()
    with pytest.raises(KeyboardInterrupt), Work(folder) as work:
        work.begin("run")
        work.keep("0000", TENSORS)
        raise KeyboardInterrupt
    assert list(folder.glob("*.safetensors"))


def test_the_folder_stays_after_the_work_where_that_is_asked_for(tmp_path):
    with Work(tmp_path / "work", keep=True) as work:
        work.begin("run")
        work.keep("0000", TENSORS)
    with Work(tmp_path / "work") as work:
        work.begin("run")
        assert work.recall("0000")


def test_a_folder_with_other_things_in_it_is_refused_and_kept(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="other files"), Work(tmp_path):
        pass
    assert (tmp_path / "precious.txt").exists()


def test_the_work_lies_beside_the_result_in_a_folder_that_is_there(tmp_path):
    assert work_folder(tmp_path / "a.mkv").parent == tmp_path
    assert work_folder(tmp_path / "frames" / "%05d.png").parent == tmp_path
    (tmp_path / "frames").mkdir()
    assert work_folder(tmp_path / "frames").parent == tmp_path / "frames"
    assert work_folder(tmp_path / "a.mkv") != work_folder(tmp_path / "b.mkv")
    long = [work_folder(tmp_path / f"{'影' * 82}{end}.mkv") for end in ("", "a")]
    assert len({*long}) == 2 and all(len(os.fsencode(path.name)) < 256 for path in long)


def test_the_hash_of_a_large_file_is_computed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "_LARGE", 3)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"one")
    first = cached_hash(path)
    assert first == hash_of([path])
    (tmp_path / "model.safetensors.hash").write_text(f"known {path.stat().st_size} "
                                                     f"{path.stat().st_mtime_ns}")  # fmt: skip
    assert cached_hash(path) == "known"
    path.write_bytes(b"other")
    assert cached_hash(path) == hash_of([path]) != first


def test_identities_and_hashes_follow_what_they_are_of(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    files = [tmp_path / name for name in "ab"]
    before = hash_of(files)
    assert len({hash_of([file]) for file in files} | {before, hash_of(files[::-1])}) == 4
    (tmp_path / "b").write_bytes(b"owt")
    assert hash_of(files) != before
    latin = tmp_path / os.fsdecode(b"caf\xe9")  # no UTF-8
    latin.write_bytes(b"one")
    assert hash_of([latin]) != hash_of(files[:1])
    assert identity_of({"a": 1, "b": 2}) == identity_of({"b": 2, "a": 1})
    assert identity_of({"a": 1}) != identity_of({"a": 2})


def test_the_hash_of_tensors_follows_shape_type_and_values():
    a = torch.arange(6.0)
    hashes = {tensor_hash(t) for t in (a, a.view(2, 3), a.half(), a + 1)}
    assert len(hashes | {tensor_hash(a, a)}) == 5
    assert tensor_hash(a.clone()) in hashes


# whole runs


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def undisturbed(changing):
    """Results by their strengths."""
    clip = clip_of(11, 8, 10)
    return {s: run(clip, changing, settings=handed(strength=s)) for s in (1.0, 0.7)}


def stopping_after(calls):
    count = 0

    def on_progress(stage, done, total):
        nonlocal count
        count += 1
        if count > calls:
            raise Stopped

    return on_progress


@hypothesis_settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    stops=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    strength=st.sampled_from([1.0, 0.7]),
)
def test_a_run_stopped_anywhere_goes_on_to_the_very_same_result(
    tmp_path_factory, changing, undisturbed, stops, strength
):
    clip, settings = clip_of(11, 8, 10), handed(strength=strength)
    expected = undisturbed[strength]
    folder = tmp_path_factory.mktemp("runs") / "work"
    for stop in stops:
        with Work(folder, keep=True) as work:
            work.begin("run")
            with suppress(Stopped):
                run(clip, changing, settings=settings, work=work, on_progress=stopping_after(stop))
    with Work(folder) as work:
        work.begin("run")
        assert torch.equal(run(clip, changing, settings=settings, work=work), expected)


@pytest.mark.parametrize("merged", [0, 100])
def test_what_is_finished_is_not_done_again(work, changing, monkeypatch, merged):
    settings = handed(sampling=STEPS)
    settings = replace(settings, chunk=replace(settings.chunk, merged=merged))
    clip, calls = clip_of(11, 8, 10), []
    forward = changing.network.forward
    monkeypatch.setattr(
        changing.network, "forward", lambda *args, **kw: calls.append(1) or forward(*args, **kw)
    )

    def stop(stage, done, total):
        if stage == "denoise" and done == 9:
            raise Stopped

    with pytest.raises(Stopped):
        run(clip, changing, settings=settings, work=work, on_progress=stop)
    begun = len(calls)
    result = run(clip, changing, settings=settings, work=work)
    calls.clear()
    assert torch.equal(result, run(clip, changing, settings=settings))
    assert len(calls) == 5 * 3  # windows and evaluations of an undisturbed run
    calls.clear()
    run(clip, changing, settings=settings, work=work)
    assert not calls
    assert begun == 9


def test_damaged_pieces_are_done_again(work, changing):
    clip, settings = clip_of(11, 8, 10), handed()
    expected = run(clip, changing, settings=settings, work=work)
    for path in random.Random(0).sample(entries(work), 2):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert torch.equal(run(clip, changing, settings=settings, work=work), expected)
    assert len(entries(work)) == 5
