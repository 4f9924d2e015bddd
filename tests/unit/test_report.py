"""tfmq.report: image metrics, sheets and the HTML report."""

import base64
import math
import os
import re
import subprocess
import sys
import types
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from demo import html
from tfmq.report import metrics, sheet


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def image_pairs():
    shapes = st.tuples(st.integers(1, 2), st.integers(1, 24), st.integers(1, 24), st.sampled_from([1, 3]))
    return st.tuples(shapes, st.integers(0, 1000)).map(
        lambda drawn: (noise(*drawn[0], seed=drawn[1]), noise(*drawn[0], seed=drawn[1] + 5000))
    )


# Metrics


def test_psnr_of_a_known_error():
    reference = torch.full((2, 8, 8, 3), 0.25, dtype=torch.float64)
    assert metrics.psnr(reference, reference + 0.1) == pytest.approx(20.0, abs=1e-9)
    assert metrics.psnr(reference * 255, (reference + 0.1) * 255, data_range=255) == pytest.approx(20.0, abs=1e-9)


def test_psnr_of_a_batch_is_the_mean_over_the_images_that_differ():
    reference = noise(3, 8, 8, 3, dtype=torch.float64)
    candidate = reference.clone()
    candidate[0] += 0.1
    candidate[1] += 0.01
    assert metrics.psnr(reference, candidate) == pytest.approx(30.0, abs=1e-9)
    assert metrics.psnr(reference, reference) == math.inf


@settings(max_examples=30, deadline=None)
@given(image_pairs())
def test_metrics_are_symmetric_bounded_and_one_at_identity(pair):
    a, b = pair
    assert metrics.psnr(a, b) == pytest.approx(metrics.psnr(b, a), rel=1e-12)
    assert metrics.ssim(a, b) == pytest.approx(metrics.ssim(b, a), abs=1e-12)
    assert -1 <= metrics.ssim(a, b) < 1
    assert metrics.psnr(a, a) == math.inf
    assert metrics.ssim(a, a) == pytest.approx(1, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.005, 0.1))
def test_metrics_fall_as_noise_grows(seed, strength):
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0.2, 0.8, 24, dtype=torch.float64)
    reference = (ramp[:, None] * ramp[None, :]).unsqueeze(-1).expand(24, 24, 3)
    disturbance = torch.randn(24, 24, 3, generator=generator, dtype=torch.float64)
    near, far = reference + strength * disturbance, reference + 2 * strength * disturbance
    assert metrics.psnr(reference, near) - metrics.psnr(reference, far) == pytest.approx(20 * math.log10(2), abs=1e-9)
    assert metrics.ssim(reference, near) > metrics.ssim(reference, far)


def brute_force_ssim(a, b):
    """The definition, position by position, with two-pass variances."""
    scores = []
    for channel in range(a.shape[-1]):
        x, y = a[..., channel].numpy(), b[..., channel].numpy()
        rows, columns = (min(11, n) for n in x.shape)
        window = np.exp(
            -((np.arange(rows)[:, None] - (rows - 1) / 2) ** 2 + (np.arange(columns)[None, :] - (columns - 1) / 2) ** 2)
            / (2 * 1.5**2)
        )
        window /= window.sum()
        for top in range(x.shape[0] - rows + 1):
            for left in range(x.shape[1] - columns + 1):
                u, v = x[top : top + rows, left : left + columns], y[top : top + rows, left : left + columns]
                mu, mv = (window * u).sum(), (window * v).sum()
                var_u, var_v = (window * (u - mu) ** 2).sum(), (window * (v - mv) ** 2).sum()
                cov = (window * (u - mu) * (v - mv)).sum()
                scores.append(
                    (2 * mu * mv + 0.01**2)
                    * (2 * cov + 0.03**2)
                    / ((mu**2 + mv**2 + 0.01**2) * (var_u + var_v + 0.03**2))
                )
    return float(np.mean(scores))


@pytest.mark.parametrize("size", [(20, 17), (11, 11), (12, 31), (5, 7), (10, 14), (1, 1), (1, 30), (2, 3)])
def test_ssim_equals_the_definition(size):
    a = noise(*size, 3, seed=1, dtype=torch.float64)
    b = (a + 0.1 * noise(*size, 3, seed=2, dtype=torch.float64)).clamp(0, 1)
    assert metrics.ssim(a, b) == pytest.approx(brute_force_ssim(a, b), abs=1e-12)


def test_ssim_equals_scipys_gaussian_filter():
    ndimage = pytest.importorskip("scipy.ndimage")
    a, b = noise(40, 33, 1, seed=3, dtype=torch.float64), noise(40, 33, 1, seed=4, dtype=torch.float64)

    def blur(image):
        return ndimage.gaussian_filter(image[..., 0].numpy(), 1.5, truncate=3.5)[5:-5, 5:-5]

    mu, mv, uu, vv, uv = blur(a), blur(b), blur(a * a), blur(b * b), blur(a * b)
    expected = (2 * mu * mv + 1e-4) * (2 * (uv - mu * mv) + 9e-4)
    expected /= (mu**2 + mv**2 + 1e-4) * (uu - mu**2 + vv - mv**2 + 9e-4)
    assert metrics.ssim(a, b) == pytest.approx(float(expected.mean()), abs=1e-12)
    assert metrics.ssim(a * 255, b * 255, data_range=255) == pytest.approx(float(expected.mean()), abs=1e-12)


def test_ssim_of_an_inverted_picture_is_negative():
    a = noise(32, 32, 3)
    assert metrics.ssim(a, 1 - a) < -0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_metrics_take_every_float_type_in_inference_mode(dtype):
    with torch.inference_mode():
        a, b = noise(1, 16, 16, 3).to(dtype), noise(1, 16, 16, 3, seed=1).to(dtype)
        assert metrics.compare(a, b)["psnr_db"] == pytest.approx(metrics.psnr(a.double(), b.double()), abs=1e-9)


def test_compare_holds_means_and_every_image():
    reference = noise(3, 40, 36, 3)
    candidate = (reference + 0.1 * noise(3, 40, 36, 3, seed=1)).clamp(0, 1)
    candidate[2] = reference[2]
    result = metrics.compare(reference, candidate)
    assert set(result) == {"psnr_db", "ssim", "lpips", "images", "identical", "per_image"}
    assert (result["images"], result["identical"], len(result["per_image"])) == (3, 1, 3)
    for index, row in enumerate(result["per_image"]):
        assert row["psnr_db"] == metrics.psnr(reference[index], candidate[index])
        assert row["ssim"] == metrics.ssim(reference[index], candidate[index])
    assert result["psnr_db"] == metrics.psnr(reference, candidate)
    assert result["psnr_db"] == pytest.approx(sum(r["psnr_db"] for r in result["per_image"][:2]) / 2, rel=1e-12)
    assert result["ssim"] == pytest.approx(sum(r["ssim"] for r in result["per_image"]) / 3, rel=1e-12)
    assert result["per_image"][2]["psnr_db"] == math.inf


@pytest.mark.parametrize(
    ("reference", "candidate", "says"),
    [
        (
            torch.zeros(2, 8, 6, 3),
            torch.zeros(1, 8, 6, 3),
            "2 images of 6 x 8 pixels with 3 channels.*1 image of 6 x 8",
        ),
        (torch.zeros(8, 6, 3), torch.zeros(8, 7, 3), "same size"),
        (torch.zeros(8, 6, 3), torch.zeros(8, 6, 1), "with 1 channel:"),
        (torch.zeros(8, 6), torch.zeros(8, 6), "reference has shape"),
        (torch.zeros(8, 6, 3), torch.zeros(0, 8, 6, 3), "candidate has shape"),
        (torch.zeros(8, 6, 3), torch.zeros(8, 6, 3, dtype=torch.uint8), "candidate is of type torch.uint8"),
        (
            torch.zeros(2, 8, 6, 3),
            torch.zeros(2, 8, 6, 3).index_fill(0, torch.tensor(1), math.nan),
            "Image 1 of the cand",
        ),
        (torch.full((8, 6, 3), math.inf), torch.zeros(8, 6, 3), "Image 0 of the reference"),
    ],
)
def test_bad_images_are_refused_in_one_sentence(reference, candidate, says):
    for function in (metrics.psnr, metrics.ssim, metrics.compare, sheet.side_by_side):
        with pytest.raises(ValueError, match=says) as caught:
            function(reference, candidate)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data_range", [0, -1, math.nan, math.inf])
def test_a_data_range_must_be_positive(data_range):
    for function in (metrics.psnr, metrics.ssim):
        with pytest.raises(ValueError, match="data_range"):
            function(noise(8, 8, 3), noise(8, 8, 3), data_range)


# LPIPS: the package and its weights are stood in for, so that the rule is tested without them.


class FakeLpips(torch.nn.Module):
    built = 0

    def __init__(self, net, version, verbose):
        super().__init__()
        assert (net, version, verbose) == ("alex", "0.1", False)
        FakeLpips.built += 1

    def forward(self, a, b):
        assert a.dtype == torch.float32
        assert a.shape[:2] == (1, 3)
        assert a.amin() >= -1
        return (a - b).abs().mean().reshape(1, 1, 1, 1)


@pytest.fixture
def lpips_home(monkeypatch, tmp_path):
    """Installs the stand-ins; the folder in which AlexNet's weights belong."""
    FakeLpips.built = 0
    weights = types.SimpleNamespace(IMAGENET1K_V1=types.SimpleNamespace(url="https://example.org/models/alex-12.pth"))
    models = types.ModuleType("torchvision.models")
    models.AlexNet_Weights = weights
    package = types.ModuleType("lpips")
    package.LPIPS = FakeLpips
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setitem(sys.modules, "lpips", package)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    metrics._lpips_network.cache_clear()
    yield tmp_path / "checkpoints"
    metrics._lpips_network.cache_clear()


def test_lpips_without_the_package_says_so(lpips_home, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert "'lpips' is not installed" in metrics.lpips_unavailable_reason()
    assert metrics.compare(noise(40, 40, 3), noise(40, 40, 3, seed=1))["lpips"] is None


def test_lpips_with_an_empty_torchvision_says_so(lpips_home, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", types.ModuleType("torchvision.models"))
    assert "does not import here" in metrics.lpips_unavailable_reason()


def test_lpips_without_weights_is_never_built(lpips_home):
    assert metrics.compare(noise(40, 40, 3), noise(40, 40, 3, seed=1))["lpips"] is None
    reason = metrics.lpips_unavailable_reason()
    assert "https://example.org/models/alex-12.pth" in reason
    assert str(lpips_home / "alex-12.pth") in reason
    assert FakeLpips.built == 0


def test_lpips_that_cannot_be_built_says_so_in_one_line(lpips_home, monkeypatch):
    def broken(**_):
        raise RuntimeError("bad magic number\nand a long story")

    sys.modules["lpips"].LPIPS = broken
    lpips_home.mkdir()
    (lpips_home / "alex-12.pth").touch()
    reason = metrics.lpips_unavailable_reason()
    assert "(bad magic number)" in reason
    assert "\n" not in reason


def test_lpips_with_weights_is_measured_and_built_once(lpips_home):
    assert metrics.lpips_unavailable_reason()  # not there yet; must not be remembered
    lpips_home.mkdir()
    (lpips_home / "alex-12.pth").touch()
    assert metrics.lpips_unavailable_reason() is None
    reference = noise(2, 40, 40, 3)
    candidate = reference * torch.tensor([1.0, 0.5]).view(2, 1, 1, 1)
    result = metrics.compare(reference, candidate)
    assert result["per_image"][0]["lpips"] == 0
    assert result["per_image"][1]["lpips"] == pytest.approx(float(reference[1].mean()), rel=1e-5)  # |2a - 2b|, b = a/2
    assert result["lpips"] == pytest.approx(result["per_image"][1]["lpips"] / 2)
    assert metrics.compare(reference[..., :1], candidate[..., :1])["lpips"] > 0
    assert metrics.compare(reference[:, :30], candidate[:, :30])["lpips"] is None
    assert FakeLpips.built == 1


# Sheets


def test_a_sheet_is_reference_candidate_and_amplified_difference():
    reference, candidate = noise(2, 16, 20, 3), noise(2, 16, 20, 3, seed=1)
    out, gap = sheet.side_by_side(reference, candidate, amplify=3.0), sheet.gap(20)
    assert out.shape == (2, 16, 60 + 2 * gap, 3)
    assert torch.equal(out[:, :, :20], reference)
    assert torch.equal(out[:, :, 20 + gap : 40 + gap], candidate)
    assert torch.allclose(out[:, :, 40 + 2 * gap :], ((reference - candidate).abs() * 3).clamp(max=1))
    assert out[:, :, 20 : 20 + gap].unique().numel() == 1


def test_a_sheet_takes_one_image_grey_alpha_and_half():
    assert sheet.side_by_side(noise(8, 8, 1), noise(8, 8, 1, seed=1)).shape == (1, 8, 28, 3)
    assert sheet.side_by_side(noise(8, 8, 4), noise(8, 8, 4, seed=1)).shape == (1, 8, 28, 3)
    assert sheet.side_by_side(noise(8, 8, 3).half(), noise(8, 8, 3).half()).dtype == torch.float32


@pytest.mark.parametrize("width", [8, 64, 300])
def test_captions_are_drawn_above_an_unchanged_sheet(width):
    reference, candidate = noise(2, 16, width, 3), noise(2, 16, width, 3, seed=1)
    plain = sheet.side_by_side(reference, candidate)
    out = sheet.side_by_side(reference, candidate, captions=("float32", "W8A8 的 é", "difference × 8, rather long"))
    strip = out.shape[1] - 16
    assert strip > 0
    assert torch.equal(out[:, strip:], plain)
    assert torch.equal(out[0, :strip], out[1, :strip])
    if width >= 64:
        assert out[:, :strip].amax() > 0.8, "no text was drawn"
        gap = sheet.gap(width)
        assert out[:, :strip, width : width + gap].unique().numel() == 1, "text runs out of its column"


def test_bad_sheets_are_refused():
    a = noise(8, 8, 3)
    with pytest.raises(ValueError, match="2 captions"):
        sheet.side_by_side(a, a, captions=("a", "b"))
    with pytest.raises(ValueError, match="amplify"):
        sheet.side_by_side(a, a, amplify=0)
    with pytest.raises(ValueError, match="2 channels"):
        sheet.side_by_side(noise(8, 8, 2), noise(8, 8, 2))
    with pytest.raises(ValueError, match="0 columns"):
        sheet.grid(noise(1, 8, 8, 3), 0)
    with pytest.raises(ValueError, match=r"shape \[8, 8, 3\]"):
        sheet.grid(a, 2)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 5), st.integers(1, 150))
def test_a_grid_holds_every_image_in_order(count, columns, height, width):
    images = noise(count, height, width, 3)
    out = sheet.grid(images, columns)
    gap, across = sheet.gap(width), min(columns, count)
    down = math.ceil(count / across)
    assert out.shape == (down * (height + gap) - gap, across * (width + gap) - gap, 3)
    for index, image in enumerate(images):
        top, left = index // across * (height + gap), index % across * (width + gap)
        assert torch.equal(out[top : top + height, left : left + width], image)


def test_a_png_holds_the_nearest_levels(tmp_path):
    image = torch.tensor([[0.0, 1.0, -0.5], [1.5, 0.499 / 255, 0.501 / 255]]).view(1, 2, 3)
    path = tmp_path / "new" / "a.png"
    sheet.save_png(path, image)
    assert np.asarray(Image.open(path)).tolist() == [[[0, 255, 0], [255, 0, 1]]]
    levels = torch.arange(256).view(16, 16, 1) / 255
    sheet.save_png(str(path), levels.unsqueeze(0))
    assert np.asarray(Image.open(path))[..., 0].ravel().tolist() == list(range(256))
    assert os.listdir(path.parent) == ["a.png"]


def test_a_png_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    sheet.save_png(path, noise(4, 4, 3))
    before = path.read_bytes()
    for bad, says in ((noise(2, 4, 4, 3), "shape"), (torch.full((4, 4, 3), math.nan), "NaN"), (noise(4, 4, 2), "chan")):
        with pytest.raises(ValueError, match=says):
            sheet.save_png(path, bad)

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        sheet.save_png(path, noise(4, 4, 3, seed=1))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]


# HTML


class Page(HTMLParser):
    """Checks nesting; collects elements and text."""

    VOID = {"meta", "link", "img", "input", "br"}

    def __init__(self, path):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)

    def tags(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]


REPORT = {
    "host_version": "0.30.0",
    "psnr_db": 48.8125,
    "lpips": None,
    "bytes": {"before": 51_600_000, "after": 12_900_000},
    "seconds": 192.6,
    "layers": {"total": 62, "quantized_linear": 45, "left": ["conv_in", "conv_out"]},
    "quality": {
        "float32": {"psnr_db": math.inf, "ssim": 1.0, "bytes": 859_520_964},
        "ours_w8a8": {"psnr_db": 48.8, "ssim": 0.9982, "bytes": 512, "extra": {"deep": {"deeper": 1}}},
    },
    "per_image": [{"prompt": f"a star {i}", "psnr_db": 40.0 + i} for i in range(20)],
}


def test_a_report_reads_well(tmp_path):
    html.write(tmp_path / "r.html", REPORT, title="Shapes")
    page = Page(tmp_path / "r.html")
    for text in ("48.81 dB", "not measured", "12.9 MB", "25 % of 51.6 MB before", "3 min 13 s", "0.30.0"):
        assert text in page.text
    for text in ("Quantized linear", "conv_in, conv_out", "∞ dB", "860 MB", "512 bytes", "ours_w8a8", "20 rows"):
        assert text in page.text
    assert page.texts.count("PSNR") == 3  # headline, two tables
    assert page.texts.count("Shapes") == 2  # title and heading
    assert "ours_w8a8: Extra" in page.text
    assert len(page.tags("table")) == 4
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.tags("meta")
    assert {"title": "859520964"} in page.tags("span"), "the exact number is lost"
    assert os.listdir(tmp_path) == ["r.html"]


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("table_bytes", 999_499, "999 kB"),
        ("table_bytes", 999_600, "1.00 MB"),
        ("table_bytes", 12_345_678_901, "12.3 GB"),
        ("run_seconds", 0.0213, "21.3 ms"),
        ("run_seconds", 59.97, "1 min 00 s"),
        ("run_s", 2.5, "2.50 s"),
        ("run_seconds", 3599.7, "1 h 00 min"),
        ("run_seconds", 7500, "2 h 05 min"),
        ("step_ms", 41.25, "41.25 ms"),
        ("hit_percent", 97.5, "97.5 %"),
        ("ssim", 0.99999996, "0.99999996"),
        ("ssim", 0.987654321, "0.98765"),
        ("ssim", 1.0, "1"),
        ("steps_per_s", 3.25, "3.25"),
        ("parameters", 859_520_964, "859,520,964"),
        ("rel_l2", 1.234e-7, "1.23e-07"),
        ("psnr_db", math.nan, "not a number"),
        ("psnr_db", np.float32(30.0), "30.00 dB"),
        ("ok", True, "yes"),
        ("states", 10**400, str(10**400)),
    ],
)
def test_units_come_from_keys(tmp_path, key, value, shown):
    html.write(tmp_path / "r.html", {"section": {key: value}})
    page = Page(tmp_path / "r.html")
    assert shown in page.texts


def test_labels_that_lose_their_unit_stay_apart(tmp_path):
    html.write(tmp_path / "r.html", {"section": {"cache_bytes": 1, "cache_seconds": 1, "peak_vram_bytes": 1}})
    texts = Page(tmp_path / "r.html").texts
    assert {"Cache bytes", "Cache seconds", "Peak VRAM"} <= set(texts)


def test_hostile_text_stays_text(tmp_path):
    evil = "</style><script>alert('x')</script>\"><img src=x onerror=alert(1)>&amp;"
    sheet.save_png(tmp_path / "a.png", noise(4, 4, 3))
    report = {evil: 1, "note": evil, "a": {evil: evil}, "b": {evil: {evil: evil}, "c": {evil: 2}}, "d": [evil] * 20}
    html.write(tmp_path / "r.html", report, [(evil, tmp_path / "a.png")], title=evil)
    page = Page(tmp_path / "r.html")
    assert page.tags("script") == []
    assert len(page.tags("style")) == 1
    assert len(page.tags("img")) == 1
    assert page.tags("img")[0]["alt"] == evil
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count(evil) >= 29


def test_pictures_travel_inside_the_page(tmp_path):
    files = []
    for name, width in (("small", 64), ("wide", 500), ("huge", 1200)):
        sheet.save_png(tmp_path / f"{name}.png", noise(40, width, 3))
        files.append((name, tmp_path / f"{name}.png"))
    Image.open(files[0][1]).save(tmp_path / "a.jpg")
    html.write(tmp_path / "r.html", {}, [*files, ("photo", tmp_path / "a.jpg")])
    page = Page(tmp_path / "r.html")
    images = page.tags("img")
    assert [i["width"] for i in images] == ["64", "500", "1200", "64"]
    for (_, path), image in zip(files, images, strict=False):
        head, data = image["src"].split(",", 1)
        assert head == "data:image/png;base64"
        assert base64.b64decode(data) == path.read_bytes()
    assert images[3]["src"].startswith("data:image/jpeg;base64,")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)
    assert not re.search(r"https?://|@import|url\(", text)


def test_a_picture_that_cannot_be_read_is_named_and_no_page_is_written(tmp_path):
    sheet.save_png(tmp_path / "whole.png", noise(40, 40, 3))
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1000])
    (tmp_path / "text.png").write_text("no picture")
    for name in ("cut.png", "text.png", "missing.png"):
        with pytest.raises(ValueError, match=name) as caught:
            html.write(tmp_path / "r.html", {}, [("a", tmp_path / name)])
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "r.html").exists()


def test_the_same_report_gives_the_same_bytes(tmp_path):
    html.write(tmp_path / "a.html", {**REPORT, "samplers": set("hgfedcba")})
    html.write(tmp_path / "b.html", {**REPORT, "samplers": set("abcdefgh")})
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    texts = Page(tmp_path / "a.html").texts
    assert [text for text in texts if text in set("abcdefgh")] == list("abcdefgh")  # not in the order of their hashes


printable = st.text(st.characters(exclude_categories=["Cc"], exclude_characters="\r"), max_size=12)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | printable
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=14) | st.dictionaries(printable | st.integers(0, 9), inner, max_size=5),
    max_leaves=25,
)


def strings(tree):
    if isinstance(tree, dict):
        return [text for value in tree.values() for text in strings(value)]
    if isinstance(tree, list):
        return [text for value in tree for text in strings(value)]
    return [tree] if isinstance(tree, str) else []


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(printable, trees, max_size=6))
def test_any_report_gives_a_whole_page_with_all_its_texts(tmp_path_factory, report):
    path = tmp_path_factory.mktemp("report") / "r.html"
    html.write(path, report)
    text = Page(path).text
    for one in strings(report):
        assert one.encode("utf-8", "backslashreplace").decode() in text


# The room's walls


def test_the_room_needs_neither_comfy_nor_the_optional_packages():
    code = (
        "import sys\n"
        "import tfmq.report.metrics, tfmq.report.sheet, demo.html\n"
        "bad = {'comfy', 'lpips', 'torchvision', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=120)
