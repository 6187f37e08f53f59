// Metrics by frame: a small chart each, and a table with the value at the playhead and the mean.

const WIDTH = 420, HEIGHT = 130, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 20;
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 4", "12 4", "1 2", "6 2 1 2"];
const COLORS = 8;
const stroke = (clip) => `stroke: var(--c${clip % COLORS}); stroke-dasharray: ${DASHES[clip % DASHES.length]}`;

function svg(name, attributes, parent) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent?.append(element);
  return element;
}

function element(name, text, parent) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}

// Values are numbers, null where there is none, and "inf".
function written(value) {
  if (value === null || value === undefined) return "–";
  if (value === "inf") return "∞";
  return Math.abs(value) >= 10 ? value.toFixed(2) : value.toPrecision(3);
}

/** onSeek(index) is called where a chart is pressed. Returns follow(index), for the playhead. */
function drawCurves(charts, table, scene, onSeek) {
  charts.replaceChildren();
  table.replaceChildren();
  const last = Math.max(scene.frames - 1, 1);
  const x = (frame) => LEFT + ((WIDTH - LEFT - RIGHT) * frame) / last;
  // Some metrics give a video one value and have no curve.
  const heads = scene.metrics.filter(({ values }) => Object.keys(values).length).map(chart);
  const metrics = scene.metrics.filter(({ means }) => Object.keys(means).length);
  const cells = rows();

  function chart(metric) {
    const numbers = Object.values(metric.values).flat().filter((v) => typeof v === "number");
    let [low, high] = [Math.min(...numbers, Infinity), Math.max(...numbers, -Infinity)];
    if (!numbers.length) [low, high] = [0, 1];
    const margin = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
    [low, high] = [low - margin, high + margin];
    const y = (value) => TOP + ((HEIGHT - TOP - BOTTOM) * (high - value)) / (high - low);
    const figure = element("figure", undefined, charts);
    element("figcaption", [metric.title, metric.better].filter(Boolean).join(", "), figure);
    const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${metric.title} by frame; the table below has the values` }, figure);
    for (const part of [0.1, 0.5, 0.9]) {
      const value = low + (high - low) * part;
      svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }, picture);
      svg("text", { x: LEFT - 5, y: y(value) + 4, "text-anchor": "end" }, picture).textContent = written(value);
    }
    for (const frame of new Set([0, Math.round(last / 2), last]))
      svg("text", { x: x(frame), y: HEIGHT - 5, "text-anchor": "middle" }, picture).textContent = frame;
    for (const [clip, values] of Object.entries(metric.values)) {
      let path = "", down = false;
      values.forEach((value, frame) => {
        const drawn = typeof value === "number";
        if (drawn) path += `${down ? "L" : "M"}${x(frame).toFixed(1)} ${y(value).toFixed(1)}`;
        down = drawn;
      });
      svg("path", { d: path, style: stroke(clip) }, picture);
    }
    const press = (event) => {
      if (!event.buttons) return;
      const box = picture.getBoundingClientRect();
      const across = ((event.clientX - box.left) / box.width) * WIDTH;
      onSeek(clamp(Math.round(((across - LEFT) / (WIDTH - LEFT - RIGHT)) * last), 0, scene.frames - 1));
    };
    picture.addEventListener("pointerdown", press);
    picture.addEventListener("pointermove", press);
    return svg("line", { class: "head", y1: TOP, y2: HEIGHT - BOTTOM }, picture);
  }

  function rows() {
    const cells = [];
    if (!metrics.length) return cells;
    element("caption", "At this frame, and the mean over all", table);
    const head = element("tr", undefined, element("thead", undefined, table));
    for (const text of ["", ...metrics.map((metric) => metric.title)]) element("th", text, head).scope = "col";
    const body = element("tbody", undefined, table);
    scene.clips.forEach((clip, index) => {
      if (!metrics.some(({ means }) => index in means)) return;
      const row = element("tr", undefined, body);
      const name = element("th", undefined, row);
      name.scope = "row";
      const swatch = svg("svg", { class: "swatch", viewBox: "0 0 30 8", "aria-hidden": "true" }, name);
      svg("path", { d: "M0 4H30", style: stroke(index) }, swatch);
      name.append(` ${clip.name}`);
      for (const metric of metrics) {
        const cell = element("td", undefined, row);
        const now = element("span", "", cell);
        if (index in metric.means) element("small", ` (${written(metric.means[index])})`, cell);
        if (index in metric.values) cells.push([now, metric.values[index]]);
      }
    });
    return cells;
  }

  return (index) => {
    for (const head of heads) for (const end of ["x1", "x2"]) head.setAttribute(end, x(index));
    for (const [cell, values] of cells) cell.textContent = written(values[index]);
  };
}
