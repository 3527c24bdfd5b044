"use strict";
// The list (search, sort, filter), the explanations of a study and the players (loop, step, slow
// motion, timeline). No network, no library.

const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
const byId = (id) => document.getElementById(id);
const read = (id) => JSON.parse(byId(id)?.textContent ?? "null");
const poster = (clip) => clip.replace(/\.webm$/, ".jpg");

const make = (tag, className = "", text = "", ...children) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  element.append(...children);
  return element;
};

// ---------------------------------------------------------------------------------------- players

class Player {
  constructor(figure, film) {
    this.figure = figure;
    this.video = figure.querySelector("video");
    this.rate = film.rate;
    this.frames = film.frames;
    this.clip = `../${film.clip}`;
    this.line = figure.querySelector(".timeline");
    this.now = figure.querySelector(".now");
    this.output = figure.querySelector("output");
    this.playButton = figure.querySelector(".play");
    this.speed = figure.querySelector("select");
    this.target = null;
    const on = (selector, act) => figure.querySelector(selector).addEventListener("click", act);
    on(".play", () => this.toggle());
    on(".back", () => this.step(-1));
    on(".on", () => this.step(1));
    this.speed.addEventListener("change", () => { this.video.playbackRate = Number(this.speed.value); });
    this.video.addEventListener("click", () => this.toggle());
    for (const event of ["play", "pause", "seeked", "loadeddata"]) {
      this.video.addEventListener(event, () => this.show());
    }
    this.line.addEventListener("pointerdown", (event) => this.drag(event));
    this.line.addEventListener("pointermove", (event) => { if (event.buttons) this.drag(event); });
    this.line.addEventListener("keydown", (event) => this.key(event));
    this.follow();
  }

  load() {
    if (this.video.getAttribute("src")) return;
    this.video.preload = "auto";  // to step through frames before it has played
    this.video.src = this.clip;
    this.video.playbackRate = Number(this.speed.value);
    if (this.figure.dataset.autoplay && !still) this.play();
  }

  play() { this.video.play().catch(() => {}); }  // ignore an interruption before the start

  toggle() {
    this.load();
    if (this.video.paused) this.play(); else this.video.pause();
  }

  get frame() {
    const shown = this.target ?? Math.floor(this.video.currentTime * this.rate + 1e-3);
    return Math.min(this.frames - 1, Math.max(0, shown));
  }

  seek(frame) {
    this.load();
    this.video.pause();
    this.target = (frame + this.frames) % this.frames;  // wraps around
    this.video.currentTime = (this.target + 0.5) / this.rate;
    this.show();
  }

  step(n) { this.seek(this.frame + n); }

  drag(event) {
    const box = this.line.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    this.seek(Math.min(this.frames - 1, Math.max(0, Math.floor(share * this.frames))));
  }

  key(event) {
    const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 };
    if (event.key in moves) this.step(moves[event.key]);
    else if (event.key === "Home") this.seek(0);
    else if (event.key === "End") this.seek(this.frames - 1);
    else if (event.key === " ") this.toggle();
    else return;
    event.preventDefault();
  }

  show() {
    if (!this.video.paused) this.target = null;
    const frame = this.frame;
    this.now.style.left = `${(100 * (frame + 0.5)) / this.frames}%`;
    this.output.textContent = `${frame + 1} of ${this.frames}`;
    this.line.setAttribute("aria-valuenow", frame + 1);
    this.line.setAttribute("aria-valuetext", `frame ${this.output.textContent}`);
    this.playButton.textContent = this.video.paused ? "\u25b6" : "\u275a\u275a";
    this.playButton.setAttribute("aria-label", this.video.paused ? "Play" : "Pause");
  }

  follow() {
    if (!this.video.requestVideoFrameCallback) {
      this.video.addEventListener("timeupdate", () => this.show());
      return;
    }
    const shown = () => { this.show(); this.video.requestVideoFrameCallback(shown); };
    this.video.requestVideoFrameCallback(shown);
  }
}

const players = new Map();
const visibleFigures = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const player = players.get(target);
    if (isIntersecting) {
      player.load();
      if (target.dataset.paused) { delete target.dataset.paused; player.play(); }
    } else if (!player.video.paused) {
      player.video.pause();
      target.dataset.paused = "yes";
    }
  }
}, { rootMargin: "200px" });

const parts = document.createElement("template");
parts.innerHTML = `<figure class="player"><figcaption></figcaption>
<div class="film"><img alt=""><video muted loop playsinline preload="none"></video></div>
<div class="timeline" role="slider" tabindex="0" aria-valuemin="1" aria-valuenow="1">
<span class="now" style="left:0"></span></div>
<div class="controls"><button type="button" class="back" aria-label="One frame back">\u25c0\u275a</button>
<button type="button" class="play" aria-label="Play">\u25b6</button>
<button type="button" class="on" aria-label="One frame forward">\u275a\u25b6</button>
<select aria-label="Speed"><option value="1">1\u00d7</option><option value="0.5">\u00bd\u00d7</option>
<option value="0.25">\u00bc\u00d7</option></select><output></output></div></figure>`;

// A video of the study; caption: what follows its name; best: the number of its most important clip.
const makePlayer = (film, { caption = null, best = -1, down = false } = {}) => {
  const figure = parts.content.firstElementChild.cloneNode(true);
  const legend = figure.querySelector("figcaption");
  legend.append(make("strong", "", film.name));
  if (caption) legend.append(caption);
  if (film.note) legend.append(make("span", "soft", film.note));
  const screen = figure.querySelector(".film");
  if (!film.clip) {
    screen.replaceWith(film.missing ? make("div", "standin", `No clip: ${film.missing}`) : "");
    for (const part of figure.querySelectorAll(".timeline, .controls")) part.remove();
    return figure;
  }
  const image = screen.querySelector("img");
  image.src = `../${poster(film.clip)}`;
  for (const part of [image, screen.querySelector("video")]) {
    part.width = film.width;
    part.height = film.height;
  }
  const speed = `${film.frames} frames at ${Number(film.rate.toPrecision(3))} a second`;
  screen.querySelector("video").setAttribute("aria-label", `${film.name}: ${speed}`);
  const line = figure.querySelector(".timeline");
  line.setAttribute("aria-label", `Frame of ${film.name}`);
  line.setAttribute("aria-valuemax", film.frames);
  if (caption) {
    const places = new Set();
    film.clips.forEach(([left, width], c) => {
      if (c !== best && places.has(left)) return;
      places.add(left);
      const mark = make("span", `clip${c === best ? " best" : ""}${c === best && down ? " down" : ""}`);
      mark.style.left = `${left}%`;
      mark.style.width = `${width}%`;
      line.prepend(mark);
    });
    figure.dataset.autoplay = "yes";
  }
  const player = new Player(figure, film);
  players.set(figure, player);
  player.show();
  visibleFigures.observe(figure);
  return figure;
};

// ----------------------------------------------------------------------------------- explanations

const study = read("study");

const signs = { "+": ["up", "\u25b2\u00a0"], "\u2212": ["down", "\u25bc\u00a0"] };

const effectOf = (score, unit, without) => {
  const text = make("span", "effect"), [className, arrow] = signs[score?.[0]] ?? ["", ""];
  if (score) text.append(make("b", className, `${arrow}${score} ${unit ?? ""}`));
  if (without) text.append(make("span", "", `without it: ${without}`));
  return text;
};

const inTrack = (className, left, width = null) => {
  const mark = make("i", className);
  mark.style.left = `${left}%`;
  if (width !== null) mark.style.width = `${width}%`;
  return mark;
};

const PROBABILITIES = [0, 25, 50, 75, 100].map((x) => [x, `${x}\u00a0%`]);

const waterfall = ({ bars, without, unit, check = "", cut = null, ends = [], ticks = PROBABILITIES }) => {
  const table = make("table", "waterfall");
  table.append(make("caption", "", ends.length > 1 ? "How the videos add up to the answer" : "All videos"));
  const track = (...marks) => {
    const cell = make("div", "track", "", ...ticks.map(([at]) => inTrack("tick", at)), ...marks);
    if (cut !== null) cell.append(inTrack("cut", cut));
    return make("td", "axis", "", cell);
  };
  const axis = make("div", "ticks", "", ...ticks.map(([at, text]) => {
    const label = make("span", at < 8 ? "first" : at > 92 ? "last" : "", text);
    label.style.left = `${at}%`;
    return label;
  }));
  const head = make("tr", "", "", make("th", "", "Video"), make("th", "axis", "", axis),
    make("th", "number", unit ? `Score, ${unit}` : "Score"), make("th", "number", "Without it"));
  table.append(make("thead", "", "", head));
  const row = (className, title, line, score, text) => make("tr", className, "",
    make("th", "", title), line, make("td", "number", score), make("td", "number without", text));
  const endRow = (title, [at, text]) => row("end", title, track(inTrack("end", at)), "", text);
  const body = make("tbody");
  if (ends.length > 1) body.append(endRow("reference", ends[0]));
  for (const [v, start, stop, score] of bars) {
    const kind = v < 0 ? "rest" : score[0] === "\u2212" ? "against" : "for";
    const bar = inTrack(kind, Math.min(start, stop), Math.abs(stop - start));
    const title = v < 0 ? `${-v} other videos` : study.videos[v].name;
    body.append(row("", title, track(bar), score, without[v] ?? ""));
  }
  if (ends.length) body.append(endRow("answer", ends.at(-1)));
  table.append(body);
  const notes = [];
  if (ends.length > 1) notes.push(`The reference is ${study.reference}.`);
  notes.push(study.scores);
  if (cut !== null) notes.push("Dotted: the threshold.");
  const caption = make("p", "soft", notes.join(" "));
  caption.title = check;
  return make("div", "why", "", table, caption);
};

const fill = (details) => {  // the content of a label, once
  if (details.children.length > 1) return;
  const label = study.labels[details.id.slice("label-".length)];
  const cards = make("div", "players");
  const scores = new Map((label.bars ?? []).map(([v, , , score]) => [v, score]));
  for (const [v, best] of label.cards) {
    const score = scores.get(v), caption = effectOf(score, label.unit, label.without[v]);
    cards.append(makePlayer(study.videos[v], { caption, best, down: score?.[0] === "\u2212" }));
  }
  details.append(make("div", "detail", "", cards));
  if (label.fault) details.lastChild.append(make("p", "caution", `\u26a0 ${label.fault}.`));
  if (label.bars) details.lastChild.append(waterfall(label));
};

if (study) {
  const labels = [...document.querySelectorAll("details.label")];
  for (const details of labels) {
    if (details.open) fill(details);
    details.addEventListener("toggle", () => { if (details.open) fill(details); });
  }
  byId("videos").querySelector("p").textContent = study.note;
  byId("videos").querySelector(".players").append(...study.videos.map((film) => makePlayer(film)));

  const button = byId("all-labels");
  const nameButton = () => {
    button.textContent = labels.every((x) => x.open) ? "Close all labels" : "Open all labels";
  };
  if (button) {
    nameButton();
    for (const details of labels) details.addEventListener("toggle", nameButton);
    button.addEventListener("click", () => {
      const open = !labels.every((x) => x.open);
      for (const details of labels) details.open = open;
    });
  }
  const showHash = () => {
    const target = labels.find((x) => `#${x.id}` === location.hash);
    if (target) target.open = true;
  };
  addEventListener("hashchange", showHash);
  showHash();

  // On paper: a table of all answers, then every label with its explanation.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = labels.filter((x) => !x.open);
    const answers = document.querySelector(".answers");
    const copy = make("section", `${answers.className} print-only`);
    for (const row of answers.querySelectorAll(".row")) {
      copy.append(make("div", row.className, "", ...[...row.children].map((x) => x.cloneNode(true))));
    }
    answers.before(copy);
    for (const details of labels) { fill(details); details.open = true; }
  });
  addEventListener("afterprint", () => {
    for (const copy of document.querySelectorAll(".answers.print-only")) copy.remove();
    for (const details of closed) details.open = false;
  });
}

for (const link of document.querySelectorAll("a[data-key]")) {
  document.addEventListener("keydown", (event) => {
    const typing = /INPUT|SELECT|TEXTAREA/.test(document.activeElement.tagName);
    if (event.key === link.dataset.key && !typing && !event.ctrlKey && !event.metaKey) link.click();
  });
}

// ------------------------------------------------------------------------------------------- list

const list = byId("list");
if (list) {
  const studies = read("studies");
  const rows = [...list.tBodies[0].rows];
  const columns = ["value", "width", "cut", "truth", "decision", "right", "shown", "range",
    "truthShown", "clip"];
  for (const one of studies) {
    one.labels = one.labels.map((x) => Object.fromEntries(columns.map((name, k) => [name, x[k]])));
  }
  let sorting = { by: "eid", down: false };

  const film = make("video");  // one for all rows: it plays the clip under the pointer
  Object.assign(film, { muted: true, loop: true });
  for (const cell of list.querySelectorAll("td.thumb")) {
    const image = cell.querySelector("img");
    if (!image || still) continue;
    cell.addEventListener("mouseenter", () => {
      film.src = image.dataset.clip;
      cell.append(film);
      film.play().catch(() => {});
    });
    cell.addEventListener("mouseleave", () => film.remove());
  }
  const loadAll = () => { for (const image of list.querySelectorAll("img")) image.loading = "eager"; };
  addEventListener("load", () => setTimeout(loadAll, 1000));  // a printed list needs them all

  const answer = (i) => studies[i].labels[Number(byId("label").value)] ?? {};
  const value = (i, by) => (["value", "truth", "width"].includes(by) ? answer(i)[by] : studies[i][by]);
  const compare = (a, b) => {  // blanks are last in both directions
    const [x, y] = [value(a, sorting.by), value(b, sorting.by)];
    const missing = (v) => v === null || v === undefined || v === "";
    if (missing(x) || missing(y)) return missing(x) - missing(y) || a - b;
    const order = typeof x === "string" ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
    return (sorting.down ? -order : order) || a - b;
  };

  const setFilter = (name, key) => {  // disable a filter for labels without its values
    const exists = rows.some((_, i) => (answer(i)[key] ?? null) !== null);
    byId(name).disabled = !exists;
    if (!exists) byId(name).value = "";
  };

  const matches = (i) => {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const label = answer(i);
    const decision = byId("decision").value;
    const right = byId("right").value;
    const novelty = byId("novelty").value;
    return words.every((word) => studies[i].text.includes(word))
      && (!decision || label.decision === Number(decision === "yes"))
      && (!right || label.right === Number(right === "right"))
      && (!novelty || studies[i].warned === (novelty === "warned"));
  };

  const badge = (kind, text) => make("b", `badge ${kind}`, text);

  const show = (i) => {
    const label = answer(i);
    const cell = (name) => rows[i].querySelector(name);
    cell(".shown .text").textContent = label.shown;
    const bar = cell(".bar");
    const isProbability = byId("label").selectedOptions[0]?.dataset.probability && label.shown;
    bar.hidden = !isProbability;
    bar.classList.toggle("yes", label.decision === 1);
    if (isProbability) {
      bar.style.setProperty("--p", `${100 * label.value}%`);
      bar.style.setProperty("--t", label.cut === null ? "-99rem" : `${100 * label.cut}%`);
    }
    const isClass = byId("label").selectedOptions[0]?.dataset.class;
    const decisions = isClass ? ["", badge("yes", "\u25cf most probable")]
      : [badge("no", "\u25cb absent"), badge("yes", "\u25cf present")];
    cell(".decision").replaceChildren(...(label.decision === null ? [] : [decisions[label.decision]]));
    if (cell(".range")) cell(".range").textContent = label.range;
    const truth = cell(".truth");
    if (truth) {
      const marks = [badge("wrong", "\u2717 differs"), badge("no", "\u2713 agrees")];
      truth.replaceChildren(label.truthShown, ...(label.right === null ? [] : [" ", marks[label.right]]));
    }
    const image = cell(".thumb img");
    if (image && label.clip && image.dataset.clip !== label.clip) {
      image.dataset.clip = label.clip;
      image.src = poster(label.clip);
    }
  };

  const update = () => {
    setFilter("decision", "decision");
    setFilter("right", "right");
    let shown = 0;
    for (const i of rows.map((_, k) => k).sort(compare)) {
      show(i);
      rows[i].hidden = !matches(i);
      shown += !rows[i].hidden;
      list.tBodies[0].append(rows[i]);
    }
    const label = byId("label").selectedOptions[0]?.textContent ?? "";
    byId("count").textContent = `${shown} of ${rows.length} studies \u00b7 ${label}`;
    for (const th of list.querySelectorAll("th[data-by]")) {
      const state = th.dataset.by !== sorting.by ? "none" : sorting.down ? "descending" : "ascending";
      th.setAttribute("aria-sort", state);
    }
  };

  for (const name of ["label", "decision", "right", "novelty"]) byId(name).addEventListener("change", update);
  byId("search").addEventListener("input", update);
  for (const th of list.querySelectorAll("th[data-by]")) {
    th.querySelector("button").addEventListener("click", () => {
      sorting = { by: th.dataset.by, down: sorting.by === th.dataset.by ? !sorting.down : false };
      update();
    });
  }
  update();
}
