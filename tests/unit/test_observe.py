"""Observers against brute force on inputs that fit the sample."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq.decide.grids import static_grid
from tfmq.errors import TfmqError
from tfmq.observe.balance import choose_balance
from tfmq.observe.layer import BINS, KEPT, LayerObserver
from tfmq.observe.model import ModelObserver
from tfmq.observe.statistics import LayerStatistics
from tfmq.timeline import Clock, Partition, TimeAxis

INTERVALS = 4
Run = Callable[[nn.Module], None]


def clock() -> Clock:
    return Clock(TimeAxis(0.0, 1000.0), Partition.uniform(INTERVALS))


class Net(nn.Module):
    """Runs in another order than it registers; `unused` never runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.out = nn.Linear(6, 3)
        self.conv = nn.Conv2d(6, 5, 3, padding=1)
        self.tokens = nn.Linear(6, 4)
        self.vector = nn.Linear(6, 4)
        self.unused = nn.Linear(6, 4)
        with torch.no_grad():
            self.tokens.weight[:, 2] /= 40  # as in real checkpoints: a loud channel is read by quiet weights

    def forward(self, image: Tensor, emb: Tensor) -> Tensor:
        self.conv(image)
        self.vector(emb)
        rows = image.flatten(2).transpose(1, 2)
        self.tokens(rows)
        return self.out(rows.clone())  # another tensor: not a sibling of `tokens`


LAYERS = ("out", "conv", "tokens", "vector", "unused")


def calls(stage: int) -> list[tuple[float, Tensor, Tensor]]:
    g = torch.Generator().manual_seed(stage)
    out = []
    for t in (950.0, 900.0, 600.0, 30.0):  # interval 1 is never visited
        image = torch.randn(2, 6, 3, 4, generator=g) * (1 + t / 1000) + 0.3
        image[:, 2] *= 40  # a channel to balance
        out.append((t, image, torch.randn(2, 6, generator=g)))
    return out


def observed(layers: tuple[str, ...] = LAYERS) -> tuple[Net, ModelObserver, list[list[tuple[float, Tensor, Tensor]]]]:
    net, stages = Net(), [calls(0), calls(1)]
    with ModelObserver([(path, net.get_submodule(path)) for path in layers], clock()) as watch, torch.no_grad():
        for stage, run in enumerate(stages):
            if stage:
                watch.end_first_stage()
            for t, image, emb in run:
                watch.start_call(torch.tensor([t, t]))
                net(image, emb)
    return net, watch, stages


def rows_of(path: str, image: Tensor, emb: Tensor) -> Tensor:
    return emb if path == "vector" else image.movedim(1, -1).reshape(-1, 6)


@pytest.mark.parametrize("path", ["conv", "tokens", "vector"])
def test_statistics_equal_brute_force(path: str) -> None:
    net, watch, stages = observed()
    found = watch.statistics()[path]
    inputs = [[(int(t * INTERVALS / 1000), rows_of(path, *x)) for t, *x in stage] for stage in stages]
    both = inputs[0] + inputs[1]
    low, high = torch.full((INTERVALS, 6), float("inf")), torch.full((INTERVALS, 6), float("-inf"))
    first_low, first_high = low.clone(), high.clone()
    for place, part in enumerate(both):
        interval, rows = part
        low[interval] = torch.minimum(low[interval], rows.amin(0))
        high[interval] = torch.maximum(high[interval], rows.amax(0))
        if place < len(inputs[0]):
            first_low[interval] = torch.minimum(first_low[interval], rows.amin(0))
            first_high[interval] = torch.maximum(first_high[interval], rows.amax(0))
    square = torch.cat([rows for _, rows in inputs[0]]).double().square().mean(0)
    weight = net.get_submodule(path).weight
    balance = choose_balance(first_low, first_high, square, weight)
    assert (found.balance is None) == (balance is None)
    if path == "tokens":
        assert balance is not None  # the case is worth its name
    if balance is not None:
        torch.testing.assert_close(found.balance, balance)
    s = balance if balance is not None else torch.ones(6)
    torch.testing.assert_close(found.low, (low / s).amin(1))
    torch.testing.assert_close(found.high, (high / s).amax(1))

    # the distribution: second stage only
    expected = torch.zeros(INTERVALS, BINS, dtype=torch.int64)
    error, energy = torch.zeros(INTERVALS, dtype=torch.float64), torch.zeros(INTERVALS, dtype=torch.float64)
    for interval, rows in inputs[1]:
        x = rows / s
        a, b = float(found.bin_low[interval]), float(found.bin_high[interval])
        place = ((x.double() - a) / (b - a) * BINS).floor().clamp(0, BINS - 1).long()
        expected[interval] += torch.bincount(place.flatten(), minlength=BINS)
        least, most = x.double().amin(1, keepdim=True), x.double().amax(1, keepdim=True)
        step = (most - least) / 255
        error[interval] += (((x - least) / step).round() * step + least - x).square().sum()
        energy[interval] += x.double().square().sum()
    assert torch.equal(found.histogram.sum(1), expected.sum(1))
    # neighbouring bins may swap an entry that lies on their edge
    assert int((found.histogram.cumsum(1) - expected.cumsum(1)).abs().max()) <= 1
    if path == "conv":
        assert found.kind == "conv2d" and not bool(found.row_error.any())
    else:
        assert found.kind == "linear"
        torch.testing.assert_close(found.row_error, torch.stack([error, energy], 1), rtol=1e-3, atol=1e-9)
    assert found.shape == tuple(weight.shape)
    assert found.vector == (path == "vector")


def test_order_and_the_layer_that_never_ran() -> None:
    _, watch, _ = observed()
    found = watch.statistics()
    assert list(found) == ["conv", "vector", "tokens", "out"]
    assert [s.order for s in found.values()] == [0, 1, 2, 3]
    assert watch.observers["unused"].statistics() is None


def test_a_layer_of_the_first_stage_alone_says_nothing() -> None:
    layer = nn.Linear(6, 4)
    observer = LayerObserver(layer, INTERVALS)
    observer.observe(torch.randn(3, 6), 0)
    assert observer.statistics() is None
    observer.end_first_stage(layer.weight)
    assert observer.statistics() is None
    late = LayerObserver(layer, INTERVALS)
    late.end_first_stage(layer.weight)
    late.observe(torch.randn(3, 6), 0)
    assert late.statistics() is None


def finish(observer: LayerObserver, weight: Tensor, *stages: list[tuple[int, Tensor]]) -> LayerStatistics:
    for number, stage in enumerate(stages):
        if number:
            observer.end_first_stage(weight)
        for interval, x in stage:
            observer.observe(x, interval)
    found = observer.statistics()
    assert found is not None
    return found


def test_unvisited_intervals_count_nothing_and_are_filled() -> None:
    layer = nn.Linear(6, 4)
    narrow, wide = torch.linspace(-1, 1, 60).reshape(10, 6), torch.linspace(-3, 3, 60).reshape(10, 6)
    run = [(0, narrow), (2, wide)]
    found = finish(LayerObserver(layer, INTERVALS), layer.weight, run, run)
    assert (found.histogram.sum(1) > 0).tolist() == [True, False, True, False]
    scale, _ = static_grid(found, "minmax")
    torch.testing.assert_close(scale, torch.tensor([2.0, 4.0, 6.0, 6.0]) / 255, rtol=1e-2, atol=0)


def test_an_interval_first_seen_in_the_second_stage() -> None:
    layer = nn.Linear(6, 4)
    x = torch.linspace(-1, 2, 60).reshape(10, 6)
    found = finish(LayerObserver(layer, INTERVALS), layer.weight, [(0, x)], [(0, x), (3, 3 * x)])
    assert int(found.histogram[3].sum()) == 60  # entries beyond the bins go to the outermost
    assert float(found.high[3]) == pytest.approx(6.0)
    assert bool(torch.isfinite(torch.stack(static_grid(found, "mse")[:1])).all())


def test_constant_and_zero_inputs() -> None:
    layer = nn.Linear(6, 4)
    for x in (torch.zeros(5, 6), torch.full((5, 6), 3.0)):
        found = finish(LayerObserver(layer, 1), layer.weight, [(0, x)], [(0, x)])
        assert int(found.histogram.sum()) == 30
        scale, zero_point = static_grid(found, "minmax")
        back = ((x / scale).round() + zero_point).clamp(0, 255).sub(zero_point) * scale
        torch.testing.assert_close(back, x, rtol=0.01, atol=1e-6)


def test_empty_input_is_no_call() -> None:
    observer = LayerObserver(nn.Linear(6, 4), 1)
    observer.observe(torch.empty(0, 6), 0)
    assert observer.calls == 0


@pytest.mark.parametrize("kind", ["depthwise", "grouped"])
def test_grouped_convolutions(kind: str) -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=8 if kind == "depthwise" else 2)
    x = torch.randn(2, 8, 5, 5)
    x[:, 1] *= 50
    found = finish(LayerObserver(conv, 1), conv.weight, [(0, x)], [(0, x)])
    assert found.balance is None
    assert float(found.high[0]) == pytest.approx(float(x.max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    layer = nn.Linear(6, 4, dtype=dtype)
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = finish(LayerObserver(layer, 1), layer.weight, [(0, x)], [(0, x)])
    assert found.low.dtype == found.bin_low.dtype == torch.float32
    assert float(found.low[0]) == float(x.min()) and float(found.high[0]) == float(x.max())


# --- sampling and memory ----------------------------------------------------------------------------------------------


def test_the_sample_moves_and_the_ranges_see_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tfmq.observe.layer.SAMPLE", 60)
    layer = nn.Linear(6, 4)
    observer = LayerObserver(layer, 1)
    x = torch.arange(100.0).unsqueeze(1).repeat(1, 6)
    observer.observe(x, 0)
    observer.end_first_stage(layer.weight)
    seen = torch.zeros(BINS, dtype=torch.int64)
    for _ in range(40):
        observer.observe(x, 0)
        found = observer.statistics()
        assert found is not None
        added = found.histogram[0] - seen
        assert 0 < int(added.sum()) <= 60
        seen = found.histogram[0].clone()
    assert int((seen > 0).sum()) > 90  # not always the same rows
    assert float(observer.high.max()) == 99.0 and float(observer.low.min()) == 0.0


def size(observer: LayerObserver) -> int:
    return sum(v.nbytes for v in vars(observer).values() if isinstance(v, Tensor))


def test_memory_is_constant_and_no_input_is_kept() -> None:
    layer = nn.Linear(6, 4)
    observer = LayerObserver(layer, INTERVALS)
    for stage in range(2):
        if stage:
            observer.end_first_stage(layer.weight)
        sizes, inputs = set(), []
        for call in range(20):
            x = torch.randn(50 + call, 6)
            inputs.append(weakref.ref(x))
            observer.observe(x, call % INTERVALS)
            sizes.add((size(observer), len(vars(observer))))
            assert not any(isinstance(v, (list, dict)) for v in vars(observer).values())
            del x
        gc.collect()
        assert len(sizes) == 1
        assert not any(ref() is not None for ref in inputs)
    # 8 bytes an entry at most; a histogram for each of the two branches of guidance
    assert size(observer) <= 8 * INTERVALS * (2 * 6 + 2 * BINS + 8) + 2 * KEPT * 6


@pytest.mark.parametrize("stages", [1, 2])
def test_a_sample_of_rows_of_both_stages(stages: int) -> None:
    layer = nn.Linear(6, 4)
    observer = LayerObserver(layer, INTERVALS)
    inputs = [torch.randn(5, 30, 6).bfloat16().float() for _ in range(60)]
    for call, x in enumerate(inputs[: 30 * stages]):
        if call == 30:
            observer.end_first_stage(layer.weight)
        observer.observe(x, call % INTERVALS)
    if stages == 1:
        observer.end_first_stage(layer.weight)
        observer.observe(inputs[0], 0)
    rows = finish(observer, layer.weight).rows
    assert rows is not None and rows.dtype == torch.bfloat16 and rows.shape == (KEPT, 6)
    everything = torch.stack(inputs).reshape(60, -1, 6)
    calls = [int((everything == row).all(2).any(1).nonzero().flatten()[0]) for row in rows.float()]
    assert len(set(calls)) > 20 and len({tuple(row) for row in rows.tolist()}) > KEPT * 0.9
    if stages == 2:
        assert min(calls) < 30 <= max(calls)


@pytest.mark.parametrize("kernel", [1, (3, 2)], ids=str)
@pytest.mark.parametrize("more", [{}, {"padding": (2, 1)}, {"stride": 2, "padding": 1}, {"dilation": (2, 1)}], ids=str)
def test_the_rows_of_a_convolution_are_what_its_weight_is_multiplied_by(kernel: Any, more: dict[str, Any]) -> None:
    layer = nn.Conv2d(3, 5, kernel, **more)
    observer = LayerObserver(layer, INTERVALS)
    x = torch.randn(2, 3, 7, 6).bfloat16().float()
    rows = finish(observer, layer.weight, [(0, x)] * 20, [(0, x)]).rows
    assert rows is not None and rows.shape == (KEPT, layer.weight[0].numel())
    sizes = {"dilation": 1, "padding": 0, "stride": 1} | more
    patches = nn.functional.unfold(x, layer.kernel_size, **sizes).movedim(1, -1).reshape(-1, rows.shape[1])
    assert all(bool((patches == row).all(1).any()) for row in rows.float())
    assert len({tuple(row) for row in rows.tolist()}) > 10


def test_no_rows_where_the_weight_does_not_meet_them() -> None:
    grouped = nn.Conv2d(4, 4, 3, groups=2)
    x = torch.randn(1, 4, 5, 5)
    assert finish(LayerObserver(grouped, INTERVALS), grouped.weight, [(0, x)], [(0, x)]).rows is None
    vector = nn.Linear(6, 4)
    x = torch.randn(3, 6)
    assert finish(LayerObserver(vector, INTERVALS), vector.weight, [(0, x)], [(0, x)]).rows is None


# --- layers that read one tensor --------------------------------------------------------------------------------------


class Attention(nn.Module):
    """q, k, v of one tensor; `gate` and `up` of another; what lies between them is told by `between`."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.between = between
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 8), nn.Linear(32, 8, bias=False)
        self.gate, self.up = nn.Linear(32, 40), nn.Linear(32, 40)
        with torch.no_grad():
            for layer in (self.q, self.k, self.gate, self.up):
                layer.weight[:, 2] /= 40
            self.v.weight *= 100  # its balance alone would be another

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x) + nn.functional.pad(self.k(x) + self.v(x), (0, 24))
        hidden = y + 3 * x
        gate = self.gate(hidden)
        return gate * self.up(self.between(hidden))

    @staticmethod
    def input(seed: int) -> Tensor:
        x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(seed))
        x[..., 2] *= 40
        return x


def attended(net: Attention, inference: bool = False) -> ModelObserver:
    layers = [(path, m) for path, m in net.named_modules() if isinstance(m, nn.Linear)]
    with ModelObserver(layers, clock()) as watch, torch.inference_mode(inference), torch.no_grad():
        for stage in range(2):
            for call in range(3):
                watch.start_call(torch.tensor([300.0 * call]))
                net(net.input(10 * stage + call))
            if stage == 0:
                watch.end_first_stage()
    assert watch._last is None
    return watch


def groups(watch: ModelObserver) -> set[frozenset[str]]:
    of: dict[int, set[str]] = {}
    for path, observer in watch.observers.items():
        of.setdefault(id(observer), set()).add(path)
    return {frozenset(paths) for paths in of.values()}


def same_input(a: LayerStatistics, b: LayerStatistics) -> bool:
    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, LayerStatistics):
            return same_input(x, y)
        return torch.equal(x, y) if isinstance(x, Tensor) else x == y

    return all(equal(vars(a)[name], vars(b)[name]) for name in vars(a) if name not in ("shape", "order"))


@pytest.mark.parametrize("inference", [False, True])
def test_layers_that_read_one_tensor_are_calibrated_as_one(inference: bool) -> None:
    watch = attended(Attention(), inference)
    assert groups(watch) == {frozenset("qkv"), frozenset({"gate", "up"})}
    assert watch.observers["q"].calls == 6  # each tensor once
    found = watch.statistics()
    assert list(found) == ["q", "k", "v", "gate", "up"] and [s.order for s in found.values()] == [0, 1, 2, 3, 4]
    assert [s.shape for s in found.values()] == [(32, 32), (8, 32), (8, 32), (40, 32), (40, 32)]
    assert found["q"].rotated is not None and found["q"].balance is not None
    assert same_input(found["q"], found["k"]) and same_input(found["q"], found["v"])
    assert same_input(found["gate"], found["up"]) and not same_input(found["q"], found["up"])
    rotated = found["k"].rotated
    assert rotated is not None and (rotated.shape, rotated.order) == ((8, 32), 1)
    # A file holds no tensor twice.
    about = [s for own in found.values() for s in (own, own.rotated) if s is not None]
    places = [value.data_ptr() for s in about for value in vars(s).values() if isinstance(value, Tensor)]
    rows = {s.rows.data_ptr() for s in about if s.rows is not None}
    assert len(rows) == len(about) and len(places) == len(set(places)) and places


def test_what_siblings_learn_is_what_one_learns() -> None:
    """Of all their weights, each at unit size."""
    net = Attention()
    found = attended(net).statistics()["v"]
    weights = [layer.weight.detach() for layer in (net.q, net.k, net.v)]
    unit = torch.cat([w / w.square().mean().sqrt() for w in weights])
    both = nn.Linear(32, 48)
    both.weight.data = unit
    inputs = [[(min(int(300 * c * INTERVALS / 1000), 3), net.input(10 * s + c)) for c in range(3)] for s in range(2)]
    expected = finish(LayerObserver(both, INTERVALS), unit, *inputs)
    assert same_input(found, expected)


@pytest.mark.parametrize(
    "between", [lambda x: x.mul_(1.5), lambda x: x.copy_(x.flip(-1)), lambda x: x.clone(), lambda x: x[:]]
)
@pytest.mark.parametrize("inference", [False, True])
def test_another_tensor_or_other_values_make_no_siblings(between: Callable[[Tensor], Tensor], inference: bool) -> None:
    net = Attention(between)
    watch = attended(net, inference)
    assert groups(watch) == {frozenset("qkv"), frozenset({"gate"}), frozenset({"up"})}
    alone = attended(Attention(between)).statistics()
    assert all(same_input(s, alone[path]) for path, s in watch.statistics().items())


def test_a_layer_between_two_and_a_new_call() -> None:
    first, second, other, conv = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4), nn.Conv2d(6, 4, 1)
    layers = {"first": first, "second": second, "other": other, "conv": conv}
    x = torch.randn(2, 6, 3, 6)
    for what in ("other", "conv", "call", "nothing"):
        with ModelObserver(layers.items(), clock()) as watch, torch.no_grad():
            watch.start_call(torch.tensor([1.0]))
            first(x)
            if what == "other":
                other(x.clone())
            elif what == "conv":
                conv(x)
            elif what == "call":
                watch.start_call(torch.tensor([1.0]))
            second(x)
        assert (watch.observers["first"] is watch.observers["second"]) == (what == "nothing"), what
    with ModelObserver(layers.items(), clock()) as watch, torch.no_grad():
        first(x)
        watch.end_first_stage()
        first(x)
        second(x)  # later than the balance was chosen
    assert watch.observers["first"] is not watch.observers["second"]


def test_what_a_sibling_reads_alone_is_observed_too() -> None:
    first, second = nn.Linear(6, 4), nn.Linear(6, 4)
    x, wide, written = torch.randn(5, 6), 10 * torch.randn(5, 6), torch.randn(5, 6)
    with ModelObserver([("first", first), ("second", second)], clock()) as watch, torch.inference_mode():
        written = written.clone()
        for stage in range(2):
            watch.start_call(torch.tensor([1.0]))
            first(x)
            second(x)
            watch.start_call(torch.tensor([1.0]))
            first(written)
            second(written.mul_(-3.0))
            second(wide)
            first(x)
            first(x)  # a call of its own
            if stage == 0:
                watch.end_first_stage()
    observer = watch.observers["first"]
    assert observer is watch.observers["second"]
    assert observer.calls == 2 * 6
    assert float(observer.high[0].max()) >= float(wide.max()) and float(observer.low[0].min()) <= float(wide.min())


def test_the_weights_of_siblings_may_be_given() -> None:
    net = Attention()
    with ModelObserver([(p, net.get_submodule(p)) for p in "qkv"], clock()) as watch, torch.inference_mode():
        for call in range(3):
            net(net.input(call))
        watch.end_first_stage({p: torch.zeros_like(net.get_submodule(p).weight) for p in "qkv"})
    assert watch.observers["k"].balance is None


def test_no_tensor_is_kept_for_siblings() -> None:
    net = Attention()
    gc.collect()
    gc.disable()
    try:
        with ModelObserver([(p, net.get_submodule(p)) for p in "qkv"], clock()), torch.no_grad():
            x = net.input(0)
            seen = weakref.ref(x)
            net.q(x)
            del x
            assert seen() is None
    finally:
        gc.enable()


# --- hooks and errors -------------------------------------------------------------------------------------------------


def hook_count(net: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in net.modules())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("path", ["conv", "tokens", "vector"])
@pytest.mark.parametrize("stage", [0, 1])
def test_broken_values_name_the_layer(path: str, bad: float, stage: int) -> None:
    net = Net()
    _, image, emb = calls(0)[0]
    broken_image, broken_emb = image.clone(), emb.clone()
    broken_image[0, 3, 1, 1] = bad
    broken_emb[1, 2] = bad
    watch = ModelObserver([(path, net.get_submodule(path))], clock())
    with pytest.raises(TfmqError, match=rf"Layer {path} received NaN") as error, watch:
        watch.start_call(torch.tensor([500.0]))
        if stage:
            net(image, emb)
            watch.end_first_stage()
        net(broken_image, broken_emb)
    assert "\n" not in str(error.value)
    assert hook_count(net) == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_hooks_go_whatever_happens(error: type[BaseException]) -> None:
    net = Net()
    foreign = net.conv.register_forward_pre_hook(lambda *_: None)
    watch = ModelObserver([(path, net.get_submodule(path)) for path in LAYERS], clock())
    with pytest.raises(error), watch:
        assert hook_count(net) == 1 + len(LAYERS)
        raise error
    assert hook_count(net) == 1  # and another's hook stays
    foreign.remove()


def test_the_model_computes_the_same_under_observation() -> None:
    net = Net()
    _, image, emb = calls(0)[0]
    plain = net(image, emb)
    with ModelObserver([(path, net.get_submodule(path)) for path in LAYERS], clock()) as watch:
        watch.start_call(torch.tensor([500.0]))
        assert torch.equal(net(image, emb), plain)
    keys = set(net.state_dict())
    assert keys == set(Net().state_dict())


def test_another_weight_may_be_given_for_the_balance() -> None:
    """A layer whose own weight is not what runs (patched on the fly)."""
    net = Net()
    with ModelObserver([("tokens", net.tokens)], clock()) as watch, torch.inference_mode():
        watch.start_call(torch.tensor([500.0]))
        for _, image, emb in calls(0):
            net(image, emb)
        watch.end_first_stage({"tokens": torch.zeros(4, 6)})
    assert watch.observers["tokens"].balance is None
