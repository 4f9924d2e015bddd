"""The TIB by table and by probe: exact counts on real configurations, agreement on tiny instances, honest failure."""

from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
from torch import nn

from bench.temporal.models import MODELS, build
from bench.temporal.share import share
from bench.temporal.tiny import TINY, fill, tiny_inputs, tiny_model, tiny_run
from devkit.inprocess import use_host
from devkit.paths import host_dir
from support.probe import find_by_probe
from tfmq.temporal.tib import Tib, boundary_layers, find_tib

needs_host = pytest.mark.skipif(
    not (host_dir() / "main.py").is_file(), reason=f"no ComfyUI in {host_dir()}: set COMFYUI_PATH or run dev.py test"
)

# name: (all parameters, temporal parameters), counted on the meta device by a script of its own
COUNTS = {
    "SD1.5": (859520964, 27875520),
    "SDXL": (2567463684, 24922560),
    "SD3-medium": (2028328000, 683461632),
    "SD3.5-medium": (2243171520, 775534080),
    "SD3.5-large": (8056627520, 2703785728),
    "Flux.1-dev": (11901408320, 3279710208),
    "Flux.1-schnell": (11891178560, 3269480448),
    "Flux.2-dev": (32223281152, 720371712),
    "Chroma1": (8899983424, 278285312),
    "Qwen-Image": (20430401088, 6826094592),
    "Wan2.1-14B": (14288491584, 186091520),
    "Wan2.1-1.3B": (1418996800, 17200128),
    "Wan2.2-5B": (4999787712, 67430400),
    "Z-Image": (6154908736, 127833088),
    "Lumina2": (2609769152, 268173568),
    "PixArt-Sigma": (610856096, 9789696),
    "AuraFlow 0.2": (6842876928, 2294028288),
    "HunyuanDiT 1.2": (1499952032, 99372416),
    "HunyuanVideo": (12821012544, 3497625600),
}

# name: how many layers depend on what
DEPENDENCIES = {
    "SD1.5": {"t": 24},
    "SDXL": {"t": 2, "vector": 2, "t+vector": 17},
    "SD3-medium": {"t": 2, "vector": 2, "t+vector": 49},
    "Flux.1-dev": {"t": 2, "vector": 4, "t+vector": 77},
    "Flux.1-schnell": {"t": 2, "vector": 2, "t+vector": 77},
    "Flux.2-dev": {"t": 2, "vector": 2, "t+vector": 4},
    "Chroma1": {"t+vector": 12},
    "Qwen-Image": {"t": 123},
    "Wan2.1-14B": {"t": 3},
    "Wan2.2-5B": {"per-token t": 3},
    "Z-Image": {"t": 35},
    "AuraFlow 0.2": {"t": 43},
    "HunyuanDiT 1.2": {"t": 2, "text": 2, "t+text": 41},
    "HunyuanVideo": {"t": 4, "vector": 4, "t+vector": 81, "t+text": 2},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny operations only: several threads cost more than they bring, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def dependencies(tib: Tib) -> dict[str, int]:
    found = list(tib.layers.values())
    return {name: found.count(name) for name in set(found)}


@needs_host
def test_share_of_real_configurations() -> None:
    assert {name: (count["total"], count["temporal"]) for name, count in share().items()} == COUNTS


@needs_host
@pytest.mark.parametrize("name", DEPENDENCIES)
def test_what_real_layers_depend_on(name: str) -> None:
    architecture, config = MODELS[name]
    model = build(architecture, **config)
    tib = find_tib(model)
    assert tib.architecture == architecture
    assert dependencies(tib) == DEPENDENCIES[name]
    assert all(model.get_submodule(path) is not None for path in tib.layers)
    assert {f"{path}.weight" for path in tib.layers} <= set(tib.parameters)
    for path, end in boundary_layers(model).items():
        assert path not in tib.layers and model.get_submodule(path).weight is not None, (path, end)


@needs_host
def test_raw_parameters_are_counted_but_are_no_layers() -> None:
    wan, pixart = (find_tib(build(MODELS[name][0], **MODELS[name][1])) for name in ("Wan2.1-1.3B", "PixArt-Sigma"))
    assert {"blocks.0.modulation", "blocks.29.modulation", "head.modulation"} <= set(wan.parameters)
    assert {"blocks.27.scale_shift_table", "final_layer.scale_shift_table"} <= set(pixart.parameters)
    assert set(wan.layers) == {"time_embedding.0", "time_embedding.2", "time_projection.1"}


@needs_host
@pytest.mark.parametrize("name", TINY)
def test_table_equals_probe(name: str) -> None:
    model, tiny, inputs = tiny_model(name), TINY[name], tiny_inputs(name)
    tib = find_tib(model)
    probe = find_by_probe(
        model,
        tiny_run(name, model),
        inputs["x"],
        inputs["t"],
        inputs["context"],
        vector={key: inputs[key] for key in tiny.vector},
        text={key: inputs[key] for key in tiny.text},
    )
    assert tib.architecture == tiny.architecture
    # Layers that see only text know nothing of t: the probe sets them apart.
    pooled = {path for path, dependency in tib.layers.items() if dependency == "text"}
    assert pooled <= set(probe.pooled_text)
    assert probe.tib.layers == {path: dependency for path, dependency in tib.layers.items() if path not in pooled}
    assert set(probe.tib.parameters) <= set(tib.parameters)
    assert boundary_layers(model) == {probe.first: "first", probe.last: "last"}
    assert probe.not_seen == () and probe.unusable == {}


@needs_host
def test_a_model_that_reads_the_next_sigma_is_not_in_the_table() -> None:
    config = {**MODELS["HunyuanVideo"][1], "depth": 1, "depth_single_blocks": 1, "meanflow": True}
    model = build("hunyuan_video", **config)
    assert find_tib(model) == Tib("unknown", {}, ())
    assert boundary_layers(model) == {"img_in.proj": "first", "final_layer.linear": "last"}


@needs_host
@pytest.mark.parametrize(("t_shape", "expected"), [((2,), "t"), ((2, 48), "per-token t")])
def test_an_architecture_outside_the_table_is_found_by_probe(t_shape: tuple[int, ...], expected: str) -> None:
    use_host()
    from comfy.ldm.lightricks.model import LTXVModel

    config = dict(in_channels=8, cross_attention_dim=32, attention_head_dim=16, num_attention_heads=2)
    operations = import_module("comfy.ops").disable_weight_init
    model = LTXVModel(
        **config, caption_channels=24, num_layers=1, device="cpu", dtype=torch.float32, operations=operations
    )
    fill(model.eval())
    assert find_tib(model) == Tib("unknown", {}, ())
    torch.manual_seed(0)
    inputs = torch.randn(2, 8, 3, 4, 4), torch.rand(t_shape), torch.randn(2, 5, 24)
    probe = find_by_probe(model, lambda x, t, context: model(x, t, context, None), *inputs)
    time_layers = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
    assert probe.tib.layers == {f"adaln_single.{name}": expected for name in time_layers}
    assert (probe.first, probe.last) == ("patchify_proj", "proj_out")


class Small(nn.Module):
    """A network of an unknown class: a time path, an image path, and whatever a test adds to them."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 6)
        self.size = nn.Linear(3, 6)
        self.shift = nn.Linear(6, 4)
        self.patch = nn.Conv2d(2, 4, 1)
        self.token = nn.Linear(5, 4)
        self.out = nn.Conv2d(4, 2, 1)
        self.spare = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        shift = self.shift(torch.tanh(self.time(t[:, None]) + self.size(y)))
        h = self.patch(x) + shift[..., None, None] + self.token(context).mean(1)[..., None, None]
        return self.out(h)


def probe_small(model: nn.Module, **more: torch.Tensor):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 2, 3, 3), torch.rand(2), torch.randn(2, 4, 5)]
    return find_by_probe(model, model, *inputs, vector={"y": torch.randn(2, 3), **more})


def test_unknown_architecture() -> None:
    assert find_tib(Small()) == Tib("unknown", {}, ())
    assert boundary_layers(Small()) == {}


def test_a_known_class_name_with_another_inside_is_unknown() -> None:
    class UNetModel(Small):
        pass

    assert find_tib(UNetModel()).architecture == "unknown"


def test_probe_finds_an_unknown_tib() -> None:
    model = Small()
    probe = probe_small(model)
    assert probe.tib.architecture == "found by probe"
    assert probe.tib.layers == {"time": "t", "size": "vector", "shift": "t+vector"}
    assert set(probe.tib.parameters) == {f"{path}.{name}" for path in probe.tib.layers for name in ("weight", "bias")}
    assert probe.moved_by["shift"] == {"t", "y"}
    assert probe.moved_by["out"] == {"image", "text", "t", "y"}
    assert (probe.first, probe.last, probe.not_seen) == ("patch", "out", ("spare",))
    assert not any(module._forward_hooks for module in model.modules())


def test_probe_sees_the_image_in_a_time_layer() -> None:
    class Leaky(Small):
        def forward(self, x, t, context, y):  # the shift now also knows one pixel
            return super().forward(x, t + 1e-3 * x[:, 0, 0, 0], context, y)

    probe = probe_small(Leaky())
    assert probe.tib == Tib("no TIB found", {}, ())
    assert probe.moved_by["time"] == {"image", "t"}


def test_probe_sees_text_in_a_time_layer() -> None:
    class Refined(Small):
        def forward(self, x, t, context, y):
            return super().forward(x, t + context.mean((1, 2)), context, y)

    assert probe_small(Refined()).tib.layers == {"time": "t+text", "size": "vector", "shift": "t+text"}


def test_a_model_that_ignores_t_has_no_tib() -> None:
    class Timeless(Small):
        def forward(self, x, t, context, y):
            return super().forward(x, torch.ones_like(t), context, y)

    probe = probe_small(Timeless())
    assert probe.tib == Tib("no TIB found", {}, ())
    assert probe.moved_by["size"] == {"y"}


@pytest.mark.parametrize(("spoil", "why"), [("nan", "not finite"), ("dropout", "differs between equal runs")])
def test_what_cannot_be_trusted_never_qualifies(spoil: str, why: str) -> None:
    class Spoiled(Small):
        def forward(self, x, t, context, y):
            extra = torch.full_like(t, torch.nan) if spoil == "nan" else torch.rand_like(t)
            return super().forward(x, t + extra, context, y)

    probe = probe_small(Spoiled())
    assert probe.tib == Tib("no TIB found", {}, ())
    assert probe.unusable["time"] == probe.unusable["shift"] == why


def test_hooks_are_removed_when_the_model_fails() -> None:
    class Broken(Small):
        def forward(self, x, t, context, y):
            super().forward(x, t, context, y)
            raise RuntimeError("broken")

    model = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        probe_small(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"not in dict"):
        find_tib({})
    with pytest.raises(ValueError, match=r"'wrong' has shape \(3, 3\), the latents have 2 rows"):
        probe_small(Small(), wrong=torch.zeros(3, 3))
    with pytest.raises(ValueError, match="'image' for another input"):
        probe_small(Small(), image=torch.zeros(2, 3))
