from __future__ import annotations

import io
import os
import socket
import struct
import subprocess
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from llama_adapter.common.errors import UsageError
from llama_adapter.data import pictures
from llama_adapter.data.pictures import MAX_BYTES, MAX_PIXELS, open_picture, read_picture

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
NOISE = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)

Image.init()  # otherwise PIL does not know yet which formats it can write


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    assert type(image) is Image.Image and image.mode == "RGB"
    return np.asarray(image)


def grey(image: Image.Image) -> list[int]:
    """The picture's values in reading order. Its channels have to be equal."""
    values = pixels(image)
    assert (values == values[..., :1]).all()
    return values[..., 0].ravel().tolist()


def refusal(source: Any, **options: Any) -> str:
    """The message of the error, which has to be one line."""
    with pytest.raises(UsageError) as caught:
        open_picture(source, **options)
    line = str(caught.value)
    assert line.isprintable() and len(line) < 400
    return line


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colours: int, rows: bytes, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))
    body = b"".join(extra) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


# --- where it comes from ------------------------------------------------------------------------------------


def test_a_name_a_path_bytes_and_an_opened_picture_are_all_pictures(tmp_path: Path) -> None:
    file = tmp_path / "noise.png"
    Image.fromarray(NOISE).save(file)
    for source in (str(file), file, file.read_bytes(), Image.open(file), Image.fromarray(NOISE)):
        assert (pixels(open_picture(source)) == NOISE).all()
    assert read_picture(file) == read_picture(str(file)) == read_picture(file.read_bytes())


def test_what_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "missing.png")
    assert "a folder" in refusal(tmp_path)
    assert refusal("").startswith("''")
    assert "not a file's name" in refusal("a\0b.png")
    assert "cannot be read" in refusal("x" * 5000)


@pytest.mark.timeout(10)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_and_devices_are_refused_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", "/dev/zero", os.devnull):
        assert "a pipe or a device" in refusal(name)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    file = tmp_path / "secret.png"
    file.touch(mode=0)
    assert "Permission denied" in refusal(file)


def test_an_empty_file_and_one_too_large(tmp_path: Path) -> None:
    file = tmp_path / "file.png"
    file.touch()
    assert "0 bytes" in refusal(file) and "0 bytes" in refusal(b"")
    with open(file, "wb") as sparse:
        sparse.truncate(MAX_BYTES)
        assert len(read_picture(file)) == MAX_BYTES
        sparse.truncate(2**40)
    assert "larger than 30 MiB" in refusal(file) and "larger than 30 MiB" in refusal(bytes(MAX_BYTES + 1))


def test_error_lines_name_the_source_safely(tmp_path: Path) -> None:
    assert refusal(b"no picture").startswith("the picture: ")
    assert refusal(tmp_path / "a\x1b[31m\n\u202eb.png").endswith("a�[31m��b.png: " + refusal("a")[3:])
    line = refusal("folder/" * 400 + "cat.png")
    assert "…" in line and "folder/cat.png" in line


# --- what is no picture, or too much of one -----------------------------------------------------------------


def test_what_is_no_picture_is_told_which_formats_are() -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    for content in (b"no picture", b"\0" * 50, postscript, b"%PDF-1.4\n", b"<!DOCTYPE html><p><svg>"):
        line = refusal(content)
        assert "not a picture" in line and "JPEG, PNG, GIF" in line


@pytest.mark.parametrize(
    "start", ["", "\ufeff \n", '<?xml version="1.0"?>\n<!-- a cat -->', "<!DOCTYPE svg>"]
)
def test_svg_is_told_apart(start: str) -> None:
    assert "save it as PNG" in refusal(f'{start}<svg width="9"></svg>'.encode())


@pytest.mark.parametrize(
    "size",
    # PIL accepts the first silently, warns about the second and refuses the last.
    [(8_000, 9_000), (12_000, 10_000), (40_000, 40_000)],
)
@pytest.mark.parametrize("kind", ["png", "gif"])
def test_too_many_pixels_are_refused_before_decoding(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], kind: str
) -> None:
    width, height = size
    files = {
        "png": png(width, height, 8, 2, b""),
        "gif": b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0)
        + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x01\0\0;",
    }  # fmt: skip
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert f"more than the {MAX_PIXELS:,}" in refusal(files[kind])
        if width < 40_000:
            assert f"{width:,} x {height:,}" in refusal(Image.open(io.BytesIO(files[kind])))
            heard.clear()  # this test's own call of Image.open
    assert not heard and before == Image.MAX_IMAGE_PIXELS


def test_an_opened_picture_without_pixels_is_refused() -> None:
    assert "0 x 5 pixels" in refusal(Image.new("F", (0, 5)))


KINDS = ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", *(["AVIF"] if "AVIF" in Image.SAVE else [])]
FILES = {kind: encoded(Image.fromarray(NOISE), kind) for kind in KINDS}
FILES["progressive JPEG"] = encoded(Image.fromarray(NOISE), "JPEG", progressive=True)
FILES["deflated TIFF"] = encoded(Image.fromarray(NOISE), "TIFF", compression="tiff_deflate")
FILES["APNG"] = encoded(
    Image.fromarray(NOISE), "PNG", save_all=True, append_images=[Image.new("RGB", (5, 7))]
)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_cut_off_anywhere_is_refused_or_whole_all_the_same(kind: str) -> None:
    whole = pixels(open_picture(FILES[kind]))
    survived = 0
    for length in range(1, len(FILES[kind])):
        try:
            assert (pixels(open_picture(FILES[kind][:length])) == whole).all(), length
            survived += 1
        except UsageError:
            pass
    # The end of a file may be missing; the first frame of an animation is enough.
    assert survived < (100 if kind == "APNG" else 30)


def test_a_cut_file_s_line_says_so() -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        assert "damaged or cut off" in refusal(FILES[kind][:-40])
    with open_lazily(FILES["PNG"][:-40]) as opened:
        assert "damaged or cut off" in refusal(opened)
    closed = open_lazily(FILES["PNG"])
    closed.close()
    refusal(closed)


def open_lazily(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


@settings(deadline=None, max_examples=400)
@given(
    kind=st.sampled_from(sorted(FILES)),
    changes=st.lists(st.tuples(st.integers(0, 5000), st.binary(max_size=4), st.integers(0, 4)), max_size=6),
    cut=st.none() | st.integers(0, 5000),
)
def test_hostile_content_is_a_picture_or_a_usage_error(
    kind: str, changes: list[tuple[int, bytes, int]], cut: int | None
) -> None:
    content = bytearray(FILES[kind][:cut])
    for place, new, removed in changes:
        place %= len(content) + 1
        content[place : place + removed] = new
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            pixels(open_picture(bytes(content)))
        except UsageError as error:
            assert str(error).isprintable()
    assert not heard


@settings(deadline=None, max_examples=100)
@given(
    kind=st.sampled_from([b"acTL", b"fcTL", b"tRNS", b"PLTE", b"iCCP", b"eXIf", b"zTXt", b"pHYs", b"gAMA"]),
    data=st.binary(max_size=40),
    bits=st.sampled_from([1, 2, 4, 8, 16]),
    colours=st.sampled_from([0, 2, 3, 4, 6]),
)
def test_hostile_png_chunks_are_a_picture_or_a_usage_error(
    kind: bytes, data: bytes, bits: int, colours: int
) -> None:
    content = png(2, 2, bits, colours, b"\0" * 34, chunk(kind, data))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with suppress(UsageError):
            pixels(open_picture(content))
    assert not heard


def test_whatever_a_decoder_raises_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (
        MemoryError(),
        SyntaxError("a\nb"),
        struct.error("c"),
        zlib.error("d"),
        RecursionError("e"),
    ):

        def load(self: Image.Image, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(ImageFile.ImageFile, "load", load)
        assert "damaged or cut off" in refusal(FILES["PNG"])


def test_threads_leave_the_warning_filters_as_they_were() -> None:
    odd = png(1, 1, 8, 2, b"\0" * 4, chunk(b"acTL", b"\0" * 8))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(open_picture, [odd] * 100))
        assert warnings.filters == before and not heard
        open_lazily(odd)
        assert heard  # PIL had something to warn about


# --- which pixels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_s_first_frame(kind: str) -> None:
    first, second = Image.new("RGB", (3, 3), RED), Image.new("RGB", (3, 3), BLUE)
    content = encoded(first, kind, save_all=True, append_images=[second], lossless=True)
    opened = Image.open(io.BytesIO(content))
    assert getattr(opened, "n_frames", 1) == 2
    assert (pixels(open_picture(content)) == RED).all()
    opened.seek(1)
    assert (pixels(open_picture(opened)) == BLUE).all()


def test_a_cmyk_jpeg() -> None:
    content = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    assert open_lazily(content).mode == "CMYK"
    assert np.abs(pixels(open_picture(content)).astype(int) - RED).max() <= 3


ALL_16_BITS = np.arange(65536, dtype=np.uint16).reshape(256, 256)
ALL_16_BITS_IN_8 = [round(value / 257) for value in range(65536)]


def test_16_bit_greys_are_scaled_not_clipped() -> None:
    picture = Image.fromarray(ALL_16_BITS)
    assert picture.mode == "I;16"
    pgm = b"P5 256 256 65535\n" + ALL_16_BITS.astype(">u2").tobytes()
    for source in (
        picture,
        Image.frombytes("I;16B", (256, 256), ALL_16_BITS.astype(">u2").tobytes()),
        Image.fromarray(ALL_16_BITS.astype(np.int32)),
        encoded(picture, "PNG"),
        encoded(picture, "TIFF"),
        pgm,
    ):
        assert grey(open_picture(source)) == ALL_16_BITS_IN_8
    dark = png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 3, 200))
    assert grey(open_picture(dark)) == [0, 1]
    assert grey(open_picture(b"P5 2 1 65535\n" + struct.pack(">2H", 3, 200))) == [0, 1]
    see_through = png(
        3, 1, 16, 0, b"\0" + struct.pack(">3H", 1000, 1001, 65535), chunk(b"tRNS", struct.pack(">H", 1000))
    )
    assert grey(open_picture(see_through)) == [255, 4, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.2, 1], [0, 51, 255]),
        ([0, 2, 254.6], [0, 2, 255]),
        ([0, 257, 65535], [0, 1, 255]),
        ([-1, 0, 1], [0, 128, 255]),
        ([-3e38, 0, 3e38], [0, 128, 255]),
        ([0, 50000, 100000], [0, 128, 255]),
        ([-7, -7, -7], [0, 0, 0]),
        ([1e30, 1e30, 1e30], [0, 0, 0]),
        ([0, 0, 0], [0, 0, 0]),
    ],
)
def test_floating_point(values: list[float], expected: list[int]) -> None:
    picture = Image.fromarray(np.array([values], dtype=np.float32))
    assert picture.mode == "F"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert grey(open_picture(picture)) == grey(open_picture(encoded(picture, "TIFF"))) == expected


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_floating_point_that_is_no_number_is_refused(value: float) -> None:
    picture = Image.fromarray(np.array([[0, value, 1]], dtype=np.float32))
    assert "not finite numbers" in refusal(picture)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 7, 255], [0, 7, 255]),
        ([0, 257, 65535], [0, 1, 255]),
        ([-(2**31), 0, 2**31 - 1], [0, 128, 255]),
        ([0, 1, 70000], [0, 0, 255]),
        ([-5, -5, -4], [0, 0, 255]),
    ],
)
def test_32_bit_greys(values: list[int], expected: list[int]) -> None:
    picture = Image.fromarray(np.array([values], dtype=np.int32))
    assert picture.mode == "I"
    assert grey(open_picture(picture)) == grey(open_picture(encoded(picture, "TIFF"))) == expected


def test_one_bit() -> None:
    picture = Image.fromarray(np.array([[True, False, True]]))
    assert picture.mode == "1"
    assert grey(open_picture(encoded(picture, "PNG"))) == grey(open_picture(picture)) == [255, 0, 255]


def test_transparency_is_laid_on_white() -> None:
    rgba = Image.fromarray(np.array([[(*RED, 255), (*RED, 128), (*RED, 0)]], dtype=np.uint8))
    expected = [[RED, (255, 127, 127), WHITE]]
    for source in (rgba, encoded(rgba, "PNG"), encoded(rgba, "WEBP", lossless=True)):
        assert (pixels(open_picture(source)) == expected).all()

    la = Image.fromarray(np.array([[(0, 255), (0, 128), (0, 0)]], dtype=np.uint8), mode="LA")
    for source in (la, encoded(la, "PNG"), la.convert("La"), la.convert("RGBA").convert("RGBa")):
        assert grey(open_picture(source)) == [0, 127, 255]

    palette = Image.new("P", (3, 1))
    palette.putpalette([*RED, *RED, *BLUE])
    palette.putdata([0, 1, 2])
    for transparency, middle in ((1, WHITE), (bytes([255, 128, 255]), (255, 127, 127))):
        content = encoded(palette, "PNG", transparency=transparency)
        assert (pixels(open_picture(content)) == [[RED, middle, BLUE]]).all()
    content = encoded(palette, "GIF", transparency=1)
    assert (pixels(open_picture(content)) == [[RED, WHITE, BLUE]]).all()

    keyed = encoded(Image.fromarray(np.array([[RED, BLUE]], dtype=np.uint8)), "PNG", transparency=BLUE)
    assert (pixels(open_picture(keyed)) == [[RED, WHITE]]).all()


# For each orientation, EXIF's specification says where row 0 and column 0 are in the upright picture.
ORIENTATIONS = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def turned(stored: np.ndarray, row_0: str, column_0: str) -> np.ndarray:
    if row_0 in ("left", "right"):
        stored, row_0, column_0 = stored.swapaxes(0, 1), column_0, row_0
    if row_0 == "bottom":
        stored = stored[::-1]
    return stored[:, ::-1] if column_0 == "right" else stored


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_pictures_are_turned_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    expected = turned(NOISE, *ORIENTATIONS[orientation])
    for kind in ("PNG", "WEBP", "TIFF"):
        content = encoded(Image.fromarray(NOISE), kind, exif=exif, lossless=True)
        for source in (content, open_lazily(content)):
            assert np.array_equal(pixels(open_picture(source)), expected)
    content = encoded(Image.fromarray(NOISE), "JPEG", exif=exif)
    expected = turned(np.asarray(open_lazily(content)), *ORIENTATIONS[orientation])
    upright = open_picture(content)
    assert np.array_equal(pixels(upright), expected)
    assert np.array_equal(pixels(open_picture(upright)), expected)  # it is turned only once
    deep = Image.fromarray(ALL_16_BITS[:2, :3])
    expected = turned(np.zeros((2, 3)), *ORIENTATIONS[orientation])
    assert pixels(open_picture(encoded(deep, "PNG", exif=exif))).shape[:2] == expected.shape


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08"]
)
def test_damaged_exif_is_no_reason_to_refuse(exif: bytes) -> None:
    content = encoded(Image.fromarray(NOISE), "PNG", exif=exif)
    assert (pixels(open_picture(content)) == NOISE).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_one_pixel_wide_or_high(size: tuple[int, int]) -> None:
    for kind in KINDS:
        assert open_picture(encoded(Image.new("RGB", size, RED), kind)).size == size


COLOUR_MODES = ["1", "L", "P", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LA", "La", "PA"]


@pytest.mark.parametrize("mode", [*COLOUR_MODES, "I", "F", "I;16", "I;16L", "I;16B"])
def test_an_opened_picture_is_not_changed(mode: str) -> None:
    picture = Image.new(mode, (3, 2), 1 if len(Image.new(mode, (1, 1)).getbands()) == 1 else None)
    picture.info["comment"] = "mine"
    before = (picture.mode, picture.size, picture.tobytes(), dict(picture.info))
    result = open_picture(picture)
    pixels(result)
    result.putpixel((0, 0), (1, 2, 3))
    assert (picture.mode, picture.size, picture.tobytes(), picture.info) == before


def test_lab_is_refused() -> None:
    assert "save it as RGB" in refusal(Image.new("LAB", (2, 2)))


# --- URLs ---------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """/picture, /to/URL (redirects there), /again (redirects to itself), /large, /drip, /missing."""

    seen: ClassVar[list[tuple[str, dict[str, str]]]] = []

    def do_GET(self) -> None:
        self.seen.append((self.path, dict(self.headers)))
        if self.path.startswith(("/to/", "/again")):
            self.send_response(302)
            self.send_header("Location", unquote(self.path.partition("/to/")[2]) or "/again")
            self.end_headers()
        elif self.path.startswith("/picture"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(FILES["PNG"])
        elif self.path == "/large":
            self.send_response(200)
            self.end_headers()
            self._write_for_ever(b"\0" * 2**16, pause=0)
        elif self.path == "/drip":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            self._write_for_ever(b"x", pause=0.02)
        elif self.path == "/cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(FILES["PNG"][:50])
        else:
            self.send_response(404, "No\x1b such")
            self.end_headers()

    def _write_for_ever(self, block: bytes, pause: float) -> None:
        with suppress(OSError):  # the reader closes the connection
            for _ in range(1000):
                self.wfile.write(block)
                time.sleep(pause)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a server on 127.0.0.1, which here is the only private address allowed."""
    is_public = pictures.is_public
    monkeypatch.setattr(pictures, "is_public", lambda ip: ip == "127.0.0.1" or is_public(ip))
    monkeypatch.setattr(Handler, "seen", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.fixture
def no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: Any, **__: Any) -> None:
        raise AssertionError("connected")

    monkeypatch.setattr(socket, "create_connection", connect)


def resolving(monkeypatch: pytest.MonkeyPatch, answers: Callable[[str], list[str]]) -> None:
    """Resolve names with `answers`, and addresses with the system."""
    system = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *rest: Any, **options: Any) -> Any:
        hosts = [host] if host.replace(".", "").isdigit() else answers(host)
        return [found for host in hosts for found in system(host, port, *rest, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_urls_are_refused_unless_allowed(server: str) -> None:
    for line in (refusal(f"{server}/picture"), refusal("HTTPS://example.com/cat.png")):
        assert "allow_urls=True" in line and "--allow-urls" in line
    assert not Handler.seen


def test_an_allowed_url_is_fetched(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for path in ("/picture", "/picture?a=b c&d=ä#e", f"/to/{server}/picture", "/to//picture"):
        assert (pixels(open_picture(server + path, allow_urls=True)) == NOISE).all()
    assert read_picture(f"{server}/picture", allow_urls=True) == FILES["PNG"]
    path, headers = Handler.seen[1]
    assert path == "/picture?a=b%20c&d=%C3%A4"
    assert headers["User-Agent"] == "llama-adapter" and headers["Host"] == server.removeprefix("http://")


PRIVATE_IPV4 = [
    *["127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1"],
    *["224.0.0.1", "240.0.0.1", "255.255.255.255"],
    *["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "localhost", "LOCALHOST"],
]
PRIVATE_IPV6 = [
    *["::1", "::", "fe80::1", "fc00::1", "fec0::1", "ff02::1", "ff0e::1", "2001:db8::1"],
    *["::ffff:127.0.0.1", "::ffff:7f00:1", "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::1"],
]


@pytest.mark.usefixtures("no_connection")
@pytest.mark.parametrize("host", [*PRIVATE_IPV4, *(f"[{address}]" for address in PRIVATE_IPV6)])
def test_private_addresses_are_never_connected_to(host: str) -> None:
    assert "private network" in refusal(f"http://{host}/", allow_urls=True)
    assert "private network" in refusal(f"https://{host}:8080/cat.png", allow_urls=True)


@pytest.mark.usefixtures("no_connection")
@pytest.mark.parametrize(
    "host", ["127.0.0.1.", "127。0。0。1", "[fe80::1%25lo]", "[fe80::1%lo]", "localhost."]
)
def test_spellings_that_a_resolver_may_not_know_are_refused_all_the_same(host: str) -> None:
    refusal(f"http://{host}/", allow_urls=True)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_are_allowed(address: str) -> None:
    assert pictures.is_public(address)


@pytest.mark.parametrize(
    "target", ["http://169.254.169.254/meta", "http://127.0.0.2/", "//[::1]/", "http://10.0.0.1:80/"]
)
def test_a_redirect_into_a_private_network_is_refused(server: str, target: str) -> None:
    assert "private network" in refusal(f"{server}/to/{target}", allow_urls=True)
    assert len(Handler.seen) == 1


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("file:///etc/passwd", "leads to file://"),
        ("ftp://example.com/", "leads to ftp://"),
        ("http://me:secret@example.com/", "password"),
        ("http://[::1/", "not a URL"),
    ],
)
def test_a_redirect_is_held_to_the_same_rules(server: str, target: str, said: str) -> None:
    assert said in refusal(f"{server}/to/{target}", allow_urls=True)


@pytest.mark.usefixtures("no_connection")
def test_one_private_address_among_public_ones_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, lambda _: ["8.8.8.8", "10.0.0.1"])
    assert "private network" in refusal("http://pictures.example/", allow_urls=True)


def test_the_address_that_was_checked_is_the_one_connected_to(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def rebinding(host: str) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    resolving(monkeypatch, rebinding)
    url = server.replace("127.0.0.1", "pictures.example")
    assert (pixels(open_picture(f"{url}/picture", allow_urls=True)) == NOISE).all()
    assert asked == ["pictures.example"]
    assert Handler.seen[0][1]["Host"] == url.removeprefix("http://")


def test_an_address_that_does_not_answer_leaves_the_others(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "is_public", lambda _: True)
    resolving(monkeypatch, lambda _: ["127.0.0.9", "127.0.0.1"])
    open_picture(server.replace("127.0.0.1", "pictures.example") + "/picture", allow_urls=True)


@pytest.mark.usefixtures("no_connection")
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://example.com/cat.png", "leads to ftp://"),
        ("file:///etc/passwd", "leads to file://"),
        ("gopher://example.com/", "leads to gopher://"),
        ("http://", "not a URL"),
        ("http:///cat.png", "not a URL"),
        ("http://example.com:99999/", "not a URL"),
        ("http://example.com:0/", "not a URL"),
        ("http://[::1/", "not a URL"),
        ("http://example.com/\r\nHost: other", "not a URL"),
        ("http://exa\tmple.com/", "not a URL"),
        ("http://example..com/", "cannot be fetched"),
        (f"http://{'a' * 70}.com/", "cannot be fetched"),
        ("https://me:secret@example.com/cat.png", "user name or password"),
    ],
)
def test_urls_that_are_not_usable(url: str, said: str) -> None:
    line = refusal(url, allow_urls=True)
    assert said in line and "secret" not in line


def test_what_the_server_says_is_told(server: str) -> None:
    assert "the server answers 404 No�" in refusal(f"{server}/missing", allow_urls=True)
    assert "more than 5 redirects" in refusal(f"{server}/again", allow_urls=True)
    assert len(Handler.seen) == 1 + 6
    refusal(f"{server}/cut", allow_urls=True)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        assert "refused" in refusal(f"http://127.0.0.1:{port}/", allow_urls=True)


def test_a_download_has_limits(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_BYTES", 2**20)
    assert "larger than 1 MiB" in refusal(f"{server}/large", allow_urls=True)
    monkeypatch.setattr(pictures, "MAX_SECONDS", 0.3)
    assert "takes more than 0.3 seconds" in refusal(f"{server}/drip", allow_urls=True)


def test_a_name_that_takes_for_ever_to_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: done.wait(10) and [])
    monkeypatch.setattr(pictures, "MAX_SECONDS", 0.1)
    assert "takes more than 0.1 seconds" in refusal("http://pictures.example/", allow_urls=True)
    done.set()


def test_https_is_verified_against_the_host_s_name(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ssl

    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    )
    command += f" -addext subjectAltName=DNS:pictures.example -keyout {key} -out {certificate}"
    try:
        subprocess.run(command.split(), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl here to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    resolving(monkeypatch, lambda _: ["127.0.0.1"])
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as https:
        https.socket = context.wrap_socket(https.socket, server_side=True)
        https.handle_error = lambda *_: None  # type: ignore[method-assign]
        thread = threading.Thread(target=https.serve_forever, args=(0.01,))
        thread.start()
        try:
            url = f"https://pictures.example:{https.server_port}/picture"
            assert "CERTIFICATE_VERIFY_FAILED" in refusal(url, allow_urls=True)
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            assert (pixels(open_picture(url, allow_urls=True)) == NOISE).all()
            other = url.replace("pictures.example", "other.example")
            assert "CERTIFICATE_VERIFY_FAILED" in refusal(other, allow_urls=True)
        finally:
            https.shutdown()
            thread.join()
    assert len(Handler.seen) == 1
