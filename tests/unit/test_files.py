"""Files: whole or not at all, and a sentence about every one that cannot be read."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tfmq import files
from tfmq.errors import TfmqError
from tfmq.files import (
    CALIBRATION,
    MANIFEST,
    MODEL,
    NEWEST,
    VERSION,
    read_calibration,
    read_manifest,
    read_tensors,
    smallest_exact,
    write,
    write_calibration,
)
from tfmq.observe.calibration import Calibration
from tfmq.observe.statistics import LayerStatistics
from tfmq.timeline import Partition, TimeAxis

per_file = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


def calibration(names: tuple[str, ...] = ("a.b", "c"), settings_: dict[str, Any] | None = None) -> Calibration:
    layers = {}
    for order, name in enumerate(names):
        g = torch.Generator().manual_seed(order)
        histogram = torch.randint(0, 2000, (3, 32), generator=g)
        histogram[1] = 0
        layers[name] = LayerStatistics(
            kind="linear" if order % 2 == 0 else "conv2d", shape=(4, 5) if order % 2 == 0 else (4, 5, 3, 3),
            order=order, low=torch.tensor([-1.0, float("inf"), -2.0]), high=torch.tensor([1.0, float("-inf"), 2.0]),
            balance=torch.rand(5, generator=g) + 0.5 if order % 2 == 0 else None, histogram=histogram,
            bin_low=-torch.rand(3, generator=g), bin_high=torch.rand(3, generator=g),
            row_error=torch.rand(3, 2, generator=g, dtype=torch.float64), vector=order == 1,
            rows=torch.randn(4, 5, generator=g).bfloat16() if order % 2 == 0 else None,
        )  # fmt: skip
    return Calibration(
        "fingerprint", "EPS", TimeAxis(0.0, 999.0), Partition((0.25, 0.5)), layers, settings_ or {"steps": 20}
    )


def sentence(error: pytest.ExceptionInfo[TfmqError], path: Path) -> str:
    text = str(error.value)
    assert path.name in text
    assert "\n" not in text and text.endswith(".") and ". " not in text, text
    return text


def parts(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.endswith(".part")]


# --- there and back ---------------------------------------------------------------------------------------------------


@per_file
@given(
    st.lists(st.text(min_size=1, max_size=10), min_size=1, max_size=3, unique=True),
    st.dictionaries(st.text(max_size=5), st.one_of(st.text(max_size=9), st.integers(), st.booleans()), max_size=3),
)
def test_a_calibration_comes_back(tmp_path: Path, names: list[str], about: dict[str, Any]) -> None:
    path = tmp_path / "c.safetensors"
    made = calibration(tuple(names), about)
    write_calibration(path, made)
    found = read_calibration(path)
    assert (found.model, found.sampling, found.axis, found.partition, found.settings) == (
        made.model, made.sampling, made.axis, made.partition, made.settings,
    )  # fmt: skip
    assert list(found.layers) == list(made.layers)
    for name, s in made.layers.items():
        got = found.layers[name]
        assert (got.kind, got.shape, got.order, got.vector) == (s.kind, s.shape, s.order, s.vector)
        for field in ("low", "high", "bin_low", "bin_high", "row_error"):
            assert torch.equal(getattr(got, field), getattr(s, field)), field
        for field in ("balance", "rows"):
            old, new = getattr(s, field), getattr(got, field)
            assert (new is None) == (old is None), field
            assert old is None or (new.dtype == old.dtype and torch.equal(new, old)), field
        # counts relative to their peak in float16: 11 bits
        error = (got.histogram - s.histogram).abs()
        assert bool((error <= s.histogram * 2.0**-11 + s.histogram.amax(1, keepdim=True) * 2.0**-24).all())
    assert parts(tmp_path) == []


@per_file
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8),
        st.tuples(st.sampled_from([torch.int8, torch.float32, torch.bfloat16, torch.int32]), st.integers(0, 9)),
        max_size=4,
    )
)
def test_tensors_come_back(tmp_path: Path, about: dict[str, tuple[torch.dtype, int]]) -> None:
    path = tmp_path / "new folder" / "t.safetensors"
    tensors = {name: torch.arange(2 * n).reshape(2, n).t().to(dtype) for name, (dtype, n) in about.items()}
    tensors.pop("__metadata__", None)
    write(path, tensors, {"kind": MODEL, "note": "ü\n"})
    found = read_tensors(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], t) and found[k].dtype == t.dtype for k, t in tensors.items())
    assert read_manifest(path, MODEL) == {"version": VERSION, "kind": MODEL, "note": "ü\n"}
    write(path, tensors, {"kind": MODEL, "version": NEWEST})
    assert read_manifest(path, MODEL)["version"] == NEWEST


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["save_file", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_failed_write_leaves_the_old_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: str, number: int
) -> None:
    path = tmp_path / "model.safetensors"
    write(path, {"a": torch.ones(3)}, {"kind": MODEL})
    old = path.read_bytes()

    def fail(*args: Any, **_: Any) -> None:
        if step == "save_file":
            Path(args[1]).write_bytes(b"half a file")
        raise OSError(number, errno.errorcode[number].lower() + " happened")

    monkeypatch.setattr(files if step == "save_file" else files.os, step, fail)
    with pytest.raises(TfmqError) as error:
        write(path, {"a": torch.zeros(3)}, {"kind": MODEL})
    assert "happened" in sentence(error, path)
    assert str(tmp_path) in str(error.value)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_write_cleans_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, interrupt: type[BaseException]
) -> None:
    path = tmp_path / "model.safetensors"

    def fail(*_: Any, **__: Any) -> None:
        raise interrupt

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(interrupt):
        write(path, {"a": torch.zeros(3)}, {"kind": MODEL})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_a_file_may_be_read_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {"kind": "model"})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "model.safetensors"
    with pytest.raises(TfmqError) as error:
        write(path, {}, {"kind": MODEL})
    sentence(error, path)
    assert (tmp_path / "file").read_text() == "in the way"


def test_the_target_is_never_half_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """While the tensors are written the old file is there, whole."""
    path = tmp_path / "model.safetensors"
    write(path, {"a": torch.ones(3)}, {"kind": MODEL})
    old = path.read_bytes()
    seen = []
    inner = files.save_file

    def spy(*args: Any, **kwargs: Any) -> None:
        inner(*args, **kwargs)
        seen.append((path.read_bytes(), Path(args[1]).parent))

    monkeypatch.setattr(files, "save_file", spy)
    write(path, {"a": torch.zeros(3)}, {"kind": MODEL})
    assert seen == [(old, tmp_path)]  # in the same folder, so that the rename is atomic
    assert torch.equal(read_tensors(path)["a"], torch.zeros(3))


# --- reading ----------------------------------------------------------------------------------------------------------


@per_file
@given(st.data())
def test_a_truncated_file(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "c.safetensors"
    write_calibration(path, calibration())
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(TfmqError) as error:
        read_calibration(path)
    sentence(error, path)
    with pytest.raises(TfmqError) as error:
        read_tensors(path)
    sentence(error, path)


@settings(parent=per_file, max_examples=200)
@given(st.data())
def test_a_flipped_bit_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "c.safetensors"
    write_calibration(path, calibration())
    raw = bytearray(path.read_bytes())
    header = int.from_bytes(raw[:8], "little") + 8
    place = data.draw(st.integers(0, header - 1))
    raw[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    try:
        read_calibration(path)
    except TfmqError as error:
        assert path.name in str(error)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(100), b"\xff" * 64])
def test_not_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(TfmqError) as error:
        read_manifest(path, MODEL)
    assert "not a complete safetensors file" in sentence(error, path)


def test_missing_and_folder(tmp_path: Path) -> None:
    path = tmp_path / "gone.safetensors"
    with pytest.raises(TfmqError) as error:
        read_manifest(path, MODEL)
    assert "no longer" in sentence(error, path)
    with pytest.raises(TfmqError) as error:
        read_tensors(path)
    sentence(error, path)
    path.mkdir()
    with pytest.raises(TfmqError) as error:
        read_manifest(path, MODEL)
    sentence(error, path)


@pytest.mark.parametrize("header", [None, {"format": "pt"}])
def test_a_foreign_file(tmp_path: Path, header: dict[str, str] | None) -> None:
    path = tmp_path / "sd15.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata=header)
    with pytest.raises(TfmqError) as error:
        read_manifest(path, MODEL)
    assert "not written by TFMQ" in sentence(error, path)


def test_a_newer_file(tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    save_file({}, path, metadata={MANIFEST: json.dumps({"version": NEWEST + 1, "kind": MODEL})})
    with pytest.raises(TfmqError) as error:
        read_manifest(path, MODEL)
    text = sentence(error, path)
    assert "newer" in text and str(NEWEST + 1) in text and "update" in text


def test_the_wrong_kind(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    write_calibration(path, calibration())
    with pytest.raises(TfmqError) as error:
        read_manifest(path, MODEL)
    assert "holds a calibration" in sentence(error, path)
    write(path, {}, {"kind": MODEL})
    with pytest.raises(TfmqError) as error:
        read_calibration(path)
    assert "holds a model" in sentence(error, path)


@pytest.mark.parametrize(
    "manifest",
    ["", "{", "[]", "1", "null", "{}", '{"version": 1}', '{"version": "x", "kind": "model"}',
     '{"version": null, "kind": "model"}', '{"version": Infinity, "kind": "model"}'],
)  # fmt: skip
def test_a_damaged_manifest(tmp_path: Path, manifest: str) -> None:
    path = tmp_path / "m.safetensors"
    save_file({}, path, metadata={MANIFEST: manifest})
    with pytest.raises(TfmqError) as error:
        read_manifest(path, MODEL)
    sentence(error, path)


@pytest.mark.parametrize("lost", ["low", "high", "histogram", "peak", "bin_low", "bin_high", "row_error"])
def test_a_calibration_without_one_of_its_tensors(tmp_path: Path, lost: str) -> None:
    path = tmp_path / "c.safetensors"
    write_calibration(path, calibration())
    manifest, tensors = read_manifest(path, CALIBRATION), read_tensors(path)
    del tensors[f"c:{lost}"]
    write(path, tensors, manifest)
    with pytest.raises(TfmqError) as error:
        read_calibration(path)
    assert "damaged" in sentence(error, path)


@pytest.mark.parametrize(
    "change",
    [{"layers": []}, {"layers": {"c": 1}}, {"layers": {"c": {}}}, {"axis": [1]}, {"axis": [2, 1]}, {"axis": None},
     {"edges": [0.5, 0.5]}, {"edges": 3}, {"edges": ["x"]}],
)  # fmt: skip
def test_a_calibration_with_a_damaged_manifest(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "c.safetensors"
    write_calibration(path, calibration())
    manifest, tensors = read_manifest(path, CALIBRATION), read_tensors(path)
    write(path, tensors, manifest | change)
    with pytest.raises(TfmqError) as error:
        read_calibration(path)
    assert "damaged" in sentence(error, path)


# --- 16 bits where they do --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smallest_exact(dtype: torch.dtype) -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    short = smallest_exact(x.to(dtype).float())
    assert short.element_size() == 2
    assert torch.equal(short.float(), x.to(dtype).float())
    assert smallest_exact(x) is x
    ints = torch.arange(3)
    assert smallest_exact(ints) is ints
