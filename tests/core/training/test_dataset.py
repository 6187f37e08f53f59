import json
import sys
import tarfile
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import webdataset

from star_core.backbones import COGVIDEOX, I2VGENXL
from star_core.degradation import MILD, STAR_HEAVY, STAR_LIGHT, clean_target, degrade_video
from star_core.metrics import psnr
from star_core.training import videos
from star_core.training.autoencoder import TINY_VAE, start_as_projection
from star_core.training.captions import caption_of, read_captions
from star_core.training.dataset import ClipFilter, clips_of, make_dataset, measure
from star_core.training.loading import Batches
from star_core.training.objective import TrainConfig, draw_batch, sample_generator
from star_core.training.tiny import NETWORK, SAMPLING, new_network
from star_core.training.validation import Validation
from star_core.training.videos import (
    SampleSize,
    VideoClips,
    VideoSamples,
    enlarged,
    stored_clips,
)
from star_core.vae.patch import patch_vae
from star_core.video_io import open_sink, open_video

SMALL = ClipFilter(length=(4, 6), size=(32, 32), motion=(0.0, 80.0), detail=0.5)


def film(path, frames, *, size=(48, 64), step=2, level=0.5, swing=0.4):
    """Waves that move `step` pixels a frame."""
    h, w = size
    columns = torch.arange(w) / 5
    with open_sink(path, width=w, height=h, fps=Fraction(25)) as sink:
        for index in range(frames):
            row = level + swing * torch.sin(columns + step * index / 5)
            sink.write(row.expand(3, h, w).clamp(0, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    film(folder / "a.mkv", 10)
    film(folder / "b.mkv", 5)
    film(folder / "dark.mkv", 5, level=0.03, swing=0.02)
    film(folder / "tiny.mkv", 5, size=(16, 16))
    (folder / "cut_off.mkv").write_bytes((folder / "a.mkv").read_bytes()[:600])
    (folder / "b.txt").write_text("Waves beside.\n")
    (folder / "OpenVid-1M.csv").write_text(
        "video,caption,aesthetic score,motion score,temporal consistency score,camera motion,frame,"
        'fps,seconds\na.mkv,"Waves, moving.",5.1,3.2,0.99,static,10,25,0.4\n'
        "b.mkv,Not this one.,5.0,3.0,0.98,static,5,25,0.2\n"
    )
    return folder


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    cuts = {10: [4]}  # only the long film has a cut

    def find_cuts(frames):
        return cuts.get(sum(1 for _ in frames), [])

    counts = make_dataset(folder, out, SMALL, find_cuts=find_cuts, per_shard=2)
    return out, counts


def test_shots_become_clips_and_what_does_not_pass_is_counted(shards):
    out, counts = shards
    rejected = {"too little brightness": 1, "too small": 1, "unreadable": 1}
    assert counts == {"kept": 3} | rejected
    # The third one has no clips, but it is complete.
    names = ["shard-00000.json", "shard-00000.tar", "shard-00001.json", "shard-00002.json"]
    assert sorted(path.name for path in out.iterdir()) == names


def test_a_shard_is_a_webdataset_with_frames_record_and_caption(shards, folder, tmp_path):
    with tarfile.open(shards[0] / "shard-00000.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{n:010d}.{s}" for n in (0, 1, 2) for s in ("json", "mp4", "txt")]
    record = json.loads((tmp_path / "0000000001.json").read_text())
    assert (record["source"], record["frames"]) == ("a.mkv", [4, 10])
    assert record["motion"] > 0.2
    stored = torch.stack(list(open_video(tmp_path / "0000000001.mp4")))
    original = torch.stack(list(open_video(folder / "a.mkv", frames=(4, 10))))
    assert (stored - original).abs().mean() < 0.02
    assert (tmp_path / "0000000001.txt").read_text() == "Waves, moving."


def test_webdataset_reads_the_shards(shards):
    files = [str(path) for path in sorted(shards[0].glob("*.tar"))]
    samples = list(webdataset.WebDataset(files, shardshuffle=False))  # pyright: ignore
    assert [sample["__key__"] for sample in samples] == [f"{n:010d}" for n in range(len(samples))]
    assert len(samples) == len(stored_clips(shards[0])) > 2
    assert samples[1]["txt"].decode() == "Waves, moving."
    assert json.loads(samples[1]["json"])["frames"] == [4, 10]


def test_a_text_beside_a_video_comes_before_the_table(folder):
    captions = read_captions(folder)
    assert caption_of(folder / "b.mkv", captions) == "Waves beside."
    assert caption_of(folder / "a.mkv", captions) == "Waves, moving."
    assert caption_of(folder / "none.mkv", captions) is None


def test_stars_own_table_is_read_and_others_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("path,text\n/data/x.mp4,A dog.\n")
    assert read_captions(tmp_path) == {"x.mp4": "A dog."}
    (tmp_path / "b.csv").write_text("name,words\nx,y\n")
    with pytest.raises(ValueError, match="video and caption"):
        read_captions(tmp_path)


@pytest.mark.parametrize("frames", [3, 4, 6, 7, 13, 40])
def test_clips_cover_a_shot_in_equal_parts(frames):
    clips = list(clips_of([range(10, 10 + frames)], (4, 6)))
    assert all(4 <= len(clip) <= 6 for clip in clips)
    covered = [i for clip in clips for i in clip]
    assert covered == list(range(10, 10 + len(covered)))
    assert len(covered) == {3: 0, 7: 6}.get(frames, frames)


def test_what_is_measured_of_a_clip():
    still = torch.full((3, 3, 32, 32), 0.5)
    measured = measure(still)
    assert measured.motion == measured.detail == 0
    assert measured.brightness == pytest.approx(125, abs=2)
    stripes = (torch.arange(32) % 2).float().expand(3, 32, 32)
    assert measure([stripes]).detail > 50


def test_shards_that_cannot_be_written_or_read_are_refused(shards, folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="other videos or with other options"):
        make_dataset(folder, shards[0], SMALL, per_shard=2)  # without cuts
    (tmp_path / "shard-00007.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="other shards"):
        make_dataset(folder, tmp_path, SMALL)
    (tmp_path / "shard-00007.tar").unlink()
    with pytest.raises(ValueError, match="no videos"):
        make_dataset(tmp_path, tmp_path / "out", SMALL)
    with pytest.raises(ValueError, match="no shards"):
        stored_clips(tmp_path)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ValueError, match="pip install webdataset"):
        make_dataset(folder, tmp_path / "out", SMALL)


def test_an_interruption_leaves_no_half_shard(folder, tmp_path):
    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_dataset(folder, tmp_path / "out", SMALL, per_shard=9, on_video=stop)
    assert not list((tmp_path / "out").iterdir())


def test_what_is_complete_is_not_made_again(folder, tmp_path):
    out, seen = tmp_path / "out", []

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_dataset(folder, out, SMALL, per_shard=1, on_video=stop)
    assert {path.name for path in out.glob("*.tar")} == {"shard-00000.tar", "shard-00001.tar"}
    before = (out / "shard-00000.tar").stat().st_mtime_ns
    (out / "shard-00001.tar").unlink()  # as if it had been stopped between both files
    counts = make_dataset(folder, out, SMALL, per_shard=1, on_video=lambda *at: seen.append(at))
    assert (out / "shard-00000.tar").stat().st_mtime_ns == before
    assert seen[0] == (1, 5) and seen[-1] == (5, 5)
    whole = tmp_path / "whole"
    assert counts == make_dataset(folder, whole, SMALL, per_shard=1)
    for path in whole.glob("*.tar"):
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_processes_make_the_same_shards(folder, tmp_path):
    seen: list[tuple[int, int]] = []
    alone, both = tmp_path / "alone", tmp_path / "both"
    counts = make_dataset(folder, alone, SMALL, per_shard=3)
    assert counts == make_dataset(
        folder, both, SMALL, per_shard=3, workers=2, on_video=lambda *at: seen.append(at)
    )
    assert seen[-1] == (5, 5)
    for path in alone.iterdir():
        assert path.read_bytes() == (both / path.name).read_bytes()


@pytest.fixture(scope="module")
def vae():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = patch_vae(TINY_VAE)
    start_as_projection(vae.model, torch.rand(20, 3, 16, 16) * 2 - 1)  # pyright: ignore[reportArgumentType]
    vae.model.eval()
    return vae


def generator(seed):
    return torch.Generator().manual_seed(seed)


def samples_of(folder, vae, recipe=MILD, *, text=None, **sample):
    size = SampleSize(**{"frames": 3, "size": (24, 32), "interval": 1} | sample)
    return VideoSamples(VideoClips(folder, recipe, size), vae, text=text)


def test_a_sample_is_a_clean_and_a_degraded_clip_in_latents_with_its_text(shards, vae):
    reported = []

    def text(caption):
        reported.append(caption)
        return torch.full((2, 3), float(len(caption)))

    samples = samples_of(shards[0], vae, text=text)
    sample = samples.sample(generator(3))
    assert sample.hq.shape == sample.lq.shape == (vae.latent_channels, 3, 6, 8)
    assert sample.text is not None and sample.text.shape == (2, 3)
    assert not torch.equal(sample.hq, sample.lq)
    again = samples.sample(generator(3))
    assert torch.equal(sample.lq, again.lq) and torch.equal(sample.hq, again.hq)
    for seed in range(12):
        samples.sample(generator(seed))
    # Each text is encoded once.
    assert sorted(reported) == ["", "Waves beside.", "Waves, moving."]


def test_clips_that_are_encoded_together_are_those_that_are_encoded_alone(shards, vae):
    samples = samples_of(shards[0], vae)
    pairs = [samples.source.draw(generator(seed)) for seed in range(3)]
    for seed, sample in enumerate(samples.encode(pairs)):
        alone = samples.sample(generator(seed))
        torch.testing.assert_close(sample.hq, alone.hq)
        torch.testing.assert_close(sample.lq, alone.lq)


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_captions_are_left_out_as_often_as_asked(shards, monkeypatch, share):
    size = SampleSize(frames=1, size=(8, 8), interval=1)
    clips = VideoClips(shards[0], MILD, size, caption_dropout=share)
    monkeypatch.setattr(videos, "read_window", lambda *_: torch.zeros(1, 3, 8, 8))
    captions = [clips.draw(generator(seed)).caption for seed in range(300)]
    assert captions.count("") / 300 == pytest.approx(share, abs=0.08)


def test_the_published_models_leave_out_captions_as_their_papers_do():
    assert (I2VGENXL.prompts.caption_dropout, COGVIDEOX.prompts.caption_dropout) == (0.5, 0.1)


def test_a_sharpened_recipe_sharpens_once_and_degrades_its_target(shards, vae):
    plain, sharpened = (
        samples_of(shards[0], vae, replace(MILD, sharpen=sharpen)) for sharpen in (False, True)
    )
    (clean, _), (target, large) = (
        samples.videos(samples.source.draw(generator(3))) for samples in (plain, sharpened)
    )
    assert not torch.equal(clean, target)
    torch.testing.assert_close(target, clean_target(clean, STAR_HEAVY), rtol=0, atol=1.5 / 255)
    # With the generator where drawing had it, after clip, window and crop.
    numbers = generator(3)
    torch.randint(1, (), generator=numbers)
    for _ in range(3):
        torch.randint(1, (), generator=numbers)
    seed = int(torch.randint(2**62, (), generator=numbers))
    small, _ = degrade_video(clean, replace(MILD, sharpen=True), seed)
    torch.testing.assert_close(large, enlarged(small, (24, 32), "bicubic"), rtol=0, atol=0.03)


def test_frames_of_a_sample_are_an_interval_apart(shards, vae):
    samples = samples_of(shards[0], vae, STAR_LIGHT, size=(48, 64), interval=2)
    clean, large = samples.videos(samples.source.draw(generator(0)))
    assert clean.shape == large.shape == (3, 3, 48, 64)
    # The waves move by 2 pixels a frame, so by 4 between frames of the sample.
    moved = clean[0, :, :, 4:], clean[0, :, :, 2:-2]
    double, single = ((clean[1, :, :, : part.shape[-1]] - part).abs().mean() for part in moved)
    assert double < single


def test_clips_too_small_for_a_sample_are_left_out_and_told(shards, caplog):
    clips = VideoClips(shards[0], MILD, SampleSize(frames=3, size=(24, 32), interval=2))
    assert {clip.frames for clip in clips.clips} == {5, 6}
    assert "1 shorter than 5 frames" in caplog.text
    for frames, size, words in ((9, (24, 32), "3 shorter than 17"), (3, (96, 64), "64x96")):
        with pytest.raises(ValueError, match=f"{words}.*lower --size"):
            VideoClips(shards[0], MILD, SampleSize(frames=frames, size=size))


@pytest.fixture
def damaged(shards, tmp_path):
    """The first of three clips cannot be read."""
    source = shards[0] / "shard-00000.tar"
    clip, content = stored_clips(shards[0])[0], bytearray(source.read_bytes())
    content[clip.offset : clip.offset + clip.size] = bytes(clip.size)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / source.name).write_bytes(content)
    return tmp_path / "shards"


def test_a_clip_that_cannot_be_read_is_replaced_alike_wherever_it_is_drawn(damaged, shards):
    size = SampleSize(frames=3, size=(24, 32), interval=1)
    broken, whole = (VideoClips(folder, MILD, size) for folder in (damaged, shards[0]))
    replaced = 0
    for seed in range(12):
        pair, again = (broken.draw(generator(seed)) for _ in range(2))
        assert torch.equal(pair.clean, again.clean) and pair.replaced == again.replaced
        if pair.replaced:
            assert all("shard-00000.tar, 0000000000.mp4: " in text for text in pair.replaced)
            replaced += 1
        else:
            assert torch.equal(pair.degraded, whole.draw(generator(seed)).degraded)
    assert 0 < replaced < 12
    broken.clips = broken.clips[:1]
    with pytest.raises(ValueError, match="10 clips in a row cannot be used"):
        broken.draw(generator(0))


@pytest.mark.parametrize("numbers", [0, 3])
def test_its_replacement_does_not_depend_on_how_far_reading_came(shards, monkeypatch, numbers):
    clips = VideoClips(shards[0], MILD, SampleSize(frames=3, size=(24, 32), interval=1))
    expected, read, failed = generator(0), videos.read_window, []
    torch.randint(1, (), generator=expected)  # for the clip that fails
    expected = clips.draw(expected)

    def failing(clip, sample, generator):
        if not failed:
            torch.rand(numbers, generator=generator)
            failed.append(clip)
            raise OSError("gone")
        return read(clip, sample, generator)

    monkeypatch.setattr(videos, "read_window", failing)
    pair = clips.draw(generator(0))
    assert failed and pair.replaced
    assert torch.equal(pair.clean, expected.clean) and torch.equal(pair.degraded, expected.degraded)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_whoever_draws_them(damaged, vae, workers, caplog):
    samples = samples_of(damaged, vae)
    config = TrainConfig(steps=1, seed=5)
    parts = [range(0, 2), range(2, 4), range(8, 10)]
    batches = Batches(samples, parts, config, workers=workers)
    found = list(batches)
    for part, batch in zip(parts, found, strict=True):
        alone = draw_batch(samples, part, config)
        assert torch.equal(batch.t, alone.t) and torch.equal(batch.noise, alone.noise)
        torch.testing.assert_close(batch.lq, alone.lq)
    drawn = [samples.source.draw(sample_generator(5, i)) for part in parts for i in part]
    assert batches.replaced.total() == sum(len(pair.replaced) for pair in drawn) > 0
    assert caplog.text.count("a clip is replaced") == 1
    samples.source.clips = samples.source.clips[:1]
    with pytest.raises(ValueError, match="^10 clips in a row"):
        list(Batches(samples, parts, config, workers=workers))


def test_a_network_that_copies_the_hint_is_as_good_as_the_vae(vae, tmp_path):
    network, prompts = new_network(replace(NETWORK, hint_prior=0.5), 0)
    column = torch.linspace(0.2, 0.8, 32).expand(2, 3, 40, 32)
    noisy = (column + 0.02 * torch.randn(column.shape, generator=generator(0))).clamp(0, 1)
    network.train()
    validation = Validation({0: (column, noisy)}, vae, tmp_path, sampling=SAMPLING)
    figures = validation(network, prompts, 500)
    assert network.training
    with torch.no_grad():
        there_and_back = vae.decode(vae.encode(noisy.transpose(0, 1)[None] * 2 - 1)) / 2 + 0.5
    as_good = psnr(there_and_back[0, :, 0].clamp(0, 1), column[0])
    assert figures["restored psnr"] == pytest.approx(as_good, abs=1)
    assert figures["degraded psnr"] == pytest.approx(34, abs=1)
    video = open_video(tmp_path / "validation" / "0000500_0.mp4")
    assert (video.info.width, video.info.height, len(video)) == (96, 40, 2)


def test_validation_evaluates_the_network_as_often_as_the_model_is_sampled(vae, tmp_path):
    network, prompts = new_network(NETWORK, 0)
    texts, forward = [], network.forward

    def counted(x, t, y, hint):
        texts.append(y)
        return forward(x, t, y, hint)

    network.forward = counted  # pyright: ignore[reportAttributeAccessIssue]
    clip = torch.rand(2, 3, 24, 16, generator=generator(0))
    Validation({}, vae, tmp_path).restored(network, prompts, clip)
    positive = [y for y in texts if torch.equal(y, prompts.positive)]
    assert (len(texts), len(positive)) == (28, 14)
