"""A warm process is what a cold one would be: its words, environment, folder, streams, exit code and end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm

pytestmark = [
    pytest.mark.usefixtures("warm_children"),
    pytest.mark.skipif(sys.platform != "linux", reason="processes start cold elsewhere"),
]
SAYS = """
import os, subprocess, sys
print(sys.argv[1:], os.getcwd(), os.environ["SAID"], sys.stdin.read(), "torch" in sys.modules, os.getppid(), __name__)
command = [sys.executable, "-c", "import sys; print('torch' in sys.modules)"]
print(subprocess.run(command, stdout=2).returncode, file=sys.stderr)
raise SystemExit(7)
"""


@pytest.mark.parametrize("form", ["-c", "-m", "a file"])
def test_it_takes_what_it_is_given_and_what_it_starts_is_warm(tmp_path: Path, form: str) -> None:
    (tmp_path / "says.py").write_text(SAYS)
    words = {"-c": ["-c", SAYS], "-m": ["-m", "says"], "a file": [str(tmp_path / "says.py")]}[form]
    done = subprocess.run(
        [sys.executable, *words, "a", "b c"],
        input="in",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "SAID": "here"},
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout == f"['a', 'b c'] {tmp_path} here in True {os.getpid()} __main__\n"
    assert done.stderr == "True\n0\n"


def test_its_end_is_seen() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
    assert isinstance(child, warm.Popen) and child.poll() is None and os.getsid(child.pid) == child.pid
    child.send_signal(signal.SIGTERM)
    assert child.wait(20) == -signal.SIGTERM
    failed = subprocess.run([sys.executable, "-c", "1 / 0"], capture_output=True, check=False)
    assert failed.returncode == 1 and b"ZeroDivisionError" in failed.stderr
