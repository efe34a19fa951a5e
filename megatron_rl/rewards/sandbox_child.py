"""The confined side of ``sandbox.py``: locks its own process up, then runs the program and tests.

Started as ``python -I -S -B sandbox_child.py TOKEN_FD VERDICT_FD CPU_S MEMORY_MIB PARENT_PID`` with
the job, a JSON list [programs, tests, entry_point], on standard input. Uses the standard library
only and imports nothing of this package. Writes lines to VERDICT_FD: "ready", "compiled", and
"passed TOKEN" or "failed WHY".
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import types

# System calls a computing Python program needs: name, number on x86-64 and on ARM64 ("-": none).
# All others fail with EPERM; open and openat do if they ask for more than reading.
_CALLS = """
read 0 63, readv 19 65, pread64 17 67, write 1 64, writev 20 66, close 3 57, lseek 8 62
open 2 -, openat 257 56, getdents64 217 61, getcwd 79 17, dup 32 23, pipe2 293 59
stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79, statx 332 291, access 21 -
faccessat 269 48, faccessat2 439 439, readlink 89 -, readlinkat 267 78
mmap 9 222, munmap 11 215, mprotect 10 226, mremap 25 216, madvise 28 233, brk 12 214
futex 202 98, set_robust_list 273 99, rseq 334 293, membarrier 324 283, restart_syscall 219 128
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132
poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, sched_yield 24 124
clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169, time 201 -
nanosleep 35 101, clock_nanosleep 230 115, getrusage 98 165, times 100 153, getrlimit 97 163
sched_getaffinity 204 123, uname 63 160, sysinfo 99 179, getrandom 318 278
getpid 39 172, getppid 110 173, gettid 186 178
getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, exit 60 93, exit_group 231 94
"""
_FLAGS_ARGUMENT = {"open": 1, "openat": 2}
# Machine -> (AUDIT_ARCH constant of its 64-bit ABI, column of the table above)
_MACHINES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}

# O_WRONLY | O_RDWR, O_CREAT, O_TRUNC, O_APPEND, O_TMPFILE
_WRITING_FLAGS = 0x3 | 0x40 | 0x200 | 0x400 | 0x400000
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 1  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO with EPERM
_LOAD, _IF_EQUAL, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # classic BPF
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16  # offsets in struct seccomp_data
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38


def build_filter(machine: str) -> bytes:
    """The seccomp program of a machine, in classic BPF; KeyError if the machine is not known."""
    architecture, column = _MACHINES[machine]
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _REFUSE),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    for call in _CALLS.replace(",", "\n").split("\n"):
        columns = call.split()
        if not columns or columns[column] == "-":
            continue
        name, number = columns[0], int(columns[column])
        if name in _FLAGS_ARGUMENT:
            code += [
                (_IF_EQUAL, 0, 4, number),
                (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * _FLAGS_ARGUMENT[name]),
                (_IF_ANY_BIT, 1, 0, _WRITING_FLAGS),
                (_RETURN, 0, 0, _ALLOW),
                (_RETURN, 0, 0, _REFUSE),
            ]
        else:
            code += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    code.append((_RETURN, 0, 0, _REFUSE))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def confine(cpu_s: int, memory_mib: int, parent: int) -> None:
    """Limits, then the filter; OSError if the kernel refuses, KeyError on an unknown machine."""
    memory = memory_mib * 2**20
    for limit, soft, hard in (
        (resource.RLIMIT_CPU, cpu_s, cpu_s + 1),
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_NPROC, 0, 0),
    ):
        # Fewer open files, by the user's limit, do; of others `sandbox.check_limits` has said so.
        most = resource.getrlimit(limit)[1] if limit == resource.RLIMIT_NOFILE else -1
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(limit, (soft, hard))
    libc = ctypes.CDLL(None, use_errno=True)
    program = build_filter(platform.machine())
    buffer = ctypes.create_string_buffer(program, len(program))

    class FilterProgram(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    filter_program = FilterProgram(len(program) // 8, ctypes.addressof(buffer))
    _prctl(libc, _PR_SET_PDEATHSIG, 9)
    if os.getppid() != parent:
        os._exit(1)  # the parent died before it could be watched
    _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1)
    _prctl(libc, _PR_SET_SECCOMP, 2, ctypes.addressof(filter_program))


def _prctl(libc: ctypes.CDLL, option: int, first: int, second: int = 0) -> None:
    if (
        libc.prctl(
            option,
            ctypes.c_ulong(first),
            ctypes.c_ulong(second),
            ctypes.c_ulong(0),
            ctypes.c_ulong(0),
        )
        != 0
    ):
        raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")


def run(programs: list[str], tests: str, entry_point: str, verdict: int) -> None:
    """Executes the first program that compiles, executes the tests in its namespace, calls
    ``check`` if they define it.
    """
    code = compile_first(programs)
    os.write(verdict, b"compiled\n")
    module = types.ModuleType("program")  # not __main__: what stands under that guard does not run
    sys.modules["program"] = module
    exec(code, module.__dict__)
    module.__dict__.pop("check", None)
    candidate = find(module.__dict__, entry_point)
    exec(compile(tests, "tests", "exec", dont_inherit=True), module.__dict__)
    check = module.__dict__.get("check")
    if check is not None:
        check(candidate)


def compile_first(programs: list[str]) -> types.CodeType:
    """The first that is valid Python; the error of the first reading of fences if none is."""
    errors = []
    for program in programs:
        try:
            return compile(program, "program", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError) as error:
            errors.append(error)
    raise errors[min(1, len(errors) - 1)]


def find(names: dict, entry_point: str) -> object:
    """The function to test. Of a method, one that makes a new instance for each call; it is among
    ``names`` as well, for tests that call it by name.
    """
    owner, _, method = entry_point.rpartition("().")
    if not owner and method in names:
        return names[method]
    made = names.get(owner or "Solution")
    if not isinstance(made, type) or not hasattr(made, method):
        raise NameError(f"{entry_point} is not defined")

    def call(*arguments, **named):
        return getattr(made(), method)(*arguments, **named)

    names.setdefault(method, call)
    return call


def describe(error: BaseException) -> str:
    """One line about an error; a class the program defined itself is only named, its methods are
    not trusted.
    """
    name = type(error).__name__
    text = str(error) if type(error).__module__ == "builtins" else ""
    return " ".join(f"{name}: {text}".split())[:200].rstrip(": ")


def main() -> None:
    token, verdict, cpu_s, memory_mib, parent = map(int, sys.argv[1:6])
    job = json.loads(sys.stdin.buffer.read())
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    try:
        confine(cpu_s, memory_mib, parent)
    except (OSError, KeyError, ValueError) as error:
        os.write(verdict, f"{describe(error)} on {platform.machine()}\n".encode())
        os._exit(1)
    os.write(verdict, b"ready\n")
    # Taken before the program runs: it may replace names in the modules it shares with this script.
    write, read, leave, explain = os.write, os.read, os._exit, describe
    try:
        run(*job, verdict)
        line = b"passed " + read(token, 64)
    # SystemExit, KeyboardInterrupt and classes of the program's own are failures like any other.
    except BaseException as error:  # noqa: BLE001
        line = b"failed " + explain(error).encode("utf-8", errors="replace")
    write(verdict, line + b"\n")
    leave(0)  # no exit handlers of the program


if __name__ == "__main__":
    main()
