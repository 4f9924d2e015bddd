"""TFMQ Temporal Cache on tiny MODELs: the same bits as without it, with fewer weights loaded."""

from __future__ import annotations

import logging
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load as read_safetensors

from bench.temporal import cache as tiny
from devkit.client import Client
from devkit.inprocess import PACK_MODULE, load_pack
from support import tiny as checkpoints

load_pack()

import comfy.controlnet  # noqa: E402
import comfy.hooks  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402

from bench.quality.host_formats import int8_model  # noqa: E402

host = import_module(f"{PACK_MODULE}.tfmq.host.temporal.cache")
twin = import_module(f"{PACK_MODULE}.tfmq.host.temporal.twin")
TfmqError = import_module(f"{PACK_MODULE}.tfmq.errors").TfmqError
PLENTY = 10**9


def sample(patcher, name, sampler="euler", steps=3, **changed):
    return tiny.sample(patcher, name, sampler, steps, **changed)


def trusted(cached) -> bool:
    return all(layer.trusted for layer in host.require(cached).layers.values())


@pytest.mark.parametrize("name", tiny.MODELS_HERE)
def test_the_picture_is_the_same_bit_by_bit(name: str):
    base = tiny.patcher_of(name)
    plain = sample(base, name)
    cached = host.apply(base, PLENTY)
    assert torch.equal(sample(cached, name), plain)
    run = host.require(cached).last
    assert (run.calls, run.hits, run.filled, run.prefetched, run.bypassed) == (3, 2, 1, 2, 0)
    assert trusted(cached)
    assert torch.equal(sample(base, name), plain), "the MODEL that went in has changed"


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m_sde", "ddim"])
def test_samplers_on_and_off_the_grid(sampler: str):
    base = tiny.patcher_of("Flux")
    cached = host.apply(base, PLENTY)
    assert torch.equal(sample(cached, "Flux", sampler), sample(base, "Flux", sampler))
    run = host.require(cached).last
    assert run.bypassed == 0 and run.hits + run.filled == run.calls
    assert (run.filled > 1) == (sampler == "dpm_2")


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_batches_share_equal_rows(cfg: float, monkeypatch: pytest.MonkeyPatch):
    """A product of several threads may make two outputs of one input; then they are not shared. Here each row is a
    product of its own."""
    linear = torch.nn.functional.linear

    def row_by_row(x, *rest):
        return torch.cat([linear(row, *rest) for row in x.split(1)]) if x.dim() == 2 else linear(x, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", row_by_row)
    base = tiny.patcher_of("SDXL")
    cached = host.apply(base, PLENTY)
    assert torch.equal(sample(cached, "SDXL", cfg=cfg, batch=3), sample(base, "SDXL", cfg=cfg, batch=3))
    record = host.require(cached)
    distinct = 1 if cfg == 1.0 else 2
    row = host.slot_bytes(record, torch.float32)
    assert record.table.nbytes == 3 * distinct * row


def test_the_weights_are_neither_loaded_nor_counted():
    base = tiny.patcher_of("SD3")
    size, parameters = base.model_size(), sum(p.numel() for p in base.model.parameters())
    cached = host.apply(base, PLENTY)
    record = host.require(cached)
    assert cached.model_size() == size - record.nbytes
    assert cached.patches_uuid != base.patches_uuid
    comfy.model_management.load_models_gpu([cached])
    names = {name for name, _ in cached.model.named_parameters()}
    assert not any("adaLN_modulation" in name for name in names)
    loaded = {entry[2] for entry in cached._load_list()}
    assert not any(path in name for name in loaded for path in record.layers)
    for layer in record.layers.values():  # dynamic loading looks for these
        assert not hasattr(layer, "comfy_cast_weights") and not list(layer.buffers())
    assert sum(p.numel() for p in cached.model.parameters()) == parameters - record.parameters
    summary = host.describe(cached)
    assert f"{len(record.layers)} temporal layers" in summary and f"{record.parameters / 1e6:.2f} M" in summary


@pytest.mark.parametrize("order", ["before", "after", "after a run"])
def test_a_lora_on_temporal_layers_is_honoured(order: str):
    base = tiny.patcher_of("AuraFlow")
    cached = host.apply(base, PLENTY)
    paths = [*list(host.require(cached).layers)[:2], "t_embedder.mlp.2"]
    plain, wanted = sample(base, "AuraFlow"), sample(tiny.with_lora(base, paths), "AuraFlow")
    assert not torch.equal(plain, wanted)
    if order == "before":
        cached = host.apply(tiny.with_lora(base, paths), PLENTY)
        assert torch.equal(sample(cached, "AuraFlow"), wanted)
        return
    if order == "after a run":  # the modules of the cache stand in the shared network while the LoRA is added
        assert torch.equal(sample(cached, "AuraFlow"), plain)
    assert torch.equal(sample(tiny.with_lora(cached, paths), "AuraFlow"), wanted)
    stronger = sample(tiny.with_lora(cached, paths, strength=2.0), "AuraFlow")
    assert torch.equal(stronger, sample(tiny.with_lora(base, paths, strength=2.0), "AuraFlow"))
    assert torch.equal(sample(cached, "AuraFlow"), plain)


def test_a_model_that_is_loaded_in_part(monkeypatch: pytest.MonkeyPatch):
    base = tiny.patcher_of("Flux")
    plain = sample(base, "Flux")
    cached = host.apply(base, PLENTY)
    whole = ModelPatcher.partially_load

    def in_part(self, device, extra_memory=0, force_patch_weights=False):
        return whole(self, device, 100_000, force_patch_weights)

    monkeypatch.setattr(ModelPatcher, "partially_load", in_part)
    assert torch.equal(sample(cached, "Flux"), plain)
    assert cached.model.model_lowvram and host.require(cached).last.hits == 2


def test_dynamic_loading_merges_as_it_would_without_the_cache():
    base = tiny.patcher_of("AuraFlow")
    path = next(iter(host.require(host.apply(base, PLENTY)).layers))
    key = f"diffusion_model.{path}.weight"
    patched = tiny.with_lora(base, [path])
    weight = base.model.state_dict()[key]
    dynamic = SimpleNamespace(patches=patched.patches, is_dynamic=lambda: True)
    merged = twin.merged(weight, key, dynamic, weight)
    assert torch.equal(merged, patched.patch_weight_to_device(key, return_weight=True))
    assert not torch.equal(merged, weight)


def test_what_is_saved_is_the_whole_model():
    base = tiny.patcher_of("AuraFlow")
    wanted = {key: value.clone() for key, value in base.model.state_dict().items()}
    cached = host.apply(base, PLENTY)
    comfy.model_management.load_models_gpu([cached])
    found = cached.model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_clone_with_another_network_gets_modules_of_its_own():
    base = tiny.patcher_of("AuraFlow")
    cached = host.apply(base, PLENTY)
    first = sample(cached, "AuraFlow")
    other = tiny.patcher_of("AuraFlow")
    clone = cached.clone(model_override=other.get_clone_model_override())
    host.require(cached).on_other_network(cached, clone)
    assert host.require(clone) is not host.require(cached)
    assert torch.equal(sample(clone, "AuraFlow"), first)
    comfy.model_management.unload_all_models()
    own = {id(layer.real) for layer in host.require(clone).layers.values()}
    assert own <= {id(module) for module in other.model.modules()}


def test_a_controlnet_goes_through():
    class Control(comfy.controlnet.ControlBase):
        """Adds to the first block of a UNet's decoder."""

        def get_control(self, *_):
            return {"output": [torch.full((1, 64, 4, 4), 0.3)], "middle": [], "input": []}

    base = tiny.patcher_of("SDXL")
    cached = host.apply(base, PLENTY)

    def controlled(patcher):
        texts = [tiny.conditioning("SDXL", seed) for seed in (1, 2)]
        texts[0][0][1]["control"] = Control()
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            return comfy.sample.sample(
                patcher, noise, 3, 3.0, "euler", "normal", *texts, torch.zeros(1, 4, 8, 8), disable_pbar=True, seed=0
            )

    wanted = controlled(base)
    assert not torch.equal(wanted, sample(base, "SDXL"))
    assert torch.equal(controlled(cached), wanted)
    assert host.require(cached).last.bypassed == 0


def test_rows_are_kept_from_run_to_run():
    base = tiny.patcher_of("SDXL")
    cached = host.apply(base, PLENTY)
    first = sample(cached, "SDXL")
    other = sample(cached, "SDXL", seed=7)
    assert not torch.equal(first, other)
    assert host.require(cached).last.filled == 1
    assert torch.equal(sample(cached, "SDXL"), first)
    assert host.require(cached).last.hits == 3


def test_a_small_budget_costs_hits_but_not_bits():
    base = tiny.patcher_of("SDXL")
    cached = host.apply(base, 1)
    record = host.require(cached)
    row = host.slot_bytes(record, torch.float32)
    cached = host.apply(base, 4 * row)  # two steps with two rows
    assert torch.equal(sample(cached, "SDXL", steps=5), sample(base, "SDXL", steps=5))
    record = host.require(cached)
    assert record.last.evicted > 0 and 0 < record.last.hits < 4
    assert record.table.nbytes <= 4 * row


def test_out_of_memory_while_computing_ahead(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    base = tiny.patcher_of("Flux")
    cached = host.apply(base, PLENTY)
    table = host.require(cached).table
    write, written = table.write, []

    def full(key, path, rows):
        written.append(key)
        if len(written) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        write(key, path, rows)

    monkeypatch.setattr(table, "write", full)
    with caplog.at_level(logging.WARNING):
        found = sample(cached, "Flux")
    assert torch.equal(found, sample(base, "Flux"))
    assert "out of memory while computing features ahead" in caplog.text
    run = host.require(cached).last
    assert (run.filled, run.prefetched, run.bypassed) == (3, 0, 0)


def test_nan_features_are_named():
    base = tiny.patcher_of("SD3")
    path = "joint_blocks.1.x_block.adaLN_modulation.1"
    base.model.diffusion_model.get_submodule(path).bias.data[0] = float("nan")
    with pytest.raises(TfmqError, match=path):
        sample(host.apply(base, PLENTY), "SD3")


def test_models_without_a_tib_are_refused():
    base = tiny.patcher_of("AuraFlow")
    base.model.diffusion_model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(TfmqError, match="nothing to cache"):
        host.apply(base, PLENTY)
    with pytest.raises(TfmqError, match="not a diffusion MODEL"):
        host.apply(object(), PLENTY)
    with pytest.raises(TfmqError, match="budget"):
        host.apply(tiny.patcher_of("AuraFlow"), 0)


def test_a_timestep_per_token_runs_on_the_weights(caplog: pytest.LogCaptureFixture):
    base = tiny.patcher_of("Wan2.2-5B")
    cached = host.apply(base, PLENTY)
    shape = (1, *tiny.MODELS_HERE["Wan2.2-5B"].latent)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, *shape[2:])
    mask[:, :, 0] = 0  # the first frame is given

    def masked(patcher):
        texts = [tiny.conditioning("Wan2.2-5B", seed) for seed in (1, 2)]
        with torch.inference_mode():
            return comfy.sample.sample(
                patcher, noise, 2, 3.0, "euler", "normal", *texts, torch.ones(shape), noise_mask=mask,
                disable_pbar=True, seed=0,
            )  # fmt: skip

    assert torch.equal(masked(cached), masked(base))
    assert host.require(cached).last.bypassed == 2
    assert "one timestep per token" in caplog.text


def test_a_reference_with_a_timestep_of_its_own(monkeypatch: pytest.MonkeyPatch):
    plain = tiny.conditioning

    def edit(name, seed):
        found = plain(name, seed)
        found[0][1] |= {
            "reference_latents": [torch.ones(1, 16, 1, 8, 8)], "reference_latents_method": "index_timestep_zero",
        }  # fmt: skip
        return found

    monkeypatch.setattr(tiny, "conditioning", edit)
    base = tiny.patcher_of("Qwen-Image")
    cached = host.apply(base, PLENTY)
    assert torch.equal(sample(cached, "Qwen-Image"), sample(base, "Qwen-Image"))
    assert host.require(cached).last.hits == 2 and trusted(cached)


def test_an_embedding_that_another_node_changes(caplog: pytest.LogCaptureFixture):
    def patch(args, extra):
        return extra["original_block"]({**args, "vec": args["vec"] * 1.5})

    base = tiny.patcher_of("Flux")
    base.model_options["transformer_options"]["patches_replace"] = {"dit": {("double_block", 0): patch}}
    cached = host.apply(base, PLENTY)
    assert torch.equal(sample(cached, "Flux"), sample(base, "Flux"))
    wrong = {path for path, layer in host.require(cached).layers.items() if not layer.trusted}
    assert wrong == {"double_blocks.0.img_mod.lin", "double_blocks.0.txt_mod.lin"}
    assert "another input than expected" in caplog.text


def test_weights_in_the_hosts_own_int8():
    base = tiny.patcher_of("SD3")
    paths = list(host.require(host.apply(base, PLENTY)).layers)
    with torch.inference_mode():  # as in a graph
        quantized = int8_model(base, paths, rotated=False)
    plain = sample(quantized, "SD3")
    assert not torch.equal(plain, sample(base, "SD3"))
    cached = host.apply(quantized, PLENTY)
    assert torch.equal(sample(cached, "SD3"), plain)
    lora = paths[:1]
    assert torch.equal(sample(tiny.with_lora(cached, lora), "SD3"), sample(tiny.with_lora(quantized, lora), "SD3"))
    assert trusted(cached)


def test_temporal_layers_that_tfmq_has_quantized_are_left_alone():
    class Leaf(host.HostLeaf):
        def __init__(self):
            torch.nn.Module.__init__(self)

    base = tiny.patcher_of("AuraFlow")
    paths = list(host.require(host.apply(base, PLENTY)).layers)
    for path in paths[:-1]:
        base.add_object_patch(f"diffusion_model.{path}", Leaf())
    assert list(host.require(host.apply(base, PLENTY)).layers) == paths[-1:]
    base.add_object_patch(f"diffusion_model.{paths[-1]}", Leaf())
    with pytest.raises(TfmqError, match="quantized by TFMQ already"):
        host.apply(base, PLENTY)


def test_unloaded_between_runs_and_on_another_device():
    base = tiny.patcher_of("Flux")
    cached = host.apply(base, PLENTY)
    record = host.require(cached)
    first = sample(cached, "Flux")
    import_module(f"{PACK_MODULE}.tfmq.host.model").release(cached)
    assert record.table.nbytes == 0
    assert torch.equal(sample(cached, "Flux"), first)
    assert record.last.filled == 1
    for path, rows in record.table.rows.items():
        record.table.rows[path] = rows.to("meta")
    assert torch.equal(sample(cached, "Flux"), first)
    assert record.last.filled == 1 and record.last.bypassed == 0


def test_a_cache_on_a_cache_takes_its_place():
    base = tiny.patcher_of("AuraFlow")
    once = host.apply(base, PLENTY)
    twice = host.apply(once, 2 * PLENTY)
    assert twice.model_size() == once.model_size()
    assert host.require(twice).budget == 2 * PLENTY
    assert torch.equal(sample(twice, "AuraFlow"), sample(base, "AuraFlow"))
    assert host.require(twice).last.hits == 2
    assert host.require(once).last.calls == 0


def test_a_lora_that_is_switched_per_prompt():
    name = "AuraFlow"
    base = tiny.patcher_of(name)
    cached = host.apply(base, PLENTY)
    path = next(iter(host.require(cached).layers))
    weight = base.model.state_dict()[f"diffusion_model.{path}.weight"]
    change = {f"diffusion_model.{path}.weight": ("diff", (torch.ones_like(weight) * 0.1,))}

    def hooked(patcher):
        group = comfy.hooks.HookGroup()
        hook = comfy.hooks.WeightHook(strength_model=1.0)
        hook.weights = change
        hook.need_weight_init = False
        group.add(hook)
        positive = tiny.conditioning(name, 1)
        positive[0][1]["hooks"] = group
        mine = patcher.clone()
        mine.add_hook_patches(hook, change, 1.0)
        shape = (1, *tiny.MODELS_HERE[name].latent)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            return comfy.sample.sample(
                mine, noise, 2, 3.0, "euler", "normal", positive, tiny.conditioning(name, 2), torch.zeros(shape),
                disable_pbar=True, seed=0,
            )  # fmt: skip

    wanted = hooked(base)
    assert not torch.equal(wanted, sample(base, name, steps=2))
    assert torch.equal(hooked(cached), wanted)
    assert torch.equal(sample(cached, name), sample(base, name))


def test_in_a_graph(client: Client):
    """The node in a running ComfyUI, with a LoRA-free MODEL from the host's own loader."""
    flux = checkpoints.FLUX
    settings = {"seed": 3, "steps": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}

    def graph(model: str) -> dict:
        links = {"model": [model, 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
        return {
            "1": flux.loader,
            "2": flux.conditioning(seed=1),
            "3": flux.conditioning(seed=2),
            "4": flux.empty_latent,
            "5": {"class_type": "KSampler", "inputs": {**settings, **links}},
            "6": {"class_type": "SaveLatent", "inputs": {"samples": ["5", 0], "filename_prefix": f"test/cache{model}"}},
            "7": {"class_type": "TFMQ_TemporalCache", "inputs": {"model": ["1", 0], "budget_mb": 64}},
            "8": {"class_type": "PreviewAny", "inputs": {"source": ["7", 1]}},
        }

    def latents(model: str) -> torch.Tensor:
        result = client.queue(graph(model))
        assert "a table answers for" in str(result.outputs["8"])
        return read_safetensors(client.fetch(result.outputs["6"]["latents"][0]))["latent_tensor"]

    assert torch.equal(latents("7"), latents("1"))


def test_projected_sizes_of_real_models():
    qwen = tiny.projected("Qwen-Image", 50, 1)
    assert qwen["parameters_not_resident"] == 6_815_864_832
    assert qwen["table_bytes"] == 50 * 2 * 2_217_984
