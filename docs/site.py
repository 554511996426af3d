"""Hooks of mkdocs (mkdocs.yml): the pages read the same on the repository's own pages and on the site.

Pages of docs/ link to files outside it, `../examples/trl_sgcd.py` say. Pictures among those are copied into the site,
the others become links to the repository. A file that is not there is a warning, and so an error under --strict.
CHANGELOG.md, CONTRIBUTING.md and SECURITY.md lie at the top, where hosts look for them, and are pages too.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")
PICTURES = (".png", ".svg")
log = logging.getLogger("mkdocs.hooks.site")


def on_config(config: Any) -> Any:
    """Take the addresses from pyproject.toml, the one place that has them."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    config.repo_url, config.site_url = urls["Repository"], urls["Documentation"]
    config.repo_name = config.site_name
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the top folder, and the pictures that pages show from outside docs/."""
    for page, name in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        text = re.sub(r"\]\(([A-Z]+\.md)", lambda found: f"](../{found[1]}", text)
        text = text.replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    pages = [file.content_string for file in files.documentation_pages()]
    for path in sorted({found[1] for text in pages for found in OUTSIDE.finditer(text)}):
        if path.endswith(PICTURES) and (ROOT / path).is_file():
            files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links to files outside docs/ into links that work on the site."""

    def link(found: re.Match[str]) -> str:
        path, anchor = found[1], found[2] or ""
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which does not exist", page.file.src_uri, path)
        for name, source in PAGES.items():
            if path == source:
                return f"]({name}{anchor})"
        if path.endswith(PICTURES):
            return f"]({place(path)})"
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{path}{anchor})"

    return OUTSIDE.sub(link, markdown)


def place(path: str) -> str:
    """Where a picture from outside docs/ lies in the site."""
    return f"figures/{Path(path).name}"
