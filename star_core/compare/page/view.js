// The stage: one canvas that shows one or two clips of the current picture, zoomed and moved alike.

const MODES = ["wipe", "side", "one", "difference"];
const GRIP = 12; // CSS pixels around the wipe's edge that take hold of it

/** view: {mode, left, right, wipe, gain, scale, x, y}; scale 0 fits, x and y are the clip's centre. */
function makeStage(canvas, onChange) {
  const context = canvas.getContext("2d");
  const view = { mode: "wipe", left: 0, right: 1, wipe: 0.5, gain: 4, scale: 0, x: 0.5, y: 0.5 };
  let scene = null, picture = null;

  const size = () => ({ width: canvas.clientWidth, height: canvas.clientHeight });

  function panels() {
    const { width, height } = size();
    if (view.mode !== "side") return [{ x: 0, width, height }];
    const half = Math.floor(width / 2);
    return [{ x: 0, width: half - 1, height }, { x: half + 1, width: width - half - 1, height }];
  }

  function scale() {
    const { width, height } = panels()[0];
    return view.scale || Math.min(width / scene.width, height / scene.height);
  }

  // Where a clip lies in a panel, in CSS pixels. Whole pixels of the screen, so that nothing blurs.
  function placed(panel) {
    const ratio = window.devicePixelRatio, s = scale();
    const whole = (value) => Math.round(value * ratio) / ratio;
    return {
      x: whole(panel.x + panel.width / 2 - view.x * scene.width * s),
      y: whole(panel.height / 2 - view.y * scene.height * s),
      width: scene.width * s,
      height: scene.height * s,
    };
  }

  function drawClip(clip, panel, from = 0, to = panel.width) {
    const place = placed(panel);
    context.save();
    context.beginPath();
    context.rect(panel.x + from, 0, to - from, panel.height);
    context.clip();
    const top = clip * scene.cell_height;
    context.drawImage(picture, 0, top, scene.width, scene.height, place.x, place.y, place.width, place.height);
    context.restore();
  }

  function draw() {
    const ratio = window.devicePixelRatio, { width, height } = size();
    const [across, down] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== across || canvas.height !== down) [canvas.width, canvas.height] = [across, down];
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.globalCompositeOperation = "source-over";
    context.fillStyle = "#000";
    context.fillRect(0, 0, width, height);
    if (!scene || !picture) return;
    context.imageSmoothingEnabled = scale() * ratio < 1; // enlarged pixels stay pixels
    const [first, second] = panels();
    drawClip(view.left, first);
    if (view.mode === "side") drawClip(view.right, second);
    if (view.mode === "wipe") {
      const edge = Math.round(view.wipe * width);
      drawClip(view.right, first, edge);
      context.fillStyle = "#fff";
      context.fillRect(edge - 1, 0, 2, height);
      context.fillRect(edge - 4, height / 2 - 20, 8, 40);
    }
    if (view.mode === "difference") {
      context.globalCompositeOperation = "difference";
      drawClip(view.right, first);
      context.globalCompositeOperation = "lighter";
      context.setTransform(1, 0, 0, 1, 0, 0);
      for (let gain = 1; gain < view.gain; gain *= 2) context.drawImage(canvas, 0, 0);
    }
  }

  function change(values) {
    Object.assign(view, values);
    view.wipe = clamp(view.wipe, 0, 1);
    view.x = clamp(view.x, 0, 1);
    view.y = clamp(view.y, 0, 1);
    draw();
    onChange();
  }

  /** The clip's point under (x, y) of the canvas stays where it is. */
  function zoom(factor, x = size().width / 2, y = size().height / 2) {
    const panel = panels().findLast((p) => x >= p.x) ?? panels()[0];
    const before = scale();
    const after = clamp(before * factor, Math.min(before, 0.05), 32);
    const [dx, dy] = [x - panel.x - panel.width / 2, y - panel.height / 2];
    const gained = 1 / before - 1 / after;
    change({ scale: after, x: view.x + (dx * gained) / scene.width, y: view.y + (dy * gained) / scene.height });
  }

  function pan(dx, dy) {
    change({ x: view.x - dx / scale() / scene.width, y: view.y - dy / scale() / scene.height });
  }

  const atEdge = (event) => view.mode === "wipe" && Math.abs(event.offsetX - view.wipe * size().width) < GRIP;
  let held = null;
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    held = atEdge(event) ? "wipe" : "picture";
  });
  canvas.addEventListener("pointermove", (event) => {
    canvas.classList.toggle("wiping", held === "wipe" || (!held && atEdge(event)));
    if (held === "wipe") change({ wipe: event.offsetX / size().width });
    if (held === "picture") pan(event.movementX, event.movementY);
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (held = null));
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(2 ** (-event.deltaY / 400), event.offsetX, event.offsetY);
  }, { passive: false });
  new ResizeObserver(draw).observe(canvas);

  return {
    view, change, zoom, pan, draw,
    get scale() { return scale(); },
    show(next) { picture = next; draw(); },
    open(next) {
      scene = next;
      picture = null;
      change({ scale: 0, x: 0.5, y: 0.5 });
    },
  };
}
