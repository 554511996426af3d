"""The documentation's links lead somewhere: every relative link, its anchor, and every file that is named."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")
FOLDERS = "bench configs csrc docs examples scripts sgcd_kernels tests trainer .github .ci".split()
NAMED = re.compile(
    rf"(?<![\w./-])((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*{{}},<>-]*\.(?:py|md|yaml|yml|sh|cpp|h|csv|png))"
)


def prose(page: Path) -> str:
    """The page without its code blocks, where brackets are Python's."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as Markdown renderers make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def expanded(pattern: str) -> list[str]:
    """`a/{b,c}_*.yaml` as the two patterns it stands for."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    options = found[1].split(",")
    return [one for option in options for one in expanded(pattern[: found.start()] + option + pattern[found.end() :])]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    for target, anchor in LINK.findall(prose(page)):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name} links to {target}#{anchor}, which has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    for name in NAMED.findall(page.read_text(encoding="utf-8")):
        if "<" in name:
            continue
        for pattern in expanded(name):
            assert list(ROOT.glob(pattern)), f"{page.name} names {pattern}, which does not exist"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lists_follow_an_empty_line(page: Path) -> None:
    """Else the site, whose Markdown is stricter than that of code hosts, shows them as running text."""
    found = re.search(r"^(?!- |\d+\. |[ #|]).+\n(- |1\. ).*", prose(page), re.M)
    assert found is None, f"{page.name}: no empty line before the list in {found[0]!r}"


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / ".github").rglob("*.*"))], ids=lambda page: page.name)
def test_make_targets_that_are_named_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = re.findall(r"(?:`|^    |run: )make ([a-z][a-z0-9-]*)", page.read_text(encoding="utf-8"), re.M)
    assert set(named) <= targets, f"{page.name} names make {sorted(set(named) - targets)}, which the Makefile lacks"


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if f": {page.name}\n" not in text]
    assert not missing, f"mkdocs.yml has no entry in nav for {missing}"


def test_pictures_are_in_git() -> None:
    """A picture that only this checkout has would be missing everywhere else."""
    shown = {
        (page.parent / target).resolve().relative_to(ROOT).as_posix()
        for page in PAGES
        for target, _ in LINK.findall(prose(page))
        if target.endswith((".png", ".svg"))
    }
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files", *sorted(shown)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(listed.stdout.split()) == shown


def test_formatters_have_one_version() -> None:
    """pre-commit runs the ruff that `make lint` runs."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.search(r"^ruff==(\S+)$", pins, re.M)[1] == re.search(r"ruff-pre-commit\n +rev: v(\S+)", hooks)[1]


def test_the_citation_has_the_version_of_the_package() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
