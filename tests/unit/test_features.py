"""Float temporal features of the TIB alone: equal to what the whole network makes on the way."""

import math

import pytest
import torch

from bench.temporal.tiny import tiny_inputs, tiny_model, tiny_run
from devkit.inprocess import use_host
from devkit.paths import host_dir
from tfmq.errors import TfmqError
from tfmq.temporal.features import sinusoid, temporal_graph
from tfmq.temporal.tib import find_tib

needs_host = pytest.mark.skipif(
    not (host_dir() / "main.py").is_file(), reason=f"no ComfyUI in {host_dir()}: set COMFYUI_PATH or run dev.py test"
)


def test_sinusoid_by_hand():
    made = sinusoid(torch.tensor([3.0, 700.0]), 5, max_period=100.0)
    assert made.shape == (2, 5)
    for row, t in zip(made, (3.0, 700.0), strict=True):
        expected = [math.cos(t), math.cos(t / 10), math.sin(t), math.sin(t / 10), 0.0]
        assert torch.allclose(row, torch.tensor(expected), atol=1e-4)


@needs_host
@pytest.mark.parametrize("name", ["SD1.5", "Wan2.1", "AuraFlow", "Qwen-Image", "Lumina2", "Z-Image", "PixArt-Sigma"])
def test_the_graph_gives_what_the_network_computes(name):
    use_host()
    model = tiny_model(name)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    paths = list(find_tib(model).layers)

    def keep(path):
        def hook(module, args, out):
            seen.setdefault(path, (args[0].clone(), out.clone()))

        return hook

    for path in paths:
        model.get_submodule(path).register_forward_hook(keep(path))
    inputs = tiny_inputs(name)
    with torch.no_grad():
        tiny_run(name, model)(**inputs)
    first = next(iter(temporal_graph(model, embed=lambda t: t).layers))
    # A UNet's embedding of t is ours to compute; the others' is taken from the run.
    graph = temporal_graph(model) if name == "SD1.5" else temporal_graph(model, embed=lambda t: seen[first][0])
    found = graph.features(inputs["t"])
    assert set(found) == set(paths)
    for path, feature in found.items():
        assert torch.allclose(feature.reshape(seen[path][1].shape), seen[path][1], rtol=1e-4, atol=1e-4), path
    assert set(graph.embedder) | set(graph.outputs) == set(paths) and graph.outputs


@needs_host
def test_given_weights_take_the_place_of_the_networks_own():
    use_host()
    model = tiny_model("SD1.5")
    plain = temporal_graph(model)
    path = plain.outputs[0]
    doubled = temporal_graph(model, weights={f"{path}.weight": 2 * plain.layers[path].weight})
    t = torch.tensor([7.0])
    bias = plain.layers[path].bias
    assert torch.allclose(doubled.features(t)[path] - bias, 2 * (plain.features(t)[path] - bias), atol=1e-4)


@needs_host
def test_nan_features_are_named():
    use_host()
    model = tiny_model("SD1.5")
    model.time_embed[2].weight.data[0, 0] = float("nan")
    with pytest.raises(TfmqError, match=r"time_embed\.2 gives NaN"):
        temporal_graph(model).features(torch.arange(3.0))


@needs_host
def test_a_tib_that_sees_a_vector_is_refused():
    use_host()
    with pytest.raises(TfmqError, match="more than the timestep"):
        temporal_graph(tiny_model("SDXL"))


def test_a_network_without_tib_is_refused():
    with pytest.raises(TfmqError, match="No Temporal Information Block"):
        temporal_graph(torch.nn.Sequential(torch.nn.Linear(2, 2)))
