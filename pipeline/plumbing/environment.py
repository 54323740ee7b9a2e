"""What a ``fips`` process sets up before it imports torch, numpy and the libraries that use them."""

import logging
import os
import sys
import threading

EXIT_WITH_PARENT = "FIPS_EXIT_WITH_PARENT"
"""Environment variable: set, a process ends when its standard input does, as it does when the one that holds its other
end dies, however it dies."""


def prepare_process() -> None:
    """Thread pools that sleep while idle; other libraries quiet about what a user can neither read nor mend."""
    # Idle threads that spin cost many times what they save on a machine with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():
        # transformers' bars of loading and saving weights; on a terminal they also show downloads.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if os.environ.pop(EXIT_WITH_PARENT, None):
        threading.Thread(target=_exit_after_input, daemon=True).start()
    for name in (
        "torchao",  # lists its kernels for other hardware that it cannot load
        "torch.utils._pytree",  # tells torchao of a deprecation
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


def _exit_after_input() -> None:
    # Not sys.stdin, whose lock the interpreter wants when it ends.
    while os.read(0, 1024):
        pass
    os._exit(1)
