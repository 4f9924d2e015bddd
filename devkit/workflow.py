"""A workflow as the front end saves it (nodes, links, widget values) -> the graph that the host runs (API format)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Workflow = dict[str, Any]
Prompt = dict[str, dict[str, Any]]

NOTES = {"Note", "MarkdownNote"}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
# Node modes of the front end.
MUTED, BYPASSED = 2, 4
# INT widgets with these names have a "control after generate" beside them even where the schema does not ask for it.
SEEDS = {"seed", "noise_seed"}


class WorkflowError(ValueError):
    """The workflow cannot be run by this host."""


def load(path: str | Path) -> Workflow:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def to_prompt(workflow: Workflow, object_info: dict[str, Any]) -> Prompt:
    """The API-format graph of a workflow; `object_info` is the host's answer to /object_info.

    Raises WorkflowError for a node type that the host does not have and for subgraphs.
    """
    if (workflow.get("definitions") or {}).get("subgraphs"):
        raise WorkflowError("The workflow holds subgraphs: unpack them in the front end first.")
    links = _Links(workflow)
    prompt: Prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES | {"Reroute", "PrimitiveNode"} or node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        schema = object_info.get(node["type"])
        if schema is None:
            raise WorkflowError(
                f"Node {node['id']} is a {node['type']}, which this host does not have: install its pack."
            )
        inputs = dict(widgets(node, schema))
        for slot in node.get("inputs", []):
            source = links.source(slot.get("link"))
            if source is not None:
                inputs[slot["name"]] = source
        title = node.get("title") or schema.get("display_name") or node["type"]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}
    return prompt


def widgets(node: dict[str, Any], schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of a node's widgets, from its `widgets_values` (a list in schema order, or a dict)."""
    values = node.get("widgets_values") or []
    if isinstance(values, dict):
        yield from values.items()
        return
    for place, name in _places(schema):
        if place < len(values):  # an older version of the node saved fewer: the host says what is missing
            yield name, values[place]


def set_widget(node: dict[str, Any], schema: dict[str, Any], name: str, value: Any) -> None:
    """Change one widget of a node of a workflow. KeyError where its type has no such widget."""
    node["widgets_values"][{found: place for place, found in _places(schema)}[name]] = value


def find(prompt: Prompt, class_type: str, title: str | None = None) -> str:
    """Id of the only node of a type (and title). Raises WorkflowError where there is none or more than one."""
    found = [
        key
        for key, node in prompt.items()
        if node["class_type"] == class_type and title in (None, node["_meta"]["title"])
    ]
    if len(found) != 1:
        called = f" called {title!r}" if title else ""
        raise WorkflowError(f"The workflow has {len(found)} {class_type} nodes{called}, not one.")
    return found[0]


def _places(schema: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """The widgets of a node type: place in `widgets_values`, and name."""
    place = 0
    for group in ("required", "optional"):
        for name, spec in schema["input"].get(group, {}).items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            if _is_widget(kind, options):
                yield place, name
                # Beside it stands the "control after generate" of the front end, which the host does not know.
                place += 2 if kind == "INT" and options.get("control_after_generate", name in SEEDS) else 1


def _is_widget(kind: Any, options: dict[str, Any]) -> bool:
    return (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput")


class _Links:
    """Where a link comes from, through reroutes and bypassed nodes."""

    def __init__(self, workflow: Workflow):
        self.nodes = {node["id"]: node for node in workflow["nodes"]}
        self.origin = {link[0]: (link[1], link[2]) for link in workflow.get("links", [])}

    def source(self, link: int | None) -> Any:
        """[node id, slot] for a link, a value for a link from a PrimitiveNode, None where nothing arrives."""
        while link is not None:
            node_id, slot = self.origin[link]
            node = self.nodes[node_id]
            if node["type"] == "PrimitiveNode":
                return node["widgets_values"][0]
            if node["type"] == "Reroute":
                link = node["inputs"][0].get("link")
            elif node.get("mode", 0) == BYPASSED:
                link = self._through(node, slot)
            elif node.get("mode", 0) == MUTED:
                return None
            else:
                return [str(node_id), slot]
        return None

    @staticmethod
    def _through(node: dict[str, Any], slot: int) -> int | None:
        """The link that a bypassed node passes on: that of the input at the same place or, else, of the same type."""
        wanted, inputs = node["outputs"][slot]["type"], node.get("inputs", [])
        candidates = inputs[slot : slot + 1] + inputs
        return next((i.get("link") for i in candidates if i["type"] == wanted), None)
