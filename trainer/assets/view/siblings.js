// The siblings of a group, side by side. Tokens have no listeners of their own: a group can hold 100,000 of them.
const FIELDS = {
  W: ["W", "weight W", (s, i) => at(s, "W", i)],
  d: ["d", "divergence d = KL(student ‖ teacher)", (s, i) => at(s, "d", i)],
  s: ["s", "saliency s", (s, i) => at(s, "s", i)],
  hp: ["H student", "entropy of the student", (s, i) => at(s, "student_entropy", i)],
  hq: ["H teacher", "entropy of the teacher", (s, i) => at(s, "teacher_entropy", i)],
  delta: ["Δ log p", "log q − log p of the token: below 0 the teacher finds it less likely", (s, i) => {
    const [p, q] = [at(s, "student_logp", i), at(s, "teacher_logp", i)];
    return known(p) && known(q) ? q - p : null;
  }],
};
const at = (sibling, name, i) => (sibling[name] ? sibling[name][i] : null);
let field = "W", current = null;

function scale(group) {
  let low = field === "W" ? 1 : 0, high = field === "W" ? 2 : field === "s" ? 1 : 0, measured = false;
  const middle = low, value = FIELDS[field][2];
  for (const sibling of group.siblings) {
    for (let i = 0; i < sibling.pieces.length; i++) {
      const v = value(sibling, i);
      if (known(v)) { measured = true; low = Math.min(low, v); high = Math.max(high, v); }
    }
  }
  return measured ? { middle, low, high } : null;
}
function colour(value, scale) {
  if (!scale || !known(value)) return "";
  const up = value >= scale.middle;
  const reach = up ? scale.high - scale.middle : scale.middle - scale.low;
  const part = reach > 0 ? Math.sqrt(Math.min(Math.abs(value - scale.middle) / reach, 1)) : 0;
  const strength = field === "W" || field === "s" ? part * part : part;  // the others are long-tailed
  return strength < 0.02 ? "" : `rgba(var(--${up ? "high" : "low"}), calc(${strength.toFixed(3)} * var(--strongest)))`;
}

function drawLegend(scale) {
  const box = $("legend");
  box.replaceChildren(el("span", {}, FIELDS[field][1]));
  if (!scale) return box.append(el("span", {}, "was not measured in this group"));
  if (scale.high - scale.low < 1e-8) return box.append(el("span", {}, "is 0 at every token of this group"));
  const ramp = el("span", { class: "ramp" });
  const stops = Array.from({ length: 9 }, (_, i) => colour(scale.low + (i / 8) * (scale.high - scale.low), scale) || "transparent");
  ramp.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  box.append(el("span", {}, show(scale.low)), ramp, el("span", {}, show(scale.high)));
  const mark = el("span", { class: "mark" }, el("span", { class: "t span" }, "underlined"));
  box.append(mark, el("span", {}, "= credit span · point at a token, tap it, or move with the arrow keys for its figures"));
}

function drawToken(sibling, i, scale) {
  const own = Boolean(sibling.generated[i]), span = at(sibling, "span", i);
  const node = el("span", { class: own ? (known(span) && span >= 0 ? "t span" : "t") : "o" });
  visible(sibling.pieces[i]).split("\n").forEach((part, n) => {
    if (n) { if (own) node.append(el("span", { class: "nl" }, "↵")); node.append("\n"); }
    node.append(part);
  });
  if (own) {
    node.dataset.i = i;
    node.style.background = colour(FIELDS[field][2](sibling, i), scale);
  }
  return node;
}

function outcome({ reward, success }) {
  const said = (success ? "✓ succeeded" : "✗ failed") + (reward === Number(success) ? "" : `, reward ${show(reward)}`);
  return [success ? (reward < 1 ? "part" : "good") : reward > 0 ? "part" : "bad", said];
}

function drawSibling(sibling, number, scale, group) {
  const own = sibling.generated.filter(Boolean).length, weights = (sibling.W || []).filter(known);
  const [kind, said] = outcome(sibling);
  const parts = Object.entries(sibling.components).map(([name, value]) => ` · ${name} ${show(value)}`).join("");
  const mean = weights.reduce((a, b) => a + b, 0) / weights.length;
  const weight = weights.length ? ` · W mean ${show(mean)}, max ${show(largest(weights, -Infinity))}` : "";
  const card = el("article", { class: `card sibling ${kind}` },
    el("h3", {}, el("span", {}, said), el("span", {}, `sibling ${number}`)),
    el("div", { class: "facts" }, `${group.task.class.replaceAll("_", " ")} · stop: ${sibling.stop || "–"}`
      + ` · ${own} tokens generated, ${sibling.pieces.length - own} observed${weight}${parts}`));
  if (sibling.reason) card.append(el("div", { class: "facts" }, `why: ${sibling.reason}`));
  card.sibling = sibling;
  let turn = null, run = null, now = null, mode = null;
  for (let i = 0; i < sibling.pieces.length; i++) {
    const isOwn = Boolean(sibling.generated[i]);
    if (sibling.turns[i] !== now && (isOwn || turn === null)) {
      now = sibling.turns[i]; mode = null;
      turn = el("div", { class: "turn" }, el("b", {}, `turn ${now + 1}`));
      card.append(turn);
    }
    if (mode !== isOwn) { mode = isOwn; run = el("div", { class: isOwn ? "generated" : "observed", dir: "ltr" }); turn.append(run); }
    run.append(drawToken(sibling, i, scale));
  }
  if (turn === null) card.append(el("div", { class: "turn empty" }, "no tokens"));
  if (sibling.cut) card.append(el("div", { class: "turn empty" }, `${sibling.cut} more tokens are not on this page`));
  const first = card.querySelector(".t");
  if (first) first.tabIndex = 0;
  return card;
}

// ---- the figures of one token: by pointer, by tap, and by keyboard (one token of a sibling is in the tab order)
function tip(node) {
  const sibling = node.closest(".sibling").sibling, i = Number(node.dataset.i), span = at(sibling, "span", i);
  const figures = [["W", "W"], ["d", "d"], ["saliency s", "s"], ["H student", "student_entropy"], ["H teacher", "teacher_entropy"],
    ["log p student", "student_logp"], ["log q teacher", "teacher_logp"]];
  const rows = [...figures.map(([said, name]) => [said, show(at(sibling, name, i))]), ["span", known(span) && span >= 0 ? span : "none"],
    ["turn", sibling.turns[i] + 1], ["kind", data.classes[sibling.classes[i]] || "–"]];
  const list = el("dl");
  for (const [name, value] of rows) list.append(el("dt", {}, name), el("dd", {}, value));
  const box = $("tip");
  box.replaceChildren(el("b", {}, sibling.pieces[i].replaceAll("\n", "↵") || "(empty)"), list);
  if (!current.reference) box.append(el("div", {}, "no reference, so no teacher"));
  box.hidden = false;
  node.setAttribute("aria-describedby", "tip");
  const spot = node.getBoundingClientRect();
  const x = Math.min(spot.left, innerWidth - box.offsetWidth - 12), below = spot.bottom + 8;
  box.style.left = Math.max(x, 8) + "px";
  box.style.top = Math.max(below + box.offsetHeight > innerHeight ? spot.top - box.offsetHeight - 8 : below, 8) + "px";
}
const hideTip = () => { $("tip").hidden = true; };
const tokenOf = (event) => event.target.closest && event.target.closest(".t[data-i]");

function moveTo(node) {
  for (const other of node.closest(".sibling").querySelectorAll('.t[tabindex="0"]')) other.tabIndex = -1;
  node.tabIndex = 0;
  node.focus();
}
function moveByKey(event) {
  const node = tokenOf(event);
  if (event.key === "Escape") return hideTip();
  if (!node) return;
  const all = [...node.closest(".sibling").querySelectorAll(".t[data-i]")], here = all.indexOf(node);
  const turns = node.closest(".sibling").sibling.turns, turn = (n) => turns[n.dataset.i];
  const found = {
    ArrowRight: () => all[here + 1],
    ArrowLeft: () => all[here - 1],
    ArrowDown: () => all.find((n) => turn(n) > turn(node)),
    ArrowUp: () => all.find((n) => turn(n) === turn(node) - 1) || all[0],
    Home: () => all[0],
    End: () => all[all.length - 1],
  }[event.key];
  if (!found) return;
  event.preventDefault();
  const next = found();
  if (next) moveTo(next);
}
function listen() {
  const columns = $("columns");
  columns.addEventListener("pointerover", (event) => { const node = tokenOf(event); if (node) tip(node); else hideTip(); });
  columns.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hideTip(); });
  columns.addEventListener("click", (event) => { const node = tokenOf(event); if (node) { moveTo(node); tip(node); } else hideTip(); });
  columns.addEventListener("focusin", (event) => { const node = tokenOf(event); if (node) tip(node); });
  columns.addEventListener("focusout", hideTip);
  columns.addEventListener("keydown", moveByKey);
}

function drawReference(group) {
  const info = group.info || {};
  const facts = [["writer", info.writer], ["cached", info.cached ? "yes" : ""], ["tokens", info.tokens], ["seconds", info.seconds],
    ["error", info.error], ["masked before sending", Object.entries(info.sanitiser_hits || {}).map(([k, n]) => `${k} ${n}`).join(", ")]]
    .filter(([, v]) => v !== undefined && v !== null && v !== "" && v !== 0).map(([k, v]) => `${k}: ${typeof v === "number" ? show(v) : v}`);
  const card = el("div", { class: "card" + (group.reference ? "" : " none") },
    el("h3", {}, group.reference ? "The reference that caused it (only the teacher reads it)" : "No reference: this group trained with W = 1"));
  if (group.reference) card.append(el("pre", {}, group.reference));
  card.append(el("small", {}, facts.join(" · ")));
  $("reference").replaceChildren(card);
}

function drawGroup() {
  const step = data.steps[$("step").value], group = step.groups[$("group").value];
  hideTip();
  current = group;
  for (const part of ["task", "reference", "legend", "columns"]) $(part).replaceChildren();
  if (!group) return $("columns").append(el("p", { class: "empty" }, `No group was traced in step ${step.step}.`));
  const scaled = scale(group), task = group.task;
  const prompt = el("details", {}, el("summary", {}, "the prompt that the student read"), el("pre", {}, group.prompt));
  $("task").append(el("small", {}, `${task.env} · ${task.id} · scenario ${task.scenario} · ${task.class.replaceAll("_", " ")}`),
    el("q", {}, task.instruction), prompt);
  drawReference(group);
  drawLegend(scaled);
  group.siblings.forEach((s, i) => $("columns").append(drawSibling(s, i + 1, scaled, group)));
  if (group.left_out) $("columns").append(el("p", { class: "empty" }, `${group.left_out} more siblings are not on this page`));
  for (const button of $("fields").querySelectorAll("button")) button.setAttribute("aria-pressed", String(button.value === field));
}
function drawStep() {
  const step = data.steps[$("step").value];
  $("group").replaceChildren(...step.groups.map((g, i) => {
    const good = g.siblings.filter((s) => s.success).length;
    return el("option", { value: i }, `${g.task.id}: ${good} of ${g.siblings.length} succeeded${g.reference ? "" : ", no reference"}`);
  }));
  drawGroup();
}

function startSiblings() {
  if (!data.steps.length) {
    return $("siblings").replaceChildren(el("h2", {}, "Siblings"), el("p", { class: "empty" }, "No siblings were traced in this run (trace_steps in its config)."));
  }
  data.steps.forEach((s, i) => $("step").append(el("option", { value: i }, s.step)));
  $("step").value = data.steps.length - 1;
  for (const [key, [name, title]] of Object.entries(FIELDS)) {
    const button = el("button", { type: "button", value: key, title }, name);
    button.addEventListener("click", () => { field = key; drawGroup(); });
    $("fields").append(button);
  }
  $("step").addEventListener("change", drawStep);
  $("group").addEventListener("change", drawGroup);
  $("observed").addEventListener("change", (event) => $("columns").classList.toggle("hide-observed", !event.target.checked));
  listen();
  drawStep();
}
