"""Settings for every test: how hypothesis draws its examples.

`deadline=None`, because the first example of a test may compile a kernel. Where `CI` is set the
examples are the same in every run, so that a failure there is a failure here.
"""

import os

from hypothesis import settings

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")
