"""What the documents say exists: files, links, commands, help pages."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import dev
from devkit.paths import ROOT, WORKFLOWS
from tfmq.decide.grids import RANGES
from tfmq.host.step_choice import RULES
from tfmq.rounding.efforts import EFFORTS
from tfmq.scheme import ACTIVATIONS, RECIPES
from tfmq.words import Choices

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "web/docs/**/*.md")
    for path in ROOT.glob(pattern)
)
# In a code span: a path of this repository, with its folder.
FOLDERS = "tfmq|tests|docs|web|demo|bench|devkit|example_workflows"
PATH = re.compile(rf"(?:{FOLDERS})/[\w./-]*")
LINK = re.compile(r"\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")


def text(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def missing_links(document: str, content: str) -> list[str]:
    """Relative links that lead nowhere, from the document's own folder."""
    targets = (link.partition("#")[0] for link in LINK.findall(content) if "://" not in link)
    return [target for target in targets if target and not (ROOT / document).parent.joinpath(target).exists()]


def missing_paths(content: str) -> list[str]:
    """Paths in code spans that are not in the repository."""
    named = (match for span in SPAN.findall(content) for match in PATH.findall(span) if span.startswith(match))
    return [path for path in named if not (ROOT / path).exists()]


def anchors(content: str) -> set[str]:
    """What the headings of a page are linked by."""
    headings = re.findall(r"^#+ (.+)$", content, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def commands(content: str) -> list[list[str]]:
    """Arguments of every `python dev.py ...` in a document."""
    found = re.findall(r"python dev\.py ([^`\n]+)", content)
    return [shlex.split(line, comments=True) for line in found]


def node_ids() -> list[str]:
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in sorted((ROOT / "tfmq" / "nodes").glob("*.py"))]
    keywords = (k for tree in trees for call in ast.walk(tree) if isinstance(call, ast.Call) for k in call.keywords)
    return [k.value.value for k in keywords if k.arg == "node_id" and isinstance(k.value, ast.Constant)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_lead_somewhere(document: str):
    assert missing_links(document, text(document)) == []
    assert missing_paths(text(document)) == []


def test_a_dead_link_and_a_dead_path_are_found():
    content = "[a](no/such.md) [b](https://example.org) [c](README.md#x) `tfmq/no_such.py` `tfmq/runtime/leaf.py`"
    assert missing_links("README.md", content) == ["no/such.md"]
    assert missing_paths(content) == ["tfmq/no_such.py"]


def test_the_commands_of_the_readme_are_those_of_dev_py():
    found = commands(text("README.md"))
    assert ["demo"] in found and ["test"] in found
    for arguments in found:
        parsed, rest = dev._parser().parse_known_args(arguments)  # leaves with an error where there is no such command
        assert not rest or parsed.command == "test", arguments


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_placeholder_is_left(document: str):
    assert not re.search(r"\b(TODO|TBD|FIXME|XXX|lorem ipsum)\b|\?\?+|<figure>|\bN\.N\b", text(document), re.IGNORECASE)


def test_every_node_has_a_help_page_and_a_line_in_the_readme():
    ids = node_ids()
    assert len(ids) >= 6
    for node_id in ids:
        page = Path("web/docs") / f"{node_id}.md"
        assert (ROOT / page).is_file(), f"{node_id} has no help page"
        assert f"]({page.as_posix()})" in text("README.md"), f"{node_id} is not in the README's table"


def test_every_help_page_belongs_to_a_node():
    assert {page.stem for page in ROOT.glob("web/docs/*.md")} <= set(node_ids())


def test_every_help_page_names_every_input_of_its_node():
    bodies = [ast.parse(file.read_text(encoding="utf-8")).body for file in (ROOT / "tfmq" / "nodes").glob("*.py")]
    for node in (n for body in bodies for n in body if isinstance(n, ast.ClassDef)):
        calls = [c for c in ast.walk(node) if isinstance(c, ast.Call)]
        page = next(
            (ROOT / f"web/docs/{k.value.value}.md" for c in calls for k in c.keywords if k.arg == "node_id"), None
        )
        if page is None:
            continue
        template = {c for outer in calls if _called(outer) == "TemplatePrefix" for c in ast.walk(outer)}
        for call in calls:
            if _called(call) in ("Input", "combo") and call not in template:
                name = call.args[0].value
                assert f"`{name}`" in page.read_text(encoding="utf-8"), f"{page.name} says nothing about {name}"


@pytest.mark.parametrize(
    ("page", "choices"),
    [
        *(("Quantize", choices) for choices in (RECIPES, EFFORTS, RANGES, ACTIVATIONS)),
        *((page, RULES) for page in ("Calibrate", "CalibrateCustom")),
    ],
)
def test_help_pages_name_every_option(page: str, choices: Choices):
    assert [name for name in choices if f"`{name}`" not in text(f"web/docs/TFMQ_{page}.md")] == []


def test_every_example_workflow_has_a_thumbnail():
    for file in WORKFLOWS.glob("*.json"):
        assert file.with_suffix(".jpg").is_file(), f"{file.name} has no picture of the same name"


def test_every_decision_is_in_the_index_and_says_what_was_chosen_where():
    pages = [page for page in (ROOT / "docs" / "decisions").glob("*.md") if page.name != "README.md"]
    assert len(pages) > 20
    for page in pages:
        assert f"]({page.name})" in text("docs/decisions/README.md"), f"{page.name} is not in the index"
        missing = [
            part
            for part in ("**Question.**", "**Chosen.**", "**Code.**")
            if part not in text(f"docs/decisions/{page.name}")
        ]
        assert not missing, f"{page.name} lacks {missing}"


def test_links_to_a_part_of_a_page_find_it():
    for document in DOCUMENTS:
        for link in LINK.findall(text(document)):
            target, _, part = link.partition("#")
            if part and "://" not in link:
                page = (ROOT / document).parent / target if target else ROOT / document
                assert part in anchors(page.read_text(encoding="utf-8")), f"{document}: {link}"


def test_anchors_are_those_of_github():
    assert anchors("# A b\n\n## `x` and y, z\n\ntext # no\n") == {"a-b", "x-and-y-z"}


def test_pictures_are_small():
    for file in [*(ROOT / "docs" / "images").iterdir(), *WORKFLOWS.glob("*.jpg")]:
        assert file.stat().st_size < 300_000, file.name


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
