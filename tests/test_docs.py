"""What `make docs` says of the site, said of what lies outside of it too.

And the linter of English, `docs/prose.py`.
"""

import pathlib
import re
import runpy
import shutil
import tomllib

import pytest

from tests.releases import readme

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


def test_pictures_have_alternative_texts():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    texts = {page.name: page.read_text() for page in pages}
    hooks = runpy.run_path(str(ROOT / "docs" / "site_hooks.py"))
    texts["gallery.md"] = hooks["with_pictures"](texts["gallery.md"])
    pictures = re.findall(r"!\[([^\]]*)\]", "".join(texts.values()))
    assert len(pictures) > 8
    assert all(len(text) > 9 for text in pictures)


def test_notebooks_are_what_the_command_makes():
    notebooks = runpy.run_path(str(ROOT / "docs" / "notebooks.py"))
    pages = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
    assert len(pages) == len([*pages[0].parent.glob("*.ipynb")])
    for page in pages:
        made = notebooks["notebook_of"](page.read_text())
        written = page.with_suffix(".ipynb").read_text()
        assert written == made, "run `make notebooks`"


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 100


def test_the_readme_says_how_to_choose_a_backend():
    # `make extras` follows it with each of them installed alone.
    for line in readme.commands():
        assert all(backend in line for backend in readme.BACKENDS), line


def test_the_readme_is_the_first_page_of_the_site():
    pytest.importorskip("mkdocs")
    hooks = runpy.run_path(str(ROOT / "docs" / "site_hooks.py"))
    targets = re.findall(r"\]\(([^)\s#]+)", hooks["first_page"]())
    made = {name.lower() for name in hooks["AT_THE_ROOT"]}
    assert made <= {*targets}
    for target in {*targets} - made:
        assert (ROOT / "docs" / target).is_file()


SLIP = "A kernel that is not a multiple of four words long stays dense. "


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (SLIP, None),
        ("word " * 31 + ".", "has 31 words, 30 at most"),
        ("# " + "word " * 36, None),
        ("| " + "word " * 36, None),
        ("```bash\n" + "word " * 36 + "\n```", None),
        ("- " + "word " * 20 + "\n- " + "word " * 20, "20.0 words, 18"),
        ("Short.\n\nOf these two are left.", "3: 'Of these two are left.'"),
        ("It holds. As it should.", "begins with a hanging 'As'"),
        ("It holds.\nThat it holds is nice.", "2: 'That it holds"),
        ("It has 1.5 of 3 % in int8, 2:4 and [4](5.md) parts. " + SLIP, "12.5"),
        ("The rows are 1, 2, 3, 4, 5, 6 and 7. " + 9 * SLIP, "7 numbers, 6"),
        ("It is `f(1, 2, 3, 4)` of SmolLM2-135M. " + SLIP, None),
    ],
)
def test_the_linter_of_english(text, problem):
    found = runpy.run_path(str(ROOT / "docs" / "prose.py"))["problems"](text)
    assert bool(found) == bool(problem), found
    assert problem is None or any(problem in each for each in found)


def test_the_linter_reads_docstrings_and_comments():
    linter = runpy.run_path(str(ROOT / "docs" / "prose.py"))
    texts = [text for _, text in linter["package_texts"]()]
    assert len(texts) > 1000
    assert not any("Args:" in text for text in texts)
    assert any("Names that other libraries use" in text for text in texts)
    assert linter["problems"]("It has 1.5 of 3 %.", is_page=False) == []


def test_a_release_has_addresses_and_a_readme_whose_links_hold(tmp_path):
    files = "https://example.org/me/kwm/blob/v1.2.3/"
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    write = runpy.run_path(str(ROOT / ".github" / "release_links.py"))["main"]
    write("https://example.org/me/kwm", "v1.2.3", tmp_path)

    before, after = (
        re.findall(r"\]\(([^)\s]+)\)", path.read_text())
        for path in (README, tmp_path / "README.md")
    )
    assert before
    assert after == [files + target for target in before]
    with pytest.raises(SystemExit, match="already"):
        write("https://example.org/me/kwm", "v1.2.3", tmp_path)

    old, new = (
        tomllib.loads((folder / "pyproject.toml").read_text())
        for folder in (ROOT, tmp_path)
    )
    urls = new["project"].pop("urls")
    assert new == old
    assert urls["Changelog"] == f"{files}CHANGELOG.md"
    for url in urls.values():
        # Only files that exist.
        if url.startswith(files):
            assert (ROOT / url.removeprefix(files)).is_file()
