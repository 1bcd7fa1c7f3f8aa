"""What the tests of diagnose share: the corpus of faults and healthy programs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
