"""What `make docs` says of the site, said of what lies outside of it too."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).absolute().parent.parent
README = ROOT / "README.md"

pytestmark = pytest.mark.one_backend


def anchors(path):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
        for heading in headings
    }


@pytest.mark.parametrize(
    "page",
    sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        # Made when the site is built.
        if path in ("changelog.md", "contributing.md"):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 120


def test_the_first_page_takes_parts_that_are_there():
    parts = re.findall(
        r'"README.md:(\w+)"', (ROOT / "docs/index.md").read_text()
    )
    assert parts == ["quality", "runtimes"]
    for part in parts:
        assert f"[start:{part}]" in README.read_text()
        assert f"[end:{part}]" in README.read_text()
