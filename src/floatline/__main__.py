"""`python -m floatline` is `floatline`."""

from floatline.cli import main

if __name__ == "__main__":
    main()
