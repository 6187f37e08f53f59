// One video holds all clips of a scene, one above the other, so that they cannot get out of step:
// whichever frame the browser shows, it shows it of all of them. Which one that is stands in the
// picture itself, as blocks of black and white: browsers differ in the time that they name for it.

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

/**
 * Calls onPicture(picture, index) with each frame that becomes visible; index counts from 0.
 * onPlaying(playing) is called when playing begins and ends.
 */
function makePlayer(video, onPicture, onPlaying) {
  let scene = null, url = null, shown = 0, wanted = 0, sought = 0, moving = false;
  let playing = false;
  const picture = document.createElement("canvas"), copy = picture.getContext("2d", { alpha: false });
  const reader = document.createElement("canvas").getContext("2d", { willReadFrequently: true });

  function numberIn(picture) {
    const { top, block, bits } = scene.number;
    reader.canvas.width = bits;
    reader.canvas.height = 1;
    reader.imageSmoothingEnabled = false; // the middle of each block
    reader.drawImage(picture, 0, top, bits * block, block, 0, 0, bits, 1);
    const { data } = reader.getImageData(0, 0, bits, 1);
    let number = 0;
    for (let bit = 0; bit < bits; bit++) if (data[4 * bit] > 127) number += 2 ** bit;
    return number;
  }

  // A copy, because the video may move on between two drawings of it.
  function capture() {
    const { videoWidth: width, videoHeight: height } = video;
    if (!scene || video.readyState < video.HAVE_CURRENT_DATA) return;
    if (picture.width !== width || picture.height !== height) [picture.width, picture.height] = [width, height];
    copy.drawImage(video, 0, 0);
    shown = numberIn(picture);
    onPicture(picture, shown);
  }

  function presented() {
    capture();
    video.requestVideoFrameCallback(presented);
  }

  // Into the middle of a frame's time: rounding cannot reach its neighbours from there.
  function move() {
    moving = true;
    sought = wanted;
    video.currentTime = (wanted + 0.5) / scene.fps;
  }

  function seek(index) {
    wanted = clamp(index, 0, scene.frames - 1);
    if (!moving) move();
  }

  // Firefox tells of the end of a seek before it has the new picture.
  function arrive(patience) {
    if (!moving) return;
    if (sought !== wanted) return move(); // another frame was asked for meanwhile
    capture();
    if (shown === wanted || !patience) moving = false;
    else requestAnimationFrame(() => arrive(patience - 1));
  }

  video.addEventListener("seeked", () => arrive(120));
  video.requestVideoFrameCallback(presented);

  // Not the video's own `loop`: Chromium takes a paused video in its last frame for one that has
  // ended, and would go back to the first.
  video.addEventListener("ended", () => playing && video.play());

  function setPlaying(value) {
    playing = value;
    if (playing) video.play();
    else video.pause();
    onPlaying(playing);
  }

  return {
    toggle: () => setPlaying(!playing),
    seek(index) {
      setPlaying(false);
      seek(index);
    },
    step(count) {
      setPlaying(false);
      seek((moving ? wanted : shown) + count);
    },
    speed: (rate) => { video.playbackRate = rate; },
    async load(next, blob) {
      setPlaying(false);
      if (url) URL.revokeObjectURL(url);
      scene = next;
      moving = false;
      const rate = video.playbackRate;
      url = URL.createObjectURL(blob);
      video.src = url;
      await new Promise((done, failed) => {
        video.addEventListener("loadeddata", done, { once: true });
        video.addEventListener("error", () => failed(new Error(video.error?.message)), { once: true });
      });
      video.playbackRate = rate;
      seek(0);
    },
  };
}

/** A scene's video, carried as base64 in blocks: a single string may grow too long for a browser. */
function videoOf(sceneIndex) {
  const blocks = document.querySelectorAll(`script[data-scene="${sceneIndex}"]`);
  const parts = Array.from(blocks, (block) => Uint8Array.from(atob(block.textContent.trim()), (c) => c.charCodeAt(0)));
  return new Blob(parts, { type: "video/webm" });
}
