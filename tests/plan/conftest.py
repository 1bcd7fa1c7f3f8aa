"""What the planner's tests share: configs of tiny models, importable as `tiny_configs`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
