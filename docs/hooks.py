"""MkDocs hook: files of the checkout outside docs/ that a page links to become files of the site.

A link such as `../../benchmarks/results/digits.json` works where the Markdown is read in the checkout; the
site gets a copy of the file below `checkout/`, and the link is pointed there.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()[^)#\s]+")
TARGETS = "checkout"


def outside(page: str, link: str) -> str | None:
    """Path in the checkout of a linked file that lies outside docs/; None for all other links."""
    if re.match(r"[a-z]+:", link):
        return None
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return path if not path.startswith("docs/") and (ROOT / path).is_file() else None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link to outside docs/."""
    for page in list(files.documentation_pages()):
        for link in LINK.findall(page.content_string):
            path = outside(page.src_uri, link)
            uri = f"{TARGETS}/{path}.txt" if path and path.endswith(".md") else f"{TARGETS}/{path}"
            if path and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=os.fspath(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links at the copies."""

    def pointed(match: re.Match[str]) -> str:
        path = outside(page.file.src_uri, match[0])
        if path is None:
            return match[0]
        uri = f"{TARGETS}/{path}.txt" if path.endswith(".md") else f"{TARGETS}/{path}"
        return posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(pointed, markdown)
