"""hf_xet, with which the Hub itself puts files into its store and reads them: it chunks and decodes as every client.

It runs in a process of its own, for it keeps a cache and a log where its environment says.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.hub.loopback.xet import TOKEN

_CONNECT = """
import hf_xet, sys, time
url, token, name, size, path = sys.argv[1:]
connection = {"endpoint": url, "token": token, "token_expiry_unix_secs": int(time.time()) + 3600}
"""
_UPLOAD = """
with hf_xet.XetSession().new_upload_commit(**connection) as commit:
    commit.start_upload_file(path, sha256=name)
"""
_DOWNLOAD = """
with hf_xet.XetSession().new_file_download_group(**connection) as group:
    group.start_download_file(hf_xet.XetFileInfo(name, int(size)), path)
"""


def upload(url: str, home: Path, path: Path, sha256: str) -> None:
    """Put a file into the store at *url*."""
    _run(_UPLOAD, home, url, sha256, "", str(path))


def download(url: str, home: Path, name: str, nbytes: int, path: Path) -> None:
    """Make a file of what the store at *url* has under Xet's name."""
    _run(_DOWNLOAD, home, url, name, str(nbytes), str(path))


def _run(work: str, home: Path, url: str, *arguments: str) -> None:
    command = [sys.executable, "-c", _CONNECT + work, url, TOKEN, *arguments]
    subprocess.run(command, env={"HF_HOME": str(home)}, check=True)
