"""How techniques make an optimizer step: on some parameters only, in fp32 on half weights, with low-bit state."""
