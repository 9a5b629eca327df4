"""Opens what a user names as a picture: an upright 8-bit RGB image, or a `UsageError` that says why not.

A picture is a file name, a URL where the caller allows it, the content of a file, or an opened PIL image.
None of them is trusted: reading, decoding and downloading have limits, and only the formats below are
decoded. Colour profiles are not applied.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import os
import queue
import re
import socket
import ssl
import stat
import string
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from PIL import Image, UnidentifiedImageError

from llama_adapter.common.errors import UsageError

Picture = str | Path | bytes | Image.Image

MAX_BYTES = 30 * 2**20
MAX_PIXELS = 70_000_000  # enough for a 64-megapixel phone; 4 bytes each when decoded
MAX_SECONDS = 10.0  # for a whole download, from resolving the host name to the last byte
MAX_REDIRECTS = 5

# No EPS, for which PIL would start Ghostscript, and no formats that are not used for photographs.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "MPO", "AVIF")
_URL = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_SVG = re.compile(rb"(\xef\xbb\xbf)?\s*<(svg|!doctype svg|(\?xml|!--).*<svg)", re.DOTALL | re.I)

# EXIF's orientation -> the operation that turns the stored picture upright. 1 is upright already.
_ORIENTATION = 274
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_picture(source: str | Path | bytes, *, allow_urls: bool = False) -> bytes:
    """The bytes of a picture's file: at least one, at most `MAX_BYTES`. They are not checked further.

    A string that starts with http:// or https:// is a URL. It is fetched only with `allow_urls`, never from a
    private network, and within `MAX_SECONDS`. Raises UsageError if it can't be read or is not allowed.
    """
    name = _name(source)
    if isinstance(source, bytes):
        content = source
    elif isinstance(source, str) and _URL.match(source):
        content = _read_url(source, name, allow_urls)
    else:
        content = _read_file(source, name)
    if not content:
        raise UsageError(f"{name}: empty, 0 bytes; expected a picture")
    if len(content) > MAX_BYTES:
        raise UsageError(f"{name}: larger than {MAX_BYTES // 2**20} MiB; save the picture smaller")
    return content


def open_picture(source: Picture, *, allow_urls: bool = False) -> Image.Image:
    """The picture in RGB with 8 bits a channel, fully decoded and upright. Always a new image.

    For an animation this is the first frame (for an opened one, the current frame). Transparent parts become
    white. Grey values of 16 bits are scaled to 8. Grey values of 32 bits or floating point have no fixed
    range: see `_grey`. Raises UsageError if it is no picture, is damaged, has more than `MAX_PIXELS` pixels,
    or can't be read (see `read_picture`, also for `allow_urls`).
    """
    name = _name(source)
    content = b"" if isinstance(source, Image.Image) else read_picture(source, allow_urls=allow_urls)
    try:
        with _without_pil_warnings():
            image = source if isinstance(source, Image.Image) else identify(content)
            _check_size(image, name)
            image.load()
            rgb = _upright(to_rgb(image, name), image)
    except UsageError:
        raise
    except Image.DecompressionBombError:  # PIL's own limit, which is higher; checked before the size is known
        raise UsageError(f"{name}: more than the {MAX_PIXELS:,} pixels allowed; make it smaller") from None
    except UnidentifiedImageError:
        if _SVG.match(content[:4096]):
            raise UsageError(f"{name}: SVG is not supported; save it as PNG") from None
        formats = f"{', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}"
        raise UsageError(f"{name}: not a picture, or of another format than {formats}") from None
    except Exception as error:  # on damaged files PIL's parsers raise all kinds of errors
        reason = f" ({_plain(str(error))})" if str(error) else ""
        raise UsageError(f"{name}: the picture is damaged or cut off{reason}; get it again") from None
    rgb.info.clear()  # so that nobody turns it a second time
    return rgb


def opened_picture(source: Picture, *, allow_urls: bool = False) -> Image.Image:
    """As `open_picture`, but an image that `open_picture` has made is returned as it is.

    So a picture is decoded only once, however many functions it passes through.
    """
    # An image in memory, not a file that PIL has opened and not decoded yet.
    if type(source) is Image.Image and source.mode == "RGB" and source.width * source.height:
        turned = source.getexif().get(_ORIENTATION, 1) != 1
        if not turned and "transparency" not in source.info:
            return source
    return open_picture(source, allow_urls=allow_urls)


# --- files --------------------------------------------------------------------------------------------------


def _read_file(path: str | Path, name: str) -> bytes:
    """The start of a file: at most one byte more than is allowed."""
    path = os.fspath(path)
    try:
        mode = os.stat(path).st_mode
        # Opening a pipe would wait for its writer.
        content = b""
        if stat.S_ISREG(mode):
            with open(path, "rb") as file:
                content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"{name}: there is no such file; expected a picture's") from None
    except OSError as error:
        raise UsageError(f"{name}: cannot be read: {error.strerror}") from None
    except ValueError:  # a zero byte or half a surrogate pair
        raise UsageError(f"{name}: not a file's name; expected a picture's") from None
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise UsageError(f"{name}: {what}; expected a picture's file")
    return content


def _name(source: Picture) -> str:
    """The picture's name in error messages."""
    if isinstance(source, bytes | Image.Image):
        return "the picture"
    text = str(source)
    if _URL.match(text):
        text = re.sub(r"(?<=://)[^/?#]*@", "", text)  # without the password
    return _plain(text) or "''"


def _plain(text: str) -> str:
    """The text on one line, without control characters, at most 120 characters long."""
    text = "".join(char if char.isprintable() else "\ufffd" for char in text)
    return text if len(text) <= 120 else f"{text[:59]}…{text[-60:]}"


# --- pixels -------------------------------------------------------------------------------------------------


def identify(content: bytes) -> Image.Image:
    """The picture with only its header read."""
    Image.init()
    available = [name for name in _FORMATS if name in Image.OPEN]  # not every build has AVIF
    return Image.open(io.BytesIO(content), formats=available)


def _check_size(image: Image.Image, name: str) -> None:
    size = f"{image.width:,} x {image.height:,} pixels"
    if image.width * image.height > MAX_PIXELS:
        raise UsageError(f"{name}: {size}, more than the {MAX_PIXELS:,} allowed; make it smaller")
    if not image.width * image.height:
        raise UsageError(f"{name}: {size}; expected a picture with at least one")


def _upright(rgb: Image.Image, stored: Image.Image) -> Image.Image:
    if stored.format == "TIFF":  # PIL turns these itself, and some versions leave the orientation in place
        return rgb
    try:
        turn = _TURNS.get(stored.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF is no reason to refuse the picture
        turn = None
    return rgb if turn is None else rgb.transpose(turn)


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A picture of any mode in RGB. Raises UsageError if its mode can't be converted."""
    if image.mode == "LAB":
        raise UsageError(f"{name}: its colours are Lab; save it as RGB")
    if image.mode[0] in "IF":
        image = _grey(image, name)
    if image.mode == "La":  # convert() would drop its transparency
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey(image: Image.Image, name: str) -> Image.Image:
    """Scale grey values of more than 8 bits to 8 bits.

    Modes I and F don't say which value is white. It is taken as the first of 1 (F only), 255 and 65,535 that
    no value exceeds. If none fits, or a value is negative, the darkest becomes black and the brightest white.
    """
    import numpy as np  # slow to import, and few pictures need it

    # Older versions of PIL open 16-bit PNG in mode I too, and all versions 16-bit PGM.
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    values = np.array(image, dtype=np.float32 if sixteen_bits else np.float64)
    if not np.isfinite(values).all():
        raise UsageError(f"{name}: has pixels that are not finite numbers; save it as 8-bit PNG")
    see_through = image.info.get("transparency")  # PNG: one value
    transparent = values == see_through if isinstance(see_through, int) else False
    low, high = float(values.min()), float(values.max())
    whites = (65535,) if sixteen_bits else (1, 255, 65535) if image.mode == "F" else (255, 65535)
    fitting = [white for white in whites if low >= 0 and high <= white]
    black, span = (0.0, fitting[0]) if fitting else (low, (high - low) or 1.0)
    np.subtract(values, black, out=values)
    np.multiply(values, 255 / span, out=values)
    grey = np.rint(values).astype(np.uint8)
    return Image.fromarray(np.where(transparent, np.uint8(255), grey))


_warnings_lock = threading.Lock()
_warnings_restored = ExitStack()
_warnings_users = 0


@contextmanager
def _without_pil_warnings() -> Iterator[None]:
    """Hide PIL's warnings about odd files: the user gets either a good picture or a `UsageError`.

    Warning filters belong to the whole process. The first of several threads sets the filter and the last
    removes it, so that threads can decode side by side.
    """
    global _warnings_users
    with _warnings_lock:
        if not _warnings_users:
            _warnings_restored.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _warnings_users += 1
    try:
        yield
    finally:
        with _warnings_lock:
            _warnings_users -= 1
            if not _warnings_users:
                _warnings_restored.close()


# --- URLs ---------------------------------------------------------------------------------------------------
# On a server, a stranger's URL is fetched from inside the operator's network. So the host name is resolved
# once, all of its addresses must be public, and the connection goes to one of exactly these addresses. Each
# redirect passes the same checks. A proxy would resolve the name itself, so proxy settings are ignored.


def _read_url(url: str, name: str, allowed: bool) -> bytes:
    """The start of what a URL leads to: at most one byte more than is allowed."""
    parts = _parse_url(url, name)
    if not allowed:
        raise UsageError(
            f"{name}: URLs are not fetched unless allowed: open_picture(url, allow_urls=True) in "
            "Python, --allow-urls on the command line; or download it and give the file"
        )
    deadline = time.monotonic() + MAX_SECONDS
    try:
        for _ in range(1 + MAX_REDIRECTS):
            with _connect(parts, name, deadline) as connection:
                response = _get(parts, connection, deadline)
                location = response.getheader("Location")
                if response.status in (301, 302, 303, 307, 308) and location:
                    parts = _parse_url(location, name, base=parts.geturl())
                    continue
                if response.status != 200:
                    answer = _plain(f"{response.status} {response.reason}".strip())
                    raise UsageError(f"{name}: the server answers {answer}; check the URL")
                content = b""
                while len(content) <= MAX_BYTES and (block := response.read(2**20)):
                    content += block
                return content
        raise UsageError(f"{name}: more than {MAX_REDIRECTS} redirects; give the picture's own URL")
    except TimeoutError:
        reason = f"takes more than {MAX_SECONDS:g} seconds"
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        reason = f"cannot be fetched: {_plain(str(error))}"
    raise UsageError(f"{name}: {reason}; try again, or download it and give the file")


def _parse_url(url: str, name: str, base: str = "") -> SplitResult:
    try:
        parts = urlsplit(urljoin(base, url))
        usable_port = parts.port is None or parts.port > 0
    except ValueError:
        raise UsageError(f"{name}: not a URL; expected https://HOST/PATH") from None
    if parts.scheme not in ("http", "https"):
        raise UsageError(f"{name}: leads to {_plain(parts.scheme)}://; only http and https are fetched")
    if not (parts.hostname and usable_port and url.isprintable()):
        raise UsageError(f"{name}: not a URL; expected https://HOST/PATH")
    if "@" in parts.netloc:
        raise UsageError(f"{name}: the URL holds a user name or password; give one without")
    return parts


def _connect(parts: SplitResult, name: str, deadline: float) -> socket.socket:
    """Connect to one of the host's public addresses. For https the host's certificate is verified."""
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    addresses = _resolve(host, port, deadline)
    if not all(is_public(address) for address in addresses):
        raise UsageError(f"{name}: leads into a private network, which is not allowed; give the file")
    while True:
        address = addresses.pop(0)
        try:
            seconds = _left(deadline) / (1 + len(addresses))
            connection = socket.create_connection((address, port), timeout=seconds)
            break
        except OSError:
            if not addresses:
                raise
    if parts.scheme == "https":
        connection.settimeout(_left(deadline))
        connection = ssl.create_default_context().wrap_socket(connection, server_hostname=host)
    return connection


def _resolve(host: str, port: int, deadline: float) -> list[str]:
    answers: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answers.put([str(address[0]) for *_, address in found])
        except (OSError, UnicodeError) as error:
            answers.put(error)

    # getaddrinfo has no time limit. The thread ends when the system's own limit is reached.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=_left(deadline))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped:
            return is_public(str(ip.ipv4_mapped))
        # is_global is also true for 2000::/3, much of which is unassigned, and for 6to4, which can hold any
        # IPv4.
        return ip.is_global and ip in ipaddress.ip_network("2000::/3") and ip.sixtofour is None
    return ip.is_global and not ip.is_multicast


def _get(parts: SplitResult, connection: socket.socket, deadline: float) -> http.client.HTTPResponse:
    target = quote(parts.path or "/", safe=string.punctuation)
    if parts.query:
        target += "?" + quote(parts.query, safe=string.punctuation)
    lines = [f"GET {target} HTTP/1.1", f"Host: {parts.netloc.encode('idna').decode()}", "Accept: image/*"]
    lines += ["User-Agent: llama-adapter", "Accept-Encoding: identity", "Connection: close", "", ""]
    connection.settimeout(_left(deadline))
    connection.sendall("\r\n".join(lines).encode())
    response = http.client.HTTPResponse(connection, method="GET")
    response.fp = io.BufferedReader(_Timed(connection, deadline))
    response.begin()
    return response


class _Timed(io.RawIOBase):
    """Reads from a connection until a deadline. With a limit for each read only, a server that sends a byte
    every few seconds could hold the reader for ever."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(_left(self._deadline))
        return self._connection.recv_into(buffer)


def _left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds
