"use strict";
// Everything is built with createElement and textContent: no text of a run is ever read as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

// Characters that are invisible or reorder the text around them, shown as what they are: controls, zero-width and
// bidirectional marks, tag characters, lone surrogates.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\u2028\u2029\u115f\u1160\u3164\uffa0]/gu;
const visible = (text) => String(text).replace(HIDDEN, (c) =>
  c === "\n" || c === "\t" ? c : `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, visible(value));
  for (const child of children) node.append(child instanceof Node ? child : visible(child));
  return node;
}
function svg(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

const known = (v) => typeof v === "number" && Number.isFinite(v);
// Not Math.max(...values): a call cannot take the arguments of a long rollout.
const largest = (values, least) => values.reduce((a, b) => Math.max(a, b), least);
const smallest = (values, most) => values.reduce((a, b) => Math.min(a, b), most);
function show(v) {
  if (!known(v)) return "–";
  if (Number.isInteger(v)) return String(v);
  const size = Math.abs(v);
  return size >= 1000 ? v.toFixed(0) : size >= 0.001 ? String(+v.toPrecision(3)) : v.toExponential(1);
}
