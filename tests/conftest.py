"""What pytest is not to collect: programs that `make golden` and `make dist` run."""

import signal

from hypothesis import HealthCheck, settings

collect_ignore = ["golden", "check_dist.py"]

# The same examples in every run, and no word about how long they take.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")

# A shell starts background jobs with Ctrl-C ignored, and their children inherit that; the tests of Ctrl-C need it heard.
signal.signal(signal.SIGINT, signal.default_int_handler)
