"""What a person sees while the kernels of a first call are compiled."""

import pytest
import torch

from support import patchers

import comfy.model_management  # isort: skip
import comfy.utils  # isort: skip

first_run = patchers.module("tfmq.host.first_run")
table = patchers.module("tfmq.kernels.table")
tune = patchers.module("tfmq.kernels.triton.tune")

GPU = tune.Machine("a GPU", (9, 0), 132)
SHAPES = [tune.Shape("3 x 3 int8", 8192, n, 320, 9) for n in (320, 640, 1280)]


@pytest.fixture
def shown(monkeypatch):
    """(value, total) as the front end gets them."""
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total)))
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0)
    return seen


def network(tuner, shapes, calls=None):
    """Stands for the network: it meets some products."""

    def executor(x, sigma):
        for shape in shapes:
            tuner.choose(shape, GPU, lambda tile: calls.append(tile) or 1.0 if calls is not None else 1.0)
        return x + sigma

    return executor


@pytest.mark.parametrize("expected", [1, 3, 10])
def test_a_bar_while_kernels_are_compiled(shown, caplog, expected):
    caplog.set_level("INFO")
    run, tuner = first_run.FirstRun(expected), tune.Tuner(None)
    assert float(run(network(tuner, SHAPES), torch.ones(()), torch.ones(()))) == 2
    values, totals = zip(*shown, strict=True)
    assert list(values) == sorted(values) and values[0] == 0 and len(values) == len(SHAPES) * tune.TRIED + 1
    assert totals[-1] == max(expected, len(SHAPES)) * tune.TRIED and values[-1] == len(SHAPES) * tune.TRIED
    lines = [r.getMessage() for r in caplog.records if "compiling int8 kernels" in r.getMessage()]
    assert len(lines) == 1 and f"0 of about {expected} done, {expected} left" in lines[0]
    shown.clear()
    run(network(tuner, SHAPES), torch.ones(()), torch.ones(()))
    assert shown == [], "nothing is new"
    tune.tell(SHAPES[0], 0, 1)
    assert shown == [], "nobody watches between two calls"


def test_kernels_whose_tiles_are_known(shown, tmp_path):
    """In a process of their own they may still have to be compiled."""
    path = tmp_path / "kernels.json"
    first_run.FirstRun(3)(network(tune.Tuner(path), SHAPES), torch.ones(()), torch.ones(()))
    shown.clear()
    first_run.FirstRun(3)(network(tune.Tuner(path), SHAPES), torch.ones(()), torch.ones(()))
    assert [value for value, _ in shown] == [0, tune.TRIED, 2 * tune.TRIED]


def test_an_interrupt_is_taken_between_two_kernels(shown):
    tuner, calls = tune.Tuner(None), []

    def executor(x, sigma):
        def time(tile):
            calls.append(tile)
            if len(calls) == 2:
                comfy.model_management.interrupt_current_processing()
            return 1.0

        tuner.choose(SHAPES[0], GPU, time)

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        first_run.FirstRun(3)(executor, torch.ones(()), torch.ones(()))
    assert len(calls) == 2
    comfy.model_management.interrupt_current_processing(False)
    known = []
    first_run.FirstRun(3)(network(tuner, SHAPES[:1], known), torch.ones(()), torch.ones(()))
    assert known, "what was interrupted is not taken for known"


def test_only_where_triton_runs_a_layer(quantized, monkeypatch):
    quantized = quantized.clone()
    assert first_run.WRAPPER not in quantized.wrappers["apply_model"], "this is a CPU"
    plan = quantized.attachments["tfmq"].plan
    triton = next(b for b in table.BACKENDS if b.name == "triton")
    monkeypatch.setattr(first_run, "pick", lambda *_: triton)
    expected = first_run.kinds(quantized, plan)
    assert 1 < expected < len(plan.layers)
    first_run.attach(quantized, plan)
    (wrapper,) = quantized.wrappers["apply_model"][first_run.WRAPPER]
    assert wrapper.expected == expected
    picture = patchers.sample(quantized)  # in this process nothing is compiled
    assert bool(picture.isfinite().all())
