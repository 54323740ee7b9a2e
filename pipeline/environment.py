"""What a ``fips`` process sets up before it imports torch, numpy and the libraries that use them."""

import logging
import os
import sys


def prepare_process() -> None:
    """Thread pools that sleep while idle; other libraries quiet about what a user can neither read nor mend."""
    # Idle threads that spin cost many times what they save on a machine with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():
        # transformers' bars of loading and saving weights; on a terminal they also show downloads.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in (
        "torchao",  # lists its kernels for other hardware that it cannot load
        "torch.utils._pytree",  # tells torchao of a deprecation
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
