"""Codes that lie in memory only in a kernel's own order."""

import copy
import pickle

import pytest
import torch

from tfmq.geometry import Geometry
from tfmq.kernels import onednn
from tfmq.runtime.packed_codes import PackedCodes, plain

GEOMETRIES = {
    "linear": Geometry((48, 80)),
    "odd linear": Geometry((7, 5)),
    "wide linear": Geometry((3, 130)),
    "conv": Geometry((20, 36, 3, 3), padding=(1, 1)),
    "odd conv": Geometry((5, 3, 3, 1), (2, 2), (1, 0)),
    "1x1": Geometry((33, 17, 1, 1)),
}


@pytest.fixture(params=GEOMETRIES)
def made(request) -> tuple[torch.Tensor, PackedCodes]:
    if onednn.missing() is not None:
        pytest.skip(str(onednn.missing()))
    geometry = GEOMETRIES[request.param]
    codes = torch.randint(-127, 128, geometry.shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)
    ready = onednn.prepare(codes, torch.rand(geometry.shape[0]) + 0.1, geometry)
    return codes, PackedCodes(codes, None, ready, onednn.restore)


def test_they_come_back_as_they_were(made) -> None:
    codes, packed = made
    assert torch.equal(packed.plain(), codes) and torch.equal(plain(packed), codes) and plain(codes) is codes
    assert packed.shape == codes.shape and packed.dtype is torch.int8 and packed.nbytes == codes.nbytes
    assert packed.plain().is_contiguous()


def test_their_dimensions_change_places(made) -> None:
    codes, packed = made
    dims = tuple(reversed(range(codes.dim())))
    turned = packed.permuted(*dims)
    assert isinstance(turned, PackedCodes) and turned.shape == codes.permute(dims).shape and turned.is_contiguous()
    assert torch.equal(turned, codes.permute(dims)) and turned.ready is packed.ready
    assert torch.equal(turned.permuted(*dims), codes)


def test_every_operation_sees_plain_codes(made) -> None:
    codes, packed = made
    for inference in (False, True):
        with torch.inference_mode(inference):
            assert torch.equal(packed, codes) and torch.equal(packed + 1, codes + 1)
            assert torch.equal(packed.flatten(1).sum(1), codes.flatten(1).sum(1))
            assert type(packed.clone()) is torch.Tensor and torch.equal(packed.clone(), codes)
            assert torch.equal(torch.empty_like(codes).copy_(packed), codes)
            assert isinstance(packed.detach(), PackedCodes) and torch.equal(packed.detach(), codes)
            assert isinstance(packed.to("cpu"), PackedCodes) and torch.equal(packed.to("cpu", copy=True), codes)
            assert type(packed.to(torch.int32)) is torch.Tensor and torch.equal(packed.float(), codes.float())
            assert packed.to("meta").device.type == "meta"


def test_copies_are_plain(made) -> None:
    codes, packed = made
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert type(twin) is torch.Tensor and torch.equal(twin, codes)


def test_nobody_writes_other_codes_to_them(made) -> None:
    codes, packed = made
    with torch.inference_mode():  # as the host does, when it puts back what it saved before a hook
        assert packed.copy_(codes) is packed
        packed.detach().copy_(packed)
        for write in (lambda: packed.copy_(-codes), packed.zero_):
            with pytest.raises(RuntimeError, match="replace the weight"):
                write()
    assert torch.equal(packed, codes)
