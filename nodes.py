"""The list of nodes, and the extension that ComfyUI asks for it."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .tfmq.nodes.calibrate import Calibrate, CalibrateCustom
from .tfmq.nodes.compare import Compare
from .tfmq.nodes.files import Load, Save
from .tfmq.nodes.quantize import Quantize
from .tfmq.nodes.temporal import TemporalCache, TemporalReport


class TfmqExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [Calibrate, CalibrateCustom, Quantize, Save, Load, Compare, TemporalCache, TemporalReport]


async def comfy_entrypoint() -> TfmqExtension:
    return TfmqExtension()
