// Curves differ by colour, by dash and by the shape of their points, so that no one of the three is needed.
const DASHES = ["", "7 3", "2 2.5", "9 3 2 3", "4 2", "1.5 4"];
const SHAPES = ["M-2.5,0a2.5,2.5 0 1,0 5,0a2.5,2.5 0 1,0 -5,0", "M-2.3,-2.3h4.6v4.6h-4.6z", "M0,-3l3,5.4h-6z", "M0,-3.3l3.3,3.3l-3.3,3.3l-3.3,-3.3z",
  "M-3,-0.8h2.2v-2.2h1.6v2.2h2.2v1.6h-2.2v2.2h-1.6v-2.2h-2.2z", "M0,3l3,-5.4h-6z"];
const style = (i) => ({ kind: "s" + (i % 6), dash: DASHES[(i + Math.floor(i / 6)) % 6], shape: SHAPES[(i + Math.floor(i / 6)) % 6] });

const names = Object.keys(data.curves);
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

function ticks(low, high) {
  const raw = (high - low) / 4, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * unit).find((s) => s >= raw * 0.999);
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-6; v += step) found.push(+v.toPrecision(10));
  return found;
}

function sample(i) {
  const { kind, dash, shape } = style(i);
  const icon = svg("svg", { viewBox: "-11 -4 22 8", width: 22, height: 8, "aria-hidden": "true" });
  icon.append(svg("path", { class: kind + " line", d: "M-11,0h22", "stroke-dasharray": dash }), svg("path", { class: kind, d: shape }));
  return icon;
}

function range(values) {
  let low = smallest(values, Infinity), high = largest(values, -Infinity);
  if (low >= 0 && low < 0.6 * high) low = 0;
  if (high - low < 1e-9 + Math.abs(high) * 1e-6) {
    const pad = Math.abs(high) * 0.1 || 1;
    return [low === 0 ? 0 : low - pad, high + pad];
  }
  return [low, high];
}

function chart(title, lines) {
  lines = lines.filter(([, points]) => points.length);
  if (!lines.length) return null;
  const W = 320, H = 150, left = 38, right = 8, top = 8, bottom = 20;
  const steps = [...new Set(lines.flatMap(([, points]) => points.map(([step]) => step)))].sort((a, b) => a - b);
  const [y0, y1] = range(lines.flatMap(([, points]) => points.map(([, value]) => value)));
  const pad = steps.length === 1 ? 0.5 : 0, x0 = steps[0] - pad, x1 = steps[steps.length - 1] + pad;
  const X = (v) => left + ((v - x0) / (x1 - x0)) * (W - left - right), Y = (v) => H - bottom - ((v - y0) / (y1 - y0)) * (H - top - bottom);
  const canvas = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", tabindex: 0, "aria-label": visible(title) + "; arrow keys move the step" });
  for (const v of ticks(y0, y1)) {
    canvas.append(svg("line", { class: "grid", x1: left, x2: W - right, y1: Y(v), y2: Y(v) }));
    canvas.append(svg("text", { x: left - 5, y: Y(v) + 3, "text-anchor": "end" }, show(v)));
  }
  for (const v of ticks(x0, x1).filter(Number.isInteger)) canvas.append(svg("text", { x: X(v), y: H - 5, "text-anchor": "middle" }, v));
  lines.forEach(([, points], i) => {
    const { kind, dash, shape } = style(i);
    const corners = points.map(([x, y]) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`).join(" ");
    canvas.append(svg("polyline", { class: kind + " line", points: corners, "stroke-dasharray": dash }));
    const every = Math.ceil(points.length / 30);
    points.forEach(([x, y], n) => {
      const place = `translate(${X(x).toFixed(1)},${Y(y).toFixed(1)})`;
      if ((points.length - 1 - n) % every === 0) canvas.append(svg("path", { class: kind, d: shape, transform: place }));
    });
  });
  const cursor = svg("line", { class: "cursor", y1: top, y2: H - bottom, visibility: "hidden" });
  canvas.append(cursor);
  const key = el("div", { class: "key", "aria-live": "polite" });
  let at = null;
  const label = (step) => {
    at = step;
    cursor.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step !== null) { cursor.setAttribute("x1", X(step)); cursor.setAttribute("x2", X(step)); }
    key.replaceChildren(el("span", {}, step === null ? "last" : "step " + step));
    lines.forEach(([name, points], i) => {
      const near = step === null ? points[points.length - 1] : points.find((p) => p[0] === step);
      key.append(el("span", {}, sample(i), ` ${name.replace(/^.*\//, "").replaceAll("_", " ")} ${near ? show(near[1]) : "–"}`));
    });
  };
  const nearest = (v) => steps.reduce((best, s) => (Math.abs(s - v) < Math.abs(best - v) ? s : best), steps[0]);
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    label(nearest(x0 + ((((event.clientX - box.left) / box.width) * W - left) / (W - left - right)) * (x1 - x0)));
  });
  canvas.addEventListener("pointerleave", () => label(null));
  canvas.addEventListener("blur", () => label(null));
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") return label(null);
    if (move === undefined) return;
    event.preventDefault();
    const from = at === null ? (move < 0 ? steps.length : -1) : steps.indexOf(at);
    label(steps[Math.min(Math.max(from + move, 0), steps.length - 1)]);
  });
  label(null);
  return el("article", { class: "card" }, el("h3", {}, title), canvas, key);
}

function drawCurves() {
  for (const [title, wanted] of CARDS) {
    const card = chart(title, wanted.map((n) => [n, data.curves[n] || []]));
    if (card) $("curves").append(card);
  }
  const clock = chart("Where the time goes (shares of a step)", Object.entries(data.time_shares));
  if (clock) $("curves").append(clock);
  $("metric").append(el("option", { value: "" }, "choose…"), ...names.map((n, i) => el("option", { value: i }, n)));
  $("metric").addEventListener("change", (event) => {
    const name = names[event.target.value], card = name !== undefined && chart(name, [[name, data.curves[name]]]);
    if (card) { $("curves").prepend(card); event.target.value = ""; }
  });
}
