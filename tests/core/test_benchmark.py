"""The benchmark on a small clip of its own, with methods that need nothing."""

import csv
import hashlib
import importlib.util
import math
import sys
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from star_core import benchmark
from star_core.benchmark import cases, methods, run, write_report
from star_core.cli import main
from star_core.metrics import compare
from star_core.packages import Carrier
from star_core.plots import Point, scatter
from star_core.video_io import open_sink, open_video

NOWHERE = Carrier(requirement="none==0", sha256="0" * 64, member="none")


def write(path, frames):
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames.shape[-2:]
    with open_sink(path, width=width, height=height, fps=Fraction(25)) as sink:
        for frame in frames:
            sink.write(frame)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A benchmark's folder with one small film in it, the only clip that there is."""
    coarse = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    film = torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1)
    path = write(tmp_path / "films" / "toy.mkv", film)
    clip = cases.Clip(
        file="toy.mkv",
        carrier=NOWHERE,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        frames=(1, 4),
        crop=(48, 32, 8, 16),
    )
    monkeypatch.setitem(cases.CLIPS, "toy", clip)
    return tmp_path


@pytest.fixture
def restored(monkeypatch):
    """Which cells are restored, in this process."""
    module = sys.modules["star_core.benchmark.run"]  # the package has a function of that name
    cells = []

    def restore(method, source, out, folder, threads):
        cells.append((method, out.parents[1].name))
        out.parent.mkdir(parents=True, exist_ok=True)
        return module.restore_here(method, source, out, folder, threads)

    monkeypatch.setattr(module, "_restore", restore)
    return cells


def all_of(folder, *, methods=("bicubic",), metrics=("psnr", "flicker"), **options: Any):
    return run(folder, clips=["toy"], methods=methods, metrics=metrics, **options)


def test_truth_is_the_cut_and_the_input_as_much_smaller_as_it_is_enlarged(folder):
    film = torch.stack(list(open_video(folder / "films" / "toy.mkv")))
    truth = torch.stack(list(open_video(cases.truth_of("toy", folder))))
    assert torch.equal(truth, film[1:4, :, 16:48, 8:56])
    for recipe in cases.RECIPES:
        info = open_video(cases.degraded("toy", recipe, folder)).info
        scale = cases.scale_of(recipe)
        assert (info.width, info.height, info.frame_count) == (48 // scale, 32 // scale, 3)
    assert [cases.scale_of(recipe) for recipe in ("heavy", "light-3", "heavy-1")] == [4, 3, 1]


def test_a_method_is_asked_for_its_own_scales_alone(folder, restored, monkeypatch):
    only_two = methods.Method(
        title="x",
        prepare=lambda folder: "1",
        restore=methods.METHODS["bicubic"].restore,
        scales=(2,),
    )
    monkeypatch.setitem(methods.METHODS, "two", only_two)
    recipes = ["heavy", "heavy-2"]
    seen = []
    results = all_of(
        folder,
        methods=["bicubic", "two"],
        recipes=recipes,
        on_progress=lambda stage, done, total: seen.append((done, total)),
    )
    assert seen[-1] == (3, 3)
    cells = [(r.method, r.recipe) for r in results]
    assert cells == [("bicubic", "heavy"), ("bicubic", "heavy-2"), ("two", "heavy-2")]


def test_a_film_with_another_hash_is_refused(folder):
    write(folder / "films" / "other.mkv", torch.zeros(2, 3, 16, 16)).replace(
        folder / "films" / "toy.mkv"
    )
    with pytest.raises(ValueError, match="not the published file"):
        cases.truth_of("toy", folder)


def test_values_are_those_of_the_restored_file(folder, restored):
    (result,) = all_of(folder, recipes=["heavy"])
    video = folder / "heavy" / "bicubic" / "toy.mkv"
    expected = compare(open_video(video), open_video(folder / "truth" / "toy.mkv"))
    assert result.per_frame["psnr"] == expected.per_frame["psnr"]
    assert result.means["flicker"] == expected.means["flicker"]
    assert result.frames == 3 and result.cost.cpu_seconds > 0


def test_a_run_that_was_ended_goes_on(folder, restored):
    def end(stage, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        all_of(folder, on_progress=end)
    assert len(restored) == 2
    results = all_of(folder)
    every = len(cases.RECIPES)
    assert len(results) == every and len(restored) == every == len(set(restored))
    assert [r.means for r in all_of(folder)] == [r.means for r in results]
    assert len(restored) == every


def test_a_method_finds_nothing_that_an_earlier_run_left(folder, restored, monkeypatch):
    left = folder / "light" / "resuming" / ".toy.mkv-work"
    left.mkdir(parents=True)
    beside = []

    def restore(source, out, *rest):
        beside.extend(path.name for path in out.parent.iterdir())
        methods.METHODS["bicubic"].restore(source, out, *rest)

    resuming = methods.Method(title="x", prepare=lambda folder: "1", restore=restore)
    monkeypatch.setitem(methods.METHODS, "resuming", resuming)
    all_of(folder, methods=["resuming"], recipes=["light"])
    assert not beside
    assert {path.name for path in left.parent.iterdir()} == {left.name, "toy.mkv", "toy.json"}


def test_only_what_has_changed_is_made_again(folder, restored, monkeypatch):
    names = ["bicubic", "again"]
    versions = {"again": "1"}
    again = methods.Method(
        title="again",
        prepare=lambda folder: versions["again"],
        restore=methods.METHODS["bicubic"].restore,
    )
    monkeypatch.setitem(methods.METHODS, "again", again)
    all_of(folder, methods=names, recipes=["light"])
    versions["again"] = "2"
    all_of(folder, methods=names, recipes=["light"])
    assert restored == [("bicubic", "light"), ("again", "light"), ("again", "light")]
    results = all_of(folder, methods=names, recipes=["light"], metrics=["psnr", "ssim"])
    assert all(result.means.keys() == {"psnr", "ssim"} for result in results)
    results = all_of(folder, methods=names, recipes=["light"], metrics=["ssim"])
    assert all(r.means.keys() == r.per_frame.keys() == {"ssim"} for r in results)


def test_what_lacks_something_is_told_in_one_line_and_left_out(folder, restored, monkeypatch):
    def prepare(folder):
        raise ValueError("it needs a spell: `pip install spell`")

    lacking = methods.Method(title="x", prepare=prepare, restore=lambda *_: None)
    monkeypatch.setitem(methods.METHODS, "lacking", lacking)
    monkeypatch.setenv("STAR_METRIC_WEIGHTS", str(folder / "none"))
    output = []
    (result,) = all_of(
        folder,
        methods=["lacking", "bicubic"],
        recipes=["light"],
        metrics=["lpips", "psnr"],
        on_missing=output.append,
    )
    assert result.method == "bicubic" and set(result.means) == {"psnr"}
    assert [line.split(" is left out: ")[0] for line in output] == ["lacking", "lpips"]
    assert "pip install spell" in output[0] and not any("\n" in line for line in output)


@pytest.mark.parametrize("what", ["clips", "methods", "recipes", "metrics"])
def test_unknown_names_are_refused_with_those_that_there_are(tmp_path, what):
    options: dict[str, Any] = {"clips": ["city"], "methods": ["bicubic"], what: ["nonsense"]}
    with pytest.raises(ValueError, match=f"no {what[:-1]} is called nonsense: choose from"):
        run(tmp_path, **options)


def test_a_process_of_its_own_tells_what_it_took(folder):
    (result,) = all_of(folder, recipes=["compression"])
    assert result.cost.seconds > 0 and result.cost.cpu_seconds > 0
    assert result.cost.peak is None or result.cost.peak > 2**24


def test_the_report_has_every_cell_and_frame(folder, restored):
    pytest.importorskip("matplotlib", reason="plots are drawn by matplotlib")
    results = all_of(folder)
    files = write_report(results, folder, folder / "report")
    assert all(file.stat().st_size for file in files)
    with (folder / "cells.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["psnr"]) for row in rows] == [r.means["psnr"] for r in results]
    with (folder / "frames.csv").open() as file:
        frames = list(csv.DictReader(file))
    assert len(frames) == len(cases.RECIPES) * (3 + 2)  # flicker has no value at a first frame
    text = (folder / "report" / "benchmark.md").read_text()
    for result in results:
        assert f"| bicubic | {result.means['psnr']:.2f} |" in text
    expected = (
        "Gaussian blur 1.6, area reduction by 4, noise 12/255, JPEG 30; enlarged by 4; seed 1."
    )
    assert expected in text
    for picture in (folder / "report").glob("*.png"):
        assert f"({picture.name})" in text


def test_without_matplotlib_the_tables_are_still_made(folder, restored, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "matplotlib" else find_spec(n)
    )
    arguments = ["--clips", "toy", "--methods", "bicubic", "--recipes", "light"]
    assert main(["benchmark", *arguments, "--metrics", "psnr", "--out", str(folder)]) == 0
    assert "pip install matplotlib" in capsys.readouterr().err
    assert "| bicubic |" in (folder / "benchmark.md").read_text()
    assert not list(folder.glob("*.png"))


def test_the_command_prints_where_the_report_lies(folder, restored, capsys):
    pytest.importorskip("matplotlib", reason="plots are drawn by matplotlib")
    arguments = ["--clips", "toy", "--methods", "bicubic", "--recipes", "light"]
    assert main(["benchmark", *arguments, "--metrics", "psnr", "--out", str(folder)]) == 0
    assert str(folder / "benchmark.md") in capsys.readouterr().out


def restore(method, tmp_path, frames):
    source = write(tmp_path / "in.mkv", frames)
    size = 4 * frames.shape[-1], 4 * frames.shape[-2]
    methods.METHODS[method].restore(source, tmp_path / "out.mkv", size, tmp_path, lambda: None, 1)
    return torch.stack(list(open_video(tmp_path / "out.mkv")))


def test_lanczos_keeps_a_grey_and_its_edges_are_sharper_than_bicubics(tmp_path):
    pytest.importorskip("cv2", reason="Lanczos is OpenCV's")
    (tmp_path / "grey").mkdir()
    grey = torch.full((1, 3, 8, 12), 100 / 255)
    assert torch.equal(
        restore("lanczos", tmp_path / "grey", grey), grey[:, :, :1, :1].expand(1, 3, 32, 48)
    )
    edge = torch.full((1, 3, 8, 12), 0.2)
    edge[..., 6:] = 0.8
    slopes = {}
    for method in ("lanczos", "bicubic"):
        (tmp_path / method).mkdir()
        slopes[method] = restore(method, tmp_path / method, edge).diff(dim=-1).max()
    assert slopes["lanczos"] > slopes["bicubic"]


def test_real_esrgan_is_run_by_ncnn_from_its_published_form(tmp_path, monkeypatch):
    """With a network that only repeats pixels, in the format of the published ones."""
    pytest.importorskip("ncnn", reason="Real-ESRGAN is run by ncnn")
    name = "REALESRGAN_ANIMAVIDEOV3_UP4X"
    param = "7767517\n2 2\nInput data 0 1 data\nInterp up 1 1 data output 0=1 1=4.0 2=4.0\n"
    (tmp_path / "real-esrgan").mkdir()
    contents = {"param": param.encode(), "bin": b""}
    for kind, content in contents.items():
        (tmp_path / "real-esrgan" / f"{name}.{kind}").write_bytes(content)
    hashes = tuple(hashlib.sha256(content).hexdigest() for content in contents.values())
    monkeypatch.setitem(methods.REAL_ESRGAN, name, hashes)
    assert name in methods.METHODS["animevideov3"].prepare(tmp_path)
    frames = (torch.rand(2, 3, 6, 10, generator=torch.Generator().manual_seed(0)) * 255).round()
    repeated = frames.repeat_interleave(4, -1).repeat_interleave(4, -2) / 255
    torch.testing.assert_close(restore("animevideov3", tmp_path, frames / 255), repeated)
    (tmp_path / "real-esrgan" / f"{name}.bin").write_bytes(b"other")
    with pytest.raises(ValueError, match="not the published file"):
        methods.METHODS["animevideov3"].prepare(tmp_path)


def test_the_scatter_marks_every_finite_point(monkeypatch):
    pytest.importorskip("matplotlib", reason="plots are drawn by matplotlib")
    points = [Point(name="one", x=0.1, y=1), Point(name="two", x=10, y=2)]
    points += [Point(name="near", x=10.5, y=2), Point(name="nan", x=1, y=math.nan)]
    figure = scatter({"a": points[:2], "b": points[2:]}, x_title="seconds", y_title="dB")
    (axes,) = figure.axes
    marks = [np.asarray(line.get_xydata()).tolist() for line in axes.lines]
    assert marks == [[[0.1, 1], [10, 2]], [[10.5, 2]]]
    assert (axes.get_xlabel(), axes.get_title(loc="left")) == ("seconds", "dB")
    labels = axes.texts
    assert [label.get_text() for label in labels] == ["one", "two", "near"]
    boxes = [label.get_window_extent() for label in labels]
    assert not any(box.overlaps(other) for box, other in combinations(boxes, 2))
    with pytest.raises(ValueError, match="no finite value"):
        scatter({"a": []}, x_title="", y_title="")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        scatter({"a": points}, x_title="", y_title="")


def test_clips_of_the_default_were_not_trained_on():
    assert benchmark.HELD_OUT == ("city", "bikes", "carphone")
    for clip in cases.CLIPS.values():
        assert clip.crop[0] % 16 == clip.crop[1] % 16 == 0
