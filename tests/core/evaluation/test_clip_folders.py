import pytest

from star_core.evaluation.clip_folders import clips_in, pair_up


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def test_clips_of_a_folder_are_its_videos_and_its_folders_of_images(tmp_path):
    make(tmp_path, "b.mp4", "a.MKV", "notes.txt", "c/0001.png", "empty/x.txt", ".hidden.mp4")
    assert list(clips_in(tmp_path)) == ["a", "b", "c"]
    assert clips_in(tmp_path)["c"] == tmp_path / "c"


def test_numbered_images_are_one_clip_and_unrelated_ones_a_clip_each(tmp_path):
    numbered = make(tmp_path / "shot", "0001.png", "0002.png")
    assert clips_in(numbered) == {"shot": numbered}
    stills = make(tmp_path / "stills", "cat.png", "dog.jpg")
    assert list(clips_in(stills)) == ["cat", "dog"]


def test_clips_are_paired_by_name_and_a_single_one_fits_whatever_it_is_called(tmp_path):
    restored = make(tmp_path / "r", "a.mkv", "b.mkv")
    truth = make(tmp_path / "t", "b/01.png", "b/02.png", "a.mp4", "c.mp4")
    pairs = pair_up(restored, truth)
    assert [(p.name, p.restored.name, p.reference and p.reference.name) for p in pairs] == [
        ("a", "a.mkv", "a.mp4"),
        ("b", "b.mkv", "b"),
    ]
    (pair,) = pair_up(restored / "a.mkv", truth / "c.mp4")
    assert (pair.name, pair.reference) == ("a", truth / "c.mp4")
    assert [p.reference for p in pair_up(restored, None)] == [None, None]


def test_what_cannot_be_paired_is_told(tmp_path):
    restored = make(tmp_path / "r", "a.mkv", "x.mkv")
    truth = make(tmp_path / "t", "a.mp4", "b.mp4")
    with pytest.raises(ValueError, match="no ground truth is called x: .* has a, b"):
        pair_up(restored, truth)
    with pytest.raises(ValueError, match="a.mkv and a.mp4: keep one"):
        clips_in(make(restored, "a.mp4"))
    with pytest.raises(ValueError, match="contains no video"):
        clips_in(make(tmp_path / "n", "notes.txt"))
    with pytest.raises(ValueError, match="does not exist"):
        pair_up(tmp_path / "none", None)
