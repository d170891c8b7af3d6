"""``python -m smpconv_zoo`` is ``smpconv-zoo``."""

from smpconv_zoo.cli import main

main()
