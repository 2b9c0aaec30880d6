"""What pytest is not to collect: programs that `make golden` and `make dist` run."""

import signal

collect_ignore = ["golden", "check_dist.py"]

# A shell starts background jobs with Ctrl-C ignored, and their children inherit that; the tests of Ctrl-C need it heard.
signal.signal(signal.SIGINT, signal.default_int_handler)
