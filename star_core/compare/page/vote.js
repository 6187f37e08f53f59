// Blind votes: every viewer sees the clips of a scene under numbers, in an order drawn from the
// page's seed, the viewer's name, the round and the scene, and answers each question.

const Z = 1.959963984540054; // two-sided 95 %

/** Wilson score interval of `votes` out of `of`: [low, high]; [0, 1] of none. */
function wilson(votes, of) {
  if (!of) return [0, 1];
  const share = votes / of, d = 1 + (Z * Z) / of;
  const middle = share + (Z * Z) / (2 * of);
  const half = Z * Math.sqrt((share * (1 - share)) / of + (Z * Z) / (4 * of * of));
  return [Math.max((middle - half) / d, 0), Math.min((middle + half) / d, 1)];
}

/** Numbers in [0, 1) that depend on the text alone: FNV-1a, then mulberry32. */
function randomFrom(text) {
  let state = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(text)) state = Math.imul(state ^ byte, 0x01000193);
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

function shuffled(items, random) {
  const result = [...items];
  for (let i = result.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [result[i], result[j]] = [result[j], result[i]];
  }
  return result;
}

/** The trials of one round: scenes in a drawn order, and clips of each in a drawn order. */
function trialsOf(data, viewer, round) {
  const key = `${data.seed}/${viewer}/${round}`;
  return shuffled(data.scenes.keys(), randomFrom(key)).map((scene) => {
    const { clips, reference, name } = data.scenes[scene];
    const judged = [...clips.keys()].filter((clip) => clip !== reference);
    return { scene, order: shuffled(judged, randomFrom(`${key}/${name}`)) };
  });
}

/** By question: how many could not tell, and of each clip its votes, share and interval. */
function tally(data, votes) {
  return Object.fromEntries(data.questions.map(({ id }) => {
    const cast = votes.filter((vote) => vote.question === id);
    const of = cast.filter((vote) => vote.choice !== null).length;
    const names = new Set(cast.flatMap((vote) => vote.order));
    const clips = Object.fromEntries([...names].sort().map((name) => {
      const count = cast.filter((vote) => vote.choice === name).length;
      const [low, high] = wilson(count, of);
      return [name, { votes: count, share: of ? count / of : null, low, high }];
    }));
    return [id, { votes: of, cannot_tell: cast.length - of, clips }];
  }));
}

/** begin() and end() switch it. show(scene, order) is called for every trial, before the ballot. */
function makeVote(data, show) {
  const $ = (id) => document.getElementById(id);
  let viewer = "", round = 1, trials = [], at = 0, votes = [];

  function only(part) {
    for (const id of ["viewer-form", "ballot", "results"]) $(id).hidden = id !== part;
  }

  function ballot() {
    const trial = trials[at];
    $("progress").textContent = `Scene ${at + 1} of ${trials.length}, round ${round}`;
    $("questions").replaceChildren();
    for (const question of data.questions) {
      const field = element("fieldset", undefined, $("questions"));
      element("legend", question.text, field);
      const answers = [...trial.order.keys(), null];
      for (const place of answers) {
        const label = element("label", undefined, field);
        const radio = element("input", undefined, label);
        Object.assign(radio, { type: "radio", name: question.id, required: true, value: place ?? "" });
        label.append(place === null ? " Cannot tell" : ` Clip ${place + 1}`);
      }
    }
    only("ballot");
    show(trial.scene, trial.order);
  }

  function begin() {
    [round, votes] = [1, []];
    only("viewer-form");
    $("viewer").focus();
  }

  function start() {
    [trials, at] = [trialsOf(data, viewer, round), 0];
    ballot();
  }

  $("viewer-form").addEventListener("submit", (event) => {
    event.preventDefault();
    viewer = $("viewer").value.trim();
    if (viewer) start();
  });

  $("ballot").addEventListener("submit", (event) => {
    event.preventDefault();
    const { scene, order } = trials[at], { name, clips } = data.scenes[scene];
    const answers = new FormData($("ballot"));
    for (const { id } of data.questions) {
      const place = answers.get(id);
      const names = order.map((clip) => clips[clip].name);
      votes.push({ scene: name, round, question: id, order: names, choice: place === "" ? null : names[place] });
    }
    at += 1;
    if (at < trials.length) return ballot();
    results();
  });

  function results() {
    const table = $("shares");
    table.replaceChildren();
    const counted = tally(data, votes);
    const head = element("tr", undefined, element("thead", undefined, table));
    for (const text of ["", ...data.questions.map(({ id }) => id)]) element("th", text, head).scope = "col";
    const body = element("tbody", undefined, table);
    for (const name of new Set(votes.flatMap((vote) => vote.order))) {
      const row = element("tr", undefined, body);
      element("th", name, row).scope = "row";
      for (const { id } of data.questions) {
        const { votes: count, share, low, high } = counted[id].clips[name];
        const percent = (value) => `${(100 * value).toFixed(0)} %`;
        element("td", share === null ? "–" : `${count} votes, ${percent(share)} (${percent(low)} to ${percent(high)})`, row);
      }
    }
    $("summary").textContent = data.questions
      .map(({ id }) => `${id}: ${counted[id].votes} votes, ${counted[id].cannot_tell} could not tell`)
      .join("; ");
    only("results");
    $("download").focus();
  }

  $("again").addEventListener("click", () => {
    round += 1;
    start();
  });

  $("download").addEventListener("click", () => {
    const file = {
      format: "star blind votes 1",
      title: data.title,
      seed: data.seed,
      viewer,
      questions: data.questions,
      interval: "Wilson score, 95 %",
      votes,
      summary: tally(data, votes),
    };
    const link = element("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(file, null, 1)], { type: "application/json" }));
    link.download = `votes-${viewer.replace(/[^\p{L}\p{N}_-]+/gu, "_")}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });

  return { begin };
}
