import csv
import json
import math
import sys
from fractions import Fraction
from importlib.util import find_spec

import pytest
import torch

from star_core.cli import main
from star_core.evaluation.clip_folders import Pair
from star_core.evaluation.evaluate import Evaluation, Selection, evaluate, evaluate_frames
from star_core.evaluation.report import curves_of, overall, table
from star_core.metrics import Comparison, psnr
from star_core.video_io import open_sink, open_video

NAMES = ["psnr", "flicker"]


def clip(path, frames=3, size=(24, 32), seed=0):
    """Noise, stored without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    with open_sink(path, width=size[1], height=size[0], fps=Fraction(25)) as sink:
        for _ in range(frames):
            sink.write(torch.rand(3, *size, generator=generator))
    return path


@pytest.fixture
def pair(tmp_path):
    return Pair(
        name="a", restored=clip(tmp_path / "r.mkv"), reference=clip(tmp_path / "t.mkv", seed=1)
    )


def frames_of(path):
    return list(open_video(path))


def test_evaluation_holds_every_frame_of_the_pair(pair):
    done = []
    result = evaluate(pair, NAMES, on_frame=lambda *at: done.append(at))
    truth = zip(frames_of(pair.restored), frames_of(pair.reference), strict=True)
    assert result.comparison.per_frame["psnr"] == [psnr(x, y) for x, y in truth]
    assert (result.frames, result.width, result.height, result.notes) == (3, 32, 24, ())
    assert done == [(1, 3), (2, 3), (3, 3)]


def test_border_size_and_frames_say_what_is_compared(pair):
    selection = Selection(frames=(1, 3), border=2, size=(10, 8))
    result = evaluate(pair, NAMES, selection=selection)
    x, y = (frames_of(p)[1][:, 8:16, 11:21] for p in (pair.restored, pair.reference))
    assert result.comparison.per_frame["psnr"][0] == psnr(x, y)
    assert (result.frames, result.width, result.height) == (2, 10, 8)
    for wrong in (Selection(border=12), Selection(size=(33, 8)), Selection(border=9, size=(16, 8))):
        with pytest.raises(ValueError, match="^a"):
            evaluate(pair, NAMES, selection=wrong)


def test_what_one_clip_has_more_is_left_out_and_told(tmp_path, pair):
    longer = Pair(
        name="a",
        restored=pair.restored,
        reference=clip(tmp_path / "more.mkv", frames=5, size=(26, 40)),
    )
    result = evaluate(longer, NAMES)
    x, y = frames_of(longer.restored)[2], frames_of(longer.reference)[2][:, :24, :32]
    assert result.comparison.per_frame["psnr"][2] == psnr(x, y)
    assert (result.frames, result.width, result.height) == (3, 32, 24)
    assert len(result.notes) == 2
    wrong = Pair(
        name="a", restored=pair.restored, reference=clip(tmp_path / "large.mkv", size=(48, 64))
    )
    with pytest.raises(ValueError, match="a: sizes are 32x24 and 64x48"):
        evaluate(wrong, NAMES)


def of(name, **per_frame):
    comparison = Comparison(per_frame=per_frame, missing={"lpips": "weights are missing"})
    frames = len(next(iter(per_frame.values())))
    return Evaluation(name=name, frames=frames, width=8, height=8, comparison=comparison)


def test_every_clip_counts_once_whatever_its_length():
    clips = [of("a", psnr=[20.0] * 9), of("b", psnr=[30.0]), of("c", psnr=[math.nan])]
    assert overall(clips) == {"psnr": 25}
    text = table(clips)
    assert "PSNR, dB" in text and "25.000" in text and "higher is better" in text
    assert text.count("weights are missing") == 1


def test_curves_of_many_clips_become_their_mean():
    pytest.importorskip("PIL", reason="plots are drawn by Pillow")
    many = [of(str(n), psnr=[20.0 + n, 30.0]) for n in range(9)]
    few = [of("the mean", psnr=[24.0, 30.0])]
    drawn = [curves_of(clips) for clips in (many, few)]
    assert drawn[0].shape == drawn[1].shape
    plot = (..., slice(44, 320), slice(80, 930))  # without the names
    assert torch.equal(drawn[0][plot], drawn[1][plot])


def test_the_command_measures_folders_and_writes_a_report(tmp_path, capsys):
    for n, name in enumerate("ab"):
        clip(tmp_path / "r" / f"{name}.mkv", seed=n)
        clip(tmp_path / "t" / f"{name}.mkv", seed=n + 1)
    options = ["--truth", str(tmp_path / "t"), "--metrics", "psnr", "ssim", "niqe"]
    weights = ["--metric-folder", str(tmp_path / "none"), "--report", str(tmp_path / "report")]
    assert main(["evaluate", str(tmp_path / "r"), *options, *weights, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "report/report.json").read_text())
    assert printed["missing"].keys() == {"niqe"}
    assert [c["name"] for c in printed["clips"]] == ["a", "b"]
    with (tmp_path / "report/clips.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["clip"] for row in rows] == ["a", "b", "mean"]
    assert float(rows[2]["psnr"]) == pytest.approx(printed["means"]["psnr"])
    with (tmp_path / "report/frames.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6
    if find_spec("PIL"):
        assert (tmp_path / "report/curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_any_optional_package_fidelity_is_measured_and_the_rest_is_told(
    tmp_path, capsys, monkeypatch
):
    for name in ("cv2", "PIL", "scipy"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("star_core.metrics.vmaf.filters", frozenset)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    restored, truth = clip(tmp_path / "r.mkv"), clip(tmp_path / "t.mkv", seed=1)
    weights = ["--metric-folder", str(tmp_path / "none"), "--report", str(tmp_path / "report")]
    assert main(["evaluate", str(restored), "--truth", str(truth), *weights]) == 0
    out, err = capsys.readouterr()
    assert "curves.png needs Pillow" in err
    for title in ("PSNR, dB ", "SSIM ", "flicker, 8-bit levels "):
        assert any(line.startswith(title) and "is better" in line for line in out.splitlines())
    for words in ("opencv-python-headless", "metric-weights lpips_alex", "imageio-ffmpeg"):
        assert words in out
    assert (tmp_path / "report/clips.csv").exists()


def test_an_unknown_metric_is_told_before_anything_is_read(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path / "none"), "--metrics", "vmaff"]) == 2
    assert "no metric is called vmaff: choose from psnr" in capsys.readouterr().err


def test_frames_in_memory_are_measured_as_files_are(pair):
    frames, truth = (torch.stack(frames_of(p)) for p in (pair.restored, pair.reference))
    of_files = evaluate(pair, NAMES, selection=Selection(border=3))
    in_memory = evaluate_frames(frames, truth, NAMES, border=3)
    assert in_memory.comparison.means == of_files.comparison.means
    assert (in_memory.width, in_memory.height) == (26, 18)
    with pytest.raises(ValueError, match="32x24, the reference 16x24: resize"):
        evaluate_frames(frames, truth[..., :16], NAMES)
