"""Settings shared by all test modules; the reference files are found by `golden_files.golden`."""

from hypothesis import settings

# No deadline: the first call of a torch function can take longer than hypothesis allows one example on a busy machine.
# Derandomized, so that a run repeats exactly.
settings.register_profile("smpconv_zoo", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("smpconv_zoo")
