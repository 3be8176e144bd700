"""Hooks of the site (mkdocs.yml): pages that lie outside of docs/, and links that lead out of it.

In the repository every link of a page is a path. On the site, README.md, CONTRIBUTING.md and CHANGELOG.md have pages;
other files outside of docs/ have none, so that their paths stand there as text.
"""

from __future__ import annotations

import posixpath
import re
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

# Pages of the site by the files at the top of the repository that they show.
TOP = {"README.md": "overview.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
SHORT = 16  # characters
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of docs/."""
    root = posixpath.dirname(config.config_file_path)
    for name, page in TOP.items():
        files.append(File.generated(config, page, abs_src_path=posixpath.join(root, name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make the links of a page those of the site."""
    uri = page.file.src_uri
    source = next((name for name, top in TOP.items() if top == uri), f"docs/{uri}")
    return rewrite(markdown, source, uri)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Mark short cells of tables, which style.css keeps in one line."""

    def mark(match: re.Match[str]) -> str:
        short = len(re.sub(r"<[^>]*>", "", match[2])) <= SHORT
        return f'<{match[1]} class="short">{match[2]}</{match[1]}>' if short else match[0]

    return re.sub(r"<(t[dh])>(.*?)</t[dh]>", mark, html, flags=re.DOTALL)


def rewrite(markdown: str, source: str, uri: str) -> str:
    """The text of the page ``uri`` of the site, from that of the file ``source`` of the repository."""

    def replace(match: re.Match[str]) -> str:
        text, path, anchor = match[1], match[2], match[3] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if target.startswith("docs/") or target in TOP:
            page = TOP.get(target) or target.removeprefix("docs/")
            if text.endswith(".md"):  # the name of a file says little on a site
                text = posixpath.basename(page).removesuffix(".md").replace("_", " ")
            return f"[{text}]({posixpath.relpath(page, posixpath.dirname(uri) or '.')}{anchor})"
        return f"`{target}`" if target.endswith(text.strip("`")) else f"{text} (`{target}`)"

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(replace, part) for part in parts)
