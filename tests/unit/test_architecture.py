"""The directions of imports, what reaches what, what docs/architecture.md names, and how long files are."""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from devkit.paths import ROOT

# From the top down. A module imports from floors below its own and from its own room; on the ground floor from others.
FLOORS = (
    ("nodes",),
    ("host",),
    ("rounding",),
    ("solve",),
    ("decide",),
    ("files",),
    ("observe",),
    ("runtime",),
    ("temporal", "kernels", "state", "report"),
    ("formats", "geometry", "timeline", "scheme", "atomic", "errors", "words"),
)
ONLY = {"kernels": {"kernels", "formats", "geometry"}}
NEVER = {("host.store", "host.quantize")}
REPORT_READERS = {"report", "nodes", "host"}
COMFY = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "latent_preview", "node_helpers"}
COMFY_ROOMS = {"nodes", "host"}

# What crosses a line today, and what it waits for. These tables only shrink: an entry that is not needed fails.
CROSSINGS: dict[tuple[str, str], str] = {}
LIMIT = 400
WHOLE = {"tfmq/kernels/onednn.py"}  # one job
LONG: set[str] = set()  # being split
# Named by docs/architecture.md, and on their way.
GONE: set[str] = set()
ELSEWHERE = {"kernels.json"}  # in the user's cache folder

CODE = ("tfmq", "bench", "demo", "devkit")
Imports = dict[str, set[str]]


def name_of(file: Path) -> str:
    """Dotted name in the repository; of a package its own."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(file): file for folder in CODE for file in sorted((ROOT / folder).rglob("*.py"))}
FILES |= {name_of(file): file for file in ROOT.glob("*.py")}
PACK = {name.removeprefix("tfmq.") for name in FILES if name.startswith("tfmq.")}


def imported(tree: ast.AST, package: str, at_runtime: bool = False) -> Iterator[str]:
    """Dotted names that a module of `package` imports, wherever in it; of `from a import b` also a.b.

    at_runtime: without those under `if TYPE_CHECKING`.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*filter(None, above), *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" if base else alias.name for alias in node.names)
        elif not (at_runtime and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from imported(node, package, at_runtime)


def names(name: str, at_runtime: bool = False) -> set[str]:
    file = FILES[name]
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    return set(imported(ast.parse(file.read_text(encoding="utf-8")), package, at_runtime))


def pack_imports(at_runtime: bool = False) -> Imports:
    """Module of tfmq -> modules of tfmq that it imports, both without `tfmq.`; a module counts and not its packages."""
    found: Imports = {}
    for module in PACK:
        inside = {n.removeprefix("tfmq.") for n in names(f"tfmq.{module}", at_runtime)} & PACK
        found[module] = {n for n in inside if not any(o.startswith(f"{n}.") for o in inside)} - {module}
    return found


def room(module: str) -> str:
    return module.partition(".")[0]


def floor(module: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


def allowed(module: str, other: str) -> bool:
    """Whether `module` may import `other`."""
    if (module, other) in NEVER or room(other) not in ONLY.get(room(module), {room(other)}):
        return False
    if room(other) == "report" and room(module) not in REPORT_READERS:
        return False
    ground = len(FLOORS) - 1
    return room(module) == room(other) or floor(module) < floor(other) or floor(module) == floor(other) == ground


def crossings(imports: Imports) -> set[tuple[str, str]]:
    return {(module, other) for module, others in imports.items() for other in others if not allowed(module, other)}


def circle(imports: Imports) -> list[str]:
    """Modules of one circle, or nothing: what is left once everything is gone that imports nothing of the rest."""
    left = {module: set(others) for module, others in imports.items()}
    while free := {module for module, others in left.items() if not others & left.keys()}:
        left = {module: others for module, others in left.items() if module not in free}
    return sorted(left)


def reached(start: Iterable[str], imports: Imports) -> set[str]:
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += imports[module]
    return found


def named_files(page: str) -> set[str]:
    """Files in the code spans and in the indented or fenced blocks of a page."""
    blocks = [line for line in re.sub(r"`{3,}", "\n    ", page).splitlines() if line.startswith("    ")]
    code = " ".join([*re.findall(r"`([^`\n]+)`", page), *blocks])
    return set(re.findall(r"(?<![\w<>*/.-])[\w.-][\w./-]*\.(?:py|json|md|toml|js)\b", code))


def exists(named: str) -> bool:
    """Whether a file of the repository has this path, or ends in it."""
    folders = (*CODE, "docs", "web", "tests", "example_workflows")
    files = {*ROOT.glob("*"), *(file for folder in folders for file in (ROOT / folder).rglob(Path(named).name))}
    return any(f"/{file.relative_to(ROOT).as_posix()}".endswith(f"/{named}") for file in files)


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in PACK} == {name for rooms in FLOORS for name in rooms}


def test_nothing_runs_up() -> None:
    assert crossings(pack_imports()) == set(CROSSINGS)


@pytest.mark.parametrize(
    ("module", "other"),
    [
        ("runtime.leaf", "observe.model"), ("runtime.leaf", "decide.plan"), ("runtime.leaf", "solve.layer"),
        ("kernels.int_mm", "timeline"), ("kernels.int_mm", "errors"), ("host.store", "host.quantize"),
        ("temporal.tib", "kernels.table"), ("state", "temporal.tib"), ("rounding.layer", "report.sheet"),
        ("formats.affine", "state"), ("observe.model", "files"), ("host.model", "nodes.files"),
    ],
)  # fmt: skip
def test_what_would_cross_a_line_is_found(module: str, other: str) -> None:
    assert crossings({module: {other}}) == {(module, other)}


@pytest.mark.parametrize(
    ("module", "other"),
    [
        ("nodes.files", "words"), ("host.model", "kernels.table"), ("runtime.leaf", "kernels.table"),
        ("kernels.int_mm", "geometry"), ("timeline", "errors"), ("nodes.compare", "report.sheet"),
    ],
)  # fmt: skip
def test_what_keeps_to_the_lines_is_not(module: str, other: str) -> None:
    assert crossings({module: {other}}) == set()


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circle(pack_imports(at_runtime=True)) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["a", "b", "c", "d"]


def test_only_nodes_and_host_import_comfy() -> None:
    importers = {name for name in FILES if {n.partition(".")[0] for n in names(name)} & COMFY}
    pack = {name for name in importers if name.startswith("tfmq.")}
    assert {room(name.removeprefix("tfmq.")) for name in pack} <= COMFY_ROOMS
    assert "nodes" in importers and "tfmq.host.store" in pack


def test_every_module_is_reached_from_a_node_or_a_benchmark() -> None:
    imports = pack_imports()
    outside = [name for name in FILES if name != "tfmq" and not name.startswith("tfmq.")]
    start = {n.removeprefix("tfmq.") for name in outside for n in names(name) if n.startswith("tfmq.")}
    found = reached(start & PACK, imports)
    packages = {module for module in PACK if FILES[f"tfmq.{module}"].name == "__init__.py"}
    assert PACK - packages - found == set()


def test_imports_are_read_as_python_reads_them() -> None:
    code = "import a.b\nfrom . import c\nfrom ..d import e\nif TYPE_CHECKING:\n    from f import g\n"
    code += "def h():\n    import i\n"
    assert set(imported(ast.parse(code), "x.y")) == {"a.b", "x.y", "x.y.c", "x.d", "x.d.e", "f", "f.g", "i"}
    assert set(imported(ast.parse(code), "x.y", at_runtime=True)) == {"a.b", "x.y", "x.y.c", "x.d", "x.d.e", "i"}


def test_the_files_that_the_architecture_page_names_exist() -> None:
    named = named_files((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")) - ELSEWHERE
    assert {name for name in named if not exists(name)} == GONE


def test_a_named_file_that_is_not_there_is_found() -> None:
    page = "`tfmq/gone.py` and `leaf.py`, `<name>.py`, `nodes*.py`, plain.py\n\n    block.py   what it does\n"
    assert named_files(page) == {"tfmq/gone.py", "leaf.py", "block.py"}
    assert exists("runtime/leaf.py") and exists("tiles.json") and not exists("tfmq/gone.py") and not exists("af.py")


def test_no_file_is_too_long() -> None:
    lines = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8").count("\n") for file in FILES.values()}
    assert {path for path, count in lines.items() if count > LIMIT} - WHOLE == LONG
