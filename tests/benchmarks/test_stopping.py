"""SIGTERM stops a command as Ctrl-C does."""

import os
import signal
import subprocess
import sys
import time

import pytest

import benchmarks.__main__ as command
from benchmarks.harness.stopping import stoppable

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals")


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # the handler runs at the next instruction


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_interrupt_and_have_codes_of_their_own(number, code):
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)]
    with stoppable() as code_of_signal:
        with pytest.raises(KeyboardInterrupt):
            send(number)
        assert code_of_signal() == code
        send()  # a second SIGTERM changes nothing
        assert code_of_signal() == code
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)] == before


def test_a_signal_that_falls_where_python_drops_exceptions_comes_again():
    class Sends:
        def __del__(self):
            send()

    with stoppable() as code_of_signal:
        Sends()
        assert code_of_signal() == 143  # it came, and raised nothing yet
        with pytest.raises(KeyboardInterrupt):
            time.sleep(5)


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable():
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("arguments", "says"), [("--quick", "with --checkpoint FOLDER"), ("--checkpoint kept", "The same command goes on")]
)
@pytest.mark.parametrize("returns", [True, False])
def test_a_command_says_how_to_go_on(monkeypatch, capsys, arguments, says, returns):
    def run(task, args):
        try:
            send()
        except KeyboardInterrupt:
            if returns:
                return 130
            raise

    monkeypatch.setattr(command, "run", run)
    assert command.main(arguments.split()) == 143
    assert says in capsys.readouterr().err


JOINED = """
import os, signal, socket, time
from benchmarks.decentralized.placement import join_hosts
from benchmarks.harness.stopping import stoppable

with socket.socket() as one:
    one.bind(("localhost", 0))
    port = one.getsockname()[1]
with stoppable() as code:
    try:
        join_hosts(f"localhost:{port}", 1, 0)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    except KeyboardInterrupt:
        os._exit(code())
"""


@pytest.mark.slow
def test_sigterm_is_heeded_where_hosts_have_joined():
    """JAX takes the signal for itself then, unless it is told not to."""
    assert subprocess.run([sys.executable, "-c", JOINED], check=False, timeout=120).returncode == 143
