"use strict";
// Charts by uPlot, the reader and the answers from the JSON of this page. Texts only ever become text nodes.
const runs = JSON.parse(document.getElementById("data").textContent);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const several = runs.length > 1;
const charts = []; // {make, node}: drawn anew when the theme changes

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const number = (v) => (v == null ? "–" : Math.abs(v) >= 1000 ? Math.round(v).toLocaleString("en") : `${+v.toPrecision(4)}`);
const share = (v) => (v == null ? "–" : `${(100 * v).toFixed(1)} %`);
const delta = (v) => `${v < 0 ? "−" : "+"}${Math.abs(v).toFixed(2)}`;

// ------------------------------------------------------------------------------------------------ charts

// data: [x, ...columns]; series: {label, stroke, format, values (shown instead of the drawn column), dash, width, fill}
function chart(section, title, note, data, series, { bands = [], x = {}, y = {}, lines = [], xLabel = "step" } = {}) {
  const plot = make("div", { tabindex: "0", role: "img", "aria-label": `${title}. ${summary(data, series)}` });
  const figure = make("figure", {}, make("figcaption", {}, title, " ", make("small", {}, note)), plot);
  document.querySelector(`#${section} .charts`).append(figure);
  const draw = () => {
    const axis = { stroke: color("--soft"), grid: { stroke: color("--grid"), width: 1 }, ticks: { stroke: color("--grid"), width: 1 } };
    const options = {
      width: plot.clientWidth, height: 240, cursor: { y: false, dataIdx: near },
      scales: { x: { time: false, ...x }, y },
      series: [{ label: xLabel, value: (u, v) => number(v) }, ...series.map((s) => ({
        label: s.label, stroke: color(s.stroke), width: s.width ?? 1.5, dash: s.dash, fill: s.fill ? color(s.fill) : undefined,
        paths: s.stepped ? uPlot.paths.stepped({ align: 1 }) : undefined, points: { show: few }, spanGaps: false,
        value: (u, v, i, at) => (s.format ?? number)(s.values && at != null ? s.values[at] : v),
      }))],
      axes: [{ ...axis, size: 34 }, { ...axis, size: 58, values: (u, ticks) => ticks.map((t) => (series[0].format ? `${+(100 * t).toPrecision(3)} %` : number(t))) }],
      bands: bands.map((b) => ({ ...b, fill: b.fill && color(b.fill) })),
      hooks: { draw: [(u) => lines.forEach((v) => vertical(u, v))] },
      legend: { live: true },
    };
    plot.replaceChildren();
    const u = new uPlot(options, data, plot);
    for (const [i, s] of series.entries()) if (s.hidden) u.root.querySelectorAll(".u-legend .u-series")[i + 1].hidden = true;
    plot.onkeydown = (event) => move(event, u, data[0].length);
    new ResizeObserver(() => plot.clientWidth && u.setSize({ width: plot.clientWidth, height: 240 })).observe(plot);
  };
  charts.push(draw);
}

function summary(data, series) {
  const parts = series.filter((s) => !s.hidden).map((s) => {
    const values = (s.values ?? data[series.indexOf(s) + 1]).filter((v) => v != null);
    const format = s.format ?? number;
    return `${s.label}: first ${format(values[0])}, last ${format(values.at(-1))}, from ${format(Math.min(...values))} to ${format(Math.max(...values))}`;
  });
  return `${parts.join("; ")}. Arrow keys read the values.`;
}

// One or two steps make no line to be seen.
const few = (u, s) => u.series[s].width > 0 && u.data[s].filter((v) => v != null).length < 3;

// A stage's legend shows its own values: those of the next steps at most, as stages and runs have steps of their own.
function near(u, s, index) {
  for (let by = 0; by <= 4; by++) for (const i of [index - by, index + by]) if (u.data[s][i] != null) return i;
  return index;
}

function vertical(u, value) {
  const at = Math.round(u.valToPos(value, "x", true));
  u.ctx.save();
  u.ctx.strokeStyle = color("--soft");
  u.ctx.setLineDash([5, 4]);
  u.ctx.beginPath();
  u.ctx.moveTo(at, u.bbox.top);
  u.ctx.lineTo(at, u.bbox.top + u.bbox.height);
  u.ctx.stroke();
  u.ctx.restore();
}

function move(event, u, count) {
  const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -count, End: count }[event.key];
  if (by === undefined) return;
  event.preventDefault();
  const index = Math.max(0, Math.min(count - 1, (u.cursor.idx ?? (by > 0 ? -1 : count)) + by));
  u.setCursor({ left: u.valToPos(u.data[0][index], "x"), top: 10 });
  const rows = [...u.root.querySelectorAll(".u-legend .u-series:not([hidden])")];
  document.getElementById("said").textContent = rows.map((row) => row.textContent).join(", ");
}

// One table of all runs' stages; steps go on from stage to stage of a run.
function curves(columns) {
  const names = [], tables = [];
  runs.forEach((run, r) => {
    let before = 0;
    run.curves.forEach((curve, c) => {
      names.push({ label: several ? `${run.name} · ${curve.stage}` : curve.stage, stroke: `--c${(several ? r : c) % 6}`, dash: several && c % 3 ? [8, 3 * (c % 3)] : undefined });
      tables.push([curve.step.map((s) => s + before), ...columns.map((name) => curve[name])]);
      before += curve.steps;
    });
  });
  return [names, tables.length > 1 ? uPlot.join(tables) : tables[0]];
}

function training() {
  const each = Math.max(0, ...runs.flatMap((run) => run.curves.map((c) => c.each)));
  if (!each) return empty("training", "No step of training is there.");
  const note = each > 1 ? `mean of up to ${each} steps` : "each step";
  const [stages, loss] = curves(["least", "greatest", "loss"]); // the mean last: drawn over its band
  const band = stages.flatMap((s) => [{ ...s, label: `${s.label}, least`, width: 0, hidden: true }, { ...s, label: `${s.label}, greatest`, width: 0, hidden: true }, { ...s }]);
  const bands = stages.map((s, i) => ({ series: [3 * i + 2, 3 * i + 1], fill: "--grid" }));
  chart("training", "Loss", each > 1 ? `${note}; grey: least and greatest` : note, loss, band, each > 1 ? { bands } : {});
  for (const [name, title, format] of [["lr", "Learning rate"], ["grad_norm", "Gradient norm, before clipping"], ["tokens_per_s", "Tokens a second"], ["mfu", "Utilisation of peak FLOP/s (mfu)", share], ["fill", "Fill of packs", share], ["balance", "Balance of ranks: mean over greatest work", share]]) {
    const [series, data] = curves([name]);
    const y = name === "fill" || name === "balance" ? { range: (u, least) => [Math.min(least, 0.9) - 0.01, 1.01] } : {};
    chart("training", title, note, data, series.map((s) => ({ ...s, format })), { y });
  }
}

function lengths(run) {
  const { edges, shares, figures } = run.lengths;
  if (!edges) return;
  const names = Object.keys(shares);
  const series = names.map((label, i) => ({ label, stroke: `--c${i % 6}`, stepped: true, format: share }));
  const data = [edges, ...names.map((name) => [...shares[name], shares[name].at(-1)])]; // the last bin ends somewhere
  chart("lengths", several ? `Tokens: ${run.name}` : "Tokens", `share in bins of ${edges[1]} tokens`, data, series, { xLabel: "tokens from" });
  const rows = names.map((name) => make("tr", {}, make("th", { scope: "row" }, name), ...figures[name].map((v) => make("td", { class: "n" }, number(v)))));
  const head = ["", "number", "mean", "median", "95 % below"].map((h) => make("th", { scope: "col", class: h ? "n" : null }, h));
  document.querySelector("#lengths .charts").append(make("div", { class: "wide" }, make("table", {}, make("caption", {}, several ? run.name : "Tokens"), make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows))));
}

function sentences(run) {
  const of = several ? ` (${run.name})` : "";
  for (const [stage, d] of Object.entries(run.deltas)) {
    const fractions = (group) => [...group.bins, group.bins.at(-1)].map((n) => n / Math.max(group.count, 1));
    const data = [d.edges, fractions(d.kept), fractions(d.selected)];
    const longer = d.tokens.random ? `; ${(d.tokens.selected / d.tokens.random).toFixed(2)} × the tokens of a random choice` : "";
    chart("sentences", `Δ, stage ${stage}, T = ${d.temperature}${of}`, `share of sentences${longer}`, data, [
      { label: "all candidates", stroke: "--c5", stepped: true, format: share },
      { label: `chosen by ${d.rule}`, stroke: "--c0", stepped: true, format: share, width: 2 },
    ], { lines: [-d.beta, d.beta], x: { range: [-1, 1] }, xLabel: "Δ from" });
  }
  for (const { temperature, shares: [teacher, common, student] } of run.places) {
    const middle = teacher.map((_, i) => Math.round((100 * (i + 0.5)) / teacher.length));
    const added = teacher.map((t, i) => (t === null ? null : t + common[i]));
    const whole = added.map((t, i) => (t === null ? null : t + student[i]));
    chart("sentences", `Types along the response, T = ${temperature}${of}`, "share of the sentences there", [middle, teacher, added, whole], [
      { label: "teacher", stroke: "--teacher-line", values: teacher, format: share, fill: "--teacher" },
      { label: "common", stroke: "--c5", values: common, format: share },
      { label: "student", stroke: "--student-line", values: student, format: share, dash: [3, 3] },
    ], { bands: [{ series: [2, 1], fill: "--grid" }, { series: [3, 2], fill: "--student" }], y: { range: [0, 1] }, xLabel: "% of the response" });
  }
}

function empty(section, text) {
  const place = document.querySelector(`#${section} .page, #${section} .charts`);
  if (!place.childElementCount) place.append(make("p", { class: "quiet" }, text));
}

// ------------------------------------------------------------------------------------------------ reader

const tip = document.getElementById("tip");
const described = new WeakMap(); // sentence -> what the tip says

function kind(piece, beta) {
  const change = piece[1] - piece[2];
  return change > beta ? "teacher" : change < -beta ? "student" : "common";
}

function response(candidate, { beta, rule }) {
  const counts = { teacher: 0, common: 0, student: 0 };
  const text = make("div", { class: "text clip" });
  for (const piece of candidate.pieces) {
    if (typeof piece === "string") {
      text.append(make("span", { class: "quiet" }, piece));
      continue;
    }
    const type = kind(piece, beta);
    counts[type] += 1;
    const first = !text.querySelector("mark");
    const mark = make("mark", { class: type, tabindex: first ? "0" : "-1" }, piece[0]);
    described.set(mark, `${type} sentence: p_T ${piece[1].toFixed(3)}, p_S ${piece[2].toFixed(3)}${piece.length > 5 ? `, p_D ${piece[5].toFixed(3)}` : ""}, Δ\u00a0${delta(piece[1] - piece[2])} (${piece[3]} and ${piece[4]} tokens)`);
    text.append(mark);
  }
  const chosen = candidate.chosen !== null;
  const fate = chosen ? `chosen for stage ${candidate.chosen}` : candidate.dropped ? "dropped by the filters" : rule ? "rejected by the rule" : "scored";
  const head = `${fate} · T = ${candidate.temperature}, candidate ${candidate.candidate}: ${counts.teacher} teacher, ${counts.common} common, ${counts.student} student${candidate.finish === "stop" ? "" : `; ended by ${candidate.finish}`}${candidate.dropped ? `; ${candidate.dropped}` : ""}`;
  return make("article", { class: chosen ? "chosen" : null }, make("h4", {}, head), text);
}

function show(question, run, page) {
  const why = run.rule ? [make("p", {}, `Chosen by ${run.rule.name}: of a question's responses at one temperature that passed the filters, ${run.rule.takes}; of equal ones the lowest number.`)] : [];
  page.replaceChildren(...why, make("div", { class: "text" }, question.question, ...(question.answer == null ? [] : [make("span", { class: "quiet" }, `\nexpected answer: ${question.answer}`)])));
  for (const temperature of new Set(question.candidates.map((c) => c.temperature))) {
    const group = question.candidates.filter((c) => c.temperature === temperature);
    group.sort((a, b) => (b.chosen !== null) - (a.chosen !== null));
    page.append(make("div", { class: "answers" }, ...group.map((c) => response(c, run))));
  }
  if (question.mixed) page.append(make("div", { class: "answers" }, mixed(question.mixed)));
}

// A response that the student began: two parts, each said whose it is.
function mixed({ student, teacher, tokens, cut, cap, masked }) {
  const text = make("div", { class: "text clip" });
  const said = [`the student began: ${tokens[0]} tokens, ${share(cut)} of what it wrote under a cap of ${cap}${masked ? "; not trained on" : ""}`, `the teacher continued: ${tokens[1]} tokens`];
  for (const [i, part] of [student, teacher].entries()) {
    const mark = make("mark", { class: i ? "went" : "began", tabindex: i ? "-1" : "0" }, part);
    described.set(mark, said[i]);
    text.append(make("small", { class: "who" }, i ? "teacher" : "student"), mark);
  }
  return make("article", { class: "mixed" }, make("h4", {}, `mixed policy · ${said.join("; ")}`), text);
}

function reader() {
  const able = runs.filter((run) => run.questions.length);
  if (!able.length) return empty("reader", "No scored responses are there.");
  const tools = document.querySelector("#reader .tools"), page = document.querySelector("#reader .page");
  const [back, on, onMixed] = ["Previous", "Next", "Next mixed"].map((word) => make("button", { type: "button" }, word));
  const where = make("span", { role: "status" });
  const pick = make("select", { "aria-label": "Run" }, ...able.map((run, i) => make("option", { value: i }, run.name)));
  let at = 0;
  const turn = (to) => {
    const run = able[pick.value];
    at = Math.max(0, Math.min(run.questions.length - 1, to));
    where.textContent = `question ${at + 1} of ${run.questions.length}`;
    back.disabled = at === 0;
    on.disabled = at === run.questions.length - 1;
    onMixed.hidden = !run.questions.some((q) => q.mixed);
    tip.hidden = true;
    show(run.questions[at], run, page);
  };
  const turnMixed = () => { // to the next, behind the last to the first
    const places = able[pick.value].questions.flatMap((q, i) => (q.mixed ? [i] : []));
    if (places.length) turn(places.find((i) => i > at) ?? places[0]);
  };
  back.onclick = () => turn(at - 1);
  on.onclick = () => turn(at + 1);
  onMixed.onclick = turnMixed;
  pick.onchange = () => turn(0);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
    if (event.key === "n") turn(at + 1);
    else if (event.key === "p") turn(at - 1);
    else if (event.key === "m") turnMixed();
    else if (event.key === "Escape") tip.hidden = true;
  });
  tools.append(...(able.length > 1 ? [pick] : []), back, on, onMixed, where);
  page.addEventListener("keydown", step);
  page.addEventListener("focusin", (event) => tell(event.target));
  page.addEventListener("pointerover", (event) => tell(event.target));
  page.addEventListener("click", (event) => event.target.tagName === "MARK" && event.target.focus());
  page.addEventListener("pointerleave", () => (tip.hidden = true));
  // Reaching a sentence by keyboard may scroll to it, in the page or in its response.
  addEventListener("scroll", () => tell(document.activeElement), { passive: true, capture: true });
  turn(0);
}

function step(event) {
  const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
  if (by === undefined || event.target.tagName !== "MARK") return;
  event.preventDefault();
  const marks = [...event.target.parentNode.querySelectorAll("mark")];
  const next = marks[marks.indexOf(event.target) + by];
  if (!next) return;
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
  tell(next);
}

function tell(target) {
  const box = target?.getClientRects()[0];
  tip.hidden = !described.has(target) || box.bottom < 0 || box.top > innerHeight;
  if (tip.hidden) return;
  tip.textContent = described.get(target);
  const size = tip.getBoundingClientRect();
  const above = box.top - size.height - 6;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - size.width - 8))}px`;
  tip.style.top = `${above > 4 ? above : Math.min(target.getBoundingClientRect().bottom + 6, innerHeight - size.height - 4)}px`;
}

// ------------------------------------------------------------------------------------------------ before and after

function samples(run) {
  if (!run.samples) return;
  const page = document.querySelector("#samples .page");
  const { labels, total, problems } = run.samples;
  if (several) page.append(make("h3", {}, run.name));
  page.append(make("p", {}, `${problems.length} of ${total} problems, evenly spread over them, not picked; the first answer to each.`));
  for (const problem of problems) {
    const answers = labels.filter((l) => problem.answers[l]).map((label) => {
      const { output, correct, finish } = problem.answers[label];
      const word = make("span", { class: correct ? "right" : "wrong" }, correct ? "right" : finish === "stop" ? "wrong" : `wrong (${finish})`);
      return make("article", {}, make("h4", {}, `${label}: `, word), make("div", { class: "text clip" }, output || " "));
    });
    page.append(make("h3", {}, problem.question), make("div", { class: "answers" }, ...answers));
  }
}

if (document.getElementById("training")) { // not on a page of comparisons alone
  training();
  for (const run of runs) {
    lengths(run);
    sentences(run);
    samples(run);
  }
  reader();
  empty("lengths", "No lengths are there.");
  empty("sentences", "No scored sentences are there.");
  empty("samples", "No evaluated answers are there.");
}
const drawAll = () => charts.forEach((draw) => draw());
requestAnimationFrame(() => setTimeout(drawAll)); // after the first paint
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
