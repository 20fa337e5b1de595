"""Decoding of one picture, from bytes or from a path inside a dataset folder, to a uint8 RGB tensor.

Damaged input of any kind raises `PictureError`, with a short `reason` by which reports count rejected pictures.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError, features
from torch.nn.functional import interpolate

Resize = Literal["shortest", "longest", "squash"]

MAX_PIXELS = 64_000_000
# The limit of the JPEG format. A longer side only ever means a hostile file, and resampling tables grow with the side.
MAX_SIDE = 65_535
# The widest uncompressed pixel there is (16-bit RGBA): a file larger than this per pixel cannot be within MAX_PIXELS.
_BYTES_PER_PIXEL = 8

# Named, because PIL otherwise also tries formats that start other programs (EPS) or fetch other files.
_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if features.check("avif") else [])]
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(ValueError):
    """A picture that cannot be used.

    Args:
        reason: a key of `REMEDIES`.
        detail: the file, the problem, and the remedy.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        # Both arguments go to `args`, so that the error survives pickling on the way out of a worker process.
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


REMEDIES = {
    "missing": "put the file there, or correct the path; the picture is looked up again at the next start",
    "empty": "write the picture again, or set the cell to null",
    "not_a_picture": "convert the file to JPEG, PNG or WebP",
    "truncated": "copy or download the file again",
    "too_large": "shrink the picture",
    "escapes_folder": "write paths relative to the dataset folder, and copy or link the pictures into the folder",
    "unreadable": "open the file in an image program and save it again; mind the permissions",
    "url": "download the picture into the dataset folder, and write the relative path or the bytes into the cell",
    "data_uri": "decode the base64 text, and write the bytes into the cell",
    "windows_path": "write the path relative to the dataset folder, with / instead of \\",
}
"""what to do, by the reason for which a picture cannot be used"""


def _unusual_form(source: str) -> str | None:
    """The reason to refuse a text that is no relative path with slashes: "url", "data_uri" or "windows_path"."""
    if source[:5].lower() == "data:":
        return "data_uri"
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
        return "url"
    return "windows_path" if "\\" in source or re.match(r"[A-Za-z]:", source) else None


def read_picture(source: str | bytes | None, root: Path | None = None, max_pixels: int = MAX_PIXELS) -> bytes:
    """The encoded bytes of a picture.

    Args:
        source: the encoded bytes themselves, or a path relative to `root`; None (a null cell) is a missing picture.
        root: the dataset folder. A path that leaves the folder (absolute, `..`, a symlink to the outside) is refused.
        max_pixels: a file too large to be a picture with that many pixels is not read.

    Raises:
        PictureError: the picture is missing, empty, too large, outside the folder, or the file cannot be read.
    """
    if source is None or (isinstance(source, str) and not source):
        raise PictureError("missing", "the image cell is null or empty")
    if isinstance(source, str):
        data = _read_file(source, root, max_pixels * _BYTES_PER_PIXEL)
        name = source
    else:
        data, name = bytes(source), "image bytes"
    if not data:
        raise PictureError("empty", f"{name}: zero bytes; write the picture again or set the cell to null")
    return data


def _read_file(source: str, root: Path | None, max_bytes: int) -> bytes:
    if root is None:
        raise PictureError("missing", f"{source!r} is a path, and no dataset folder was given to resolve it under")
    try:
        folder = Path(root).resolve()
        form = _unusual_form(source)
        if form is not None and not os.path.lexists(folder / source):
            shown = source if len(source) <= 80 else f"{source[:77]}..."
            raise PictureError(form, f"{shown!r}; {REMEDIES[form]}")
        path = (folder / source).resolve()
        if Path(source).is_absolute() or not path.is_relative_to(folder):
            remedy = "image paths are relative to the folder and stay inside it"
            raise PictureError("escapes_folder", f"{source!r} leaves the dataset folder {folder}; {remedy}")
        if not path.exists():
            raise PictureError("missing", f"{path}: no such file")
        if not path.is_file():  # a folder, or a pipe that would block for ever
            raise PictureError("unreadable", f"{path} is not a regular file")
        if path.stat().st_size > max_bytes:
            raise PictureError("too_large", f"{path}: {path.stat().st_size:,} bytes, at most {max_bytes:,} are read")
        return path.read_bytes()
    except PictureError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # permissions, null bytes, names too long, symlink circles
        raise PictureError("unreadable", f"{source!r} in {root}: {error}") from None


def decode_picture(data: bytes, size: int, resize: Resize = "shortest", max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Decode a picture and resize with bicubic interpolation and antialiasing.

    Transparent pixels are blended with white, the EXIF rotation is applied, an animation is read as the first frame,
    and 16-bit grey values are scaled to 8 bits. A file that was cut off and then closed with a proper end marker cannot
    be distinguished from a whole file.

    Args:
        data: bytes of a JPEG, PNG, WebP, GIF, BMP or TIFF file (AVIF where Pillow supports the format).
        size: side of the result in pixels.
        resize: "shortest" takes the centre square, so that the shorter side becomes `size`, as CLIP does; "longest"
            keeps the whole picture and pads with white; "squash" stretches both sides to `size`.
        max_pixels: a picture whose header announces more pixels is refused before decoding.

    Returns:
        (3, size, size) uint8 RGB.

    Raises:
        PictureError: the data cannot be decoded, are cut off, or hold too many pixels.
        ValueError: `size` is less than 1, or `resize` is unknown.
    """
    if size < 1:
        raise ValueError(f"size: {size} must be at least 1 pixel")
    if resize not in ("shortest", "longest", "squash"):
        raise ValueError(f"resize: {resize!r} must be 'shortest', 'longest' or 'squash'")
    if not data:
        raise PictureError("empty", "zero bytes")
    try:
        try:
            pixels = _pixels(data, max_pixels)
        except ValueError as error:
            if "MAX_TEXT" not in str(error):
                raise
            pixels = _pixels(_without_metadata(data), max_pixels)  # PIL refuses sound pictures with much text
        return _resize(pixels, size, resize)
    except PictureError:
        raise
    except Exception as error:  # decoders of damaged files raise anything: struct.error, SyntaxError, KeyError, ...
        raise _classified(error, data) from None


def _pixels(data: bytes, max_pixels: int) -> torch.Tensor:
    """(3, H, W) uint8 of an encoded picture."""
    with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
        _check_size(*picture.size, max_pixels)
        pixels = None
        if picture.format in ("JPEG", "MPO") and picture.mode in ("RGB", "L"):
            pixels = _decode_fast(data)
        return _decode_pil(picture) if pixels is None else pixels


def _without_metadata(png: bytes) -> bytes:
    """A PNG file without texts and colour profiles, which do not change the pixels read here."""
    parts, start = [png[:8]], 8
    while start + 8 <= len(png):
        end = start + 12 + int.from_bytes(png[start : start + 4], "big")
        if png[start + 4 : start + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            parts.append(png[start:end])
        start = end
    return b"".join(parts)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise PictureError("unreadable", f"the header says {width} x {height} pixels")
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        limit = f"{max_pixels:,} pixels and {MAX_SIDE:,} on a side"
        raise PictureError("too_large", f"{width} x {height} pixels, at most {limit}; shrink it or raise max_pixels")


def _classified(error: Exception, data: bytes) -> PictureError:
    """The PictureError for an exception of a decoder."""
    detail = f"{type(error).__name__}: {error}"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return PictureError("too_large", detail)
    # WebP's decoder does not say why it refuses; the container announces its length.
    short_riff = data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 > len(data)
    # Pillow before 13 does not recognise a JPEG that was cut off within the header.
    short_jpeg = (
        isinstance(error, UnidentifiedImageError) and data.startswith(b"\xff\xd8\xff") and b"\xff\xd9" not in data
    )
    if short_riff or short_jpeg or any(word in str(error).lower() for word in ("truncat", "premature", "incomplete")):
        return PictureError("truncated", detail)
    if isinstance(error, UnidentifiedImageError):
        return PictureError("not_a_picture", f"none of {', '.join(_FORMATS)}")
    return PictureError("unreadable", detail)


@cache
def _jpeg_decoder() -> Callable[[torch.Tensor], torch.Tensor | list[torch.Tensor]] | None:
    """The JPEG decoder of torchvision, None where torchvision has none: from version 0.29 on the decoders of
    torchvision are deprecated, and PIL decodes the same pixels 2-3 times slower. The import happens at the first
    picture, because the import takes a second and 170 MB that rankers without pictures do not need."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:
        return None
    return lambda encoded: decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)


def _decode_fast(data: bytes) -> torch.Tensor | None:
    """(3, H, W) uint8 of an ordinary JPEG, upright; None if PIL has to decode the file."""
    decode = _jpeg_decoder()
    if decode is None:
        return None
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        decoded = decode(encoded)
    except Exception as error:  # the deprecation warning of the decoder too, where warnings are errors
        if "truncated" in str(error):
            raise
        return None
    return decoded if isinstance(decoded, torch.Tensor) else decoded[0]


def _decode_pil(picture: Image.Image) -> torch.Tensor:
    """(3, H, W) uint8 of any picture that PIL opens, upright, blended with white."""
    picture.load()
    upright = _UPRIGHT.get(_orientation(picture))
    if picture.mode.startswith("I") or picture.mode == "F":
        rgb = _deep_grey(picture)
    elif "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = picture.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    else:
        rgb = picture.convert("RGB")
    if upright is not None:
        rgb = rgb.transpose(upright)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged metadata is no reason to refuse good pixels
        return 1


def _deep_grey(picture: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as scaled RGB: the conversion of PIL clips at 255, so most of a picture turns white."""
    values = np.asarray(picture).astype(np.float64)
    if picture.mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    else:  # 32-bit integers and floats declare no range: stretch from the smallest to the largest value
        values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
        low, high = float(values.min()), float(values.max())
    scaled = (values - low) / max(high - low, 1e-12) * 255
    return Image.fromarray(np.rint(scaled).clip(0, 255).astype(np.uint8)).convert("RGB")


def _resize(pixels: torch.Tensor, size: int, resize: Resize) -> torch.Tensor:
    height, width = pixels.shape[-2:]
    if resize == "shortest":
        # The square is cut out first: scaling a 1 x 5000 strip until its short side fits would need gigabytes.
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[:, top : top + side, left : left + side]
        shape = (size, size)
    elif resize == "longest":
        scale = size / max(height, width)
        shape = (max(1, round(height * scale)), max(1, round(width * scale)))
    else:
        shape = (size, size)
    # contiguous: the decoders return channels-last strides
    pixels = interpolate(pixels[None].contiguous(), shape, mode="bicubic", antialias=True)[0]
    if shape == (size, size):
        return pixels.contiguous()
    canvas = torch.full((3, size, size), 255, dtype=torch.uint8)
    top, left = (size - shape[0]) // 2, (size - shape[1]) // 2
    canvas[:, top : top + shape[0], left : left + shape[1]] = pixels
    return canvas
