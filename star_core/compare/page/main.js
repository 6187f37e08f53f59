// Puts the parts together: controls, keys, scenes.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
let scene = null, names = [], order = [], follow = () => {};

const stage = makeStage($("canvas"), refresh);
const player = makePlayer($("video"), (picture, index) => {
  stage.show(picture);
  $("frame").value = index;
  document.documentElement.dataset.frame = index;
  $("clock").textContent = `frame ${index} of 0 to ${scene.frames - 1}, ${(index / scene.fps).toFixed(3)} s`;
  follow(index);
}, (playing) => ($("play").textContent = playing ? "Pause" : "Play"));
const vote = makeVote(data, (index, clips) => open(index, clips));

function refresh() {
  const { view } = stage;
  const two = view.mode !== "one";
  $("mode").value = view.mode;
  $("left").value = view.left;
  $("right").value = view.right;
  $("right-field").hidden = $("swap").hidden = $("right-name").hidden = !two;
  $("wipe-field").hidden = view.mode !== "wipe";
  $("gain-field").hidden = view.mode !== "difference";
  $("wipe").value = Math.round(view.wipe * 1000);
  $("zoom").textContent = scene ? `${(100 * stage.scale).toFixed(0)} %` : "";
  const named = (clip) => names[order.indexOf(clip)] ?? "";
  $("left-name").textContent = named(view.left);
  $("right-name").textContent = two ? named(view.right) : "";
  const shown = two ? `${named(view.left)} and ${named(view.right)}` : named(view.left);
  $("canvas").setAttribute("aria-label", `${$("mode").selectedOptions[0].text}: ${shown}`);
}

/** Shows a scene. blind: its clips in the order that numbers them; names and metrics stay hidden. */
async function open(index, blind = null) {
  const changed = scene !== data.scenes[index];
  scene = data.scenes[index];
  order = blind ?? [...scene.clips.keys()];
  names = order.map((clip, place) => (blind ? `Clip ${place + 1}` : scene.clips[clip].name));
  for (const id of ["left", "right"])
    $(id).replaceChildren(...names.map((name, place) => new Option(name, order[place])));
  $("scene").value = index;
  $("frame").max = scene.frames - 1;
  $("measured").hidden = Boolean(blind) || !scene.metrics.length;
  $("notes").hidden = Boolean(blind);
  $("notes").replaceChildren(...[...scene.notes, ...scene.missing].map((note) => element("li", note)));
  follow = drawCurves($("charts"), $("values"), scene, player.seek);
  $("stage").style.setProperty("--shape", `${scene.width} / ${scene.height}`);
  if (changed) stage.open(scene);
  stage.change({ left: order[0], right: order[Math.min(1, order.length - 1)] });
  $("trouble").hidden = true;
  try {
    if (changed) await player.load(scene, videoOf(index));
    else player.seek(0);
  } catch (error) {
    $("trouble").textContent = `This browser cannot play the video: ${error.message}`;
    $("trouble").hidden = false;
  }
}

function toggleBlind() {
  const blind = $("vote").hidden;
  $("vote").hidden = !blind;
  $("blind").setAttribute("aria-pressed", blind);
  $("scene-field").hidden = blind || data.scenes.length < 2;
  // Until the viewer begins, names and metrics are hidden and the order says nothing either.
  const { clips, reference } = scene;
  const judged = [...clips.keys()].filter((clip) => clip !== reference);
  open(data.scenes.indexOf(scene), blind ? shuffled(judged, Math.random) : null);
  if (blind) vote.begin();
}

const nextMode = () => stage.change({ mode: MODES[(MODES.indexOf(stage.view.mode) + 1) % MODES.length] });
const swap = () => stage.change({ left: stage.view.right, right: stage.view.left });
const fit = () => stage.change({ scale: 0, x: 0.5, y: 0.5 });
const actual = () => stage.change({ scale: 1 / window.devicePixelRatio });
const choose = (side, place) => place < order.length && stage.change({ [side]: order[place] });

const KEYS = {
  " ": player.toggle,
  ArrowLeft: (event) => player.step(event.shiftKey ? -10 : -1),
  ArrowRight: (event) => player.step(event.shiftKey ? 10 : 1),
  Home: () => player.seek(0),
  End: () => player.seek(scene.frames - 1),
  x: swap,
  v: nextMode,
  ",": () => stage.change({ wipe: stage.view.wipe - 0.02 }),
  ".": () => stage.change({ wipe: stage.view.wipe + 0.02 }),
  "+": () => stage.zoom(Math.SQRT2),
  "=": () => stage.zoom(Math.SQRT2),
  "-": () => stage.zoom(Math.SQRT1_2),
  0: fit,
  z: actual,
  w: () => stage.pan(0, 40),
  s: () => stage.pan(0, -40),
  a: () => stage.pan(40, 0),
  d: () => stage.pan(-40, 0),
  b: () => $("blind").hidden || toggleBlind(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || !scene) return;
  const { target } = event;
  // Controls keep the keys that they understand themselves.
  if (target.matches("select, input:not([type=range])")) return;
  if (target.matches("button, summary") && [" ", "Enter"].includes(event.key)) return;
  if (target.id === "wipe" && /^(Arrow|Home|End)/.test(event.key)) return;
  const digit = /^Digit([1-9])$/.exec(event.code);
  if (digit) choose(event.shiftKey ? "right" : "left", digit[1] - 1);
  else {
    const act = KEYS[event.key] ?? KEYS[event.key.toLowerCase()];
    if (!act) return;
    act(event);
  }
  event.preventDefault();
});

for (const [id, act] of Object.entries({
  play: player.toggle, back: () => player.step(-1), on: () => player.step(1), blind: toggleBlind, swap, fit, actual,
  "zoom-in": () => stage.zoom(Math.SQRT2), "zoom-out": () => stage.zoom(Math.SQRT1_2),
})) $(id).addEventListener("click", act);
$("scene").addEventListener("change", () => open(Number($("scene").value)));
$("mode").addEventListener("change", () => stage.change({ mode: $("mode").value }));
for (const side of ["left", "right", "gain"])
  $(side).addEventListener("change", () => stage.change({ [side]: Number($(side).value) }));
$("wipe").addEventListener("input", () => stage.change({ wipe: $("wipe").value / 1000 }));
$("frame").addEventListener("input", () => player.seek(Number($("frame").value)));
$("speed").addEventListener("change", () => player.speed(Number($("speed").value)));

$("scene").replaceChildren(...data.scenes.map(({ name }, index) => new Option(name, index)));
$("scene-field").hidden = data.scenes.length < 2;
$("blind").hidden = !data.scenes.every(({ clips, reference }) => clips.length - (reference !== null) > 1);
open(0);
