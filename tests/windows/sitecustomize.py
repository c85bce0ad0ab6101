"""A Python that refuses what Windows refuses, for a process with this folder first on PYTHONPATH.

Kindling's own code finds none of Unix' modules and functions; libraries still do, for they ask
sys.platform. Processes start by spawn. In the folder KINDLING_WINDOWS it refuses to open a
folder, to flush what isn't open for writing, to rename or delete what this process holds open or
has mapped, to rename onto what exists, and names that Windows forbids.
"""

import errno
import fcntl
import importlib.abc
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

BELOW = os.environ["KINDLING_WINDOWS"]
ROOT = Path(__file__).resolve().parent.parent.parent
CODE = tuple(str(ROOT / name) + os.sep for name in ("train", "data_tools", "scripts"))
MODULES = {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"}
FUNCTIONS = (
    *("fchmod", "fork", "getloadavg", "geteuid", "getuid", "killpg", "mkfifo", "nice"),
    *("sched_getaffinity", "sched_setaffinity", "setsid", "statvfs", "sysconf"),
)
SIGNALS = ("SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2")
CHARACTERS = set('<>:"|?*\\')
DEVICES = {"con", "prn", "aux", "nul", *(f"{p}{n}" for p in ("com", "lpt") for n in range(1, 10))}

plain_open, plain_fsync, plain_rename = os.open, os.fsync, os.rename


class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname in MODULES and is_ours(sys._getframe(1)):
            raise ModuleNotFoundError(f"No module named {fullname!r} (on Windows)", name=fullname)


def without(module, names):
    there = {name: vars(module).pop(name) for name in names}

    def find(name):
        if name in there and not is_ours(sys._getframe(1)):
            return there[name]
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

    module.__getattr__ = find


def is_ours(frame):
    while frame and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame and frame.f_code.co_filename.startswith(CODE)


def open_(path, flags, mode=0o777, *, dir_fd=None):
    if below(path) and os.path.isdir(path):
        raise PermissionError(errno.EACCES, "a folder can't be opened (on Windows)", path)
    return plain_open(path, flags, mode, dir_fd=dir_fd)


def fsync(fd):
    number = fd if isinstance(fd, int) else fd.fileno()
    if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "not open for writing, can't be flushed (on Windows)")
    plain_fsync(fd)


def rename(src, dst, *, src_dir_fd=None, dst_dir_fd=None):
    if os.path.lexists(dst):
        raise FileExistsError(errno.EEXIST, "exists, can't be renamed to (on Windows)", dst)
    plain_rename(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)


def watch(event, arguments):
    made = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+")
    if made or event == "os.mkdir":
        check_name(arguments[0])
    elif event == "os.remove":
        check_free(arguments[0])
    elif event == "os.rename":  # os.replace as well
        check_free(arguments[0])
        check_free(arguments[1])
        check_name(arguments[1])


def check_name(path):
    if not below(path):
        return
    for part in os.path.relpath(os.fspath(path), BELOW).split(os.sep):
        device = part.split(".")[0].lower() in DEVICES
        if CHARACTERS & set(part) or part.rstrip(". ") not in (part, "") or device:
            raise OSError(errno.EINVAL, "not a name (on Windows)", path)


def check_free(path):
    if not below(path):
        return
    path = os.path.realpath(os.fspath(path))
    with open("/proc/self/maps", encoding="utf-8") as maps:
        held = {line.split(maxsplit=5)[-1].rstrip("\n") for line in maps}
    for number in os.listdir("/proc/self/fd"):
        try:
            held.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue  # the one that listed them
    if any(name == path or name.startswith(path + os.sep) for name in held):
        raise PermissionError(errno.EACCES, "in use by this process (on Windows)", path)


def below(path):
    if not isinstance(path, str | os.PathLike):
        return False
    path = os.path.abspath(os.fspath(path))
    return path == BELOW or path.startswith(BELOW + os.sep)


for name in MODULES:
    sys.modules.pop(name, None)
without(os, FUNCTIONS)
without(signal, SIGNALS)
os.open, os.fsync, os.rename = open_, fsync, rename
shutil._use_fd_functions = False  # pyright: ignore[reportAttributeAccessIssue]  # deletes by names
tempfile.TemporaryFile = tempfile.NamedTemporaryFile
multiprocessing.set_start_method("spawn")
multiprocessing.get_all_start_methods = lambda: ["spawn"]
sys.meta_path.insert(0, Absent())
sys.addaudithook(watch)
