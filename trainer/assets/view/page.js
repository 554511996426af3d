"use strict";
// Everything is built with createElement and textContent: no text of a run is ever read as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children.map((c) => (c instanceof Node ? c : document.createTextNode(String(c)))));
  return node;
}
function svg(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
const known = (v) => typeof v === "number" && Number.isFinite(v);
function show(v) {
  if (!known(v)) return "–";
  if (Number.isInteger(v)) return String(v);
  const size = Math.abs(v);
  return size >= 1000 ? v.toFixed(0) : size >= 0.001 ? String(+v.toPrecision(3)) : v.toExponential(1);
}

// ---- header
document.title = data.title + " · run";
$("title").textContent = data.title;
for (const [name, value] of Object.entries(data.config)) $("config").append(el("span", {}, name + " ", el("b", {}, value)));
if (data.notes.length) $("notes").textContent = "Not all is on this page: " + data.notes.join("; ") + ".";

// ---- curves
const names = [...new Set(data.metrics.flatMap(Object.keys))].filter((n) => n !== "step").sort();
const matching = (pattern) => names.filter((n) => pattern.test(n));
const CARDS = [
  ["Reward of the siblings", ["reward"]],
  ["Success on held-out tasks", matching(/^eval\/[^/]+\/(tgc|sgc|pass@1|class_balanced|refuser)$/)],
  ["Success by task class", matching(/^success\//)],
  ["Share of groups", ["by_group/frac_mixed", "by_group/frac_solved", "by_group/frac_failed"]],
  ["Mean weight W", ["credit/mean_weight"]],
  ["Divergence d = KL(student ‖ teacher)", ["credit/mean_divergence", "credit/p95_divergence"]],
  ["Entropy", ["entropy", "credit/teacher_entropy"]],
  ["Credit: share of tokens", ["credit/frac_salient", "credit/frac_saturated", "credit/gini"]],
  ["Tokens of a rollout", ["completions/mean_length", "completions/mean_length_solved", "completions/mean_length_failed"]],
  ["Tool calls of a rollout", ["tools/per_rollout"]],
  ["References", ["reference/supplied", "leak/phrase_rate"]],
  ["Loss", ["loss"]],
];

const series = (name) => data.metrics.filter((r) => known(r[name])).map((r) => [r.step, r[name]]);

function timeShares() {
  const stages = matching(/^time\/(?!sgcd_overhead)/);
  return stages.map((stage) => [stage, data.metrics.flatMap((r) => {
    const total = stages.reduce((sum, s) => sum + (known(r[s]) ? r[s] : 0), 0);
    return total > 0 ? [[r.step, (known(r[stage]) ? r[stage] : 0) / total]] : [];
  })]);
}

function ticks(low, high) {
  const raw = (high - low) / 4, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * unit).find((s) => s >= raw * 0.999);
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-6; v += step) found.push(+v.toPrecision(10));
  return found;
}

function chart(title, lines) {
  lines = lines.filter(([, points]) => points.length);
  if (!lines.length) return null;
  const W = 320, H = 150, left = 38, right = 8, top = 8, bottom = 20;
  const xs = lines.flatMap(([, p]) => p.map((q) => q[0])), ys = lines.flatMap(([, p]) => p.map((q) => q[1]));
  let x0 = Math.min(...xs), x1 = Math.max(...xs), y0 = Math.min(...ys), y1 = Math.max(...ys);
  if (x0 === x1) { x0 -= 0.5; x1 += 0.5; }
  if (y0 >= 0 && y0 < 0.6 * y1) y0 = 0;
  if (y1 - y0 < 1e-9 + Math.abs(y1) * 1e-6) { const pad = Math.abs(y1) * 0.1 || 1; y0 -= y0 === 0 ? 0 : pad; y1 += pad; }
  const X = (v) => left + ((v - x0) / (x1 - x0)) * (W - left - right), Y = (v) => H - bottom - ((v - y0) / (y1 - y0)) * (H - top - bottom);
  const canvas = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title });
  for (const v of ticks(y0, y1)) {
    canvas.append(svg("line", { class: "grid", x1: left, x2: W - right, y1: Y(v), y2: Y(v) }));
    canvas.append(svg("text", { x: left - 5, y: Y(v) + 3, "text-anchor": "end" }, show(v)));
  }
  const marks = ticks(x0, x1).filter(Number.isInteger);
  for (const v of marks) canvas.append(svg("text", { x: X(v), y: H - 5, "text-anchor": "middle" }, v));
  lines.forEach(([, points], i) => {
    const kind = "s" + (i % 6);
    const line = svg("polyline", { class: kind, points: points.map(([x, y]) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`).join(" ") });
    line.style.fill = "none";
    canvas.append(line);
    if (points.length < 30) for (const [x, y] of points) canvas.append(svg("circle", { class: kind, cx: X(x), cy: Y(y), r: 2 }));
  });
  const cursor = svg("line", { class: "cursor", y1: top, y2: H - bottom, visibility: "hidden" });
  const key = el("div", { class: "key" });
  const label = (at) => {
    key.replaceChildren(el("span", {}, at === null ? "last" : "step " + at));
    lines.forEach(([name, points], i) => {
      const near = at === null ? points[points.length - 1] : points.find((p) => p[0] === at);
      key.append(el("span", {}, el("i", { class: "s" + (i % 6) }), `${name.replace(/^.*\//, "").replaceAll("_", " ")} ${near ? show(near[1]) : "–"}`));
    });
  };
  const steps = [...new Set(xs)].sort((a, b) => a - b);
  canvas.addEventListener("mousemove", (event) => {
    const box = canvas.getBoundingClientRect();
    const v = x0 + (((event.clientX - box.left) / box.width) * W - left) / (W - left - right) * (x1 - x0);
    const at = steps.reduce((best, s) => (Math.abs(s - v) < Math.abs(best - v) ? s : best), steps[0]);
    cursor.setAttribute("x1", X(at)); cursor.setAttribute("x2", X(at)); cursor.setAttribute("visibility", "visible");
    label(at);
  });
  canvas.addEventListener("mouseleave", () => { cursor.setAttribute("visibility", "hidden"); label(null); });
  canvas.append(cursor);
  label(null);
  return el("article", { class: "card" }, el("h3", {}, title), canvas, key);
}

for (const [title, wanted] of CARDS) {
  const card = chart(title, wanted.map((n) => [n, series(n)]));
  if (card) $("curves").append(card);
}
const clock = chart("Where the time goes (shares of a step)", timeShares());
if (clock) $("curves").append(clock);
$("metric").append(el("option", { value: "" }, "choose…"), ...names.map((n) => el("option", { value: n }, n)));
$("metric").addEventListener("change", (event) => {
  const name = event.target.value, card = name && chart(name, [[name, series(name)]]);
  if (card) { $("curves").prepend(card); event.target.value = ""; }
});

// ---- siblings
const FIELDS = {
  W: ["W", "weight W", (t) => t.W],
  d: ["d", "divergence d = KL(student ‖ teacher)", (t) => t.d],
  s: ["s", "saliency s", (t) => t.s],
  hp: ["H student", "entropy of the student", (t) => t.student_entropy],
  hq: ["H teacher", "entropy of the teacher", (t) => t.teacher_entropy],
  delta: ["Δ log p", "log q − log p of the token: below 0 the teacher finds it less likely", (t) => (known(t.teacher_logp) && known(t.student_logp) ? t.teacher_logp - t.student_logp : null)],
};
const COLUMNS = ["W", "d", "s", "span", "student_entropy", "teacher_entropy", "student_logp", "teacher_logp"];
let field = "W";

function token(sibling, i) {
  const t = { piece: sibling.pieces[i], own: Boolean(sibling.generated[i]), turn: sibling.turns[i], kind: data.classes[sibling.classes[i]] };
  for (const name of COLUMNS) t[name] = sibling[name] ? sibling[name][i] : null;
  return t;
}
function scale(group) {
  const values = group.siblings.flatMap((s) => s.pieces.map((_, i) => FIELDS[field][2](token(s, i)))).filter(known);
  if (!values.length) return null;
  const middle = field === "W" ? 1 : 0;
  const high = Math.max(...values, field === "W" ? 2 : field === "s" ? 1 : middle), low = Math.min(...values, middle);
  return { middle, high, low };
}
function colour(value, range) {
  if (!range || !known(value)) return "";
  const up = value >= range.middle;
  const reach = up ? range.high - range.middle : range.middle - range.low;
  const part = reach > 0 ? Math.sqrt(Math.min(Math.abs(value - range.middle) / reach, 1)) : 0;
  const strength = (field === "W" || field === "s" ? part * part : part) * 0.75;  // the others are long-tailed
  return strength < 0.015 ? "" : `rgba(var(--${up ? "high" : "low"}), ${strength.toFixed(3)})`;
}

function drawLegend(range) {
  const box = $("legend");
  box.replaceChildren(el("span", {}, FIELDS[field][1]));
  if (!range) return box.append(el("span", {}, "was not measured in this group"));
  if (range.high - range.low < 1e-8) return box.append(el("span", {}, "is 0 at every token of this group"));
  const ramp = el("span", { class: "ramp" });
  const stops = Array.from({ length: 9 }, (_, i) => colour(range.low + (i / 8) * (range.high - range.low), range) || "transparent");
  ramp.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  box.append(el("span", {}, show(range.low)), ramp, el("span", {}, show(range.high)));
  const mark = el("span", { class: "mark" }, el("span", { class: "t span" }, "underlined"));
  box.append(mark, el("span", {}, "= credit span"), el("span", {}, "· point at a token for its figures"));
}

function drawToken(sibling, i, range, group) {
  const t = token(sibling, i);
  const node = el("span", { class: t.own ? "t" + (known(t.span) && t.span >= 0 ? " span" : "") : "o" });
  const parts = t.piece.split("\n");
  parts.forEach((part, n) => {
    if (n) { if (t.own) node.append(el("span", { class: "nl" }, "↵")); node.append("\n"); }
    node.append(part);
  });
  if (t.own) {
    node.style.background = colour(FIELDS[field][2](t), range);
    node.addEventListener("mouseenter", (event) => tip(t, event.currentTarget, group));
    node.addEventListener("mouseleave", () => { $("tip").hidden = true; });
  }
  return node;
}

function tip(t, anchor, group) {
  const rows = [["W", t.W], ["d", t.d], ["saliency s", t.s], ["span", known(t.span) && t.span >= 0 ? t.span : "none"],
    ["H student", t.student_entropy], ["H teacher", t.teacher_entropy], ["log p student", t.student_logp], ["log q teacher", t.teacher_logp],
    ["turn", t.turn + 1], ["kind", t.kind]];
  const list = el("dl");
  for (const [name, value] of rows) list.append(el("dt", {}, name), el("dd", {}, typeof value === "string" ? value : show(value)));
  const box = $("tip");
  box.replaceChildren(el("b", {}, t.piece.replaceAll("\n", "↵") || "(empty)"), list);
  if (!group.reference) box.append(el("div", {}, "no reference, so no teacher"));
  box.hidden = false;
  const spot = anchor.getBoundingClientRect();
  const x = Math.min(spot.left, innerWidth - box.offsetWidth - 12), below = spot.bottom + 8;
  box.style.left = Math.max(x, 8) + "px";
  box.style.top = (below + box.offsetHeight > innerHeight ? spot.top - box.offsetHeight - 8 : below) + "px";
}

function drawSibling(sibling, number, range, group) {
  const good = sibling.reward > 0, own = sibling.generated.filter(Boolean).length;
  const weights = (sibling.W || []).filter(known);
  const mean = weights.length ? weights.reduce((a, b) => a + b, 0) / weights.length : null;
  const card = el("article", { class: `card sibling ${good ? "good" : "bad"}` },
    el("h3", {}, el("span", {}, `${good ? "✓ succeeded" : "✗ failed"}`), el("span", {}, `sibling ${number}`)),
    el("div", { class: "facts" }, `${group.task.class.replace("_", " ")} · stop: ${sibling.stop || "–"} · ${own} tokens generated, ${sibling.pieces.length - own} observed`
      + (known(mean) ? ` · W mean ${show(mean)}, max ${show(Math.max(...weights))}` : "")));
  let turn = null, run = null, at = null, mode = null;
  sibling.pieces.forEach((_, i) => {
    const isOwn = Boolean(sibling.generated[i]);
    if (sibling.turns[i] !== at && (isOwn || turn === null)) {
      at = sibling.turns[i]; mode = null;
      turn = el("div", { class: "turn" }, el("b", {}, `turn ${at + 1}`));
      card.append(turn);
    }
    if (mode !== isOwn) { mode = isOwn; run = el("div", { class: isOwn ? "generated" : "observed" }); turn.append(run); }
    run.append(drawToken(sibling, i, range, group));
  });
  if (turn === null) card.append(el("div", { class: "turn empty" }, "no tokens"));
  return card;
}

function drawReference(group) {
  const info = group.info || {};
  const facts = [["writer", info.writer], ["cached", info.cached ? "yes" : ""], ["tokens", info.tokens], ["seconds", info.seconds],
    ["error", info.error], ["masked before sending", Object.entries(info.sanitiser_hits || {}).map(([k, n]) => `${k} ${n}`).join(", ")]]
    .filter(([, v]) => v !== undefined && v !== "" && v !== 0).map(([k, v]) => `${k}: ${typeof v === "number" ? show(v) : v}`);
  const card = el("div", { class: "card" + (group.reference ? "" : " none") },
    el("h3", {}, group.reference ? "The reference that caused it (only the teacher reads it)" : "No reference: this group trained with W = 1"));
  if (group.reference) card.append(el("pre", {}, group.reference));
  card.append(el("small", {}, facts.join(" · ")));
  $("reference").replaceChildren(card);
}

function drawGroup() {
  const step = data.steps[$("step").value], group = step && step.groups[$("group").value];
  if (!group) return;
  const range = scale(group), task = group.task;
  const prompt = el("details", {}, el("summary", {}, "the prompt that the student read"), el("pre", {}, group.prompt));
  $("task").replaceChildren(el("small", {}, `${task.env} · ${task.id} · scenario ${task.scenario} · ${task.class.replace("_", " ")}`),
    el("q", {}, task.instruction), prompt);
  drawReference(group);
  drawLegend(range);
  $("columns").replaceChildren(...group.siblings.map((s, i) => drawSibling(s, i + 1, range, group)));
  if (group.left_out) $("columns").append(el("p", { class: "empty" }, `${group.left_out} more siblings are not on this page`));
  for (const button of $("fields").querySelectorAll("button")) button.setAttribute("aria-pressed", String(button.value === field));
}
function drawStep() {
  const step = data.steps[$("step").value];
  $("group").replaceChildren(...step.groups.map((g, i) => {
    const good = g.siblings.filter((s) => s.reward > 0).length;
    return el("option", { value: i }, `${g.task.id}: ${good} of ${g.siblings.length} succeeded${g.reference ? "" : ", no reference"}`);
  }));
  drawGroup();
}

if (data.steps.some((s) => s.groups.length)) {
  $("step").append(...data.steps.map((s, i) => el("option", { value: i }, s.step)));
  $("step").value = data.steps.length - 1;
  for (const [key, [name, title]] of Object.entries(FIELDS)) {
    const button = el("button", { type: "button", value: key, title }, name);
    button.addEventListener("click", () => { field = key; drawGroup(); });
    $("fields").append(button);
  }
  $("step").addEventListener("change", drawStep);
  $("group").addEventListener("change", drawGroup);
  $("observed").addEventListener("change", (event) => $("columns").classList.toggle("hide-observed", !event.target.checked));
  drawStep();
} else {
  $("siblings").replaceChildren(el("h2", {}, "Siblings"), el("p", { class: "empty" }, "No siblings were traced in this run (trace_steps in its config)."));
}
