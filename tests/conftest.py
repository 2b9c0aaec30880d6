"""What pytest is not to collect: programs that `make golden` and `make dist` run."""

collect_ignore = ["golden", "check_dist.py"]
