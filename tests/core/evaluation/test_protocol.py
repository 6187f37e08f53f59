from fractions import Fraction

import pytest
import torch

from star_core.cli import main
from star_core.evaluation.evaluate import Evaluation
from star_core.evaluation.protocol import (
    METHODS,
    SETS,
    beside_the_paper,
    clips_of,
    pairs_of,
    paper,
    set_called,
    write_low_quality,
)
from star_core.metrics import METRICS, Comparison
from star_core.video_io import open_sink, open_video


def frames(folder, count=2, size=(48, 64)):
    """Numbered images, as the sets have them."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    with open_sink(folder / "%08d.png", width=size[1], height=size[0], fps=Fraction(25)) as sink:
        for _ in range(count):
            sink.write(torch.rand(3, *size, generator=generator))
    return folder


def names(set_name, folder):
    return [
        (clip.name, clip.truth is not None, clip.low_quality is not None)
        for clip in clips_of(SETS[set_name], folder)
    ]


@pytest.mark.parametrize("below", ["", "GT", "val/val_sharp"])
def test_clips_of_a_set_are_found_where_its_archives_have_them(tmp_path, below):
    for name in ("000", "001"):
        frames(tmp_path / below / name)
    assert names("REDS30", tmp_path) == [("000", True, False), ("001", True, False)]


def test_the_first_archive_of_udm10_has_the_truth_inside_each_clip(tmp_path):
    frames(tmp_path / "archpeople" / "truth")
    frames(tmp_path / "archpeople" / "blur4", size=(12, 16))
    assert names("UDM10", tmp_path) == [("archpeople", True, False)]


def test_input_that_a_set_has_is_taken_and_plain_downsampling_is_not(tmp_path):
    for kind in ("GT", "LQ", "BDx4"):
        frames(tmp_path / kind / "000")
    assert names("UDM10", tmp_path) == [("000", True, True)]
    frames(tmp_path / "GT" / "001")
    with pytest.raises(ValueError, match="alone of 001"):
        names("UDM10", tmp_path)


@pytest.mark.parametrize("below", ["", "Input"])
def test_videolq_has_input_alone(tmp_path, below):
    frames(tmp_path / below / "000")
    assert names("VideoLQ", tmp_path) == [("000", False, True)]


def test_input_that_is_made_belongs_to_the_clip_and_the_seed(tmp_path):
    for name in ("a", "b"):
        frames(tmp_path / "set" / name)
    clips = clips_of(SETS["UDM10"], tmp_path / "set")
    made = write_low_quality(clips, tmp_path / "lq", preset="fixed-mild", seed=7)
    assert [path.name for path in made] == ["a.mkv", "b.mkv"]
    first, second = (torch.stack(list(open_video(path))) for path in made)
    assert first.shape == (2, 3, 12, 16)
    assert not torch.equal(first, second)  # the clips are equal, their seeds are not
    (alone,) = write_low_quality(clips[:1], tmp_path / "again", preset="fixed-mild", seed=7)
    assert torch.equal(torch.stack(list(open_video(alone))), first)
    reported = []
    write_low_quality(clips, tmp_path / "lq", on_progress=lambda *at: reported.append(at))
    assert not reported  # what is there is kept
    with pytest.raises(ValueError, match="no recipe is called worse: choose among .*heavy"):
        write_low_quality(clips, tmp_path, preset="worse")


def test_results_are_paired_by_the_names_of_the_clips(tmp_path):
    for name in ("a", "b"):
        frames(tmp_path / "set" / name)
    frames(tmp_path / "out" / "b")
    clips = clips_of(SETS["UDM10"], tmp_path / "set")
    (pair,) = pairs_of(clips, tmp_path / "out")
    assert (pair.name, pair.reference) == ("b", tmp_path / "set" / "b")
    frames(tmp_path / "other" / "c")
    with pytest.raises(ValueError, match=r"has no clip of the set: .*\(a, b\)"):
        pairs_of(clips, tmp_path / "other")


def test_the_papers_table_is_whole_and_says_what_its_text_says():
    for name, test_set in SETS.items():
        table = paper(name)
        assert tuple(table) == test_set.metrics and set(table) <= METRICS.keys()
        assert all(tuple(row) == METHODS for row in table.values())
    # "STAR achieves the best SSIM, LPIPS, DOVER and E*warp" of UDM10 and of OpenVid30.
    for name in ("UDM10", "OpenVid30"):
        for metric in ("ssim", "lpips", "dover", "warping_error"):
            row = paper(name)[metric]
            best = max if METRICS[metric].better == "higher" else min
            assert best(row, key=row.__getitem__) == "STAR"


def test_our_means_stand_beside_stars_and_the_best_other():
    comparison = Comparison(per_frame={"psnr": [22.5, 23.5]}, missing={"dover": "no weights"})
    ours = Evaluation(name="a", frames=2, width=8, height=8, comparison=comparison)
    lines = beside_the_paper(SETS["UDM10"], [ours]).splitlines()
    assert lines[0] == "UDM10: 1 of 10 clips"
    (psnr,) = (line.split() for line in lines if line.startswith("PSNR"))
    assert psnr[2:] == ["23", "23.91", "24", "(RealViformer)"]
    assert lines[-1] == "DOVER: no weights"


def test_the_command_makes_input_and_measures_results(tmp_path, capsys):
    frames(tmp_path / "set" / "a")
    folder, out = str(tmp_path / "set"), str(tmp_path / "lq")
    options = ["--recipe", "fixed-mild"]
    assert main(["protocol", "REDS30", folder, "--low-quality", out, *options]) == 0
    assert capsys.readouterr().out.strip().endswith("a.mkv")
    weights = ["--metric-folder", str(tmp_path / "none"), "--report", str(tmp_path / "report")]
    assert main(["protocol", "REDS30", folder, "--restored", folder, *weights]) == 0
    reported = capsys.readouterr().out
    assert "REDS30: 1 of 30 clips" in reported and "metric-weights lpips_alex" in reported
    assert (tmp_path / "report/clips.csv").exists()
    assert main(["protocol", "Vid4", folder, "--restored", folder]) == 2
    with pytest.raises(ValueError, match="choose among UDM10, REDS30, OpenVid30, VideoLQ"):
        set_called("Vid4")
