"""Many videos: what they are given, how they end, and that it does not matter who does the work."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from star_core.batch import Outcome, Worker
from star_core.cli.batching import open_run
from star_core.pipeline import Settings
from star_core.resume import work_folder
from star_core.upscale import Clip, ShotSettings
from star_core.video_io import open_video
from star_core.windows.canvas import FrameSpan
from star_core.windows.chunking import ChunkConfig
from tests.command_line import refused, run, write_clip
from tests.paths import ROOT

QUICK = ["--scale", "2", "--solver-mode", "normal", "--steps", "2"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Six clips of 4 frames, but for one of 7."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(6):
        write_clip(folder / f"clip{i}.mkv", 7 if i == 3 else 4, 12, 16)
    return folder


def jobs_file(folder, jobs) -> Path:
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    return path


def job(videos, i, out, **options):
    return {"input": str(videos / f"clip{i}.mkv"), "output": str(out), **options}


# what the jobs say


@pytest.mark.parametrize(
    "options, words",
    [
        ({"scal": 2}, ": there is no option scal"),
        ({"scale": "large"}, ', scale: must be a number, not "large"'),
        ({"scale": "2"}, ', scale: must be a number, not "2"'),
        ({"scale": 2, "out_size": "32x24"}, "not allowed with"),
        ({"out_size": "32"}, ", out_size: '32' is not of the form WIDTHxHEIGHT"),
        ({"scale": [2, 3]}, ", scale: must be a number, not [2, 3]"),
        ({"steps": False}, ", steps: must be an integer, not false"),
        ({"steps": 2.5}, ", steps: must be an integer, not 2.5"),
        ({"prompt": None}, ", prompt: must be a string, not null"),
        ({"auto": 1}, ", auto: must be true or false, not 1"),
        ({"color_fix": "blue"}, ", color_fix: invalid choice: 'blue'"),
        ({"json": True}, ": there is no option json"),
        ({"ray": "auto"}, ": there is no option ray"),
    ],
)
def test_an_option_that_cannot_be_is_refused_with_the_jobs_name(
    capsys, tmp_path, videos, options, words
):
    jobs = [job(videos, 0, tmp_path / "a.mkv"), job(videos, 1, tmp_path / "b.mkv", **options)]
    err = refused(capsys, "batch", jobs_file(tmp_path, jobs))
    assert f"jobs.json, job 2 (clip1.mkv){words}" in err or "not allowed with" in words in err


@pytest.mark.parametrize(
    "content, words",
    [
        ("{}", "list of jobs"),
        ("[]", "at least one"),
        ("nonsense", "not valid JSON"),
        ('["a.mkv"]', "job 1 must be like"),
        ('[{"input": "a.mkv"}]', "job 1 (a.mkv) names no output"),
        ('[{"input": "a.mkv", "output": "x.mkv"}, {"input": "b.mkv", "output": "x.mkv"}]', "same"),
    ],
)
def test_a_list_that_is_none_is_refused(capsys, tmp_path, content, words):
    (tmp_path / "jobs.json").write_text(content)
    assert words in refused(capsys, "batch", tmp_path / "jobs.json")


def test_a_byte_order_mark_and_hidden_files_do_no_harm(capsys, tmp_path, videos):
    """Editors on Windows write the mark; macOS leaves files such as ._clip.mkv beside others."""
    mark = "\ufeff"
    jobs = jobs_file(tmp_path, [job(videos, 0, tmp_path / "a.mkv")])
    jobs.write_text(mark + jobs.read_text(), encoding="utf-8")
    code, _, err = run(capsys, "batch", jobs, *QUICK, "--shots", "off")
    assert code == 0, err
    (videos / "._clip0.mkv").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")
    code, _, err = run(capsys, "batch", videos, "--out", tmp_path / "o", *QUICK, "--shots", "off")
    assert code == 0 and "._clip0" not in err, err


def test_folders_without_videos_or_a_place_for_results_are_refused(capsys, tmp_path, videos):
    assert "no video" in refused(capsys, "batch", tmp_path, "--out", tmp_path)
    assert "--out" in refused(capsys, "batch", videos)
    assert "nowhere" in refused(capsys, "batch", tmp_path / "nowhere.json")


# how they end


def test_each_job_has_its_options_and_a_failure_stops_no_other(capsys, tmp_path, videos):
    (tmp_path / "broken.mkv").write_bytes(b"no video")
    jobs = [
        job(videos, 0, tmp_path / "a.mkv", scale=3),
        {"input": str(tmp_path / "broken.mkv"), "output": str(tmp_path / "b.mkv")},
        job(videos, 1, tmp_path / "c.mkv", **{"out-size": "20x30"}, frames="1:3"),
    ]
    arguments = ["batch", jobs_file(tmp_path, jobs), *QUICK, "--shots", "off", "--json"]
    code, out, err = run(capsys, *arguments)
    reported = json.loads(out)
    assert code == 2
    assert [entry["state"] for entry in reported] == ["done", "failed", "done"]
    assert "broken.mkv" in reported[1]["reason"] and not (tmp_path / "b.mkv").exists()
    sizes = [
        (open_video(tmp_path / n).info.width, len(open_video(tmp_path / n)))
        for n in ("a.mkv", "c.mkv")
    ]
    assert sizes == [(48, 4), (20, 2)]
    # the same command goes on
    (tmp_path / "broken.mkv").write_bytes((videos / "clip2.mkv").read_bytes())
    before = (tmp_path / "a.mkv").read_bytes()
    code, out, err = run(capsys, *arguments[:-1])
    assert code == 0
    table = out.splitlines()
    assert "there already" in table[1] and "done" in table[2] and "there already" in table[3]
    assert (tmp_path / "a.mkv").read_bytes() == before


def test_a_folder_gives_results_that_are_called_alike(capsys, tmp_path, videos):
    few = tmp_path / "few"
    few.mkdir()
    for i in range(2):
        (few / f"clip{i}.mkv").write_bytes((videos / f"clip{i}.mkv").read_bytes())
    code, out, err = run(capsys, "batch", few, "--out", tmp_path / "out", *QUICK, "--shots", "off")
    assert code == 0, err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clip0.mp4", "clip1.mp4"]
    assert "2 of 2" in err


# parts


def options_of(capsys, tmp_path, videos, out, *more):
    """The options of a job as a worker gets them."""
    from star_core.cli import parser
    from star_core.cli.batching import _jobs

    path = jobs_file(tmp_path, [job(videos, 3, out)])
    return _jobs(parser().parse_args(["batch", str(path), *QUICK, *more]))[0]


@pytest.mark.parametrize("how", [["--shots", "2,5"], ["--shots", "off", "--segment", "3"]])
def test_parts_that_others_have_found_are_not_done_again(
    capsys, tmp_path, videos, how, monkeypatch
):
    options = options_of(capsys, tmp_path, videos, tmp_path / "whole.mkv", *how)
    options |= {"chunk_frames": 2, "chunk_overlap": 1}
    whole = Worker(open_run).finish(0, options)
    assert whole.state == "done"
    shared = options | {"out": str(tmp_path / "shared.mkv")}
    found = Worker(open_run).survey(0, shared)
    assert not isinstance(found, Outcome)
    # Workers get it from another process and read the file no more than they must.
    found = pickle.loads(pickle.dumps(found))
    monkeypatch.setattr("star_core.video_io.reader.survey", None)
    monkeypatch.setattr("star_core.video_io.reader.hash_of", None)
    assert found.segments == ([2, 3, 2] if "2,5" in how else [3, 3, 1])
    for part in (2, 0, 1):
        assert Worker(open_run).store_segment(0, shared, found, part) is None
    assert len(list(work_folder(tmp_path / "shared.mkv").glob("*.safetensors"))) >= 3
    monkeypatch.setattr("star_core.models.unet.ControlledVideoUNet.forward", None)
    assert Worker(open_run).finish(0, shared, found).state == "done"
    assert (tmp_path / "shared.mkv").read_bytes() == (tmp_path / "whole.mkv").read_bytes()
    assert not work_folder(tmp_path / "shared.mkv").exists()


def test_a_worker_keeps_its_model(capsys, tmp_path, videos, monkeypatch):
    loaded = []
    from star_core import batch

    monkeypatch.setattr(
        batch, "load", lambda *a, load=batch.load, **k: loaded.append(a) or load(*a, **k)
    )
    worker = Worker(open_run)
    for name in ("a.mkv", "b.mkv"):
        options = options_of(capsys, tmp_path, videos, tmp_path / name, "--shots", "off")
        assert worker.finish(0, options).state == "done"
    assert len(loaded) == 1


def test_segments_have_all_frames_and_see_what_they_need():
    chunk = ChunkConfig(length=4, overlap=2, merged=0, segment=5)
    shot = ShotSettings(settings=Settings(chunk=chunk), frames=range(3, 16))
    clip = object.__new__(Clip)
    object.__setattr__(clip, "wanted", range(4, 16))
    object.__setattr__(clip, "alone", False)
    segments = [part for part, _ in clip.segments([shot])]
    assert [part.requested for part in segments] == [range(4, 8), range(8, 13), range(13, 16)]
    for part in segments:
        whole = FrameSpan.of(
            range(3, 16),
            part.requested,
            chunk=replace(chunk, segment=None),
            decode_window=shot.settings.sampling.decode_window,
            behaviour=shot.settings.behaviour,
        )
        assert part == whole


# on Ray


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes of one CPU each."""
    pytest.importorskip("ray", reason="needs Ray: pip install ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    # Ray's name for: all of it on this machine's loopback address
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

    node = {
        "num_cpus": 1,
        "num_gpus": 0,
        "node_ip_address": "127.0.0.1",
        "object_store_memory": 80_000_000,
    }
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        yield cluster
    finally:
        cluster.shutdown()


def test_two_nodes_of_which_one_loses_its_worker_give_what_one_process_gives(
    cluster, capsys, tmp_path, videos
):
    options = [*QUICK, "--shots", "2", "--chunk-frames", "2", "--chunk-overlap", "1"]
    command = [sys.executable, "-m", "star_core", "batch", str(videos), *options]
    command += ["--format", "mkv", "--out", str(tmp_path / "two"), "--ray", cluster.address]
    log = tmp_path / "log.txt"
    killed = None
    with log.open("w") as output, subprocess.Popen(command, cwd=ROOT, stderr=output) as process:
        while process.poll() is None:
            time.sleep(0.02)
            at_work = list((tmp_path / "two").glob(".*/*-00000-*.safetensors"))
            pids = [
                line.split()[-1] for line in log.read_text().splitlines() if "worker on" in line
            ]
            if killed is None and len(pids) == 2 and at_work:
                killed = int(pids[0])
                os.kill(killed, signal.SIGKILL)
    words = log.read_text()
    assert process.returncode == 0, words
    assert killed and "a worker died" in words and words.count("worker on") == 3
    code, out, err = run(
        capsys, "batch", videos, "--format", "mkv", "--out", tmp_path / "one", *options
    )
    assert code == 0, err
    for i in range(6):
        name = f"clip{i}.mkv"
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_cluster_that_is_not_there_is_named(capsys, tmp_path, videos):
    pytest.importorskip("ray", reason="needs Ray: pip install ray")
    jobs = jobs_file(tmp_path, [job(videos, 0, tmp_path / "a.mkv")])
    err = refused_after_a_word(capsys, "batch", jobs, "--ray", "127.0.0.1:1", *QUICK)
    assert "no Ray cluster at 127.0.0.1:1" in err and "leave out --ray" in err


def test_without_ray_it_is_said_how_to_scale(capsys, tmp_path, videos, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    jobs = jobs_file(tmp_path, [job(videos, 0, tmp_path / "a.mkv")])
    err = refused_after_a_word(capsys, "batch", jobs, "--ray", "auto", *QUICK)
    assert "pip install ray" in err


def refused_after_a_word(capsys, *arguments) -> str:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    return err.splitlines()[-1]
