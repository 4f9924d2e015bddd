"""The tuner's clock on a device of which the times are known."""

import pytest

from tfmq.kernels import device_time
from tfmq.kernels.device_time import Stopwatch
from tfmq.kernels.triton import tune as triton_tune
from tfmq.kernels.triton.tune import Machine, Shape, Tile, Tuner


class Mark:
    def __init__(self, on: "Gpu", at: float) -> None:
        self.on, self.at = on, at

    def query(self) -> bool:
        return self.on.host >= self.at

    def elapsed_time(self, later: "Mark") -> float:
        assert later.query()
        return 1e3 * (later.at - self.at)


class Gpu:
    """host: seconds that Python has run; free: when the queue is empty. awake: of the seconds asked for, how long the
    device really stays busy."""

    def __init__(self, awake: float = 1.0) -> None:
        self.host = self.free = 0.0
        self.awake = awake

    def queue(self, seconds: float) -> None:
        self.free = max(self.free, self.host) + seconds

    def launch(self, host: float, device: float) -> None:
        self.host += host
        self.queue(device)

    def busy(self, seconds: float) -> None:
        self.launch(1e-5, self.awake * seconds)

    def mark(self) -> Mark:
        self.host += 1e-6
        return Mark(self, max(self.free, self.host))

    def wait(self) -> None:
        self.host = max(self.host, self.free)


@pytest.mark.parametrize("host", [5e-6, 3e-5, 1e-4, 2e-3])
@pytest.mark.parametrize("device", [3e-6, 3e-5, 3e-3])
@pytest.mark.parametrize("awake", [0.3, 1.0, 10.0])
def test_python_is_not_timed(host: float, device: float, awake: float) -> None:
    gpu = Gpu(awake)
    watch = Stopwatch(gpu, lambda: gpu.host)
    for _ in range(2):
        assert watch.seconds(lambda: gpu.launch(host, device)) == pytest.approx(device)


def test_a_wait_that_was_long_enough_is_kept() -> None:
    gpu, launches = Gpu(), []
    watch = Stopwatch(gpu, lambda: gpu.host)
    run = lambda: launches.append(1) or gpu.launch(1e-3, 1e-5)  # noqa: E731
    watch.seconds(run)
    assert len(launches) == 1 + 2 * device_time.RUNS
    watch.seconds(run)
    assert len(launches) == 2 + 3 * device_time.RUNS


def test_a_host_that_is_always_too_slow_ends_too() -> None:
    gpu = Gpu(awake=0.0)
    watch = Stopwatch(gpu, lambda: gpu.host)
    assert watch.seconds(lambda: gpu.launch(1e-3, 1e-5)) == pytest.approx(1e-3, rel=0.1)


def test_launches_that_block_are_not_waited_for_longer_and_longer() -> None:
    gpu = Gpu()
    watch = Stopwatch(gpu, lambda: gpu.host)

    def blocking() -> None:
        gpu.launch(1e-5, 1e-5)
        gpu.wait()

    gpu.busy = lambda seconds: (gpu.launch(1e-5, seconds), gpu.wait())
    for _ in range(20):
        before = gpu.host
        watch.seconds(blocking)
        assert gpu.host - before < device_time.TRIES * (device_time.LONGEST + 0.01)


def test_the_tuner_takes_the_quickest_kernel_although_python_takes_longer() -> None:
    layer, at = Shape("3 x 3 int8", 8192, 320, 320, 9), Machine("a GPU", (9, 0), 132)
    tiles = triton_tune.candidates(layer, at)
    best = tiles[2]
    gpu = Gpu()
    watch = Stopwatch(gpu, lambda: gpu.host)
    hosts = iter(range(1 << 20))

    def run(tile: Tile) -> None:  # the host's time wanders by more than the kernels differ
        gpu.launch(5e-5 * (1 + 0.1 * (next(hosts) % 7)), 8e-6 if tile == best else 1e-5)

    assert Tuner(None).choose(layer, at, lambda tile: watch.seconds(lambda: run(tile))) == best


def test_what_a_launch_raises_comes_through() -> None:
    gpu = Gpu()

    def run() -> None:
        raise RuntimeError("out of resource")

    with pytest.raises(RuntimeError, match="out of resource"):
        Stopwatch(gpu, lambda: gpu.host).seconds(run)
