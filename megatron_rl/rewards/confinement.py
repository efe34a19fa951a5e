"""Confines a process before it runs untrusted code: limits, rights, files, system calls.

Standard library only: ``sandbox_start.py`` loads it in an interpreter without site packages.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import struct
import sys

# System calls a computing Python program needs: name, number on x86-64 and on ARM64 ("-": none).
# All others fail with EPERM; open and openat do if they ask for more than reading. ftruncate works
# on what is open for writing: the two files in memory that are a program's input and output. None
# may wait for the machine again and again: that time is not held against a program (membarrier;
# reading past the cache of files; madvise that empties it).
_CALLS = """
read 0 63, readv 19 65, pread64 17 67, write 1 64, writev 20 66, close 3 57, lseek 8 62
open 2 -, openat 257 56, getdents64 217 61, getcwd 79 17, dup 32 23, dup2 33 -, dup3 292 24
pipe2 293 59, stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79, statx 332 291, access 21 -
faccessat 269 48, faccessat2 439 439, readlink 89 -, readlinkat 267 78, ftruncate 77 46
mmap 9 222, munmap 11 215, mprotect 10 226, mremap 25 216, madvise 28 233, brk 12 214
futex 202 98, set_robust_list 273 99, rseq 334 293, restart_syscall 219 128
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132
poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, sched_yield 24 124, wait4 61 260
clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169, time 201 -
nanosleep 35 101, clock_nanosleep 230 115, getrusage 98 165, times 100 153, getrlimit 97 163
sched_getaffinity 204 123, uname 63 160, sysinfo 99 179, getrandom 318 278
getpid 39 172, getppid 110 173, gettid 186 178
getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, exit 60 93, exit_group 231 94
"""
_FLAGS_ARGUMENT = {"open": 1, "openat": 2}
_FUTEX_PRIVATE = 0x80  # among the threads of one process
# MADV_DONTNEED, MADV_FREE, MADV_HUGEPAGE: what memory allocators ask for
_ADVICE = (4, 8, 14)
# Machine -> (AUDIT_ARCH constant of its 64-bit ABI, column of the table above, number of kill,
# O_DIRECT)
_MACHINES = {"x86_64": (0xC000003E, 1, 62, 0x4000), "aarch64": (0xC00000B7, 2, 129, 0x10000)}

# O_WRONLY | O_RDWR, O_CREAT, O_TRUNC, O_APPEND, O_TMPFILE
_WRITING_FLAGS = 0x3 | 0x40 | 0x200 | 0x400 | 0x400000
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 1  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO with EPERM
_LOAD, _IF_EQUAL, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # classic BPF
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16  # offsets in struct seccomp_data
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38

# Landlock (Linux 5.13), the same numbers on every machine: linux/landlock.h
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ASK_VERSION = 1  # LANDLOCK_CREATE_RULESET_VERSION
_ALL_FILE_RIGHTS = (1 << 13) - 1  # of its first version; seccomp refuses what later ones name
_READ_FILE, _READ_DIRECTORY = 1 << 2, 1 << 3
_UNREADABLE = ("site-packages", "dist-packages")

# Modules of the standard library to load before confinement, for kernels without Landlock, where a
# program can open no file.
_PRELOADED = """
abc array ast base64 bisect calendar cmath collections contextlib copy dataclasses datetime decimal
enum fractions functools hashlib heapq io itertools json math numbers operator queue random re
secrets statistics string struct sys textwrap time traceback types typing unicodedata unittest uuid
""".split()


def build_filter(machine: str, opens: bool = True, may_kill: int = 0) -> bytes:
    """The seccomp program of a machine, in classic BPF; KeyError if the machine is not known.

    ``opens``: files may be opened for reading. ``may_kill``: the one process it may signal, if any.
    """
    architecture, column, kill, direct = _MACHINES[machine]
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _REFUSE),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    for call in _CALLS.replace(",", "\n").split("\n"):
        columns = call.split()
        if not columns or columns[column] == "-" or not opens and columns[0] in _FLAGS_ARGUMENT:
            continue
        name, number = columns[0], int(columns[column])
        if name in _FLAGS_ARGUMENT:
            code += [
                (_IF_EQUAL, 0, 4, number),
                (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * _FLAGS_ARGUMENT[name]),
                (_IF_ANY_BIT, 1, 0, _WRITING_FLAGS | direct),
                (_RETURN, 0, 0, _ALLOW),
                (_RETURN, 0, 0, _REFUSE),
            ]
        elif name == "futex":  # another process may wait on the page of a file that both can read
            code += [
                (_IF_EQUAL, 0, 4, number),
                (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * 1),
                (_IF_ANY_BIT, 0, 1, _FUTEX_PRIVATE),
                (_RETURN, 0, 0, _ALLOW),
                (_RETURN, 0, 0, _REFUSE),
            ]
        elif name == "madvise":
            code += [
                (_IF_EQUAL, 0, 3 + len(_ADVICE), number),
                (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * 2),
                *((_IF_EQUAL, len(_ADVICE) - place, 0, a) for place, a in enumerate(_ADVICE)),
                (_RETURN, 0, 0, _REFUSE),
                (_RETURN, 0, 0, _ALLOW),
            ]
        else:
            code += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    if may_kill:
        code += [
            (_IF_EQUAL, 0, 4, kill),
            (_LOAD, 0, 0, _ARGUMENTS_AT),
            (_IF_EQUAL, 0, 1, may_kill),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _REFUSE),
        ]
    code.append((_RETURN, 0, 0, _REFUSE))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def hide() -> None:
    """Keep this user's other processes from reading this one, and drop all of root's rights."""
    libc = ctypes.CDLL(None, use_errno=True)
    _prctl(libc, _PR_SET_DUMPABLE, 0)
    header = struct.pack("II", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _checked(libc.capset(header, bytes(24)), "capset")


def confine(cpu_s: int, memory_mib: int, parent: int, written: int = 0, may_kill: int = 0) -> str:
    """Set limits, then file rules, then the filter. Returns what holds from now on, and what the
    kernel lacks.

    Args:
        cpu_s: processor time, seconds.
        memory_mib: address space, MiB.
        parent: this process ends with it.
        written: longest file it may write, bytes; concerns only files that are open for writing.
        may_kill: as in ``build_filter``.

    OSError if the kernel refuses, KeyError on an unknown machine.
    """
    _limit(cpu_s, memory_mib * 2**20, written)
    libc = ctypes.CDLL(None, use_errno=True)
    _prctl(libc, _PR_SET_PDEATHSIG, 9)
    if os.getppid() != parent:
        os._exit(1)  # the parent died before it could be watched
    _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1)
    landlock = landlock_version(libc)
    if landlock:
        _allow_reading(libc)
    else:
        for name in _PRELOADED:
            importlib.import_module(name)
    program = build_filter(os.uname().machine, landlock > 0, may_kill)
    buffer = ctypes.create_string_buffer(program, len(program))

    class FilterProgram(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    filter_program = FilterProgram(len(program) // 8, ctypes.addressof(buffer))
    _prctl(libc, _PR_SET_SECCOMP, 2, ctypes.addressof(filter_program))
    return held_text(landlock)


def landlock_version(libc: ctypes.CDLL) -> int:
    """Version of the kernel's Landlock; 0: none, in an older kernel or switched off."""
    return max(0, libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _ASK_VERSION))


def held_text(landlock: int) -> str:
    """What confines a program, as text; ``landlock``: its version, 0 without it."""
    if landlock:
        return f"seccomp, Landlock {landlock}, no root rights"
    return (
        "seccomp, no root rights; this kernel has no Landlock: programs can open no file, and "
        "import only some modules of the standard library"
    )


def _limit(cpu_s: int, memory: int, written: int) -> None:
    for limit, soft, hard in (
        (resource.RLIMIT_CPU, cpu_s, cpu_s + 1),
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, written, written),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_NPROC, 0, 0),
    ):
        # A lower limit of the user is fine for these; `sandbox.check_limits` checks the others.
        lower = limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE)
        most = resource.getrlimit(limit)[1] if lower else resource.RLIM_INFINITY
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(limit, (soft, hard))


def _allow_reading(libc: ctypes.CDLL) -> None:
    """Allow reading only the standard library and what it loads."""
    attributes = struct.pack("Q", _ALL_FILE_RIGHTS)
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    _checked(min(ruleset, 0), "Landlock")
    for path, rights in _readable():
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rule = struct.pack("=Qi", rights, place)
        _checked(libc.syscall(_ADD_RULE, ruleset, 1, rule, 0), f"Landlock rule for {path}")
        os.close(place)
    _checked(libc.syscall(_RESTRICT_SELF, ruleset, 0), "Landlock")
    os.close(ruleset)


def _readable() -> list[tuple[str, int]]:
    """Paths, each with the rights for everything below it."""
    found = [(os.getcwd(), _READ_DIRECTORY)]
    both = _READ_FILE | _READ_DIRECTORY
    for folder in filter(os.path.isdir, sys.path):  # of -I -S: the standard library
        found.append((folder, _READ_DIRECTORY))
        for entry in os.scandir(folder):
            if entry.name not in _UNREADABLE:
                found.append((entry.path, both if entry.is_dir() else _READ_FILE))
    multiarch = getattr(sys.implementation, "_multiarch", "")
    for folder in (f"/lib/{multiarch}", f"/usr/lib/{multiarch}", "/lib64", "/usr/lib64"):
        if multiarch or "64" in folder:
            found.append((folder, both))
    own = os.path.join(sys.base_prefix, "lib")
    if os.path.isdir(own):
        found += [(e.path, _READ_FILE) for e in os.scandir(own) if ".so" in e.name and e.is_file()]
    return found + [
        ("/usr/share/zoneinfo", both),
        ("/etc/localtime", _READ_FILE),
        ("/etc/ld.so.cache", _READ_FILE),
        ("/dev/null", _READ_FILE),
    ]


def _prctl(libc: ctypes.CDLL, option: int, first: int, second: int = 0) -> None:
    numbers = [ctypes.c_ulong(number) for number in (first, second, 0, 0)]
    _checked(libc.prctl(option, *numbers), f"prctl({option})")


def _checked(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
