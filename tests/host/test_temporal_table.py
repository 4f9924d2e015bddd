"""The curve that can stand in for temporal weights: made from a MODEL, read by layers without parameters."""

import pytest
import torch

from support import patchers

table_module = patchers.module("tfmq.host.temporal_table")
model = patchers.module("tfmq.host.model")


@pytest.fixture(scope="module")
def base():
    return patchers.load()


@pytest.fixture(scope="module")
def table(base):
    with torch.inference_mode():
        return table_module.make(base, base, model.time_axis(base), lambda done, total: None)


def test_the_layers_answer_as_the_weights_do(base, table):
    from comfy.ldm.modules.diffusionmodules.util import timestep_embedding

    network, t = base.model.diffusion_model, torch.tensor([0.0, 17.0, 500.0, 999.0])
    moment = table_module.Moment(table.curve)
    moment.set(t)
    x = torch.nn.functional.silu(network.time_embed(timestep_embedding(t, network.model_channels)))
    projections = [path for path in table.layers if "emb_layers" in path]
    assert projections
    for path in projections:
        leaf = table_module.TableLinear(path, table.layers[path], table.curve.rows[path], moment)
        assert not list(leaf.parameters())
        assert patchers.distance(leaf(x), network.get_submodule(path)(x)) < 1e-3


def test_the_table_goes_through_a_file(table):
    tensors = {"other": torch.zeros(1), **table.tensors()}
    back = table_module.taken_from({"temporal": table.manifest()}, tensors)
    assert list(tensors) == ["other"] and back.layers == table.layers and back.nbytes_removed == table.nbytes_removed
    t = torch.tensor([3.25, 700.0])
    assert all(torch.equal(rows, back.curve.at(t)[path]) for path, rows in table.curve.at(t).items())
    with pytest.raises(patchers.TfmqError, match="damaged"):
        table_module.taken_from({"temporal": {}}, {})
