from __future__ import annotations

import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from mmctr.data import images
from mmctr.data.images import PictureError, decode_picture, read_picture

# torchvision 0.29 warns at every JPEG that its decoders will go; the module falls back on PIL when they do
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
MODES = ("shortest", "longest", "squash")


def photo(width: int = 200, height: int = 140, seed: int = 0) -> Image.Image:
    """A smooth coloured picture without symmetry."""
    grid = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)


def encode(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().mean())


def reason(data: bytes, **options) -> str:
    with pytest.raises(PictureError) as caught:
        decode_picture(data, 32, **options)
    return caught.value.reason


def by_hand(picture: Image.Image, size: int, resize: str) -> torch.Tensor:
    """The same three conventions by PIL alone."""
    width, height = picture.size
    if resize == "shortest":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        picture = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    elif resize == "longest":
        shape = (round(width * size / max(width, height)), round(height * size / max(width, height)))
        canvas = Image.new("RGB", (size, size), "white")
        canvas.paste(picture.resize(shape, Image.Resampling.BICUBIC), ((size - shape[0]) // 2, (size - shape[1]) // 2))
        picture = canvas
    else:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@pytest.mark.parametrize("resize", MODES)
@pytest.mark.parametrize("shape", [(200, 140), (90, 300), (20, 20)])
def test_fast_path_equals_pil(resize, shape, monkeypatch):
    data = encode(photo(*shape), "JPEG", quality=95)
    fast = decode_picture(data, 64, resize)
    assert fast.shape == (3, 64, 64) and fast.dtype == torch.uint8 and fast.is_contiguous()
    assert difference(fast, by_hand(Image.open(io.BytesIO(data)), 64, resize)) < 2
    monkeypatch.setattr(images, "_decode_fast", lambda data: None)
    assert difference(fast, decode_picture(data, 64, resize)) < 2


def test_fast_path_is_taken_for_plain_jpegs_only(monkeypatch):
    taken = []
    fast = images._decode_fast
    monkeypatch.setattr(images, "_decode_fast", lambda data: taken.append(1) or fast(data))
    for picture in (photo(), photo().convert("L")):
        decode_picture(encode(picture, "JPEG"), 32)
    assert len(taken) == 2
    decode_picture(encode(photo().convert("CMYK"), "JPEG"), 32)
    decode_picture(encode(photo(), "PNG"), 32)
    assert len(taken) == 2


def test_without_torchvisions_decoder(monkeypatch):
    data = encode(photo(), "JPEG")
    fast = decode_picture(data, 32)
    monkeypatch.setattr(images, "_jpeg_decoder", lambda: None)
    assert difference(fast, decode_picture(data, 32)) < 2


@pytest.mark.filterwarnings("error")
def test_a_decoders_warning_made_an_error_does_not_cost_the_picture():
    assert decode_picture(encode(photo(), "JPEG"), 32).shape == (3, 32, 32)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_formats(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = decode_picture(encode(photo(), kind, **options), 64)
    assert difference(decoded, by_hand(photo(), 64, "shortest")) < (8 if kind == "GIF" else 1)


def test_longest_pads_with_white():
    decoded = decode_picture(encode(Image.new("RGB", (100, 50), "black"), "PNG"), 64, "longest")
    assert (decoded[:, :16] == 255).all() and (decoded[:, 48:] == 255).all() and (decoded[:, 16:48] == 0).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(kind, orientation):
    upright = photo()
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_picture(encode(stored, kind, exif=exif), 64, "longest")
    assert difference(decoded, decode_picture(encode(upright, kind), 64, "longest")) < 2


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_picture():
    decoded = decode_picture(encode(photo(), "PNG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff junk"), 64)
    assert difference(decoded, by_hand(photo(), 64, "shortest")) < 1


def test_cmyk_looks_like_rgb():
    decoded = decode_picture(encode(photo().convert("CMYK"), "JPEG", quality=95), 64)
    assert difference(decoded, by_hand(photo(), 64, "shortest")) < 8


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode):
    layer = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
    layer.paste((0, 0, 0, 255), (0, 0, 30, 60))
    if mode == "P":
        picture = Image.new("P", (60, 60), 1)
        picture.putpalette([0, 0, 0, 10, 200, 10])
        picture.paste(0, (0, 0, 30, 60))
        data = encode(picture, "PNG", transparency=1)
    else:
        data = encode(layer.convert(mode), "PNG")
    decoded = decode_picture(data, 60)
    assert (decoded[:, :, :28] == 0).all() and (decoded[:, :, 32:] == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_gradient(kind):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    row = decode_picture(encode(Image.fromarray(ramp), kind), 64)[0, 32].int()
    assert row[0] == 0 and row[-1] == 255 and (row.diff() >= 3).all()


def test_float_and_bilevel_pictures():
    ramp = np.tile(np.linspace(0, 1, 64).astype(np.float32), (64, 1))
    ramp[0, 0] = np.nan
    assert decode_picture(encode(Image.fromarray(ramp), "TIFF"), 64)[0, 32].float().std() > 60
    half = Image.new("1", (40, 40), 0)
    half.paste(1, (20, 0, 40, 40))
    decoded = decode_picture(encode(half, "PNG"), 40)
    assert (decoded[:, :, :18] == 0).all() and (decoded[:, :, 22:] == 255).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    decoded = decode_picture(encode(frames[0], kind, save_all=True, append_images=frames[1:]), 16)
    assert decoded[0].min() > 200 and decoded[2].max() < 60


@pytest.mark.lowest
@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_errors(kind):
    options = {"progressive": True} if kind == "progressive" else {}
    data = encode(photo(), "JPEG" if kind == "progressive" else kind, **options)
    for keep in (0.1, 0.3, 0.5, 0.7, 0.9, 0.98):
        assert reason(data[: int(len(data) * keep)]) == "truncated", keep
    if kind in ("JPEG", "progressive"):
        assert reason(data[:-1]) == "truncated"


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (1, 1), (3, 65535)])
@pytest.mark.parametrize("resize", MODES)
def test_extreme_shapes(shape, resize):
    assert decode_picture(encode(Image.new("RGB", shape, "red"), "PNG"), 48, resize).shape == (3, 48, 48)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_bombs_are_refused_by_their_header(kind, monkeypatch):
    data = encode(photo(), kind)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr(images, "_decode_fast", lambda data: pytest.fail("decoded"))
    assert reason(data, max_pixels=200 * 140 - 1) == "too_large"


def test_pils_own_bomb_guard_is_too_large(monkeypatch):
    data = encode(photo(), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # more than twice as many: PIL raises
    assert reason(data) == "too_large"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)  # fewer: PIL warns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason(data) == "too_large"


def test_sides_beyond_the_limit_are_refused():
    assert reason(encode(Image.new("1", (70_000, 1)), "PNG")) == "too_large"


@pytest.mark.parametrize("data", [b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_not_a_picture(data):
    assert reason(data) == "not_a_picture"


def test_arguments_are_checked():
    assert reason(b"") == "empty"
    data = encode(photo(), "PNG")
    with pytest.raises(ValueError, match="size: 0"):
        decode_picture(data, 0)
    with pytest.raises(ValueError, match="'crop'"):
        decode_picture(data, 8, "crop")  # pyright: ignore[reportArgumentType]


@pytest.mark.filterwarnings("ignore")
def test_fuzz_only_picture_errors_leave():
    rng = np.random.default_rng(0)
    small = photo(40, 30)
    valid = [
        encode(small, "JPEG"),
        encode(small, "JPEG", progressive=True),
        encode(small.convert("CMYK"), "JPEG"),
        encode(small.convert("RGBA"), "PNG"),
        encode(small.convert("P"), "GIF"),
        encode(small, "WEBP"),
        encode(small, "BMP"),
        encode(small, "TIFF"),
    ]
    for trial in range(800):
        data = bytearray(valid[trial % len(valid)])
        kind = (trial // len(valid)) % 3
        if kind == 0:
            data = rng.bytes(int(rng.integers(1, 200)))
        elif kind == 1:
            data = data[: int(rng.integers(1, len(data)))]
        else:
            # half of the flips hit the header, where they do the most
            span = len(data) if rng.random() < 0.5 else min(len(data), 64)
            for at in rng.integers(0, span, int(rng.integers(1, 12))):
                data[at] = int(rng.integers(256))
        try:
            assert decode_picture(bytes(data), 16, MODES[trial % 3], max_pixels=1_000_000).shape == (3, 16, 16)
        except PictureError as error:
            assert error.reason in {"not_a_picture", "truncated", "too_large", "unreadable"}


def test_read_picture(tmp_path):
    root, outside = tmp_path / "set", tmp_path / "secret.png"
    (root / "images").mkdir(parents=True)
    outside.write_bytes(b"secret")
    (root / "images" / "a.png").write_bytes(b"abc")
    (root / "images" / "empty.png").write_bytes(b"")
    (root / "images" / "large.png").write_bytes(bytes(100))
    (root / "link.png").symlink_to(outside)
    (root / "inside.png").symlink_to(root / "images" / "a.png")
    (root / "circle.png").symlink_to(root / "circle.png")

    assert read_picture("images/a.png", root) == b"abc"
    assert read_picture("images/../images/a.png", root) == b"abc"
    assert read_picture("inside.png", root) == b"abc"
    assert read_picture(b"raw", None) == b"raw"
    expected = {
        "../secret.png": "escapes_folder",
        "../../etc/passwd": "escapes_folder",
        str(outside): "escapes_folder",
        str(root / "images" / "a.png"): "escapes_folder",
        "link.png": "escapes_folder",
        "images/none.png": "missing",
        "https://shop.example/a.png": "url",
        "s3://bucket/a.png": "url",
        "data:image/png;base64," + "A" * 5000: "data_uri",
        "images\\a.png": "windows_path",
        "C:\\images\\a.png": "windows_path",
        "c:a.png": "windows_path",
        "": "missing",
        "images/empty.png": "empty",
        "images": "unreadable",
        "circle.png": "unreadable",
        "nul\0.png": "unreadable",
        "x" * 5000: "unreadable",
    }
    for source, slug in expected.items():
        with pytest.raises(PictureError) as caught:
            read_picture(source, root)
        assert caught.value.reason == slug, source[:40]
    for source, folder, slug in ((None, root, "missing"), (b"", root, "empty"), ("images/a.png", None, "missing")):
        with pytest.raises(PictureError, match=slug):
            read_picture(source, folder)
    with pytest.raises(PictureError, match="too_large"):
        read_picture("images/large.png", root, max_pixels=10)


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(PictureError("missing", "a.png")))
    assert (error.reason, error.detail, str(error)) == ("missing", "a.png", "missing: a.png")
    assert str(PictureError("empty")) == "empty"


@pytest.mark.parametrize("kind", ["text", "compressed text", "many texts", "colour profile"])
def test_a_sound_png_with_much_metadata(kind):
    """PIL refuses more than 1 MB of one text, and 64 MB of all texts, to be safe from bombs."""
    image = Image.new("RGB", (20, 10), (200, 30, 40))
    texts, options = PngImagePlugin.PngInfo(), {}
    if kind == "colour profile":
        options["icc_profile"] = bytes(3_000_000)
    else:
        for number in range(70 if kind == "many texts" else 1):
            size = 1_000_000 if kind == "many texts" else 3_000_000
            texts.add_text(f"Comment{number}", "x" * size, zip=kind != "text")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=texts, **options)
    plain = io.BytesIO()
    image.save(plain, "PNG")
    assert decode_picture(buffer.getvalue(), 8).equal(decode_picture(plain.getvalue(), 8))
