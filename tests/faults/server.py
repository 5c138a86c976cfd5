"""Runs streammerge commands, each in a process of its own forked from one that has imported everything already.

`python server.py SHIM`, requests and answers as JSON lines. Importing takes three seconds, which 200 merges of a tiny
model cannot spend each. It has read nothing and holds no thread; what it forks can be killed like any other process.
It may run in mount and user namespaces of its own, whose mounts vanish with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import traceback


def child(request: dict, shim: ctypes.CDLL) -> int:
    """The forked process: armed, it is the command line."""
    for fd, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, fd)
        os.close(file)
    from streammerge.cli import main

    os.environ |= request.get("env", {})
    shim.faults_arm("; ".join(request["rules"]).encode())
    try:
        code = main(request["argv"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    counts = [shim.faults_count(i) for i in range(len(request["rules"]))]
    shim.faults_arm(b"")
    with open(request["stdout"] + ".counts", "w") as f:
        json.dump(counts, f)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def answer(request: dict, shim: ctypes.CDLL) -> object:
    """Do what one line asks for."""
    if request["do"] == "start":
        pid = os.fork()
        if pid == 0:
            os._exit(child(request, shim))
        return pid
    if request["do"] == "wait":  # also told of a process that has stopped
        _, status = os.waitpid(request["pid"], os.WUNTRACED)
        return None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
    if request["do"] == "run":
        done = subprocess.run(request["argv"], capture_output=True, text=True)
        return [done.returncode, done.stderr]
    raise ValueError(request["do"])


def serve() -> None:
    """Answer until stdin ends."""
    shim = ctypes.CDLL(sys.argv[1])
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    import streammerge.pipeline  # noqa: F401
    import streammerge.plain  # noqa: F401

    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), shim)), flush=True)


if __name__ == "__main__":
    serve()
