"use strict";
// The list (search, sort, filter) and the players (loop, step, slow motion, timeline). No network, no library.

// ---------------------------------------------------------------------------------------- players

const still = matchMedia("(prefers-reduced-motion: reduce)").matches;

class Player {
  constructor(figure) {
    this.figure = figure;
    this.video = figure.querySelector("video");
    this.rate = Number(figure.dataset.rate);
    this.frames = Number(figure.dataset.frames);
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
    this.video.src = this.figure.dataset.clip;
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
    this.output.textContent = `frame ${frame + 1} of ${this.frames}`;
    this.line.setAttribute("aria-valuenow", frame + 1);
    this.line.setAttribute("aria-valuetext", this.output.textContent);
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
const seen = new IntersectionObserver((entries) => {
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
for (const figure of document.querySelectorAll(".player[data-clip]")) {
  players.set(figure, new Player(figure));
  seen.observe(figure);
}

for (const link of document.querySelectorAll("a[data-key]")) {
  document.addEventListener("keydown", (event) => {
    const typing = /INPUT|SELECT|TEXTAREA/.test(document.activeElement.tagName);
    if (event.key === link.dataset.key && !typing && !event.ctrlKey && !event.metaKey) link.click();
  });
}

// ------------------------------------------------------------------------------------------- list

const list = document.getElementById("list");
if (list) {
  const studies = JSON.parse(document.getElementById("studies").textContent);
  const rows = [...list.tBodies[0].rows];
  const field = (name) => document.getElementById(name);
  let sorting = { by: "eid", down: false };

  const thumbs = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting && !target.src) target.src = target.dataset.src;
    }
  }, { rootMargin: "300px" });
  for (const video of list.querySelectorAll("video[data-src]")) {
    thumbs.observe(video);
    video.addEventListener("mouseenter", () => { if (!still) video.play().catch(() => {}); });
    video.addEventListener("mouseleave", () => video.pause());
  }

  const answer = (i) => studies[i].labels[Number(field("label").value)] ?? {};
  const value = (i, by) => {
    if (by === "value" || by === "truth" || by === "width") return answer(i)[by];
    return studies[i][by];
  };
  const compare = (a, b) => {  // blanks are last in both directions
    const [x, y] = [value(a, sorting.by), value(b, sorting.by)];
    const missing = (v) => v === null || v === undefined || v === "";
    if (missing(x) || missing(y)) return missing(x) - missing(y) || a - b;
    const order = typeof x === "string" ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
    return (sorting.down ? -order : order) || a - b;
  };

  const setFilter = (name, key) => {  // disable a filter for labels without its values
    const exists = rows.some((_, i) => (answer(i)[key] ?? null) !== null);
    field(name).disabled = !exists;
    if (!exists) field(name).value = "";
  };

  const matches = (i) => {
    const words = field("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const label = answer(i);
    const decision = field("decision").value;
    const right = field("right").value;
    const novelty = field("novelty").value;
    return words.every((word) => studies[i].text.includes(word))
      && (!decision || label.decision === (decision === "yes"))
      && (!right || label.right === (right === "right"))
      && (!novelty || studies[i].warned === (novelty === "warned"));
  };

  const badge = (cell, kind, text) => {
    const span = document.createElement("span");
    span.className = `badge ${kind}`;
    span.textContent = text;
    cell.append(" ", span);
  };

  const update = () => {
    setFilter("decision", "decision");
    setFilter("right", "right");
    const order = rows.map((_, i) => i).sort(compare);
    let shown = 0;
    for (const i of order) {
      const label = answer(i);
      for (const name of ["shown", "width_shown", "truth_shown"]) {
        const cell = rows[i].querySelector("." + name);
        if (cell) cell.textContent = label[name] ?? "";
      }
      const [answerCell, truthCell] = [".shown", ".truth_shown"].map((x) => rows[i].querySelector(x));
      if (label.decision === true) badge(answerCell, "yes", "\u25cf present");
      if (label.decision === false) badge(answerCell, "no", "\u25cb absent");
      if (truthCell && label.right === false) badge(truthCell, "wrong", "\u2717 differs");
      if (truthCell && label.right === true) badge(truthCell, "no", "\u2713 agrees");
      const thumb = rows[i].querySelector("video[data-src]");
      if (thumb && label.thumb && thumb.dataset.src !== label.thumb) {
        thumb.dataset.src = label.thumb;
        if (thumb.src) thumb.src = label.thumb;
      }
      rows[i].hidden = !matches(i);
      shown += !rows[i].hidden;
      list.tBodies[0].append(rows[i]);
    }
    field("count").textContent = `${shown} of ${rows.length} studies`;
    for (const th of list.querySelectorAll("th[data-by]")) {
      const state = th.dataset.by !== sorting.by ? "none" : sorting.down ? "descending" : "ascending";
      th.setAttribute("aria-sort", state);
    }
  };

  for (const name of ["label", "decision", "right", "novelty"]) field(name).addEventListener("change", update);
  field("search").addEventListener("input", update);
  for (const th of list.querySelectorAll("th[data-by]")) {
    th.querySelector("button").addEventListener("click", () => {
      sorting = { by: th.dataset.by, down: sorting.by === th.dataset.by ? !sorting.down : false };
      update();
    });
  }
  update();
}
