"""The shop under gunicorn, in a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

#: The environment variable that tells the workers their database.
DATABASE_VARIABLE = "WSGI_IDEMPOTENCY_DEMO_DATABASE"

#: Seconds gunicorn gets to finish what it has begun before it is killed.
PATIENCE = 10

#: Seconds the first answer may take. Workers import the application before they give it.
START = 30


class ShopFailed(Exception):
    """Raised when gunicorn ends, or does not answer, while the shop should be open."""


def listen(host: str, port: int) -> socket.socket:
    """Take the port before anything is started, so that a taken one is told at once.

    :param host: a host name or address of this machine.
    :param port: 0 for any that is free.
    :raises OSError: the port is taken or not ours to take, or the host is not ours.
    """
    family, *_, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    return socket.create_server(address[:2], family=family, backlog=128)


@contextlib.contextmanager
def serve(
    listener: socket.socket, *, workers: int, environ: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run gunicorn on a listening socket until the block ends.

    Connections wait in the socket's backlog until a worker takes them, so clients may
    connect from the start.

    :param listener: given away; closed here.
    :param environ: what the workers need to know, beside this process's environment.
    :raises ShopFailed: no worker came to answer.
    """
    address = listener.getsockname()[:2]
    inherited = {name: value for name, value in os.environ.items() if name != "GUNICORN_CMD_ARGS"}
    with listener:
        os.set_inheritable(listener.fileno(), True)
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "gunicorn"),
                *("--config", "python:wsgi_idempotency.demo.gunicorn_conf"),
                *("--workers", str(workers)),
                *("--bind", f"fd://{listener.fileno()}"),
                "wsgi_idempotency.demo.shop:create_app()",
            ],
            env={**inherited, **environ},
            pass_fds=[listener.fileno()],
            # Ctrl-C reaches every process of the terminal's group. Only this one should
            # hear it, and stop gunicorn in good order.
            start_new_session=True,
        )
    try:
        wait_for_answer(address)
        yield process
    finally:
        stop(process)


def wait_for_answer(address: tuple[str, int]) -> None:
    """Return once a worker has answered.

    :raises ShopFailed: the connection was lost, as when gunicorn could not start.
    """
    connection = http.client.HTTPConnection(*address, timeout=START)
    try:
        connection.request("GET", "/")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as exc:
        raise ShopFailed("gunicorn did not start; its own message is above") from exc
    finally:
        connection.close()
    if status != 200:
        raise ShopFailed(f"the shop's page answered {status}; gunicorn's message is above")


def wait_for_end(process: subprocess.Popen[bytes]) -> NoReturn:
    """Wait, to be interrupted.

    :raises ShopFailed: gunicorn has ended, which nobody had asked for.
    """
    raise ShopFailed(f"gunicorn ended by itself, with exit status {process.wait()}")


def stop(process: subprocess.Popen[bytes], *, patience: float = PATIENCE) -> None:
    """Ask gunicorn to finish and wait for it; a second Ctrl-C does not wait.

    :param patience: seconds after which it is killed. Its workers end when they miss it.
    """
    process.terminate()
    try:
        process.wait(patience)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Treat a request to end, from a terminal or a supervisor, as Ctrl-C.

    Without this they would end the process at once and leave gunicorn behind. SIGINT is
    among them since a shell that starts a job in the background has it ignored; SIGHUP is
    left alone where it is ignored, as ``nohup`` does it.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
