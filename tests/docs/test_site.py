"""The site builds without a warning, loads nothing from the network, and leads to pages that are there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("material", reason="the extra docs is not installed")

ASSET = re.compile(r"<(?:link|script|img|iframe)\b[^>]*\b(?:src|href)=\"(?:https?:)?//[^>]*>")


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(root, out)
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_is_there(root: Path, site: Path) -> None:
    sources = [path.relative_to(root / "docs").with_suffix(".html") for path in (root / "docs").rglob("*.md")]
    sources += [Path(name) for name in ("overview.html", "contributing.html", "changelog.html")]
    assert all((site / path).is_file() for path in sources)
    assert not list(site.rglob("*.py"))


def test_nothing_is_fetched_from_the_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not ASSET.search(page.read_text(encoding="utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"@import|url\(\"?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet
    assert ASSET.search('<link rel="stylesheet" href="https://fonts.example/css">')


def test_contributing_is_a_page_of_the_site(root: Path, site: Path) -> None:
    text = (site / "contributing.html").read_text(encoding="utf-8")
    for what in ("pass", "target", "judge", "probe", "family", "runtime"):
        assert f'id="add-a-{what}"' in text
    assert 'href="architecture.html"' in text and 'href="docs/' not in text
    assert "<code>examples/my_pass.py</code>" in text and 'href="examples/' not in text


def test_a_broken_link_fails_the_build(root: Path, tmp_path: Path) -> None:
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(root / name, tmp_path)
    shutil.copytree(root / "docs", tmp_path / "docs")
    page = tmp_path / "docs/cache.md"
    for link in ("[x](nothing.md)", "[x](deploy.md#nothing)"):
        text = (root / "docs/cache.md").read_text(encoding="utf-8")
        page.write_text(f"{text}\n{link}\n", encoding="utf-8")
        done = build(tmp_path, tmp_path / "site")
        assert done.returncode != 0 and "nothing" in done.stderr
