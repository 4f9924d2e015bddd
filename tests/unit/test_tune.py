"""Which tile a product gets: by estimate, timed once, kept on disk."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tfmq.kernels.triton import tune as triton_tune
from tfmq.kernels.triton.tune import Machine, Shape, Tile, Tuner

from .test_triton import needs_triton

GPU = Machine("a GPU", (9, 0), 132)
LAYER = Shape("3 x 3 int8", 8192, 320, 320, 9)


def times(best: Tile | None = None, calls: list[Tile] | None = None) -> Callable[[Tile], float]:
    """A clock for which `best` is quickest."""

    def time(tile: Tile) -> float:
        if calls is not None:
            calls.append(tile)
        return 1.0 if tile == best else 2.0

    return time


def test_the_shipped_tiles_say_that_they_were_not_measured() -> None:
    shipped = json.loads(triton_tune.SHIPPED.read_text(encoding="utf-8"))
    assert "not measured" in shipped["about"]
    for capability in (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1):
        tiles = triton_tune.tiles_of(capability)
        assert len(tiles) == len(set(tiles)) >= 5
        for tile in tiles:
            assert all(x & (x - 1) == 0 for x in (tile.m, tile.n, tile.k, tile.warps)) and tile.split == 1


def test_a_kept_tile_that_no_longer_runs_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    tiles = triton_tune.candidates(LAYER, GPU)
    assert Tuner(path).choose(LAYER, GPU, times(tiles[2])) == tiles[2]

    def time(tile: Tile) -> float:
        if tile in (tiles[0], tiles[2]):
            raise RuntimeError("out of resource: shared memory")
        return 1.0

    assert Tuner(path).choose(LAYER, GPU, time) == tiles[1]
    assert Tuner(path).choose(LAYER, GPU, None) == tiles[2]  # where nothing can be tried the file is believed


@pytest.mark.parametrize("m", [1, 17, 128, 512, 2048, 8192, 32768])
@pytest.mark.parametrize("n", [4, 320, 1280, 10240])
def test_the_estimate_fills_the_gpu_and_wastes_little(m: int, n: int) -> None:
    shape = Shape("1 x 1", m, n, 1280, 1)
    tile = triton_tune.candidates(shape, GPU)[0]
    computed = -(-m // tile.m) * tile.m * -(-n // tile.n) * tile.n
    assert computed <= max(4 * m * n, 64 * 64, 64 * n, 64 * m)
    programs = -(-m // tile.m) * -(-n // tile.n) * tile.split
    most = max(-(-m // t.m) * -(-n // t.n) * t.split for t in triton_tune.candidates(shape, GPU))
    assert programs >= min(132, most) / 4


def test_small_outputs_with_many_columns_are_split() -> None:
    assert triton_tune.candidates(Shape("3 x 3", 128, 1280, 2560, 9), GPU)[0].split > 1  # 8 x 8 pixels, batch 2
    assert all(tile.split == 1 for tile in triton_tune.candidates(Shape("1 x 1", 128, 64, 320, 1), GPU))


def test_a_shape_is_timed_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "kernels.json"
    best, calls = triton_tune.candidates(LAYER, GPU)[2], []
    tuner = Tuner(path)
    assert tuner.choose(LAYER, GPU, times(best, calls)) == best
    assert 1 < len(set(calls)) <= triton_tune.TRIED and len(calls) == triton_tune.ROUNDS * len(set(calls))
    count = len(calls)
    assert tuner.choose(LAYER, GPU, times(None, calls)) == best and len(calls) == count
    other = Tuner(path)
    assert other.choose(LAYER, GPU, times(None, calls)) == best and calls[count:] == [best]  # whether it still runs
    count = len(calls)
    assert other.choose(LAYER._replace(m=64), GPU, times(None, calls)) and len(calls) > count
    assert other.choose(LAYER, GPU._replace(name="another GPU"), None) == triton_tune.candidates(LAYER, GPU)[0]
    assert len(triton_tune.read(path)) == 2  # both processes' shapes
    assert [p.name for p in path.parent.iterdir()] == ["kernels.json"]
    other.forget()
    path.unlink()
    assert other.choose(LAYER, GPU, None) == triton_tune.candidates(LAYER, GPU)[0]


def test_each_version_of_triton_has_its_own_times(tmp_path: Path) -> None:
    path, (first, second) = tmp_path / "kernels.json", triton_tune.candidates(LAYER, GPU)[:2]
    old, new = (Tuner(path, f"triton {version}") for version in ("3.6.0", "3.7.1"))
    assert old.choose(LAYER, GPU, times(second)) == second
    assert new.choose(LAYER, GPU, None) == first, "not timed yet"
    assert new.choose(LAYER, GPU, times(first)) == first
    assert Tuner(path, "triton 3.6.0").choose(LAYER, GPU, None) == second, "kept beside"


@needs_triton
def test_the_file_knows_what_compiled() -> None:
    import triton

    from tfmq.kernels.triton.launch import tuner

    assert triton.__version__ in tuner._key(LAYER, GPU) and torch.__version__ in tuner._key(LAYER, GPU)


def test_a_round_of_all_tiles_at_a_time() -> None:
    """A GPU that slows down as it warms up: timed one after the other, the first would win."""
    slow, quick = triton_tune.candidates(LAYER, GPU)[:2]
    calls = []

    def time(tile: Tile) -> float:
        calls.append(tile)
        return (1.0 if tile == quick else 1.1) * (1 + 0.02 * len(calls)) + (5.0 if len(calls) == 2 else 0.0)

    assert triton_tune.quickest([slow, quick], time) == quick
    assert calls == [slow, quick] * 3


def test_nothing_is_timed_while_a_graph_is_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best, calls = triton_tune.candidates(LAYER, GPU)[2], []
    tuner = Tuner(tmp_path / "kernels.json")
    with monkeypatch.context() as capture:
        capture.setattr(triton_tune, "capturing", lambda: True)
        assert tuner.choose(LAYER, GPU, times(best, calls)) == triton_tune.candidates(LAYER, GPU)[0]
    assert calls == []
    assert tuner.choose(LAYER, GPU, times(best)) == best, "the estimate is not kept"
    with triton_tune.untimed():
        assert Tuner(None).choose(LAYER, GPU, times(best, calls)) == triton_tune.candidates(LAYER, GPU)[0]
    assert calls == []


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("no memory"), RuntimeError("out of resource"), ValueError()]
)
def test_a_tile_that_does_not_run_is_left_out(tmp_path: Path, error: Exception) -> None:
    ordered = triton_tune.candidates(LAYER, GPU)

    def time(tile: Tile) -> float:
        if tile != ordered[1]:
            raise error
        return 5.0

    def never(tile: Tile) -> float:
        tried.append(tile)
        raise error

    assert Tuner(tmp_path / "a").choose(LAYER, GPU, time) == ordered[1]
    tuner, tried = Tuner(tmp_path / "b"), []
    assert tuner.choose(LAYER, GPU, never) == ordered[0]
    assert sorted(tried) == sorted(ordered), "all were tried, in the hope that one runs"
    assert tuner.choose(LAYER, GPU, never) == ordered[0] and len(tried) == len(ordered), "and not again"
    assert not (tmp_path / "b").exists()

    def last(tile: Tile) -> float:
        if tile != ordered[-1]:
            raise error
        return 5.0

    assert Tuner(tmp_path / "d").choose(LAYER, GPU, last) == ordered[-1]

    def interrupted(tile: Tile) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tuner(tmp_path / "c").choose(LAYER, GPU, interrupted)


BEST = list(triton_tune.candidates(LAYER, GPU)[1])
KEY = Tuner(None)._key(LAYER, GPU)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"format": 2}', b'{"format": 2, "tiles": [1]}',
        json.dumps({"format": 1, "tiles": {KEY: BEST}}).encode(),  # of an earlier version, with slower kernels
        json.dumps({"format": 2, "tiles": {KEY: BEST[:3]}}).encode(),
        json.dumps({"format": 2, "tiles": {KEY: [1 << 20] * 6}}).encode(),
        json.dumps({"format": 2, "tiles": {KEY: ["a"] * 6}}).encode(),
        json.dumps({"format": 2, "tiles": {KEY: 3}}).encode(),
    ],
)  # fmt: skip
def test_a_damaged_file_is_ignored_and_replaced(tmp_path: Path, content: bytes) -> None:
    assert triton_tune.FORMAT == 2
    path = tmp_path / "kernels.json"
    path.write_bytes(content)
    best = triton_tune.candidates(LAYER, GPU)[2]
    assert Tuner(path).choose(LAYER, GPU, times(best)) == best
    assert Tuner(path).choose(LAYER, GPU, None) == best


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_memory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    best = triton_tune.candidates(LAYER, GPU)[2]
    tuner = Tuner(tmp_path / "file" / "kernels.json")
    assert tuner.choose(LAYER, GPU, times(best)) == best
    assert tuner.choose(LAYER, GPU, None) == best


@pytest.mark.parametrize(("system", "variable"), [("linux", "XDG_CACHE_HOME"), ("win32", "LOCALAPPDATA")])
def test_the_file_lies_in_the_users_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str, variable: str
) -> None:
    monkeypatch.setattr(triton_tune.sys, "platform", system)
    monkeypatch.setenv(variable, str(tmp_path))
    assert triton_tune.cache_file() == tmp_path / "tfmq" / "kernels.json"
    monkeypatch.delenv(variable)
    assert Path.home() in triton_tune.cache_file().parents
