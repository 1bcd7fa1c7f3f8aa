"""`python -m floatline` is `floatline`."""

from floatline.cli import main

main()
