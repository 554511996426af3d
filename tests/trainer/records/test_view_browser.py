"""The page in a real browser: it draws long rollouts, works by keyboard and touch, and can be read by everyone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.records.test_view_page import make_run
from trainer.records import rollout_files, view_page

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium here")

HELPERS = """
const report = (value) => {
  const out = document.createElement("pre");
  out.id = "report";
  out.textContent = JSON.stringify(value);
  document.body.append(out);
};
const press = (key) =>
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
addEventListener("error", (event) => report({ error: event.message }));
"""


def ask(
    run: Path, question: str, monkeypatch: pytest.MonkeyPatch, width: int = 1200, scheme: str = "light"
) -> dict[str, Any]:
    """What the page of `run` answers to a script that runs after its own and calls `report`."""
    assets = run / "assets"
    if not assets.exists():
        shutil.copytree(view_page.ASSETS, assets)
    (assets / "helpers.js").write_text(HELPERS, encoding="utf-8")
    (assets / "question.js").write_text(f"{{{question}}}", encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(view_page, "ASSETS", assets)
        patch.setattr(view_page, "SCRIPTS", ("helpers", *view_page.SCRIPTS, "question"))
        page = view_page.write(run)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={run / 'profile'}"]
    command += [f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", f"--window-size={width},900"]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=300)
    found = re.search(r'<pre id="report">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return answer


def long_group(folder: Path, siblings: int, length: int) -> None:
    """A trace of rollouts at the length that the paper allows."""
    own = [i % 50 > 4 for i in range(length)]
    figures = {name: [round((i * 37 % 101) / 100, 3) for i in range(length)] for name in rollout_files.SCORES}
    one = {"stop": "answer", "prompt": "p", "ids": list(range(length)), "pieces": ["word "] * length, "generated": own}
    one |= {"turns": [i // 500 for i in range(length)], "classes": [1] * length, **figures}
    kinds = {"id": "t", "env": "e", "scenario": "s", "class": "c", "instruction": "i"}
    group = {"task": kinds, "reference": "r", "reference_info": {}}
    group["siblings"] = [one | {"reward": float(i % 2)} for i in range(siblings)]
    (folder / "rollouts").mkdir(parents=True)
    (folder / "rollouts" / "step_1.jsonl").write_text(json.dumps(group) + "\n")
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')


def test_siblings_of_the_longest_rollouts_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long_group(tmp_path, siblings=8, length=16_384)
    question = """
    const tokens = document.querySelectorAll("#columns .t, #columns .o").length;
    for (const big of ["columns", "data"]) $(big).remove();  // dumping them takes longer than drawing them
    report({ tokens });
    """
    found = ask(tmp_path, question, monkeypatch)
    assert found == {"tokens": 8 * 16_384}


KEYS = """
const token = document.querySelector(".sibling .t");
token.focus();
const seen = [];
const figure = () => ($("tip").hidden ? "" : $("tip").querySelector("dd").textContent);
const look = () => seen.push([document.activeElement.textContent, figure()]);
look();
for (const key of ["ArrowRight", "ArrowLeft", "End", "Home", "ArrowDown", "ArrowUp"]) { press(key); look(); }
const described = document.activeElement.getAttribute("aria-describedby");
press("Escape");
const hidden = $("tip").hidden;
document.querySelectorAll(".sibling")[1].querySelector(".t").click();
const tapped = !$("tip").hidden;
document.querySelector(".sibling h3").click();
const inOrder = [...document.querySelectorAll(".sibling")].map((s) => s.querySelectorAll('[tabindex="0"]').length);
const chart = document.querySelector("#curves svg[tabindex]");
chart.focus();
press("Home");
const step = chart.parentNode.querySelector(".key").textContent;
report({ seen, described, hidden, tapped, gone: $("tip").hidden, inOrder, step });
"""


def test_figures_by_keyboard_and_by_touch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    found = ask(run, KEYS, monkeypatch)
    words = [text.strip() for text, _ in found["seen"]]
    assert [words[0], *words[2:5:2]] == ["w1", "w1", "w1"]  # the first; right and left again; Home
    assert words[3] == "w8" and words[5] == "w4" and words[6] == "w1"  # End, the next turn, the turn before
    assert all(figure for _, figure in found["seen"])
    assert found["seen"][0][1] == "1.11"
    assert found["described"] == "tip"
    assert found["hidden"] and found["tapped"] and found["gone"]
    assert found["inOrder"] == [1, 1]
    assert found["step"].startswith("step 1")


CONTRAST = """
const parse = (c) => { const v = c.match(/[\\d.]+/g).map(Number); return [v[0], v[1], v[2], v.length > 3 ? v[3] : 1]; };
const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] + below[i] * (1 - top[3]));
const ground = (node) => {
  const layers = [];
  for (let n = node; n; n = n.parentElement) layers.push(parse(getComputedStyle(n).backgroundColor));
  return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
};
const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => {
  const v = c[i] / 255; return sum + w * (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); }, 0);
const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
$("tip").hidden = true;
document.querySelector(".sibling .t").focus();
const worst = { text: [99, ""], curve: [99, ""] };
const note = (kind, value, node) => {
  if (value < worst[kind][0]) worst[kind] = [value, node.outerHTML.slice(0, 120)];
};
for (const button of $("fields").querySelectorAll("button")) {
  button.click();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const node = text.parentElement;
    if (!text.data.trim() || ["SCRIPT", "STYLE", "OPTION"].includes(node.tagName) || node.closest("#report")) continue;
    const below = ground(node), look = getComputedStyle(node);
    const ink = over(parse(node instanceof SVGElement ? look.fill : look.color), below);
    note("text", ratio(ink, below), node);
  }
}
const card = chart("x", Array.from({ length: 6 }, (_, n) => ["n" + n, [[1, n], [2, n]]]));
$("curves").append(card);
for (const line of card.querySelectorAll("polyline")) {
  note("curve", ratio(parse(getComputedStyle(line).stroke), ground(line)), line);
}
report({ text: worst.text, curve: worst.curve, dark: matchMedia("(prefers-color-scheme: dark)").matches });
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_wcag_aa(tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ask(make_run(tmp_path), CONTRAST, monkeypatch, scheme=scheme)
    assert found["dark"] == (scheme == "dark")
    assert found["text"][0] >= 4.5, found["text"]
    assert found["curve"][0] >= 3, found["curve"]


LOOKS = """
const card = chart("many", Array.from({ length: 20 }, (_, n) => ["m/" + n, [[1, n], [2, n + 1]]]));
const lines = [...card.querySelectorAll("polyline")], dash = (line) => line.getAttribute("stroke-dasharray");
const looks = new Set(lines.map((line) => line.getAttribute("class") + dash(line)));
report({ looks: looks.size, without_colour: new Set(lines.slice(0, 6).map(dash)).size });
"""


def test_curves_are_told_apart_without_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(make_run(tmp_path), LOOKS, monkeypatch) == {"looks": 20, "without_colour": 6}


def test_the_page_fits_a_phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question = """
    document.querySelector(".sibling .t").focus();
    const tip = $("tip").getBoundingClientRect(), page = document.documentElement.scrollWidth;
    report({ width: innerWidth, page, tip: [tip.left >= 0, tip.right <= innerWidth] });
    """
    found = ask(make_run(tmp_path), question, monkeypatch, width=390)
    assert found["width"] <= 500  # no window of this browser is narrower
    assert found["page"] <= found["width"]
    assert found["tip"] == [True, True]


BIDI = "\u202edrow\u202c \u2066x\u2069 \u200f\u061c\x1b[31m\u200b\U000e0041"


def test_hidden_and_bidirectional_characters_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pieces(ids: Sequence[int]) -> list[str]:
        return [BIDI] * len(ids)

    run = make_run(tmp_path, pieces_of=pieces)
    question = """
    document.querySelector(".sibling .t").focus();
    const text = document.body.innerText;
    const left = [...text].filter((c) => /[\\p{Cc}\\p{Cf}\\p{Cs}]/u.test(c) && !"\\n\\t\\r".includes(c)).length;
    const found = ["⟨U+202E⟩drow⟨U+202C⟩", "⟨U+001B⟩[31m", "⟨U+E0041⟩"].map((shown) => text.includes(shown));
    report({ left, found });
    """
    assert ask(run, question, monkeypatch) == {"left": 0, "found": [True, True, True]}


def test_graded_rewards_and_empty_steps_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, rewards=(0.5, -1.0, 1.0, 0.0))
    (run / "rollouts" / "step_6.jsonl").write_text("")
    question = """
    const last = $("columns").textContent;
    $("step").value = 1; $("step").dispatchEvent(new Event("change"));
    report({ last, said: [...document.querySelectorAll(".sibling h3 span:first-child")].map((n) => n.textContent),
      kinds: [...document.querySelectorAll(".sibling")].map((n) => n.className.split(" ").pop()),
      facts: $("columns").textContent });
    """
    found = ask(run, question, monkeypatch)
    assert found["last"] == "No group was traced in step 6."
    assert found["said"] == ["✗ failed, reward 0.5", "✗ failed, reward -1", "✓ succeeded", "✗ failed"]
    assert found["kinds"] == ["part", "bad", "good", "bad"]
    assert found["facts"].count("brevity 0.25") == 4
    assert found["facts"].count("why: wrong_argument") == 3
