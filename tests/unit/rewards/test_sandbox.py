"""What model output can and cannot do."""

import contextlib
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_rl.rewards import sandbox
from megatron_rl.rewards.confinement import build_filter
from megatron_rl.rewards.sandbox import Job, Limits, Outcome, run_program

GOOD = "def f(x):\n    return x + 1\n"
WRONG = "def f(x):\n    return x\n"
TESTS = "def check(candidate):\n    assert candidate(1) == 2\n"
ROOT = Path(__file__).parents[3]
LIMITS = Limits(cpu_s=1, wall_s=20.0, memory_mib=256)


def run(program: str, tests: str = TESTS) -> Outcome:
    return run_program(Job([program], "f", tests), LIMITS)


def test_a_right_program_passes():
    assert run(GOOD) == Outcome(True, True, "all tests passed")


def test_a_wrong_program_fails():
    assert run(WRONG) == Outcome(False, True, "AssertionError")


def test_plain_assertions_are_tests_too():
    assert run(GOOD, "assert f(1) == 2\nassert f(2) == 3").passed
    assert run(GOOD, "assert f(1) == 2\nassert f(2) == 4").reason == "AssertionError"


@pytest.mark.parametrize(
    "program",
    [
        GOOD + "import sys; sys.exit(0)",
        GOOD + "import os; os._exit(0)",
        GOOD + "raise KeyboardInterrupt",
        "def f(x):\n    import sys; sys.exit(0)",
        "def f(x):\n    import os; os._exit(0)",
        WRONG + "print('all tests passed'); print('passed')",
        WRONG
        + "import os\nfor fd in range(64):\n try: os.write(fd, b'passed\\n')\n except OSError: 0",
        WRONG + "import os; os.closerange(3, 64)",
        WRONG + "def check(candidate): pass",
        WRONG + "import atexit, os; atexit.register(os._exit, 0)",
        WRONG + "import sys; sys.excepthook = lambda *_: None",
        "def g(x): return x + 1",
        "",
    ],
)
def test_success_cannot_be_faked(program):
    assert not run(program).passed


@pytest.mark.parametrize(
    "action",
    [
        "os.fork()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execv('/bin/true', ['true'])",
        "subprocess.run(['true'])",
        "socket.socket()",
        "socket.create_connection(('127.0.0.1', 80))",
        "os.kill(os.getppid(), 9)",
        "open('here.txt', 'w')",
        "open('/tmp/there.txt', 'a')",
        "os.open('/dev/null', os.O_RDWR)",
        "os.mkdir('folder')",
        "os.unlink(VICTIM)",
        "os.rename(VICTIM, VICTIM + '2')",
        "os.chmod(VICTIM, 0)",
        "os.truncate(VICTIM, 0)",
        "os.symlink(VICTIM, 'link')",
    ],
)
def test_the_world_outside_is_out_of_reach(action, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    program = GOOD + f"import os, socket, subprocess\nVICTIM = {str(victim)!r}\n"
    assert run(program).passed  # so it is the action that fails
    outcome = run(program + action)
    assert not outcome.passed
    assert outcome.reason.startswith("PermissionError: [Errno 1]")
    assert victim.read_text() == "precious"


def test_no_threads():
    outcome = run(GOOD + "import threading; threading.Thread(target=print).start()")
    assert outcome.reason == "RuntimeError: can't start new thread"


def test_a_fork_bomb_that_ignores_errors_ends_with_its_time():
    program = "import os\nwhile True:\n try: os.fork()\n except OSError: pass\n"
    assert run(program).reason == "stopped after 1 s of processor time"


def test_a_program_that_ignores_the_end_of_its_time_is_run_once():
    program = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass\n"
    outcome = run(program)
    assert outcome == Outcome(False, True, "ended before its tests were done")


def test_sleeping_ends_at_the_deadline():
    start = time.monotonic()
    limits = Limits(cpu_s=1, wall_s=1.0, memory_mib=256)
    outcome = run_program(Job([GOOD + "import time; time.sleep(60)"], "f", TESTS), limits)
    assert outcome == Outcome(False, True, "stopped after 1 s")
    assert 1.0 <= time.monotonic() - start < 30


def test_many_short_sleeps_are_a_long_one():
    limits = Limits(cpu_s=4, wall_s=1.0, memory_mib=256)
    program = GOOD + "import time\nwhile True: time.sleep(0.02)"
    assert run_program(Job([program], "f", TESTS), limits).reason == "stopped after 1 s"


COMPUTE = "import time\nwhile time.process_time() < 0.6: pass\n"


@contextlib.contextmanager
def when_computing(act):
    """Calls ``act`` with the id of a child of this process once it has computed for 0.2 s."""
    before, done = set(children().split()), threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for pid in set(children().split()) - before:
                with contextlib.suppress(OSError):
                    if programs := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                        pid = programs[0]  # the child is the judge
                    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                    if int(fields[11]) + int(fields[12]) >= 0.2 * os.sysconf("SC_CLK_TCK"):
                        return act(int(pid))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_time_in_which_it_may_not_run_is_not_the_programs():
    def hold(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(pid, signal.SIGCONT)

    with when_computing(hold):
        outcome = run_program(Job([COMPUTE + GOOD], "f", TESTS), Limits(cpu_s=4, wall_s=1.0))
    assert outcome == Outcome(True, True, "all tests passed")


def test_what_something_else_has_killed_is_run_once_more():
    with when_computing(lambda pid: os.kill(pid, signal.SIGKILL)):
        outcome = run_program(Job([COMPUTE + GOOD], "f", TESTS), Limits(cpu_s=4))
    assert outcome == Outcome(True, True, "all tests passed")


def test_a_stuck_machine_is_not_waited_for_without_end():
    with when_computing(lambda pid: os.kill(pid, signal.SIGSTOP)):
        limits = Limits(cpu_s=4, wall_s=1.0, stop_s=1.0)
        outcome = run_program(Job([COMPUTE + GOOD], "f", TESTS), limits)
    assert outcome == Outcome(False, True, "stopped after 1 s, kept from running")


def test_signals_that_the_trainer_ignores_or_blocks_are_the_sandboxs_own():
    ends = GOOD + "import os\ndef f(x): os._exit(0)"
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        outcome = run(ends, "try: f(1)\nexcept Exception: pass")
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert outcome == Outcome(False, True, "ended before its tests were done")
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGXCPU})
    try:
        outcome = run("while True: pass")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    assert outcome == Outcome(False, True, "stopped after 1 s of processor time")


def test_memory_is_limited():
    assert run(GOOD + "x = bytearray(300 * 2**20)").reason == "MemoryError"
    assert run(GOOD + "x = bytearray(100 * 2**20)").passed


def test_limits_cannot_be_raised():
    program = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))\n"
    assert not run(GOOD + program).passed


def test_output_is_thrown_away():
    assert run(GOOD + "for _ in range(300):\n    print('x' * 100000)").passed


def test_crashes_and_syntax_errors_are_failures():
    assert run(GOOD + "import ctypes; ctypes.string_at(0)").reason.startswith("ended before")
    assert run("def f(x:").compiled is False
    assert run("def f(\0").compiled is False
    assert run("\ud800").compiled is False
    assert run("(" * 100_000).compiled is False
    assert run(GOOD + "def g(): g()\ng()").reason.startswith("RecursionError")


def test_a_programs_own_exception_is_only_named():
    program = "class Odd(Exception):\n    def __str__(self): raise SystemExit\nraise Odd\n"
    assert run(program).reason == "Odd"


def test_environment_and_folder_are_empty(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_USER", "1")
    program = "import os, sys\nassert 'SECRET_OF_THE_USER' not in os.environ\n"
    program += "assert os.listdir('.') == []\nassert sys.flags.isolated\nassert not input_left()\n"
    reader = "import sys\ndef input_left(): return sys.stdin.read()\n"
    assert run(reader + program + GOOD) == Outcome(True, True, "all tests passed")


def children() -> str:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


def test_no_descriptor_and_no_process_is_left_over():
    run(GOOD)
    before = sorted(os.listdir("/proc/self/fd")), children()
    for program in (GOOD, WRONG, "import os; os._exit(3)"):
        run(program)
    assert (sorted(os.listdir("/proc/self/fd")), children()) == before


def test_threads_may_call_it_at_once():
    programs = [GOOD, WRONG] * 4
    outcomes: list[bool | None] = [None] * len(programs)

    def judge(place: int) -> None:
        outcomes[place] = run(programs[place]).passed

    threads = [threading.Thread(target=judge, args=(place,)) for place in range(len(programs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [True, False] * 4


def test_without_a_sandbox_nothing_is_run(tmp_path, monkeypatch):
    script = tmp_path / "start.py"
    script.write_text("import os, sys\nos.write(int(sys.argv[1]), b'OSError: no seccomp\\n')\n")
    monkeypatch.setattr(sandbox, "_START", script)
    with pytest.raises(
        sandbox.UserError, match="not available: OSError: no seccomp; expected Linux"
    ):
        run(GOOD)


def decide(code: bytes, architecture: int, number: int, arguments: tuple[int, ...] = ()) -> bool:
    """Interprets the four BPF instructions the filter uses; True: the call is allowed."""
    arguments = (*arguments, *[0] * (6 - len(arguments)))
    data = struct.pack("IIQ6Q", number, architecture, 0, *arguments)
    instructions = list(struct.iter_unpack("HBBI", code))
    counter, register = 0, 0
    while True:
        operation, if_true, if_false, operand = instructions[counter]
        counter += 1
        if operation == 0x20:
            register = struct.unpack_from("I", data, operand)[0]
        elif operation == 0x15:
            counter += if_true if register == operand else if_false
        elif operation == 0x45:
            counter += if_true if register & operand else if_false
        else:
            assert operation == 0x06
            return operand == 0x7FFF0000


WAITING = """
import ctypes, mmap, os
libc = ctypes.CDLL(None, use_errno=True)
def refused(call, *arguments):
    ctypes.set_errno(0)
    return call(*arguments) == -1 and ctypes.get_errno() == 1
def f(x):
    memory = mmap.mmap(-1, 4096)
    place = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    size = ctypes.c_size_t(4096)
    return [
        refused(libc.open, os.__file__.encode(), os.O_DIRECT),
        refused(libc.syscall, {"x86_64": 324, "aarch64": 283}[os.uname().machine], 1, 0, 0),
        *(refused(libc.madvise, place, size, advice) for advice in (3, 21, 22)),
        refused(libc.madvise, place, size, mmap.MADV_DONTNEED),
    ]
"""


def test_two_programs_cannot_wake_each_other():
    program = """
import ctypes, mmap, os
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
def f(operation):
    page = libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_SHARED, os.open(os.__file__, 0), 0)
    number = {"x86_64": 202, "aarch64": 98}[os.uname().machine]
    ctypes.set_errno(0)
    return libc.syscall(number, ctypes.c_void_p(page), operation, 1, 0, 0, 0), ctypes.get_errno()
"""
    # FUTEX_WAKE of what other processes wait for; of this process's threads
    assert run(program, "assert [f(1), f(0x81)] == [(-1, 1), (0, 0)]").passed


def test_no_call_waits_for_the_machine_in_the_programs_place():
    # Such a wait is no sleep: it would be ended by the limit for a machine that is stuck only.
    assert run(WAITING, "assert f(0) == [True] * 5 + [False]") == Outcome(
        True, True, "all tests passed"
    )


@pytest.mark.parametrize(
    ("machine", "architecture", "openat", "madvise", "direct", "allowed", "refused"),
    [
        # read, write, mmap, exit_group
        # | socket, clone, fork, execve, kill, unlink, ptrace, clone3, membarrier
        (
            *("x86_64", 0xC000003E, 257, 28, 0x4000),
            *((0, 1, 9, 231), (41, 56, 57, 59, 62, 87, 101, 435, 324)),
        ),
        # | socket, clone, execve, kill, unlinkat, ptrace, clone3, membarrier
        (
            *("aarch64", 0xC00000B7, 56, 233, 0x10000),
            *((63, 64, 222, 94), (198, 220, 221, 129, 35, 117, 435, 283)),
        ),
    ],
)
def test_filter(machine, architecture, openat, madvise, direct, allowed, refused):
    code = build_filter(machine)
    assert all(decide(code, architecture, number) for number in allowed)
    assert not any(decide(code, architecture, number) for number in refused)
    assert not any(decide(code, 0x40000003, number) for number in allowed)  # 32-bit calls
    assert not any(decide(code, architecture, 0x40000000 | number) for number in allowed)  # x32
    assert decide(code, architecture, openat, (0, 0, os.O_RDONLY | os.O_CLOEXEC))
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_TMPFILE, direct):
        assert not decide(code, architecture, openat, (0, 0, flags))
    # MADV_DONTNEED, _FREE, _HUGEPAGE | _NORMAL, _WILLNEED, _PAGEOUT, _POPULATE_READ
    assert all(decide(code, architecture, madvise, (0, 0, advice)) for advice in (4, 8, 14))
    futex = {0xC000003E: 202, 0xC00000B7: 98}[architecture]
    assert decide(code, architecture, futex, (0, 0x80)) and decide(
        code, architecture, futex, (0, 0x189)
    )
    assert not any(decide(code, architecture, futex, (0, operation)) for operation in (0, 1, 0x109))
    assert not any(decide(code, architecture, madvise, (0, 0, a)) for a in (0, 3, 21, 22))


LIMITED = """
import resource, sys
from megatron_rl.errors import UserError
from megatron_rl.rewards import VERIFIERS, check_sandbox
kind, most = getattr(resource, sys.argv[1]), int(sys.argv[2])
resource.setrlimit(kind, (most, most))
record = {"prompt": "def f():\\n", "tests": "assert f() == 1", "entry_point": "f"}
try:
    check_sandbox()
    print(VERIFIERS["code"](record, "    return 1").reason)
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("kind", "most", "said"),
    [
        ("RLIMIT_NOFILE", 32, "all tests passed"),
        ("RLIMIT_CPU", 5, "all tests passed"),
        ("RLIMIT_CPU", 3, "`ulimit -t` leaves 3 s of processor time; the verifier 'code' expects"),
        ("RLIMIT_AS", 400 * 2**20, "`ulimit -v` leaves 419,430,400 bytes of address space; the"),
    ],
)
def test_limits_of_the_user(kind, most, said):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, kind, str(most)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.startswith(said) and done.stdout.count("\n") == 1, done.stderr
