"""A small client of a running ComfyUI: queue a graph, follow it, fetch what it made."""

import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import websocket

Prompt = dict[str, dict[str, Any]]
Progress = Callable[[str, float, float], None]


class HostError(RuntimeError):
    """The host refused a graph, or a node of it failed.

    `node_id` and `node_type` name the node (None where the graph as a whole was refused), `exception_type` is the
    class name of the exception in the host, `message` its text.
    """

    def __init__(
        self, message: str, node_id: str | None = None, node_type: str | None = None, exception_type: str = ""
    ):
        where = f"node {node_id} ({node_type}): " if node_id is not None else ""
        super().__init__(where + message)
        self.message, self.node_id, self.node_type, self.exception_type = message, node_id, node_type, exception_type


class Interrupted(HostError):
    """The run was interrupted."""


@dataclass(frozen=True)
class Result:
    """What a finished run left: `outputs[node id]` is the node's UI output, as in the host's history."""

    prompt_id: str
    outputs: dict[str, dict[str, Any]]
    cached: frozenset[str]
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds per node that ran (by the times of the host's messages)."""

    def text(self, node_id: str) -> str:
        """The text that a node showed."""
        return "\n".join(str(part) for part in self.outputs[node_id]["text"])


class Client:
    def __init__(self, address: str):
        """`address` is "host:port"."""
        self.address = address
        self.client_id = uuid.uuid4().hex

    def get(self, path: str) -> Any:
        return json.loads(self._request(path))

    def object_info(self, node_type: str | None = None) -> dict[str, Any]:
        """Schemas of all node types, or of one (an unknown one gives an empty dict)."""
        return self.get(f"/object_info/{node_type}" if node_type else "/object_info")

    def system_stats(self) -> dict[str, Any]:
        return self.get("/system_stats")

    def history(self, prompt_id: str) -> dict[str, Any]:
        return self.get(f"/history/{prompt_id}")[prompt_id]

    def interrupt(self) -> None:
        self._request("/interrupt", b"{}")

    def free(self, unload_models: bool = True) -> None:
        """Have the host drop cached results, and the models with them, and wait until it did."""
        self._request("/free", json.dumps({"unload_models": unload_models, "free_memory": True}).encode())
        # It looks at what was asked when it has run a graph, or wakes up: so behind this one it has looked.
        self.queue({"wait": {"class_type": "PreviewAny", "inputs": {"source": "waited"}}})

    def queue(self, prompt: Prompt, on_progress: Progress | None = None, timeout: float = 600.0) -> Result:
        """Run a graph in API format and wait for its end.

        `on_progress(node id, value, maximum)` is called for every step that a running node reports.
        Raises HostError (refused graph or failed node), Interrupted, TimeoutError.
        """
        socket = websocket.create_connection(f"ws://{self.address}/ws?clientId={self.client_id}", timeout=timeout)
        try:
            answer = json.loads(
                self._request("/prompt", json.dumps({"prompt": prompt, "client_id": self.client_id}).encode())
            )
            if answer.get("node_errors"):  # the host runs the other outputs; here that is a failure
                self.interrupt()
                raise _node_error(answer["node_errors"])
            return self._follow(socket, answer["prompt_id"], on_progress, time.monotonic() + timeout)
        finally:
            socket.close()

    def upload_image(self, path: str | Path) -> str:
        """Put an image into the host's input folder; returns the name that LoadImage takes."""
        path, edge = Path(path), uuid.uuid4().hex
        body = io.BytesIO()
        head = f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="{path.name}"\r\n'
        body.write(head.encode() + b"Content-Type: application/octet-stream\r\n\r\n" + path.read_bytes())
        body.write(
            f'\r\n--{edge}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n--{edge}--\r\n'.encode()
        )
        answer = self._request("/upload/image", body.getvalue(), f"multipart/form-data; boundary={edge}")
        return json.loads(answer)["name"]

    def fetch(self, file: dict[str, str]) -> bytes:
        """The bytes of an output file as the host's history names it (`filename`, `subfolder`, `type`)."""
        wanted = {key: file[key] for key in ("filename", "subfolder", "type")}
        return self._request("/view?" + urllib.parse.urlencode(wanted))

    def images(self, result: Result, node_id: str) -> list[bytes]:
        """The images that an image output node of a run saved, as encoded bytes."""
        return [self.fetch(file) for file in result.outputs[node_id]["images"]]

    def _request(self, path: str, body: bytes | None = None, content_type: str = "application/json") -> bytes:
        request = urllib.request.Request(
            f"http://{self.address}{path}", data=body, headers={"Content-Type": content_type}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise _refusal(path, error) from None

    def _follow(self, socket, prompt_id: str, on_progress: Progress | None, deadline: float) -> Result:
        cached: set[str] = set()
        seconds: dict[str, float] = {}
        failure: HostError | None = None
        running, since = "", 0.0
        while True:
            if time.monotonic() > deadline:
                raise TimeoutError(f"The run did not end in time; it is at node {running or '(none yet)'}.")
            try:
                message = socket.recv()
            except websocket.WebSocketTimeoutException:
                continue
            if not isinstance(message, str):
                continue  # a preview
            event = json.loads(message)
            data = event.get("data", {})
            if data.get("prompt_id") != prompt_id:
                continue
            kind = event["type"]
            if kind == "execution_cached":
                cached.update(data["nodes"])
            elif kind == "progress" and on_progress is not None:
                on_progress(data.get("node") or running, data["value"], data["max"])
            elif kind == "execution_error":
                failure = HostError(
                    data["exception_message"].strip(), data["node_id"], data["node_type"], data["exception_type"]
                )
            elif kind == "execution_interrupted":
                failure = Interrupted("interrupted", data["node_id"], data["node_type"])
            elif kind == "executing":
                now = time.monotonic()
                if running:
                    seconds[running] = seconds.get(running, 0.0) + now - since
                running, since = data["node"] or "", now
                if data["node"] is None:  # sent after the history is written
                    break
        if failure is not None:
            raise failure
        return Result(prompt_id, self.history(prompt_id)["outputs"], frozenset(cached), seconds)


def _refusal(path: str, error: urllib.error.HTTPError) -> HostError:
    text = error.read().decode(errors="replace")
    try:
        answer = json.loads(text)
    except ValueError:
        return HostError(f"{path} answered {error.code}: {text[:500]}")
    if answer.get("node_errors"):
        return _node_error(answer["node_errors"])
    message = answer.get("error", text)
    return HostError(message["message"] if isinstance(message, dict) else str(message))


def _node_error(node_errors: dict[str, Any]) -> HostError:
    node_id, node = next(iter(node_errors.items()))
    first = node["errors"][0]
    return HostError(f"{first['message']}: {first['details']}", node_id, node["class_type"], first["type"])
