"""What all tests run under."""

import os
import signal

# One thread: networks this small lose time to threads that spin for each other on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell that starts tests in the background lets them, and every program that they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
