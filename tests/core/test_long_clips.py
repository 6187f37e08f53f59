"""Pieces that hand on what they found, shots apart from each other, memory that is full."""

import gc
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from star_core.parity import DEFAULT
from star_core.pipeline import Frames, Settings, ShotJob, restore
from star_core.resume import Work
from star_core.windows.canvas import Canvas, FrameSpan
from star_core.windows.chunking import ChunkConfig
from star_core.windows.geometry import upsample
from tests.core.test_pipeline import (
    PROMPT,
    SAMPLING,
    CopiesHint,
    LosslessVAE,
    changing,
    clip_of,
    model_of,
    run,
)

__all__ = ["changing"]  # a fixture

STEPS = replace(SAMPLING, steps=3)


def handed(length=4, overlap=2, *, sampling=STEPS, strength=1.0) -> Settings:
    chunk = ChunkConfig(length=length, overlap=overlap, merged=0)
    return Settings(sampling=sampling, strength=strength, chunk=chunk)


def shots_of(bounds, settings, prompts=None) -> list[ShotJob]:
    return [
        ShotJob(
            span=FrameSpan.of(range(a, b), chunk=s.chunk, decode_window=3, behaviour=s.behaviour),
            positive=p,
            negative=PROMPT,
            settings=s,
        )
        for a, b, s, p in zip(
            bounds, bounds[1:], settings, prompts or [PROMPT] * len(settings), strict=False
        )
    ]


def restored(clip, model, shots, **options):
    canvas = Canvas.of((20, 16), vae_factor=2, levels=1, behaviour=DEFAULT)
    return torch.stack(list(restore(clip, model, LosslessVAE(), shots, canvas, **options)))


# pieces


MERGED = ChunkConfig(length=4, overlap=2)


def test_with_one_evaluation_one_after_the_other_is_all_at_once(changing):
    clip, settings = clip_of(12, 8, 10), handed(sampling=SAMPLING)
    one_by_one = run(clip, changing, settings=settings)
    merged = run(clip, changing, settings=replace(settings, chunk=MERGED))
    assert (one_by_one - merged).abs().max() < 1e-5


def test_with_several_evaluations_it_is_close(changing):
    """Later frames act on earlier ones only where all windows are merged.

    That was measured as 2 % of what this untrained network changes.
    """
    clip, settings = clip_of(13, 8, 10), handed()
    one_by_one = run(clip, changing, settings=settings)
    merged = run(clip, changing, settings=replace(settings, chunk=MERGED))
    change = (merged - upsample(clip, (20, 16), "bicubic")).abs().mean()
    difference = (merged - one_by_one).abs().mean()
    assert 0 < difference < 0.06 * change


def test_what_a_piece_has_found_counts_in_the_next(tmp_path, changing):
    clip, settings = clip_of(7, 8, 10), handed(5, 3)
    span = FrameSpan.of(range(7), chunk=settings.chunk, decode_window=3, behaviour=DEFAULT)
    with Work(tmp_path / "work", keep=True) as work:
        work.begin("run")
        expected = run(clip, changing, settings=settings, work=work)
        first = work.recall("0000-00000") or {}
        assert first["x_0s"].shape[0] == 3 and first["x_0s"].shape[3] == span.groups[1].shared == 3
        work.forget("0000-*")
        work.keep("0000-00000", first | {"x_0s": first["x_0s"] + 1})
        changed = run(clip, changing, settings=settings, work=work)
    difference = (changed - expected).abs().mean(dim=(1, 2, 3))
    assert difference[:2].eq(0).all()  # finished by the first piece
    assert difference[2] > difference[3] > difference[4] > difference[6]


@pytest.mark.parametrize("strength", [0.5, 1.0])
@hypothesis_settings(max_examples=15, deadline=None)
@given(frames=st.integers(1, 40), length=st.integers(1, 9), data=st.data())
def test_long_clips_of_any_length_come_out_whole(strength, frames, length, data):
    overlap = data.draw(st.integers(0, length - 1))
    settings = handed(length, overlap, sampling=SAMPLING, strength=strength)
    clip = clip_of(frames, 6, 8)
    result = run(clip, model_of(CopiesHint()), settings=settings)
    assert torch.allclose(result, upsample(clip, (16, 12), "bicubic").clamp(0, 1), atol=3e-3)


def test_a_preview_of_a_long_clip_shows_what_the_whole_run_shows(changing):
    clip = clip_of(14, 8, 10)
    settings = handed(sampling=SAMPLING)
    whole = run(clip, changing, settings=settings)
    for wanted in (range(0, 2), range(5, 9), range(13, 14)):
        preview = run(clip, changing, settings=settings, wanted=wanted)
        assert (preview - whole[wanted.start : wanted.stop]).abs().max() < 1e-6


class Endless:
    """Frames that nobody holds."""

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def __iter__(self):
        for i in range(self.frames):
            yield torch.full((3, 8, 10), i / self.frames)


def live_bytes() -> int:
    gc.collect()
    tensors = (o for o in gc.get_objects() if type(o) is torch.Tensor)
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_memory_does_not_grow_with_the_clip():
    frames, model = 400, model_of(CopiesHint())
    shots = shots_of([0, frames], [handed(sampling=SAMPLING)])
    canvas = Canvas.of((20, 16), vae_factor=2, levels=1, behaviour=DEFAULT)
    live = {}
    for i, frame in enumerate(restore(Endless(frames), model, LosslessVAE(), shots, canvas)):
        assert frame.shape == (3, 16, 20)
        if i in (40, 380):
            live[i] = live_bytes()
    assert live[40] == live[380]


def test_frames_are_read_forwards_and_only_when_asked_for():
    read = []

    def source():
        for i in range(10):
            read.append(i)
            yield torch.tensor(5 + i)

    frames = Frames(source(), 5)
    assert read == []
    assert [int(f) for f in frames.read(range(6, 8))] == [6, 7]
    assert [int(f) for f in frames.read(range(8, 9))] == [8]
    assert read == [0, 1, 2, 3]


# shots


def test_nothing_crosses_a_cut(changing):
    settings = Settings(sampling=STEPS, chunk=ChunkConfig(length=4, overlap=2))
    shots = shots_of([0, 5, 11], [settings, settings])
    clip, other = clip_of(11, 8, 10), clip_of(11, 8, 10).flip(-1)
    before, after = clip.clone(), clip.clone()
    before[5:], after[:5] = other[5:], other[:5]
    whole = restored(clip, changing, shots)
    assert torch.equal(whole[:5], restored(before, changing, shots)[:5])
    assert torch.equal(whole[5:], restored(after, changing, shots)[5:])
    assert not torch.allclose(whole, restored(clip, changing, shots_of([0, 11], [settings])))


def test_a_shot_has_settings_and_prompts_of_its_own(changing):
    settings = [Settings(sampling=STEPS, strength=s) for s in (1, 0, 1)]
    clip = clip_of(6, 8, 10)
    mixed = restored(clip, changing, shots_of([0, 2, 4, 6], settings, [PROMPT, PROMPT, -PROMPT]))
    plain = restored(clip, changing, shots_of([0, 2, 4, 6], [settings[0]] * 3))
    assert torch.equal(mixed[:2], plain[:2])
    assert torch.equal(mixed[2:4], upsample(clip[2:4], (20, 16), "bicubic").clamp(0, 1))
    assert not torch.allclose(mixed[4:], plain[4:], atol=1e-3)


# out of memory


class Full:
    """Fails as a full device does, on some calls."""

    def __init__(self, call, failures, error="CUDA out of memory. Tried to allocate 2 GiB"):
        self.call, self.failures, self.error, self.calls = call, set(failures), error, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls in self.failures:
            raise RuntimeError(self.error)
        return self.call(*args, **kwargs)


def test_a_run_that_is_out_of_memory_goes_on_from_its_last_window_with_less(
    changing, monkeypatch, caplog
):
    clip = clip_of(6, 8, 10)
    settings = Settings(sampling=STEPS, chunk=ChunkConfig(length=4, overlap=2))
    expected = run(clip, changing, settings=settings)
    full = Full(changing.network.forward, failures=[3])
    monkeypatch.setattr(changing.network, "forward", full)
    assert torch.equal(run(clip, changing, settings=settings), expected)
    assert full.calls == 3 * 2 + 1
    assert "out of memory: going on with offloading for the network" in caplog.text


def test_tiles_come_when_nothing_else_helps(changing, monkeypatch, caplog):
    clip = clip_of(1, 80, 160)
    expected = run(clip, changing)
    full = Full(changing.network.forward, failures=[1, 2, 3])
    monkeypatch.setattr(changing.network, "forward", full)
    monkeypatch.setattr("star_core.memory.TILES", (512, 128))
    result = run(clip, changing)
    assert "tiles of 128 pixels for the network" in caplog.text
    change = (expected - upsample(clip, (320, 160), "bicubic")).abs().mean()
    assert 0 < (result - expected).abs().mean() < 0.5 * change


def test_the_vae_falls_back_on_tiles_too(changing, monkeypatch, caplog):
    vae, tiles = LosslessVAE(), []
    encode, decode = vae.encode_frame, vae.decode_window

    def failing(call, name):
        def attempt(*args, tile=None, **kwargs):
            tiles.append((name, tile and tile.size))
            if tile is None:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return call(*args, **kwargs)

        return attempt

    monkeypatch.setattr(vae, "encode_frame", failing(encode, "encode"))
    monkeypatch.setattr(vae, "decode_window", failing(decode, "decode"))
    monkeypatch.setattr("star_core.memory.TILES", (512, 64))
    clip = clip_of(2, 40, 80)
    assert torch.equal(run(clip, changing, vae=vae), run(clip, changing))
    assert [name for name, _ in tiles] == ["encode"] * 4 + ["decode"]
    assert [size for _, size in tiles] == [None, None, 64, 64, 64]
    assert "tiles of 64 pixels for the VAE" in caplog.text


def test_what_does_not_fit_at_its_smallest_ends_in_the_error_itself(changing, monkeypatch):
    full = Full(changing.network.forward, failures=range(100))
    monkeypatch.setattr(changing.network, "forward", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(clip_of(1, 8, 10), changing)
    assert full.calls < 10


def test_other_errors_are_not_taken_for_full_memory(changing, monkeypatch):
    full = Full(changing.network.forward, failures=[1], error="shapes do not match")
    monkeypatch.setattr(changing.network, "forward", full)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(clip_of(1, 8, 10), changing)
    assert full.calls == 1
