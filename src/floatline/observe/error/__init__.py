"""What number formats do to values: rounding to any of them, and the error that low-precision ops make."""
