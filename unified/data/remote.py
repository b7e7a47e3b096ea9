"""Where a shard's URL leads: a local file, embedded data, or something to fetch first.

What is not local is copied, whole, into a folder (`Access.cache_dir`) and read from there, so a
shard is fetched once a machine. webdataset's `gopen` does the fetching: ``http``, ``https``,
``hf``, ``gs``, ``ais``, ``sftp``, ``ftps``, ``scp``, and ``pipe:COMMAND``, which runs a shell
command and is refused unless `Access.allow_pipes` says otherwise.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

EMBEDDED = "embedded:"
GIGABYTE = 10**9
#: how often a copy that others drop at once is fetched again
ATTEMPTS = 5


@dataclass(frozen=True)
class Access:
    """What may be fetched, and where to: see `DataConfig`."""

    cache_dir: str = "~/.cache/unified/shards"
    cache_gb: float | None = None
    allow_pipes: bool = False

    def path(self, url: str) -> Path:
        """The local file of `url`, fetched if need be. ValueError for what may not be fetched, and
        for what could not be."""
        local = local_path(url)
        if local is not None:
            return local
        self.check(url)
        target = self.cached(url)
        for _ in range(ATTEMPTS):
            if not target.is_file():
                self._fetch(url, target)
                self._trim(keep=target)
            if self.touch(target):
                return target
        raise ValueError(
            f"shard {url} was dropped from {self.cache_dir} as often as it was fetched:"
            f" data.cache_gb {self.cache_gb} is too small for what is read at once"
        )

    def touch(self, path: Path) -> bool:
        """Mark a copy as used now; False if it is gone."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def cached(self, url: str) -> Path:
        """Where the copy of a remote shard lies."""
        name = re.sub(r"[^\w.-]+", "_", url.rsplit("/", 1)[-1])[-80:]
        digest = hashlib.sha256(url.encode()).hexdigest()[:16]
        return Path(self.cache_dir).expanduser().absolute() / f"{digest}-{name}"

    def check(self, url: str) -> None:
        """ValueError for a URL that is not local and may not, or cannot, be fetched."""
        from webdataset.gopen import gopen_schemes

        scheme = _scheme(url)
        if scheme is None:
            return
        if scheme == "pipe" and not self.allow_pipes:
            raise ValueError(
                f"{url!r} would run a shell command; if you trust it, set data.allow_pipes=true,"
                " else give the path of a shard file"
            )
        if scheme not in gopen_schemes or scheme.startswith("__"):
            raise ValueError(
                f"{url!r} cannot be fetched: {scheme} is none of {', '.join(fetched())}; download"
                " the shard and give its path"
            )

    def _fetch(self, url: str, target: Path) -> None:
        """Copy `url` to `target` in one step; processes of a machine wait for each other."""
        from filelock import FileLock
        from webdataset.gopen import gopen

        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if target.is_file():
                return
            partial = target.with_name(f".{target.name}.partial")
            try:
                with gopen(url, "rb") as remote, partial.open("wb") as copy:
                    shutil.copyfileobj(remote, copy)
            except OSError as error:
                partial.unlink(missing_ok=True)
                raise ValueError(f"shard {url} could not be fetched: {error}") from None
            os.replace(partial, target)

    def _trim(self, keep: Path) -> None:
        """Drop the copies used longest ago until the rest is within `cache_gb`."""
        from filelock import FileLock

        if self.cache_gb is None:
            return
        with FileLock(keep.parent / ".trim.lock"):
            names = [p for p in keep.parent.glob("[0-9a-f]*-*") if p.suffix != ".lock"]
            copies = {p: p.stat() for p in names if p.is_file()}
            used = sum(stat.st_size for stat in copies.values())
            for path, stat in sorted(copies.items(), key=lambda copy: copy[1].st_mtime_ns):
                if used > self.cache_gb * GIGABYTE and path != keep:
                    used -= stat.st_size
                    path.unlink(missing_ok=True)


def fetched() -> list[str]:
    """The schemes that can be fetched."""
    from webdataset.gopen import gopen_schemes

    return sorted(scheme for scheme in gopen_schemes if not scheme.startswith("__"))


def local_path(url: str) -> Path | None:
    """The file that `url` names; None for what must be fetched."""
    if url.startswith(EMBEDDED):
        return Path(str(files("unified.demos") / "data" / url.removeprefix(EMBEDDED)))
    if url.startswith("file:"):
        url = url.removeprefix("file:")
        return Path(url.removeprefix("//")).expanduser().absolute()
    return Path(url).expanduser().absolute() if _scheme(url) is None else None


def _scheme(url: str) -> str | None:
    """``http`` of ``http://...``, None for a path (and for a Windows drive)."""
    found = re.match(r"([A-Za-z][\w+.-]+):", url)
    return found[1].lower() if found else None
