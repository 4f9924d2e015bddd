"""The UNets that bench/speed/ measures are the published ones."""

import pytest
import torch

from bench.speed import networks, rounds, unet

PARAMETERS = {"sd15": 859_520_964, "sdxl": 2_567_463_684}


@pytest.mark.parametrize("model", PARAMETERS)
def test_as_many_parameters_as_the_published_network(model: str) -> None:
    with torch.device("meta"):
        network = unet.UNetModel(unet.CONFIGS[model])
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[model]


def small() -> unet.Config:
    return unet.Config(8, (1, 2), (1, 0), 1, 24, 16, True, 12, channels=32, blocks=1)


def test_activations_keep_their_size() -> None:
    config = small()
    network = unet.UNetModel(config)
    unet.fill(network)
    with torch.no_grad():
        y = network(*unet.inputs(config, 2, torch.float32, torch.device("cpu")))
    assert y.shape == (2, 4, 8, 8)
    assert 0.2 < float(y.std()) < 5


def test_the_order_of_the_hosts_transformers(monkeypatch, tmp_path) -> None:
    """The same numbers; images in NCHW order between the blocks, which convolutions then meet."""
    monkeypatch.setitem(unet.CONFIGS, "small", small())
    found, orders = [], []
    for name in "small", "small" + unet.NCHW:
        config = unet.config_of(name)
        network = unet.UNetModel(config)
        unet.fill(network)
        seen = orders.append([]) or orders[-1]
        for module in network.modules():
            if isinstance(module, unet.SpatialTransformer):
                module.register_forward_hook(lambda _, __, y, seen=seen: seen.append(y.is_contiguous()))
        with torch.no_grad():
            found.append(network(*unet.inputs(config, 2, torch.float32, torch.device("cpu"))))
    torch.testing.assert_close(found[0], found[1])
    assert orders[0] and not any(orders[0]) and all(orders[1])
    with torch.inference_mode():
        assert networks.build("bf16", "small" + unet.NCHW, torch.device("cpu"), tmp_path).step().shape[0] == 2


def test_ours_is_quantized_and_close(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(unet.CONFIGS, "small", small())
    cpu = torch.device("cpu")
    with torch.inference_mode():
        want = networks.build("bf16", "small", cpu, tmp_path).step().float()
        for _ in range(2):  # the second time with the calibration of the first
            ours = networks.build(networks.OURS, "small", cpu, tmp_path)
            error = (ours.step().float() - want).norm() / want.norm()
            assert 0 < error < 0.1
    assert "W8A8" in ours.notes and ours.resident > 0


def test_measure_names_what_it_left_out(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(unet.CONFIGS, "small", small())
    monkeypatch.setattr(rounds, "KEPT", tmp_path)
    with torch.inference_mode():
        results: list[dict] = []
        rounds.measure("small", ["fp32", "unheard_of"], torch.device("cpu"), 2, 60.0, results.append)
    found = results[-1]
    assert [r["rounds"] for r in results] == [1, 2]
    assert found["rounds"] == 2 and set(found["ratio"]) == {"fp32"}
    assert set(found["left_out"]) == {"unheard_of"}
    assert set(found["median_s"]) == {"fp32", networks.OURS}


def test_merge_keeps_earlier_contenders() -> None:
    old = {"rounds": 3, "median_s": {"a": 1.0, "b": 2.0}, "left_out": {"c": "missing"}}
    new = {"rounds": 4, "median_s": {"a": 1.5, "c": 3.0}, "left_out": {}}
    assert rounds.merge(old, new) == {
        "rounds": 4, "median_s": {"a": 1.5, "b": 2.0, "c": 3.0}, "left_out": {},
    }  # fmt: skip


def test_merge_keeps_the_longer_measurement_of_ours() -> None:
    ours = networks.OURS
    old = {"rounds": 5, "median_s": {ours: 1.0, "b": 2.0}}
    new = {"rounds": 2, "median_s": {ours: 1.5, "c": 3.0}, "left_out": {}}
    assert rounds.merge(old, new) == {"rounds": 5, "median_s": {ours: 1.0, "b": 2.0, "c": 3.0}, "left_out": {}}
    assert rounds.merge(new, old)["median_s"][ours] == 1.0
