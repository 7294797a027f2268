"""One thread for every test: networks this small lose time to threads that spin for each other on a busy machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
