"""What every test shares: hypothesis' profiles, and Ctrl-C."""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

# The first call of a torch kernel or a codec is slow, and the machine may be busy: time is no property.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# The same examples in every run: a change is red because of the change.
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, database=None, print_blob=True)
# For hours, or until it finds something.
settings.register_profile("long", settings.get_profile("default"), max_examples=100_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))

# A shell lets what it runs in the background ignore Ctrl-C, and its children: those that tests interrupt among them.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
