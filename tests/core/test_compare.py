"""The comparison page: what it is made of, and what it does in a real Chromium."""

import base64
import json
import math
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from star_core.cli import main
from star_core.compare import find_scenes, pool, wilson, write_page
from star_core.compare.page import cell_height, stacked
from star_core.demo import DATA, GROUND_TRUTH
from star_core.metrics import compare
from star_core.video_io import open_sink, open_video

FRAMES, SIZE = 30, (160, 96)
BLOCK, BITS = 16, 6  # a frame carries its number: white and black blocks, lowest bit first


def numbered(index: int, brightness: float, size=SIZE) -> torch.Tensor:
    """A frame (3 h w) of one grey that shows `index` as blocks in its upper left corner."""
    width, height = size
    frame = torch.full((3, height, width), brightness)
    for bit in range(BITS):
        frame[:, :BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = float(index >> bit & 1)
    return frame


def write(path: Path, frames, fps=Fraction(25)) -> Path:
    frames = list(frames)
    height, width = frames[0].shape[-2:]
    with open_sink(path, width=width, height=height, fps=fps) as sink:
        for frame in frames:
            sink.write(frame)
    return path


def numbered_clip(path: Path, brightness: float, frames=FRAMES, size=SIZE, **timing) -> Path:
    return write(path, (numbered(i, brightness, size) for i in range(frames)), **timing)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    return [
        numbered_clip(folder / f"{name}.mkv", grey)
        for name, grey in (("dark", 0.2), ("middle", 0.5), ("bright", 0.8))
    ]


def data_of(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert match
    return json.loads(match[1])


def video_of(page: Path, scene: int, out: Path) -> Path:
    blocks = re.findall(rf'data-scene="{scene}">([^<]*)<', page.read_text(encoding="utf-8"))
    out.write_bytes(b"".join(map(base64.b64decode, blocks)))
    return out


# scenes


def test_a_small_clip_is_enlarged_to_the_others_and_that_is_said(tmp_path, clips):
    small = numbered_clip(tmp_path / "small.mkv", 0.5, size=(80, 48))
    (scene,) = find_scenes([clips[0], small])
    assert scene.size == SIZE
    assert next(iter(scene.clips[1])).shape == (3, SIZE[1], SIZE[0])
    assert any("small is 80x48" in note for note in scene.notes)


def test_other_shapes_are_refused(tmp_path, clips):
    wide = numbered_clip(tmp_path / "wide.mkv", 0.5, size=(200, 48))
    with pytest.raises(ValueError, match="wide is 200x48.*cut or pad"):
        find_scenes([clips[0], wide])


def test_other_frame_counts_are_refused_with_the_range_that_all_have(tmp_path, clips):
    short = numbered_clip(tmp_path / "short.mkv", 0.5, frames=7)
    with pytest.raises(ValueError, match="dark 30, short 7.*--frames 0:7"):
        find_scenes([clips[0], short])
    (scene,) = find_scenes([clips[0], short], frames=(0, 7))
    assert scene.frames == 7


def test_other_frame_rates_are_said(tmp_path, clips):
    fast = numbered_clip(tmp_path / "fast.mkv", 0.5, fps=Fraction(50))
    (scene,) = find_scenes([clips[0], fast])
    assert scene.fps == 25 and any("dark 25.0, fast 50.0" in note for note in scene.notes)


def test_folders_give_a_scene_for_each_name_that_all_of_them_have(tmp_path):
    for method, names in (("one", "ab"), ("two", "abc"), ("truth", "ab")):
        (tmp_path / method).mkdir()
        for name in names:
            numbered_clip(tmp_path / method / f"{name}.mkv", 0.5, frames=2)
    scenes = find_scenes([tmp_path / "one", tmp_path / "two"], reference=tmp_path / "truth")
    assert [scene.name for scene in scenes] == ["a", "b"]
    assert [clip.name for clip in scenes[0].clips] == ["one", "two", "reference"]
    assert scenes[0].reference is scenes[0].clips[2]
    assert any("left out: c" in note for note in scenes[0].notes)


def test_clips_of_one_name_are_told_apart_by_their_folders(tmp_path):
    paths = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        paths.append(numbered_clip(tmp_path / folder / "clip.mkv", 0.5, frames=1))
    (scene,) = find_scenes(paths)
    assert [clip.name for clip in scene.clips] == ["x/clip", "y/clip"]
    with pytest.raises(ValueError, match="two clips are called same"):
        find_scenes(paths, names=["same", "same"])


# the file


@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 4), st.integers(0, 2**16 - 1))
def test_every_clip_lies_in_its_cell_and_the_number_below(height, width, count, number):
    frames = [torch.full((3, height, width), float(k)) for k in range(count)]
    picture = stacked(frames, number)
    assert picture.shape[-1] % 2 == 0
    for k in range(count):
        top = k * cell_height(height)
        assert (picture[:, top : top + height, :width] == k).all()
        # Eight rows of its own edge below: what a coder smears stays within.
        assert (picture[:, top + height : top + height + 8] == k).all()
    bits = picture[0, count * cell_height(height) + 4, 4 : 16 * 8 : 8]
    assert sum(2**k for k, bit in enumerate(bits) if bit) == number


def test_the_page_carries_every_frame_visually_lossless(tmp_path):
    film = torch.stack(list(open_video(DATA / GROUND_TRUTH, frames=(0, 6))))[..., :183, :257]
    one = write(tmp_path / "one.mkv", film)
    two = write(tmp_path / "two.mkv", film.flip(0))
    page = tmp_path / "page.html"
    write_page(find_scenes([one, two]), page, title="T", metrics=[])
    video = open_video(video_of(page, 0, tmp_path / "video.webm"))
    assert len(video) == 6 and video.info.fps == 25
    for source, top in ((one, 0), (two, cell_height(183))):
        seen = (frame[:, top : top + 183, :257] for frame in video)
        assert min(compare(seen, open_video(source), metrics=["psnr"]).per_frame["psnr"]) > 40


def test_the_page_carries_the_metrics_of_every_frame(tmp_path, clips):
    page = tmp_path / "page.html"
    names = ["psnr", "flicker"]
    scenes = find_scenes(clips[:2], reference=clips[2])
    write_page(scenes, page, title="T", metrics=names)
    expected = compare(open_video(clips[0]), open_video(clips[2]), metrics=names)
    (scene,) = data_of(page)["scenes"]
    psnr, flicker = scene["metrics"]
    assert psnr["values"]["0"] == pytest.approx(expected.per_frame["psnr"], rel=1e-5)
    assert flicker["values"]["0"][0] is None  # the first frame has no neighbour before it
    assert psnr["means"]["0"] == pytest.approx(expected.means["psnr"], rel=1e-5)
    assert set(psnr["values"]) == {"0", "1"} and scene["reference"] == 2


def test_a_clip_equal_to_the_reference_has_infinite_psnr_and_the_page_is_json(tmp_path, clips):
    page = tmp_path / "page.html"
    write_page(find_scenes(clips[:1], reference=clips[0]), page, title="T", metrics=["psnr"])
    assert set(data_of(page)["scenes"][0]["metrics"][0]["values"]["0"]) == {"inf"}


def test_names_cannot_break_out_of_the_page(tmp_path, clips):
    page = tmp_path / "page.html"
    evil = "</script><script>alert(1)</script>"
    scenes = find_scenes(clips[:2], names=[evil, "b"], frames=(0, 2))
    write_page(scenes, page, title=evil, metrics=[])
    text = page.read_text(encoding="utf-8")
    assert "alert(1)</script>" not in text
    assert data_of(page)["scenes"][0]["clips"][0]["name"] == evil


def test_a_failure_leaves_no_page_behind(tmp_path, clips):
    def stop(stage, done, total):
        if stage == "encode" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_page(
            find_scenes(clips), tmp_path / "page.html", title="T", metrics=[], on_progress=stop
        )
    assert not list(tmp_path.iterdir())


def test_an_existing_page_is_kept(tmp_path, clips, capsys):
    page = tmp_path / "page.html"
    page.write_text("mine")
    assert main(["compare", *map(str, clips), "--out", str(page), "--metrics"]) == 2
    assert "--overwrite" in capsys.readouterr().err and page.read_text() == "mine"


def test_too_many_clips_for_one_video_are_refused(tmp_path):
    tall = numbered_clip(tmp_path / "tall.mkv", 0.5, frames=1, size=(100, 6000))
    scenes = find_scenes([tall] * 3, names=["a", "b", "c"])
    with pytest.raises(ValueError, match="at most 2 at once"):
        write_page(scenes, tmp_path / "page.html", title="T", metrics=[])


def test_what_cannot_be_measured_is_said_on_the_page_and_at_the_terminal(tmp_path, clips, capsys):
    page = tmp_path / "page.html"
    arguments = [*map(str, clips[:2]), "--frames", "0:2", "--out", str(page)]
    assert main(["compare", *arguments, "--metrics", "psnr"]) == 0
    (scene,) = data_of(page)["scenes"]
    assert scene["metrics"][0]["values"] == {}
    (why,) = scene["missing"]
    assert "needs a ground truth" in why and f"note: {why}" in capsys.readouterr().err


# votes


@given(st.integers(0, 300).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of))))
def test_wilson_agrees_with_scipy(case):
    votes, of = case
    if not of:
        assert wilson(0, 0) == (0, 1)
        return
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(votes, of).proportion_ci(0.95, method="wilson")
    assert wilson(votes, of) == pytest.approx((expected.low, expected.high), abs=1e-9)


def votes_file(path: Path, viewer: str, choices: list[str | None]) -> Path:
    votes = [
        {"scene": f"s{k}", "round": 1, "question": "quality", "order": ["b", "a"], "choice": choice}
        for k, choice in enumerate(choices)
    ]
    content = {"format": "star blind votes 1", "viewer": viewer, "votes": votes}
    path.write_text(json.dumps(content))
    return path


def test_votes_of_several_viewers_are_counted_together(tmp_path, capsys):
    first = votes_file(tmp_path / "1.json", "Ann", ["a", "b", None])
    second = votes_file(tmp_path / "2.json", "Bob", ["a", "a", "a"])
    shares = {share.clip: share for share in pool([first, second])}
    assert (shares["a"].votes, shares["b"].votes, shares["a"].of) == (4, 1, 5)
    assert (shares["a"].low, shares["a"].high) == wilson(4, 5)
    assert main(["votes", str(first), str(second)]) == 0
    assert "80.0%" in capsys.readouterr().out


def test_votes_given_twice_are_refused(tmp_path):
    first = votes_file(tmp_path / "1.json", "Ann", ["a"])
    copy = votes_file(tmp_path / "copy.json", "Ann", ["a"])
    with pytest.raises(ValueError, match="both have votes of Ann"):
        pool([first, copy])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="not a file of votes"):
        pool([tmp_path / "other.json"])


# in a browser

# The numbers that the blocks at the upper left of both panels say, and that of the playhead.
READ = """() => {
    const canvas = document.getElementById('canvas'), ratio = devicePixelRatio
    const context = canvas.getContext('2d')
    const number = (panel) => {
        const left = panel.x + (panel.width - scene.width * stage.scale) / 2
        const top = (canvas.clientHeight - scene.height * stage.scale) / 2
        let value = 0
        for (let bit = 0; bit < BITS; bit++) {
            const x = (left + (bit + 0.5) * BLOCK * stage.scale) * ratio
            const y = (top + 0.5 * BLOCK * stage.scale) * ratio
            if (context.getImageData(x, y, 1, 1).data[0] > 127) value += 2 ** bit
        }
        return value
    }
    const half = Math.floor(canvas.clientWidth / 2)
    const panels = [{x: 0, width: half - 1}, {x: half + 1, width: canvas.clientWidth - half - 1}]
    return [...panels.map(number), Number(document.documentElement.dataset.frame)]
}""".replace("BITS", str(BITS)).replace("BLOCK", str(BLOCK))
PIXEL = """([x, y]) => {
    const canvas = document.getElementById('canvas')
    const place = [x * canvas.width, y * canvas.height]
    return canvas.getContext('2d').getImageData(...place, 1, 1).data[0] / 255
}"""


@pytest.fixture(scope="module")
def written(tmp_path_factory, clips) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    scenes = find_scenes(clips[:2], reference=clips[2])
    write_page(scenes, path, title="Three greys", metrics=["psnr", "flicker"], seed=5)
    return path


@pytest.fixture
def page(chromium, written):
    context = chromium.new_context(viewport={"width": 1000, "height": 900}, offline=True)
    page = context.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    readback = "Canvas2D: Multiple readback"  # these tests read many pixels
    page.on("console", lambda m: readback in m.text or problems.append(m.text))
    page.on("request", lambda request: problems.append(request.url))
    page.goto(written.as_uri())
    at(page, 0)
    yield page
    context.close()
    assert [p for p in problems if not p.startswith(("file:", "blob:"))] == []


def until(page, condition: str) -> None:
    """Polls: the page's policy forbids playwright's own way of waiting for an expression."""
    for _ in range(500):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"never true: {condition}")


def at(page, frame: int) -> None:
    page.wait_for_selector(f'html[data-frame="{frame}"]', state="attached", timeout=10000)


@pytest.mark.page
def test_all_clips_show_the_frame_that_was_asked_for(page):
    page.select_option("#mode", "side")
    frame = 0
    for key, moved in (
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("Shift+ArrowRight", 12),
        ("ArrowLeft", 11),
        ("Shift+ArrowLeft", 1),
        ("ArrowLeft", 0),
        ("ArrowLeft", 0),
        ("End", FRAMES - 1),
        ("ArrowRight", FRAMES - 1),
        ("ArrowLeft", FRAMES - 2),
        ("Home", 0),
    ):
        page.keyboard.press(key)
        frame = moved
        at(page, frame)
        for right in ("1", "2"):
            page.select_option("#right", right)
            assert page.evaluate(READ) == [frame] * 3
    for frame in (17, 3, 28, 11, 12):
        page.locator("#frame").fill(str(frame))
        at(page, frame)
        assert page.evaluate(READ) == [frame] * 3


@pytest.mark.page
def test_many_quick_steps_end_at_their_sum(page):
    page.select_option("#mode", "side")
    for _ in range(13):
        page.locator("#on").click(delay=0)
    at(page, 13)
    assert page.evaluate(READ) == [13] * 3


@pytest.mark.page
def test_clips_stay_in_step_while_they_play(page):
    page.select_option("#mode", "side")
    page.locator("#play").click()
    until(page, "!document.getElementById('video').paused")
    seen = [page.evaluate(READ) for _ in range(150)]
    page.locator("#play").click()
    until(page, "document.getElementById('video').paused")
    seen.append(page.evaluate(READ))
    assert all(len(set(numbers)) == 1 for numbers in seen), seen
    assert len({numbers[0] for numbers in seen}) > 10


@pytest.mark.page
def test_playing_goes_on_from_the_first_frame_after_the_last(page):
    page.locator("#frame").fill(str(FRAMES - 3))
    at(page, FRAMES - 3)
    page.locator("#play").click()
    until(page, f"Number(document.documentElement.dataset.frame) < {FRAMES // 2}")
    assert page.locator("#play").inner_text() == "Pause"


@pytest.mark.page
def test_the_wipe_moves_by_key_slider_and_hand(page):
    dark, bright = 0.2, 0.5
    page.locator("#canvas").focus()
    assert page.evaluate(PIXEL, [0.47, 0.9]) == pytest.approx(dark, abs=0.02)
    assert page.evaluate(PIXEL, [0.53, 0.9]) == pytest.approx(bright, abs=0.02)
    for _ in range(5):
        page.keyboard.press(",")
    assert page.evaluate(PIXEL, [0.47, 0.9]) == pytest.approx(bright, abs=0.02)
    page.locator("#wipe").focus()
    page.keyboard.press("End")
    assert page.evaluate(PIXEL, [0.95, 0.9]) == pytest.approx(dark, abs=0.02)
    page.locator("#wipe").fill("500")
    box = page.locator("#canvas").bounding_box()
    y = box["y"] + box["height"] * 0.8
    page.mouse.move(box["x"] + box["width"] * 0.5, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.25, y, steps=3)
    page.mouse.up()
    assert page.evaluate(PIXEL, [0.3, 0.9]) == pytest.approx(bright, abs=0.02)
    assert page.evaluate(PIXEL, [0.2, 0.9]) == pytest.approx(dark, abs=0.02)


@pytest.mark.page
def test_zoom_keeps_the_point_under_the_pointer_and_pan_moves_it(page):
    page.select_option("#mode", "one")
    box = page.locator("#canvas").bounding_box()
    point = "() => [stage.view.x, stage.view.y, stage.scale]"
    fitted = page.evaluate(point)
    page.mouse.move(box["x"] + 5, box["y"] + 5)  # the clip's corner, as it fills the stage
    page.mouse.wheel(0, -400)
    until(page, "stage.view.scale > 0")
    x, y, scale = page.evaluate(point)
    assert scale == pytest.approx(2 * fitted[2])
    assert (x, y) == pytest.approx((0.25, 0.25), abs=0.02)
    page.locator("#canvas").focus()
    page.keyboard.press("d")
    assert page.evaluate(point)[0] > x
    page.keyboard.press("0")
    assert page.evaluate(point) == fitted


@pytest.mark.page
def test_difference_is_what_the_clips_differ_by_times_the_gain(page):
    page.select_option("#mode", "difference")
    page.select_option("#gain", "2")
    assert page.evaluate(PIXEL, [0.5, 0.9]) == pytest.approx(2 * 0.3, abs=0.03)
    page.select_option("#right", "0")
    assert page.evaluate(PIXEL, [0.5, 0.9]) == 0


@pytest.mark.page
def test_curves_follow_the_playhead_and_lead_it(page, written):
    metric = data_of(written)["scenes"][0]["metrics"][0]
    heads = "document.querySelector('.head').getAttribute('x1')"
    first = float(page.evaluate(heads))
    page.keyboard.press("End")
    at(page, FRAMES - 1)
    assert float(page.evaluate(heads)) > first + 300
    cell = page.locator("#values tbody td span").first.inner_text()
    assert float(cell) == pytest.approx(metric["values"]["0"][-1], abs=0.01)
    chart = page.locator("#charts svg").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.click(box["x"] + box["width"] * (46 / 420), box["y"] + 20)
    at(page, 0)


@pytest.mark.page
def test_every_control_has_a_name_and_is_reached_by_the_tab_key(page):
    controls = page.evaluate("""() => {
        const shown = [...document.querySelectorAll('button, select, input, canvas, summary')]
            .filter(e => e.checkVisibility())
        return shown.map(e => [e.id || e.tagName, (e.labels?.[0]?.textContent
            || e.getAttribute('aria-label') || e.textContent).trim()])
    }""")
    assert len(controls) > 12 and all(name for _, name in controls), controls
    reached = set()
    for _ in range(len(controls) + 2):
        page.keyboard.press("Tab")
        focused = "document.activeElement.id || document.activeElement.tagName"
        reached.add(page.evaluate(focused))
    assert {control for control, _ in controls} <= reached


@pytest.mark.page
def test_light_and_dark_and_narrow(page):
    back = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(back)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(back) != light
    page.set_viewport_size({"width": 380, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 380


def vote_blind(page, viewer: str) -> tuple[dict, str]:
    """Votes for the brightest clip in quality, and cannot tell in consistency; by keyboard."""
    page.keyboard.press("b")
    hidden = page.locator("main").inner_text()
    page.keyboard.type(viewer)
    page.keyboard.press("Enter")
    page.wait_for_selector("#ballot:not([hidden])")
    page.select_option("#mode", "side")
    at(page, 0)
    hidden += page.locator("main").inner_text()
    sides = [page.evaluate(PIXEL, [x, 0.6]) for x in (0.25, 0.75)]
    page.locator("#questions input").first.focus()
    page.keyboard.press("Space")
    if sides[1] > sides[0]:
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector("#results:not([hidden])")
    with page.expect_download() as download:
        page.keyboard.press("Enter")  # the focus is on it
    return json.loads(Path(download.value.path()).read_text(encoding="utf-8")), hidden


@pytest.mark.page
def test_blind_votes_hide_names_and_count_the_clip_that_was_meant(page, tmp_path):
    result, hidden = vote_blind(page, "Ann")
    assert not re.search("dark|middle|bright|psnr", hidden, re.IGNORECASE)
    assert "Clip 1" in hidden and "Clip 2" in hidden
    assert result["viewer"] == "Ann" and result["seed"] == 5
    quality, consistency = result["votes"]
    assert sorted(quality["order"]) == ["dark", "middle"]  # the reference is no candidate
    assert (quality["choice"], consistency["choice"]) == ("middle", None)
    counted = result["summary"]["quality"]["clips"]["middle"]
    assert (counted["votes"], counted["share"]) == (1, 1)
    assert (counted["low"], counted["high"]) == pytest.approx(wilson(1, 1))
    assert result["summary"]["consistency"]["cannot_tell"] == 1
    (tmp_path / "ann.json").write_text(json.dumps(result))
    assert [share.votes for share in pool([tmp_path / "ann.json"])] == [0, 1, 0, 0]


@pytest.mark.page
def test_the_order_of_the_clips_is_drawn_from_seed_and_viewer(page):
    orders = "viewer => trialsOf(data, viewer, 1)[0].order"
    drawn = [page.evaluate(orders, f"viewer {k}") for k in range(40)]
    assert drawn == [page.evaluate(orders, f"viewer {k}") for k in range(40)]
    assert 8 < sum(order == [0, 1] for order in drawn) < 32


@pytest.mark.page
def test_intervals_on_the_page_are_those_of_the_library(page):
    for votes, of in ((0, 0), (0, 9), (3, 7), (76, 130), (130, 130)):
        low, high = page.evaluate("([k, n]) => wilson(k, n)", [votes, of])
        assert (low, high) == pytest.approx(wilson(votes, of), abs=1e-12)
        assert math.isfinite(low)
