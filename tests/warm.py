"""Processes of the tests that start warm: forked off one that has imported torch and transformers, and nothing of ours.

These imports take six seconds of a core in each process that trains, and the suite starts a hundred of them. `Popen` is
subprocess' own, but that a command of Python with a file, `-c CODE` or `-m MODULE` is not executed anew: a nursery, one for
a pytest worker, forks a process that takes the command's words, environment, folder and streams, imports our packages from
where PYTHONPATH says, and runs the code as `__main__`. It is a child of the caller (who takes orphans,
PR_SET_CHILD_SUBREAPER), so its exit code, its signals and its end are what they are of any other. Each has a nursery of its
own, so what it starts is warm, too.

Not for what is measured or read at start: peak memory, seconds, the environment that Python, or huggingface_hub when it is
imported, reads. Elsewhere than on Linux, and for any other command, the process is executed as usual.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

SET_NAME, SET_CHILD_SUBREAPER = 15, 36  # of prctl, linux/prctl.h
CHILD, NURSERY = b"warm", b"nursery"  # the names of the processes
PYTHON = sys.executable  # a test may name another
MOST_BYTES = 1 << 20  # of a request: words and environment
LIBRARIES = (
    "torch", "transformers", "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "tokenizers", "peft", "bitsandbytes", "accelerate", "safetensors.torch",
    "typer", "rich.console", "pydantic", "yaml", "psutil",
)  # fmt: skip
_lines: list[socket.socket] = []  # to this process' nursery, once there is one
_lock = threading.Lock()


class Popen(subprocess.Popen):
    """subprocess.Popen, warm where the command is one of Python's code."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any, env: Any,
                       *rest: Any) -> None:  # fmt: skip
        words = list(map(os.fspath, args)) if isinstance(args, Sequence) and not isinstance(args, str | bytes) else []
        ours = len(words) > 1 and words[0] == PYTHON and (words[1] in ("-c", "-m") or words[1].endswith(".py"))
        if not ours or executable or preexec_fn or pass_fds or sys.platform != "linux":
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
            return
        _, _, _, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *_, new_session, _ = (
            rest  # the last but one in 3.11
        )
        streams = [given if given != -1 else number for number, given in enumerate((p2cread, c2pwrite, errwrite))]
        self.pid = ask(
            {
                "words": words[1:],
                "environment": dict(os.environ if env is None else env),
                "folder": os.fspath(cwd or os.getcwd()),
                "new_session": new_session,
            },
            streams,
        )
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def ask(request: dict[str, Any], streams: Sequence[int]) -> int:
    """The id of a new process of this one's nursery, which is started where there is none."""
    with _lock:
        if not _lines:
            _lines.append(_start_nursery())
        socket.send_fds(_lines[0], [json.dumps(request).encode()], streams)
        return int(_lines[0].recv(64))


def _start_nursery() -> socket.socket:
    ours, its = _pair()
    process = subprocess.Popen(
        [PYTHON, __file__, str(its.fileno()), *sys.path],
        pass_fds=[its.fileno()],
        stdin=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"},
    )
    its.close()
    atexit.register(process.kill)
    return ours


def _pair() -> tuple[socket.socket, socket.socket]:
    """A line to a nursery, whose children become this process' own when the one between has ended."""
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1)
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST_BYTES)
    return ours, its


# the nursery -------------------------------------------------------------------------------------------------------------


def serve(line: socket.socket) -> dict[str, Any]:
    """Fork a process for each request; returns in those processes alone, with the request."""
    while True:
        message, streams, _, _ = socket.recv_fds(line, MOST_BYTES, 3)
        if not message:
            os._exit(0)
        between = os.fork()
        if between == 0:
            between = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == between:  # until the asking process is the parent, who could not wait for it before
                os.sched_yield()
            request = json.loads(message)
            if request["new_session"]:
                os.setsid()
            line.send(str(os.getpid()).encode())
            line.close()
            return {**request, "streams": streams}
        os.waitpid(between, 0)
        for stream in streams:
            os.close(stream)


def give_birth(line: socket.socket) -> dict[str, Any]:
    """A nursery's life. Returns in its children, each with a nursery of its own, with what they were asked for."""
    while True:
        ctypes.CDLL(None).prctl(SET_NAME, NURSERY)
        request = serve(line)
        ctypes.CDLL(None).prctl(SET_NAME, CHILD)
        ours, its = _pair()
        if os.fork():
            its.close()
            _lines.append(ours)
            return request
        ours.close()
        for stream in request["streams"]:
            os.close(stream)
        line = its


def become(request: dict[str, Any]) -> tuple[str, str]:
    """Take over a request's streams, folder, environment and words; returns the code to run and its file."""
    for number, stream in enumerate(request["streams"]):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    first, *words = request["words"]
    file, folder = first, os.path.dirname(os.path.abspath(first))
    if first in ("-c", "-m"):
        code, *words = words
        file, folder = "<string>", ""
        if first == "-m":
            code = f"import runpy; runpy.run_module({code!r}, run_name='__main__', alter_sys=True)"
    else:
        with open(first, encoding="utf-8") as source:
            code = source.read()
    sys.argv[:] = [first, *words]
    sys.path[:0] = [folder, *(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path)]
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    return code, file


def main() -> None:
    """Import the libraries, and be a nursery; in its children, run the code."""
    line, sys.path[:] = socket.socket(fileno=int(sys.argv[1])), sys.argv[2:]
    for name in LIBRARIES:
        importlib.import_module(name)
    assert not {"lopt_edge", "quant"} & {name.split(".")[0] for name in sys.modules}
    gc.freeze()
    code, file = become(give_birth(line))
    subprocess.Popen = Popen
    ran = sys.modules["__main__"] = ModuleType("__main__")
    ran.__dict__["__file__"] = file
    exec(compile(code, file, "exec"), ran.__dict__)


if __name__ == "__main__":
    main()
