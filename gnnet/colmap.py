"""pycolmap, without the handlers of signals that it installs as it is imported; import it from here.

On SIGTERM they print a stack trace, and wait for ever if the signal came while memory was being allocated. They also
take the place of the handler that ends a training with a checkpoint.
"""

from __future__ import annotations

import ctypes
import signal

_actions = {
    number: ctypes.create_string_buffer(1024)  # room for C's struct sigaction
    for number in (signal.SIGTERM, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)
}
_libc = ctypes.CDLL(None)  # Python's `signal` knows no handlers of C, and sets some in the main thread alone
for _number, _action in _actions.items():
    _libc.sigaction(int(_number), None, _action)

import pycolmap  # noqa: E402

for _number, _action in _actions.items():
    _libc.sigaction(int(_number), _action, None)

__all__ = ["pycolmap"]
